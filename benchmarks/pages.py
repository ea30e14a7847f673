"""Pages in Markdown: jinja2 templates next to the code that fills them, one table macro, prose wrapped to 120 columns."""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2

from benchmarks.clock import Spread
from bnexport.environment import describe, environment
from bnexport.files import write_atomically

_WIDTH = 120


def render(template: str, **values: Any) -> str:
    """Return a template, named by its path below this folder, with its values and this machine with its load filled in."""
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, autoescape=False,
    )  # fmt: skip
    templates.filters |= {"ranged": ranged, "fixed": lambda value, digits=0: f"{value:,.{digits}f}"}
    here = {"machine": describe(environment()), "load": os.getloadavg()[0]}
    return templates.get_template(template).render(here | values)


def table_page(heads: Sequence[str], rows: Sequence[Sequence[object]], conditions: str) -> str:
    """Return a table in Markdown with a sentence of conditions below it, which ends with this machine and its load."""
    return render("table.md.jinja", heads=heads, rows=rows, conditions=conditions)


def ranged(spread: Spread, digits: int = 2) -> str:
    """Return a median with its range in brackets."""
    return f"{spread.middle:.{digits}f} ({spread.low:.{digits}f} to {spread.high:.{digits}f})"


def write_page(parts: Iterable[str], path: Path) -> None:
    """Write the parts as lines; prose is wrapped, and tables, headings, images and code blocks stay as they are."""
    write_atomically(path, (_wrapped("\n".join(parts)).strip() + "\n").encode())


def _wrapped(text: str) -> str:
    found: list[str] = []
    prose: list[str] = []
    fenced = False
    for line in [*text.split("\n"), ""]:
        fenced ^= line.startswith("```")
        literal = fenced or not line.strip() or line.startswith(("|", "#", "```", "!["))
        if prose and (literal or line.startswith("- ")):
            indent = "  " if prose[0].startswith("- ") else ""
            whole = re.sub("`[^`]+`", lambda code: code[0].replace(" ", "\0"), " ".join(prose))  # code spans stay whole
            lines = textwrap.wrap(
                whole, _WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
            )
            found += [part.replace("\0", " ") for part in lines]
            prose = []
        found += [line] if literal else []
        prose += [] if literal else [line.strip()]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(found))
