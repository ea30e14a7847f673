"""Show by trainings what "Dive into Deep Learning", section 8.5, says of BatchNorm; write docs/chapter.md and its figures.

Use: python scripts/chapter.py [--quick] [--only a,b] [--jobs N] [--dataset NAME] [--work FOLDER] [--page PAGE.md]
Every finished training is kept in FOLDER, so an interrupted run goes on where it was. Fashion-MNIST comes from the folder
that BNEXPORT_DATA names, the cache or the network. The whole takes about 20 minutes on two cores that do nothing else.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # what a training may use is set in its process

from benchmarks.chapter.page import write_chapter
from benchmarks.chapter.plan import EXPERIMENTS, FULL, QUICK
from benchmarks.chapter.trainings import ChapterRun, run_chapter
from bnexport.errors import BadInput, BnexportError

ROOT = Path(__file__).parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="2 seeds, few images: shows that it works, not what is true"
    )
    parser.add_argument("--only", default=",".join(EXPERIMENTS), help="make these experiments' trainings: a,b")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time, which share the cores")
    parser.add_argument("--dataset", default=FULL.dataset, help="of the catalogue; with digits take --quick")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "chapter", help="finished trainings")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "chapter.md", help="its figures lie beside it")
    given = parser.parse_args()
    plan = replace(QUICK if given.quick else FULL, dataset=given.dataset)
    try:
        run = ChapterRun(given.work, plan, tuple(given.only.split(",")), given.jobs)
        results = run_chapter(run, tell=lambda line: print(line, file=sys.stderr, flush=True))
        write_chapter(results, given.page)
    except BnexportError as error:
        print(f"chapter.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, BadInput) else 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
