"""Training speed of BN-LeNet on a GPU: the data on the device, with and without the recorded step."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch

from benchmarks.clock import Spread
from benchmarks.gpu.results import GpuSpeed
from bnexport.nn.lenet import bn_lenet
from bnexport.training.config import TrainingConfig
from bnexport.training.data_parts import Resident
from bnexport.training.loop import Epochs, epoch_order, evaluate
from bnexport.training.optimisers import make_optimizer
from bnexport.training.step import Step

#: Images of one epoch and of its evaluation: those of Fashion-MNIST.
_TRAIN, _TEST = 60_000, 10_000
#: Epochs that are measured together, after two that are not.
_EPOCHS, _WARM_UP = 10, 2


def gpu_speeds(
    device: torch.device, *, train: int = _TRAIN, test: int = _TEST, batch_sizes: Sequence[int] = (256, 1024)
) -> Iterator[GpuSpeed]:
    """Measure every combination of BatchNorm, batch size and step on random images; on a CPU no step is recorded."""
    generator = torch.Generator().manual_seed(0)
    parts = [
        Resident(
            torch.rand((count, 1, 28, 28), generator=generator).to(device),
            torch.randint(10, (count,), generator=generator).to(device),
        )
        for count in (train, test)
    ]
    for norm in ("torch", "scratch"):
        for batch_size in batch_sizes:
            for captured in (True, False) if device.type == "cuda" else (False,):
                yield _speed(parts[0], parts[1], norm, batch_size, captured=captured)


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
    speeds = Spread.of([train.count / spent for spent in measured])
    recorded = epochs.recording is not None and epochs.recording.made
    return GpuSpeed(norm, recorded, batch_size, train.count, speeds, sum(measured))
