"""One epoch of training, and evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from bnexport.errors import Diverged
from bnexport.nn.calling import to_eval_mode
from bnexport.nn.soundness import has_diverged
from bnexport.reproducibility import strict_float32
from bnexport.training.data_parts import DataPart
from bnexport.training.processes import World
from bnexport.training.recording import CapturedStep, Record, Recording
from bnexport.training.step import Step, Sums

#: Called after each step with the steps done and the steps in all.
OnBatch = Callable[[int, int], None]

_EVALUATION_BATCH = 500  # bounds the memory of evaluation; it does not change the result


@dataclass(frozen=True)
class MeanMetrics:
    """Mean loss and accuracy over the images of an epoch or a test set."""

    loss: float  # Mean cross-entropy, in nats
    accuracy: float  # 0 to 1


def epoch_order(count: int, *, seed: int, epoch: int) -> Tensor:
    """Return the order of the images in one epoch: a permutation of 0 ... count - 1, int64 on the CPU.

    It depends on the seed and the epoch alone, not on earlier draws, so a resumed run uses the same order.
    """
    return torch.randperm(count, generator=torch.Generator().manual_seed(epoch_seed(seed, epoch)))


def epoch_seed(*parts: int) -> int:
    """Return one seed, 0 to 2**63 - 1, from several numbers; neighbouring numbers give unrelated seeds."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0]) >> 1


class Epochs:
    """The epochs of one training; a recorded step lasts from one epoch to the next."""

    def __init__(
        self,
        step: Step,
        samples: DataPart,
        *,
        batch_size: int,
        capture: bool = False,
        record: Record = CapturedStep,
        on_note: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Prepare steps of ``batch_size`` images, summed over all processes; ``capture`` records the step if that is safe.

        ``record`` makes the recording, for one process only; ``on_note`` receives the reason if no step is recorded.
        """
        self.step, self.samples, self.batch_size = step, samples, batch_size
        self.world = step.world
        self.recording = Recording(step, batch_size=batch_size, record=record, on_note=on_note) if capture else None
        self._sums: Sums | None = None

    def steps(self) -> int:
        """Return the number of steps in one epoch."""
        return math.ceil(self.samples.count / self.batch_size)

    def take(
        self, order: Tensor, *, before_step: Callable[[int], None] | None = None, on_batch: OnBatch | None = None
    ) -> MeanMetrics:
        """Train one epoch in an order (int64 on the CPU) and return its means; each image counts with the weights of its step.

        ``before_step`` receives the number of the step in this epoch, from 0. ``on_batch`` must not wait for the device.
        If the loss or the weights are no longer finite, Diverged names the batch.
        """
        sums = self.take_steps(order, before_step=before_step, on_batch=on_batch)
        self.world.add_up(sums.loss, sums.hits, sums.losses)
        self.world.same_buffers(self.step.model)
        _refuse_diverged(self.step.model, sums.losses)
        return MeanMetrics(sums.loss.item() / len(order), sums.hits.item() / len(order))

    def take_steps(
        self, order: Tensor, *, before_step: Callable[[int], None] | None = None, on_batch: OnBatch | None = None
    ) -> Sums:
        """Take the steps of one epoch, as in ``take``; on a GPU the host does not wait for the device."""
        self.step.model.train()
        batches = torch.split(order, self.batch_size)
        sums = self._fresh_sums(len(batches))
        parts = [self.world.share(batch) for batch in batches]
        take = self.step if self.recording is None else self.recording.take
        for number, (X, y) in enumerate(self.samples.batches(parts)):
            if before_step is not None:
                before_step(number)
            loss = take(X, y, len(batches[number]), sums)
            sums.losses[number] = loss
            if loss.device.type == "cpu" and self.world.size == 1 and not math.isfinite(loss.item()):
                break  # a GPU and several processes are checked at the end of the epoch, without a wait
            if on_batch is not None:
                on_batch(number + 1, len(batches))
        return sums

    def _fresh_sums(self, steps: int) -> Sums:
        """Return zeros, in the same tensors in every epoch, because a recorded step adds to the tensors of its recording."""
        if self._sums is None or len(self._sums.losses) != steps:
            self._sums = Sums.zeros(steps, self.samples.device)
            if self.recording is not None:
                self.recording.forget()
        for value in (self._sums.loss, self._sums.hits, self._sums.losses):
            value.zero_()
        return self._sums


def evaluate(model: nn.Module, samples: DataPart, world: World | None = None) -> MeanMetrics:
    """Return loss and accuracy in eval mode and strict float32; the model's mode is restored afterwards.

    With several processes each one evaluates its part of the images.
    """
    world = world or World()
    sums = evaluated(model, samples, world)
    world.add_up(sums.loss, sums.hits)
    return MeanMetrics(sums.loss.item() / samples.count, sums.hits.item() / samples.count)


@torch.no_grad()
def evaluated(model: nn.Module, samples: DataPart, world: World) -> Sums:
    """Return the sums of ``evaluate`` over this process's part, on the device; the host does not wait for them."""
    was_training = model.training
    sums = Sums.zeros(0, samples.device)
    to_eval_mode(model)
    try:
        mine = torch.split(world.share(torch.arange(samples.count)), _EVALUATION_BATCH)
        with strict_float32():
            for X, y in samples.batches([part for part in mine if len(part)]):
                logits = model(X)
                sums.loss += nn.functional.cross_entropy(logits, y, reduction="sum")
                sums.hits += (logits.argmax(1) == y).sum()
    finally:
        model.train(was_training)
    return sums


def batches_of(samples: DataPart, order: Tensor, batch_size: int) -> Iterator[Tensor]:
    """Yield the images of an order in batches, for the re-estimation of moving statistics."""
    for X, _ in samples.batches(torch.split(order, batch_size)):
        yield X


def _refuse_diverged(model: nn.Module, losses: Tensor) -> None:
    """Raise Diverged with the first batch whose loss is not finite, or for weights that are not finite after the last batch."""
    broken = (~torch.isfinite(losses)).nonzero()
    if len(broken):
        where = f"in batch {int(broken[0]) + 1} of {len(losses)}"
    elif has_diverged(model):
        where = f"after batch {len(losses)} of {len(losses)}"
    else:
        return
    raise Diverged(f"the training diverged: the loss or the weights are no longer finite {where}", remedy="Lower --lr")
