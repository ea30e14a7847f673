"""Tables of a report's ``__str__`` and of its ``_repr_html_``, which notebooks show."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

Rows = Sequence[Sequence[str]]


def text_table(heads: Sequence[str], rows: Rows, *, numbers: Sequence[str] = ()) -> str:
    """Return a table as text: a line of heads, a line of dashes, one line per row.

    Columns whose head is in ``numbers`` are aligned to the right. Characters that would steer a terminal become "?".
    """
    cells = [[printable(cell) for cell in row] for row in (heads, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])

    def line(row: Sequence[str]) -> str:
        columns = zip(heads, row, widths, strict=True)
        return "  ".join(cell.rjust(width) if head in numbers else cell.ljust(width) for head, cell, width in columns)

    return "\n".join(line(row).rstrip() for row in cells)


def html_table(heads: Sequence[str], rows: Rows, *, numbers: Sequence[str] = ()) -> str:
    """Return the same table as HTML, with every text escaped."""
    styles = [' style="text-align:right"' if head in numbers else ' style="text-align:left"' for head in heads]

    def line(cells: Sequence[str], tag: str) -> str:
        row = (f"<{tag}{style}>{escape(cell)}</{tag}>" for cell, style in zip(cells, styles, strict=True))
        return f"<tr>{''.join(row)}</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f"<table><thead>{line(heads, 'th')}</thead><tbody>{body}</tbody></table>"


def printable(text: str) -> str:
    """Replace characters that would steer a terminal: names of modules and nodes come from the user's network."""
    return "".join(char if char.isprintable() else "?" for char in text)
