"""How fast training is, side by side with the chapter's own code: all ways in turn, round after round."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.clock import Spread
from benchmarks.training.ways import WAYS
from bnexport.errors import RuntimeUnavailable

#: Floating point operations of one image and training step of BN-LeNet: convolutions and linear layers make 563,280
#: forward (2 per multiplication and addition, from the shapes in ``nn.lenet``), and twice as many backward.
OPERATIONS_PER_IMAGE = 1.69e6
_BASELINE = "chapter-4"


@dataclass(frozen=True)
class Speeds:
    """What was measured.

    Attributes:
        rates: Way -> images per second of each epoch, all rounds together.
        ratios: Way -> its best epoch of a round over the baseline's best of the same round, one per round.
        threads: Way -> threads of torch.
        gemm: Floating point operations per second of a matrix product, one per round.
        failed: Way -> why it could not be measured.
    """

    rates: Mapping[str, Sequence[float]]
    ratios: Mapping[str, Sequence[float]]
    threads: Mapping[str, int]
    gemm: Sequence[float]
    failed: Mapping[str, str]


def measure(
    names: Sequence[str], *, rounds: int = 3, seconds: float = 10.0, tell: Callable[[str], None] = lambda _: None
) -> Speeds:
    """Measure ways, each in a new process, in turn.

    Args:
        names: Of WAYS; the baseline is measured too.
        rounds: How often.
        seconds: Of each measurement, beside its start and one epoch that is not counted.
        tell: Told a line after each measurement.

    Raises:
        RuntimeUnavailable: The baseline can't be measured here.
    """
    names = list(dict.fromkeys((_BASELINE, *names)))
    rates: dict[str, list[float]] = {name: [] for name in names}
    ratios: dict[str, list[float]] = {name: [] for name in names}
    threads: dict[str, int] = {}
    failed: dict[str, str] = {}
    gemm: list[float] = []
    for number in range(rounds):
        baseline = 0.0
        gemm += _in_child("gemm", seconds)[0]
        for name in names:
            if name in failed:
                continue
            try:
                found, threads[name] = _in_child(name, seconds)
            except RuntimeUnavailable as error:
                if name == _BASELINE:
                    raise
                failed[name] = error.message
                continue
            rates[name] += found
            baseline = max(found) if name == _BASELINE else baseline
            ratios[name].append(max(found) / baseline)
            tell(
                f"round {number + 1}/{rounds}  {name}: {max(found):.0f} images/s, {ratios[name][-1]:.2f} x the baseline"
            )
    return Speeds(rates, ratios, threads, gemm, failed)


def _in_child(name: str, seconds: float) -> tuple[list[float], int]:
    command = [sys.executable, "-m", "benchmarks.training.ways", name, str(seconds)]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    if child.returncode != 0:
        last = (child.stderr.strip().splitlines() or ["no output"])[-1]
        raise RuntimeUnavailable(f"{name} can't be measured: {last[:200]}", remedy="Set BNEXPORT_DATA")
    found = json.loads(child.stdout.strip().splitlines()[-1])
    return [float(rate) for rate in found["rates"]], int(found["threads"])


def speed_page(speeds: Speeds, conditions: str) -> Iterator[str]:
    """The document, part by part.

    Args:
        speeds: What was measured.
        conditions: Hardware and versions, as a sentence without its full stop.
    """
    yield "# The speed of training\n"
    yield (
        "Images per second of whole epochs of BN-LeNet on Fashion-MNIST, 60,000 images in batches of 256 and the evaluation on "
        "10,000, beside the chapter's own code: written by `python scripts/benchmark_training.py`. Every way runs in a process "
        "of its own, all in turn, round after round; a ratio is of the best epochs of one round. Columns give the best "
        "epoch and the median.\n"
    )
    yield "| way | threads | best, images/s | median | epochs | x the chapter's code | in `bnexport train` |"
    yield "|---|---|---|---|---|---|---|"
    for name, rates in speeds.rates.items():
        if not rates:
            continue
        spread, ratio = Spread.of(rates), Spread.of(speeds.ratios[name])
        yield (
            f"| {WAYS[name].words} | {speeds.threads[name]} | {spread.high:,.0f} | {spread.middle:,.0f} | {spread.n} | "
            f"{ratio.middle:.2f} ({ratio.low:.2f} to {ratio.high:.2f}) | {'yes' if WAYS[name].kept else 'no'} |"
        )
    for name, reason in speeds.failed.items():
        yield f"\n{WAYS[name].words}: not measured, {reason}."
    yield f"\n{conditions}.\n"
    yield from _limit(speeds)


def _limit(speeds: Speeds) -> Iterator[str]:
    rate = Spread.of(speeds.gemm)
    limit = rate.middle / OPERATIONS_PER_IMAGE
    yield "## How far from the machine's limit\n"
    yield (
        f"A step takes {OPERATIONS_PER_IMAGE / 1e6:.2f} million operations per image; this machine's matrix product makes "
        f"{rate.middle / 1e9:.0f} thousand million a second ({rate.low / 1e9:.0f} to {rate.high / 1e9:.0f}), so "
        f"{limit:,.0f} images/s would be the end"
        + (
            f"; `bnexport train` is at {Spread.of(speeds.rates['bnexport']).high / limit:.0%} of it."
            if speeds.rates.get("bnexport")
            else "."
        )
    )
