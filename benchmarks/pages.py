"""Generated pages in Markdown, wrapped like those written by hand."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from pathlib import Path

from bnexport.files import write_atomically

_WIDTH = 120


def write_page(parts: Iterable[str], path: Path) -> None:
    """Write the parts as lines; prose is wrapped, tables and headings stay as they are.

    Raises:
        OutputError: The file can't be written.
    """
    lines = "\n".join(parts).rstrip().split("\n")
    write_atomically(path, ("\n".join(map(_wrapped, lines)) + "\n").encode())


def _wrapped(line: str) -> str:
    if line.startswith(("|", "#")) or len(line) <= _WIDTH:
        return line
    indent = "  " if line.startswith("- ") else ""
    return textwrap.fill(line, _WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
