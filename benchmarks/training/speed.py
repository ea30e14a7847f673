"""The speed of training next to the chapter's own code: all ways in turn, round after round."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.clock import Spread
from benchmarks.pages import ranged, render
from benchmarks.training.ways import WAYS
from bnexport.errors import RuntimeUnavailable

#: Floating point operations of one image and training step of BN-LeNet: convolutions and linear layers make 563,280
#: forward (2 per multiplication and addition, from the shapes in ``nn.lenet``), and twice as many backward.
OPERATIONS_PER_IMAGE = 1.69e6
_BASELINE = "chapter-4"


@dataclass(frozen=True)
class TrainingSpeeds:
    """The results of a measurement by way; a rate is the images per second of an epoch."""

    rates: Mapping[str, Sequence[float]]  # all rounds together
    ratios: Mapping[str, Sequence[float]]  # best epoch over the baseline's best of the same round, one per round
    threads: Mapping[str, int]  # of torch
    gemm: Sequence[float]  # floating point operations per second of a matrix product, one per round
    failed: Mapping[str, str]  # the reason


def measure(
    names: Sequence[str], *, rounds: int = 3, seconds: float = 10.0, tell: Callable[[str], None] = lambda _: None
) -> TrainingSpeeds:
    """Measure rows of WAYS and the baseline in turn, each in a new process.

    ``seconds``: of each measurement, in addition to its start and one epoch that is not counted.

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
            ratio = f"{ratios[name][-1]:.2f} x the baseline"
            tell(f"round {number + 1}/{rounds}  {name}: {max(found):.0f} images/s, {ratio}")
    return TrainingSpeeds(rates, ratios, threads, gemm, failed)


def _in_child(name: str, seconds: float) -> tuple[list[float], int]:
    command = [sys.executable, "-m", "benchmarks.training.ways", name, str(seconds)]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    if child.returncode != 0:
        last = (child.stderr.strip().splitlines() or ["no output"])[-1]
        raise RuntimeUnavailable(f"{name} can't be measured: {last[:200]}", remedy="Set BNEXPORT_DATA")
    found = json.loads(child.stdout.strip().splitlines()[-1])
    return [float(rate) for rate in found["rates"]], int(found["threads"])


def speed_page(speeds: TrainingSpeeds, conditions: str) -> str:
    """Return the page; ``conditions``: hardware and versions as a sentence without its full stop."""
    rows = []
    for name, rates in speeds.rates.items():
        if rates:
            spread, ratio = Spread.of(rates), Spread.of(speeds.ratios[name])
            cells = [speeds.threads[name], f"{spread.high:,.0f}", f"{spread.middle:,.0f}", spread.n, ranged(ratio)]
            rows.append([WAYS[name].words, *cells, "yes" if WAYS[name].kept else "no"])
    gemm = Spread.of(speeds.gemm)
    own = speeds.rates.get("bnexport")
    limit = gemm.middle / OPERATIONS_PER_IMAGE
    return render(
        "training/page.md.jinja", speeds=speeds, conditions=conditions, rows=rows, ways=WAYS, gemm=gemm, limit=limit,
        operations=OPERATIONS_PER_IMAGE, reached=f"{Spread.of(own).high / limit:.0%}" if own else "",
    )  # fmt: skip
