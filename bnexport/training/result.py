"""What a training run came to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bnexport.nn.batch_norm import BatchNorm
from bnexport.training.config import TrainingConfig


@dataclass(frozen=True)
class TrainingResult:
    """What a run came to.

    Attributes:
        config: The recipe.
        device: Where it ran: "cpu" or "cuda".
        origin: Where the data came from, in words.
        history: One row per epoch (``EpochMetrics.to_json``).
        test_accuracy: With the plain moving statistics, 0 to 1.
        recalibrated_accuracy: With the re-estimated ones; None when there are none.
        gamma: Of the first BatchNorm; None when the network has none.
        beta: Likewise.
        out: The run directory.
        checkpoint: The last whole epoch.
        model: The result.
    """

    config: TrainingConfig
    device: str
    origin: str
    history: tuple[dict[str, Any], ...]
    test_accuracy: float
    recalibrated_accuracy: float | None
    gamma: tuple[float, ...] | None
    beta: tuple[float, ...] | None
    out: Path
    checkpoint: Path
    model: Path


def first_batch_norm(model: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Gamma and beta (channels,) of the first BatchNorm, on the CPU; None when there is none."""
    for module in model.modules():
        if isinstance(module, BatchNorm):
            return module.gamma.detach().cpu(), module.beta.detach().cpu()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            return module.weight.detach().cpu(), module.bias.detach().cpu()
    return None
