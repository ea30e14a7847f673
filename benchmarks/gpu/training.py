"""How fast a GPU trains BN-LeNet: the data on the device, with and without the recorded step."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from benchmarks.clock import Spread
from bnexport.nn.lenet import bn_lenet
from bnexport.training.config import TrainingConfig
from bnexport.training.loop import Epochs, epoch_order, evaluate
from bnexport.training.optimisers import make_optimizer
from bnexport.training.samples import Resident
from bnexport.training.step import Step

#: Images of one epoch and of its evaluation: those of Fashion-MNIST.
_TRAIN, _TEST = 60_000, 10_000
#: Epochs that are measured together, after two that are not.
_EPOCHS, _WARM_UP = 10, 2


@dataclass(frozen=True)
class GpuSpeed:
    """One row of the table.

    Attributes:
        norm: Kind of BatchNorm.
        captured: Whether the step was recorded as a CUDA graph.
        batch_size: Images per step.
        images_per_s: Of each epoch, evaluation included.
        total_s: All measured epochs together.
    """

    norm: str
    captured: bool
    batch_size: int
    images_per_s: Spread
    total_s: float


def gpu_speeds(
    device: torch.device, *, train: int = _TRAIN, test: int = _TEST, batch_sizes: Sequence[int] = (256, 1024)
) -> tuple[GpuSpeed, ...]:
    """Measure every combination of BatchNorm and step.

    Images are random, which costs a GPU the same as real ones.

    Args:
        device: A CUDA device; on a CPU nothing is recorded.
        train: Images of an epoch.
        test: Images of its evaluation.
        batch_sizes: Images per step.
    """
    generator = torch.Generator().manual_seed(0)
    parts = [
        Resident(
            torch.rand((count, 1, 28, 28), generator=generator).to(device),
            torch.randint(10, (count,), generator=generator).to(device),
        )
        for count in (train, test)
    ]
    return tuple(
        _speed(parts[0], parts[1], norm, batch_size, captured=captured)
        for norm in ("torch", "scratch")
        for batch_size in batch_sizes
        for captured in ((True, False) if device.type == "cuda" else (False,))
    )


def _speed(train: Resident, test: Resident, norm: str, batch_size: int, *, captured: bool) -> GpuSpeed:
    torch.manual_seed(0)
    model = bn_lenet(norm).to(train.device)
    step = Step(model, make_optimizer(model, TrainingConfig(norm=norm), train.device))
    epochs = Epochs(step, train, batch_size=batch_size, capture=captured)
    times: list[float] = []
    for number in range(1, _WARM_UP + _EPOCHS + 1):
        order = epoch_order(train.count, seed=0, epoch=number)
        begun = time.perf_counter()
        epochs.take(order)  # ends by reading the sums, so the device is done
        evaluate(model, test)
        times.append(time.perf_counter() - begun)
    measured = times[_WARM_UP:]
    return GpuSpeed(norm, captured, batch_size, Spread.of([train.count / spent for spent in measured]), sum(measured))


def speed_table(speeds: Sequence[GpuSpeed]) -> Iterator[str]:
    """The section of a document, line by line; says so where nothing was measured."""
    yield "## Training\n"
    if not speeds:
        yield (
            "Not measured yet: no GPU was there. The code for it (data on the device, the step recorded as a CUDA graph, "
            "sums read once per epoch) is tested where there is one, by `tests/gpu/test_gpu_training.py`.\n"
        )
        return
    yield (
        f"BN-LeNet, {_TRAIN:,} images per epoch and an evaluation on {_TEST:,}, data on the device; "
        f"{_EPOCHS} epochs after {_WARM_UP}; images/s of an epoch with its evaluation.\n"
    )
    yield "| norm | batch | step | slowest, images/s | median | fastest | 10 epochs, s |"
    yield "|---|---|---|---|---|---|---|"
    for row in speeds:
        spread, step = row.images_per_s, "recorded as a CUDA graph" if row.captured else "one kernel at a time"
        yield (
            f"| {row.norm} | {row.batch_size} | {step} | {spread.low:,.0f} | {spread.middle:,.0f} | {spread.high:,.0f} | "
            f"{row.total_s:.2f} |"
        )
    yield ""
