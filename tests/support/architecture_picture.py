"""Draw docs/architecture.svg: the units of bnexport on their floors, and the imports between them.

Use: python tests/support/architecture_picture.py
The floors come from the table in docs/architecture.md, the imports from the source. An import that a chain of other imports
implies is left out, and so are imports of the ground, which every unit may use.
"""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE, PICTURE = ROOT / "docs" / "architecture.md", ROOT / "docs" / "architecture.svg"
WIDTH, ROW, BOX_HEIGHT, MARGIN, GAP = 860, 92, 40, 24, 64
LETTER = 8.4  # width of a letter in the boxes, 14 px

STYLE = """
  text { font: 14px ui-monospace, monospace; fill: #1f2328; text-anchor: middle }
  .floor { font-size: 12px; fill: #59636e; text-anchor: start }
  rect { fill: #eef2f7; stroke: #7d8ca0; rx: 6px }
  path { fill: none; stroke: #7d8ca0; stroke-width: 1.2px }
  #tip { fill: #7d8ca0; stroke: none }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } .floor { fill: #9198a1 } rect { fill: #1c2430; stroke: #8b99ad }
    path { stroke: #8b99ad } #tip { fill: #8b99ad; stroke: none }
  }
"""


def floors() -> list[list[str]]:
    """Return the units of each floor, from the top to the ground, as the page lists them."""
    rows = re.findall(r"^\| \d+ \| (`[^|]*`) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return [re.findall(r"`(\w+)`", row) for row in rows]


def imports() -> dict[str, set[str]]:
    """Return unit -> the units that it imports, also inside of functions."""
    found: dict[str, set[str]] = {}
    for path in sorted((ROOT / "bnexport").rglob("*.py")):
        unit = path.relative_to(ROOT / "bnexport").parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bnexport."):
                found.setdefault(unit, set()).add(str(node.module).split(".")[1])
            elif isinstance(node, ast.Import):
                names = [alias.name.split(".") for alias in node.names]
                found.setdefault(unit, set()).update(name[1] for name in names if name[0] == "bnexport" and name[1:])
    return {unit: others - {unit} for unit, others in found.items()}


def direct(graph: dict[str, set[str]]) -> list[tuple[str, str]]:
    """Return the edges that no chain of two or more edges implies."""

    def reached(unit: str, seen: set[str]) -> set[str]:
        for other in graph.get(unit, set()) - seen:
            seen.add(other)
            reached(other, seen)
        return seen

    return [
        (unit, other)
        for unit in sorted(graph)
        for other in sorted(graph[unit])
        if not any(other in reached(middle, set()) for middle in graph[unit] - {other})
    ]


def draw() -> str:
    """Return the picture as SVG."""
    rows = floors()
    houses, ground = rows[:-1], rows[-1]
    places: dict[str, tuple[float, float, float]] = {}  # unit -> middle, top, width
    for number, units in enumerate(houses):
        widths = [len(unit) * LETTER + 28 for unit in units]
        left = (WIDTH - sum(widths) - GAP * (len(units) - 1)) / 2
        for unit, width in zip(units, widths, strict=True):
            places[unit] = left + width / 2, MARGIN + number * ROW, width
            left += width + GAP
    graph = {unit: others & places.keys() for unit, others in imports().items() if unit in places}
    parts = [
        f'<path d="M{a[0]:.0f} {a[1] + BOX_HEIGHT:.0f} C{a[0]:.0f} {a[1] + ROW * 0.75:.0f} {b[0]:.0f} '
        f'{b[1] - ROW * 0.3:.0f} {b[0]:.0f} {b[1] - 2:.0f}" marker-end="url(#arrow)"/>'
        for unit, other in direct(graph)
        for a, b in [(places[unit], places[other])]
    ]
    for unit, (middle, top, width) in places.items():
        parts.append(f'<rect x="{middle - width / 2:.0f}" y="{top}" width="{width:.0f}" height="{BOX_HEIGHT}"/>')
        parts.append(f'<text x="{middle:.0f}" y="{top + 25}">{unit}</text>')
    parts += [
        f'<text class="floor" x="4" y="{MARGIN + number * ROW + 25}">{len(houses) - number}</text>'
        for number in range(len(houses))
    ]
    top = MARGIN + len(houses) * ROW
    parts.append(f'<rect x="{MARGIN}" y="{top}" width="{WIDTH - 2 * MARGIN}" height="{BOX_HEIGHT + 22}"/>')
    half = (len(ground) + 1) // 2
    for line, units in enumerate((ground[:half], ground[half:])):
        parts.append(f'<text x="{WIDTH / 2:.0f}" y="{top + 25 + 22 * line}">{"  ".join(units)}</text>')
    parts.append(f'<text class="floor" x="4" y="{top + 25}">0</text>')
    arrow = '<marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top + BOX_HEIGHT + 22 + MARGIN}">'
    defs = f'<defs>{arrow}<path id="tip" d="M0 0L8 4L0 8z"/></marker></defs>'
    title = "<title>The units of bnexport on their floors; arrows are imports</title>"
    return "\n".join([head, title, f"<style>{STYLE}</style>", defs, *parts, "</svg>", ""])


def main() -> int:
    PICTURE.write_text(draw(), encoding="utf-8")
    print(PICTURE.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
