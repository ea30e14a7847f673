"""Measure how long a fold takes next to the torch.export that it needs; print a table in Markdown.

``python -m benchmarks.folding.cost [torchvision:NAME | timm:NAME ...]`` takes about ten minutes for its default networks, of
which the last one is timm's. Both times come from the same calls, so they are comparable.
docs/results/fold_cost.md has the table.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.clock import Spread
from benchmarks.command import finish, options
from benchmarks.pages import render
from benchmarks.zoo.network import EXAMPLE, make_zoo_network
from bnexport.environment import describe, environment
from bnexport.folding.fold import fold

#: Deep networks of three kinds; the last has more operations than any other of timm's convolutional ones tried.
DEEP = ("torchvision:resnet152", "torchvision:densenet201", "timm:resnetrs420")
#: More than enough to find the least disturbed one.
MOST_REPEATS = 5
_SECONDS = 120.0


@dataclass(frozen=True)
class Cost:
    """Seconds of one network's fold without its trace, and their ratio to the trace of the same call."""

    trace: Spread  # torch.export alone
    fold: Spread  # everything but the trace, without any proof
    proved: Spread  # everything but the trace, with the proof of each fold and of the whole
    ratio: Spread
    ratio_proved: Spread

    def to_json(self) -> dict[str, dict[str, float]]:
        """Return plain JSON values."""
        return {name: spread.to_json() for name, spread in vars(self).items()}


def fold_cost(module: nn.Module, example: Tensor, *, seconds: float = 10.0, repeats: int = MOST_REPEATS) -> Cost:
    """Fold in turn without and with the proof; no new round begins after ``seconds``, but one is always made."""
    started = time.perf_counter()
    traces: list[float] = []
    columns: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    while not traces or (len(columns[True]) < repeats and time.perf_counter() - started < seconds):
        for prove, taken in columns.items():
            spent = fold(module, example, prove=prove).seconds
            traces.append(spent["trace"])
            taken.append((sum(spent.values()) - spent["trace"], spent["trace"]))
    times = [Spread.of([rest for rest, _ in taken]) for taken in columns.values()]
    ratios = [Spread.of([rest / trace for rest, trace in taken]) for taken in columns.values()]
    return Cost(Spread.of(traces), *times, *ratios)


def cost_row(source: str, *, seconds: float, repeats: int = MOST_REPEATS) -> list[str]:
    """Return one network's cells of the table."""
    subject = make_zoo_network(source)
    cost = fold_cost(subject.module, subject.batch(EXAMPLE, 1), seconds=seconds, repeats=repeats)
    ratios = [f"{item.low:.2f} to {item.high:.2f}" for item in (cost.ratio, cost.ratio_proved)]
    times = [f"{item.low:.2f}" for item in (cost.trace, cost.fold, cost.proved)]
    return [source, str(subject.norms), *times, *ratios, str(cost.fold.n)]


def main() -> None:
    """Measure the networks and print the table."""
    parser = options("folding.cost", __doc__)
    parser.add_argument("sources", nargs="*", default=DEEP, metavar="NETWORK")
    torch.set_num_threads(1)  # the trace has one thread, so the proofs get one, too
    rows = [cost_row(source, seconds=_SECONDS) for source in parser.parse_args().sources]
    print(render("folding/cost.md.jinja", rows=rows, machine=describe(environment())))


if __name__ == "__main__":
    finish("cost", main)
