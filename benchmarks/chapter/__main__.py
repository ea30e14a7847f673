"""Show by trainings the claims of "Dive into Deep Learning", section 8.5, on BatchNorm; write docs/results/chapter.md.

Every finished training is kept in the folder --work, so an interrupted run resumes. Fashion-MNIST comes from the folder that
BNEXPORT_DATA names, the cache or the network. The whole takes about 20 minutes on two idle cores.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from benchmarks.chapter.page import write_chapter
from benchmarks.chapter.plan import EXPERIMENTS, FULL, QUICK
from benchmarks.chapter.results import ChapterRun, run_chapter
from benchmarks.command import finish, options, progress


def main() -> None:
    """Make the missing trainings, and write the page of all of them."""
    parser = options("chapter", __doc__)
    parser.add_argument("--quick", action="store_true", help="2 seeds, few images: shows only that the command works")
    parser.add_argument("--only", default=",".join(EXPERIMENTS), help="make these experiments' trainings: a,b")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time, which share the cores")
    parser.add_argument("--dataset", default=FULL.dataset, help="a row of the catalogue; digits needs --quick")
    parser.add_argument("--work", type=Path, default=Path("runs/chapter"), help="folder of finished trainings")
    parser.add_argument(
        "--page", type=Path, default=Path("docs/results/chapter.md"), help="the page, with its figures next to it"
    )
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # each training sets its threads in its process
    plan = replace(QUICK if given.quick else FULL, dataset=given.dataset)
    run = ChapterRun(given.work, plan, tuple(given.only.split(",")), given.jobs)
    write_chapter(run_chapter(run, tell=progress), given.page)


if __name__ == "__main__":
    finish("chapter", main)
