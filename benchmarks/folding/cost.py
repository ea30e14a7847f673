"""How long a fold takes beside the torch.export that it needs: both from the same calls, so that they are comparable."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from benchmarks.clock import Spread
from benchmarks.zoo.network import EXAMPLE, make_subject
from bnexport.folding.fold import FoldResult, fold

#: Deep networks of three kinds; the last has more operations than any other of timm's convolutional ones tried.
DEEP = ("torchvision:resnet152", "torchvision:densenet201", "timm:resnetrs420")
#: More than enough to find the least disturbed one.
MOST_REPEATS = 5


@dataclass(frozen=True)
class Cost:
    """Seconds of one network's fold, and their ratio to the trace of the same call.

    Attributes:
        trace: torch.export alone.
        fold: Everything but the trace, without any proof.
        proved: Everything but the trace, with the proof of each fold and of the whole.
        ratio: fold / trace.
        ratio_proved: proved / trace.
    """

    trace: Spread
    fold: Spread
    proved: Spread
    ratio: Spread
    ratio_proved: Spread

    def to_json(self) -> dict[str, dict[str, float]]:
        """Plain JSON values."""
        return {name: spread.to_json() for name, spread in vars(self).items()}


def fold_cost(module: nn.Module, example: Tensor, *, seconds: float = 10.0, repeats: int = MOST_REPEATS) -> Cost:
    """Fold in turn without and with the proof.

    Args:
        module: Any that ``fold`` takes.
        example: One batch.
        seconds: No new round is begun after so long; one is always made.
        repeats: Rounds at most.
    """
    started = time.perf_counter()
    traces: list[float] = []
    columns: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    while not traces or (len(columns[True]) < repeats and time.perf_counter() - started < seconds):
        for prove, taken in columns.items():
            spent = fold(module, example, prove=prove).seconds
            traces.append(spent["trace"])
            taken.append((sum(spent.values()) - spent["trace"], spent["trace"]))
    plain, proved = columns[False], columns[True]
    return Cost(
        Spread.of(traces),
        Spread.of([rest for rest, _ in plain]),
        Spread.of([rest for rest, _ in proved]),
        Spread.of([rest / trace for rest, trace in plain]),
        Spread.of([rest / trace for rest, trace in proved]),
    )


def cost_of(results: Sequence[FoldResult], traced: float) -> Cost:
    """The cost of folds of one traced graph, a plain one and a proved one.

    Args:
        results: Without and with proof.
        traced: Seconds of the trace.
    """
    plain, proved = (sum(result.seconds.values()) for result in results)
    return Cost(*(Spread.of([value]) for value in (traced, plain, proved, plain / traced, proved / traced)))


def cost_row(source: str, *, seconds: float, repeats: int = MOST_REPEATS) -> str:
    """One network's cost as a row of a table in Markdown, under ``COST_HEAD``.

    Raises:
        BnexportError: The network can't be made, traced or folded.
    """
    subject = make_subject(source)
    cost = fold_cost(subject.module, subject.batch(EXAMPLE, 1), seconds=seconds, repeats=repeats)
    ratios = [f"{item.low:.2f} to {item.high:.2f}" for item in (cost.ratio, cost.ratio_proved)]
    times = [f"{item.low:.2f}" for item in (cost.trace, cost.fold, cost.proved)]
    cells = [source, str(subject.norms), *times, *ratios, str(cost.fold.n)]
    return f"| {' | '.join(cells)} |"


#: Head of the table of ``cost_row``; seconds are the least disturbed ones.
COST_HEAD = """| network | BatchNorms | torch.export, s | fold, s | with proofs, s | fold / export | with proofs / export | n |
|---|---|---|---|---|---|---|---|"""
