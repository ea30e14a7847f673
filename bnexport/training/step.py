"""One training step, and what an epoch adds up: everything stays on the device, which is asked once per epoch."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bnexport.errors import ModelError
from bnexport.training.processes import World

_AMP = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Sums:
    """What an epoch adds up, on the device.

    Attributes:
        loss: float64 (), the sum over the images.
        hits: int64 (), images whose label was the network's.
        losses: float64 (steps,), each step's sum over its images; what is not finite is found in it by its step.
    """

    loss: Tensor
    hits: Tensor
    losses: Tensor

    @classmethod
    def zeros(cls, steps: int, device: torch.device) -> Sums:
        """Nothing yet."""
        return cls(
            torch.zeros((), dtype=torch.float64, device=device),
            torch.zeros((), dtype=torch.int64, device=device),
            torch.zeros(steps, dtype=torch.float64, device=device),
        )


class Step:
    """Forward, loss, backward, update.

    The loss is the mean over the images of ALL processes' parts of the batch: each process weights its own sum by
    size / images, because the gradients are averaged over the processes, whose parts may differ by one image.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        label_smoothing: float = 0.0,
        amp: str = "off",
        world: World | None = None,
        unused: bool = False,
    ) -> None:
        self.world = world or World()
        self.model, self.optimizer = self.world.parallel(model, unused=unused), optimizer
        self.loss_of = nn.CrossEntropyLoss(reduction="sum", label_smoothing=label_smoothing)
        self.amp = _AMP.get(amp)
        device = optimizer.param_groups[0]["params"][0].device
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp == "float16")

    def __call__(self, X: Tensor, y: Tensor, images: int, sums: Sums) -> Tensor:
        """Take the step.

        Args:
            X: This process's part of the batch, (n, channels, height, width).
            y: int64 (n,).
            images: Of the whole batch, over all processes.
            sums: Added to; not ``losses``, whose place the caller knows.

        Returns:
            The sum of the losses of X, float32 (), on the device.
        """
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(X.device.type, self.amp) if self.amp is not None else contextlib.nullcontext():
            logits = self.model(X)
            if not isinstance(logits, Tensor):
                raise ModelError(
                    f"in training the network gives a {type(logits).__name__}, not logits",
                    remedy="Switch its auxiliary outputs off, as with --model-option aux_logits=false",
                )
        loss: Tensor = self.loss_of(logits.float(), y)
        torch.autograd.backward(self.scaler.scale(loss * (self.world.size / images)))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        with torch.no_grad():
            kept = loss.detach()
            sums.loss += kept
            sums.hits += (logits.argmax(1) == y).sum()
        return kept
