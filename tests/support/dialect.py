"""Count words that plain technical English avoids, over bnexport/, the README and docs: data that "say", "know" or "ask".

Use: python tests/support/dialect.py [--lines]     --lines prints each place. The count has no limit; it is for comparison.
"""

import re
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
PATTERN = re.compile(
    r"\b(?:told|tells?|says?|said|asked|asks|knows?|nobody|somebody|whoever|strangers?)\b|of its own|goes on|\bis no (?!longer)"
    r'|"""(?:What|Whether|How|Of) ',
    re.IGNORECASE,
)
SUFFIXES = {".py", ".md", ".jinja", ".html", ".json", ".toml"}


def found_in(text: str) -> list[tuple[str, int]]:
    """Return each match with the number of its line."""
    return [(match[0], text.count("\n", 0, match.start()) + 1) for match in PATTERN.finditer(text)]


def main(arguments: list[str]) -> int:
    """Print the count of each file group, and each place with ``--lines``."""
    files = [*(ROOT / "bnexport").rglob("*"), *(ROOT / "docs").rglob("*"), *ROOT.glob("*.md")]
    counts: Counter[str] = Counter()
    for file in sorted(file for file in files if file.suffix in SUFFIXES):
        for word, line in found_in(file.read_text(encoding="utf-8")):
            place = file.relative_to(ROOT)
            counts["/".join(place.parts[:2])] += 1
            if "--lines" in arguments:
                print(f"{place}:{line}: {word}")
    for name, count in sorted(counts.items()):
        print(f"{count:5d}  {name}")
    print(f"{counts.total():5d}  in all")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
