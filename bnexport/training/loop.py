"""One epoch of training, and evaluation.

The whole data set is one tensor on the device: a step gathers its rows, and nothing is done per image in Python. Loss
and hits are summed on the device and read once per epoch, so a GPU never waits for the host inside an epoch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from bnexport.errors import UsageError

#: Called after each step with the steps done and the steps in all.
OnBatch = Callable[[int, int], None]

_EVALUATION_BATCH = 1000  # bounds the memory of evaluation; it does not change the result


def epoch_order(count: int, *, seed: int, epoch: int) -> Tensor:
    """The order of the images in one epoch.

    It depends on the seed and the epoch alone, not on what was drawn before, so a resumed run sees the same order.

    Returns:
        A permutation of 0 ... count - 1, int64 on the CPU.
    """
    mixed = int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0])
    return torch.randperm(count, generator=torch.Generator().manual_seed(mixed >> 1))


def train_epoch(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    optimizer: torch.optim.Optimizer,
    *,
    order: Tensor,
    batch_size: int,
    on_batch: OnBatch | None = None,
) -> tuple[float, float]:
    """Take one pass over the training set.

    Args:
        model: Trained in place.
        images: (n, channels, height, width) on the model's device.
        labels: int64 (n,) there.
        optimizer: Of the model's parameters.
        order: Permutation of the images.
        batch_size: Images per step; the last batch holds what is left.
        on_batch: Told after each step; it must not wait for the device.

    Returns:
        Mean loss and accuracy over the epoch, each image as the network was when it came (as the chapter reports them).

    Raises:
        UsageError: The training diverged.
    """
    model.train()
    loss_of = nn.CrossEntropyLoss()
    total_loss = torch.zeros((), dtype=torch.float64, device=images.device)
    hits = torch.zeros((), dtype=torch.int64, device=images.device)
    batches = torch.split(order.to(images.device), batch_size)
    for done, batch in enumerate(batches, start=1):
        X, y = images.index_select(0, batch), labels.index_select(0, batch)
        optimizer.zero_grad(set_to_none=True)
        logits = model(X)
        loss = loss_of(logits, y)
        loss.backward()
        optimizer.step()
        total_loss += loss.detach() * len(batch)
        hits += (logits.detach().argmax(1) == y).sum()
        if on_batch is not None:
            on_batch(done, len(batches))
    mean_loss = total_loss.item() / len(order)
    _refuse_diverged(model, mean_loss)
    return mean_loss, hits.item() / len(order)


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Accuracy in eval mode, so with the moving statistics; the model's mode is put back."""
    was_training = model.training
    model.eval()
    try:
        hits = torch.zeros((), dtype=torch.int64, device=images.device)
        for X, y in zip(torch.split(images, _EVALUATION_BATCH), torch.split(labels, _EVALUATION_BATCH), strict=True):
            hits += (model(X).argmax(1) == y).sum()
        return hits.item() / len(labels)
    finally:
        model.train(was_training)


def batches_of(images: Tensor, order: Tensor, batch_size: int) -> Iterator[Tensor]:
    """The images in an order, in batches; for the re-estimation of moving statistics."""
    for batch in torch.split(order.to(images.device), batch_size):
        yield images.index_select(0, batch)


def _refuse_diverged(model: nn.Module, mean_loss: float) -> None:
    if math.isfinite(mean_loss) and all(bool(torch.isfinite(value).all()) for value in model.state_dict().values()):
        return
    raise UsageError(
        "the training diverged: the loss or the weights are no longer finite",
        remedy="Lower --lr; the checkpoint of the last whole epoch, if there was one, is unchanged",
    )
