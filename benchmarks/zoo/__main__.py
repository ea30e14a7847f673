"""Fold every network of torchvision and many of timm, next to other tools; write JSON lines and docs/results/zoo.md.

Networks that are in the file already are not measured again, so an interrupted run resumes. All of them take some hours.
"""

from __future__ import annotations

import os
from pathlib import Path

from benchmarks.command import finish, options, progress
from benchmarks.zoo.page import write_document
from benchmarks.zoo.run import PARTS, ZooRun, chosen, run_zoo


def main() -> None:
    """Measure, and write the page if --page names it."""
    parser = options("zoo", __doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines; their networks are kept")
    parser.add_argument("--only", choices=[*PARTS], help="measure this part alone")
    parser.add_argument("--names", action="append", default=[], help="timm:NAME,torchvision:NAME; default: all")
    parser.add_argument("--limit", type=int, default=0, help="measure at most this many networks")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--seconds", type=float, default=300.0, help="time limit of one network")
    parser.add_argument("--memory-gb", type=float, default=10.0, help="memory limit of one process")
    parser.add_argument("--again", action="store_true", help="measure networks of the file again")
    parser.add_argument(
        "--page", type=Path, help="write the page of all measurements to this file, as docs/results/zoo.md"
    )
    given = vars(parser.parse_args())
    page, only = given.pop("page"), given.pop("only")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread a process: as many processes as --jobs
    given |= {"names": chosen(given["names"]), "parts": (only,) if only else tuple(PARTS)}
    lines = run_zoo(ZooRun(**given), on_line=progress)
    if page:
        write_document(lines, page)


if __name__ == "__main__":
    finish("zoo", main)
