"""Measure how long a fold takes next to the torch.export that it needs; print a table in Markdown.

``python -m benchmarks.folding.cost [torchvision:NAME | timm:NAME ...]`` takes about ten minutes for its default networks, of
which the last one is timm's. Both times come from the same calls, so they are comparable.
docs/results/fold_cost.md has the table.
"""

from __future__ import annotations

import time

import torch

from benchmarks.clock import Spread
from benchmarks.command import finish, options
from benchmarks.pages import table_page
from benchmarks.zoo.network import EXAMPLE, make_zoo_network
from bnexport.folding.fold import fold

#: Deep networks of three kinds; the last has more operations than any other of timm's convolutional ones tried.
DEEP = ("torchvision:resnet152", "torchvision:densenet201", "timm:resnetrs420")
HEADS = (
    "network", "BatchNorms", "torch.export, s", "fold, s", "with proofs, s", "fold / export", "with proofs / export", "n",
)  # fmt: skip
_SECONDS = 120.0


def cost_row(source: str, *, seconds: float, repeats: int = 5) -> list[str]:
    """Return one network's cells of the table, without its trace in the times of the fold.

    It is folded in turn without and with the proofs. No new round begins after ``seconds``, but one is always made.
    """
    subject = make_zoo_network(source)
    example, started = subject.batch(EXAMPLE, 1), time.perf_counter()
    traces: dict[bool, list[float]] = {False: [], True: []}
    folds: dict[bool, list[float]] = {False: [], True: []}
    while not folds[True] or (len(folds[True]) < repeats and time.perf_counter() - started < seconds):
        for prove in (False, True):
            spent = dict(fold(subject.module, example, prove=prove).seconds)
            traces[prove].append(spent.pop("trace"))
            folds[prove].append(sum(spent.values()))
    times = [Spread.of(taken).low for taken in (traces[False] + traces[True], *folds.values())]
    ratios = [Spread.ratio(folds[prove], traces[prove]) for prove in folds]
    cells = [f"{item:.2f}" for item in times] + [f"{item.low:.2f} to {item.high:.2f}" for item in ratios]
    return [source, str(subject.norms), *cells, str(len(folds[True]))]


def main() -> None:
    """Measure the networks and print the table."""
    parser = options("folding.cost", __doc__)
    parser.add_argument("sources", nargs="*", default=DEEP, metavar="NETWORK")
    torch.set_num_threads(1)  # the trace has one thread, so the proofs get one, too
    rows = [cost_row(source, seconds=_SECONDS) for source in parser.parse_args().sources]
    print(table_page(HEADS, rows, "Seconds: least disturbed of n; ratios of one call each, smallest to largest"))


if __name__ == "__main__":
    finish("cost", main)
