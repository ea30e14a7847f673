"""Measure the speed of training next to the chapter's own code, in turn; write docs/results/training_speed.md.

Fashion-MNIST comes from the folder that BNEXPORT_DATA names. All ways take about ten minutes, on an idle machine.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.command import finish, known, options, progress
from benchmarks.pages import write_page
from benchmarks.training.speed import measure, speed_page
from benchmarks.training.ways import WAYS
from bnexport.environment import describe, environment


def main() -> None:
    """Measure, and write the page."""
    parser = options("training", __doc__)
    parser.add_argument("ways", nargs="*", metavar="WAY", help=f"of {', '.join(WAYS)}; default all")
    parser.add_argument("--out", type=Path, default=Path("docs/results/training_speed.md"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--note", default="", help="more conditions for the reader")
    given = parser.parse_args()
    speeds = measure(
        known(parser, given.ways, list(WAYS), "way"), rounds=given.rounds, seconds=given.seconds, tell=progress
    )
    write_page([speed_page(speeds, f"{describe(environment())}. {given.note}".rstrip(". "))], given.out)


if __name__ == "__main__":
    finish("training", main)
