"""Measure the speed of training next to the chapter's own code, in turn; write docs/results/training_speed.md.

Fashion-MNIST comes from the folder that BNEXPORT_DATA names. All ways take about ten minutes, on an idle machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.clock import Spread
from benchmarks.command import finish, known, measured_in_child, options, progress
from benchmarks.pages import ranged, render, write_page
from benchmarks.training.ways import WAYS
from bnexport.environment import describe, environment
from bnexport.errors import RuntimeUnavailable

#: Floating point operations of one image and training step of BN-LeNet: convolutions and linear layers make 563,280
#: forward (2 per multiplication and addition, from the shapes in ``nn.lenet``), and twice as many backward.
OPERATIONS_PER_IMAGE = 1.69e6
_BASELINE = "chapter-4"


@dataclass(frozen=True)
class TrainingSpeeds:
    """The results of a measurement by way; a rate is the images per second of an epoch."""

    rates: dict[str, list[float]]  # all rounds together
    ratios: dict[str, list[float]]  # best epoch over the baseline's best of the same round, one per round
    threads: dict[str, int] = field(default_factory=dict)  # of torch
    gemm: list[float] = field(default_factory=list)  # operations per second of a matrix product, by round
    failed: dict[str, str] = field(default_factory=dict)  # the reason


def measure(
    names: Sequence[str], *, rounds: int = 3, seconds: float = 10.0, on_line: Callable[[str], None] = lambda _: None
) -> TrainingSpeeds:
    """Measure rows of WAYS and the baseline in turn, each for some seconds in a new process, after an epoch of warming up.

    RuntimeUnavailable: the baseline can't be measured here.
    """
    names = list(dict.fromkeys((_BASELINE, *names)))
    speeds = TrainingSpeeds({name: [] for name in names}, {name: [] for name in names})
    for number in range(1, rounds + 1):
        baseline = 0.0
        speeds.gemm.extend(_in_child("gemm", seconds)[0])
        for name in names:
            if name in speeds.failed:
                continue
            try:
                found, speeds.threads[name] = _in_child(name, seconds)
            except RuntimeUnavailable as error:
                if name == _BASELINE:
                    raise
                speeds.failed[name] = error.message
                continue
            best = max(found)
            baseline = best if name == _BASELINE else baseline
            speeds.rates[name] += found
            speeds.ratios[name].append(best / baseline)
            on_line(f"round {number}/{rounds}  {name}: {best:.0f} images/s, {best / baseline:.2f} x the baseline")
    return speeds


def _in_child(name: str, seconds: float) -> tuple[list[float], int]:
    words = ("benchmarks.training.ways", name, str(seconds))
    found = measured_in_child(name, *words, remedy="Set BNEXPORT_DATA")
    return found["rates"], found["threads"]


def speed_page(speeds: TrainingSpeeds, conditions: str) -> str:
    """Return the page; ``conditions``: hardware and versions as a sentence without its full stop."""
    rows = []
    for name, rates in speeds.rates.items():
        if rates:
            spread, ratio = Spread.of(rates), Spread.of(speeds.ratios[name])
            cells = [speeds.threads[name], f"{spread.high:,.0f}", f"{spread.middle:,.0f}", spread.n, ranged(ratio)]
            rows.append([WAYS[name].words, *cells, "yes" if WAYS[name].kept else "no"])
    gemm, own = Spread.of(speeds.gemm), speeds.rates.get("bnexport")
    limit = gemm.middle / OPERATIONS_PER_IMAGE
    return render(
        "training/page.md.jinja", speeds=speeds, conditions=conditions, rows=rows, ways=WAYS, gemm=gemm, limit=limit,
        operations=OPERATIONS_PER_IMAGE, reached=f"{max(own) / limit:.0%}" if own else "",
    )  # fmt: skip


def main() -> None:
    """Measure, and write the page."""
    parser = options("training", __doc__)
    parser.add_argument("ways", nargs="*", metavar="WAY", help=f"of {', '.join(WAYS)}; default all")
    parser.add_argument("--out", type=Path, default=Path("docs/results/training_speed.md"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--note", default="", help="more conditions for the reader")
    given = parser.parse_args()
    ways = known(parser, given.ways, list(WAYS), "way")
    speeds = measure(ways, rounds=given.rounds, seconds=given.seconds, on_line=progress)
    write_page([speed_page(speeds, f"{describe(environment())}. {given.note}".rstrip(". "))], given.out)


if __name__ == "__main__":
    finish("training", main)
