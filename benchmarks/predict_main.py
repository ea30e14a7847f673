"""Images per second of bnexport predict --out beside a bare loop over onnxruntime; prints a table in Markdown.

Use: python scripts/benchmark_predict.py BUNDLE IMAGES.npy [WORKERS]     The images are grey and of the model's size.
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.predict import side_by_side
from bnexport.bundle import Bundle
from bnexport.environment import available_cores
from bnexport.errors import BadInput, BnexportError


def main(words: list[str]) -> int:
    if len(words) not in (2, 3):
        print("use: python scripts/benchmark_predict.py BUNDLE IMAGES.npy [WORKERS]", file=sys.stderr)
        return 2
    workers = int(words[2]) if len(words) == 3 else available_cores()
    try:
        print(side_by_side(Bundle.open(words[0]), Path(words[1]), workers=workers))
    except BnexportError as error:
        print(f"benchmark_predict.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, BadInput) else 3
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
