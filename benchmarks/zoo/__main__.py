"""Fold every network of torchvision and many of timm, beside other tools; write what is left as JSON lines and a page.

Use: python scripts/zoo.py --out FILE.jsonl [--only fold|tools] [--names NAME,...] [--limit N] [--jobs N] [--again]
                           [--document docs/zoo.md]
What FILE.jsonl holds already is kept and not measured again, so an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread a process: as many processes as --jobs says

from benchmarks.zoo.run import PARTS, ZooRun, chosen, run_zoo
from benchmarks.zoo.page import write_document
from bnexport.errors import BadInput, BnexportError


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON lines; what is there is kept")
    parser.add_argument("--only", choices=[*PARTS], help="measure this part alone")
    parser.add_argument("--names", action="append", default=[], help="timm:NAME,torchvision:NAME; default: all")
    parser.add_argument("--limit", type=int, default=0, help="measure at most so many networks")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--seconds", type=float, default=300.0, help="give a network up after so long")
    parser.add_argument("--memory-gb", type=float, default=10.0, help="of one process")
    parser.add_argument("--again", action="store_true", help="measure what is there already, too")
    parser.add_argument("--document", type=Path, help="write the page of all measurements there")
    given = parser.parse_args()
    parts = (given.only,) if given.only else tuple(PARTS)
    run = ZooRun(
        given.out, chosen(given.names), parts, given.limit, given.jobs, given.seconds, given.memory_gb, given.again
    )
    try:
        lines = run_zoo(run, tell=lambda line: print(line, file=sys.stderr, flush=True))
        if given.document:
            write_document(lines, given.document)
    except BnexportError as error:
        print(f"zoo.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, BadInput) else 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
