"""Batch normalization from scratch, as in "Dive into Deep Learning", section 8.5 (Ioffe and Szegedy, 2015).

Changes from the chapter's code, each because that code fails in real use:

- The mode is ``self.training``. The chapter checks whether gradients are enabled, so ``model.eval()`` alone would keep
  using batch statistics, and a ``no_grad`` block in training would use the moving ones.
- Moving statistics are buffers: saved in the state dict, moved with the module, exported.
- They are (num_features,)-vectors as in ``torch.nn.BatchNorm2d``; the chapter's (1, C) and (1, C, 1, 1) shapes are
  accepted.
- A user's mistake raises an error with a remedy; there are no asserts.
- One value per channel in training is refused: its variance is 0, so the output would be beta, whatever the input.

Difference from ``torch.nn.BatchNorm1d/2d``: both normalise a training batch with its *biased* variance (divided
by n), but torch puts the *unbiased* one (divided by n - 1) into the moving variance, the chapter the biased one.
``unbiased=True`` follows torch. The momentum here is the weight of the OLD value; torch's is the weight of the new
one (0.9 here is 0.1 there).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bnexport.errors import FeedError, UsageError


def batch_norm(
    X: Tensor,
    gamma: Tensor,
    beta: Tensor,
    moving_mean: Tensor,
    moving_var: Tensor,
    eps: float,
    momentum: float,
    *,
    training: bool = True,
    unbiased: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise per channel, then scale and shift: ``gamma * (X - mean) / sqrt(var + eps) + beta``.

    The order of the parameters is the chapter's. Nothing is changed in place.

    Args:
        X: (N, C) or (N, C, H, W).
        gamma: Scale, C elements in any shape.
        beta: Shift, C elements in any shape.
        moving_mean: C elements in any shape.
        moving_var: C elements in any shape.
        eps: Added to the variance.
        momentum: Weight of the old moving statistics: ``moving = momentum * moving + (1 - momentum) * batch``.
        training: Normalise with the statistics of this batch and update the moving ones; else use the moving ones.
        unbiased: Put the unbiased variance into the moving variance, as torch does. Training only.

    Returns:
        Y of X's shape, and the new moving mean and variance in the shapes they came in (the same tensors outside
        training).

    Raises:
        FeedError: X has another rank or another number of channels, or one value per channel in training.
    """
    if X.dim() not in (2, 4):
        raise FeedError(
            f"BatchNorm got an input of {X.dim()} dimensions, but it takes (N, C) or (N, C, H, W)",
            remedy="Flatten or unflatten the input before the layer",
        )
    if X.shape[1] != gamma.numel():
        raise FeedError(
            f"BatchNorm over {gamma.numel()} channels got an input of {X.shape[1]} channels (axis 1)",
            remedy="Make num_features the size of the input's axis 1",
        )
    shape = (1, gamma.numel()) + (1,) * (X.dim() - 2)
    if not training:
        X_hat = (X - moving_mean.view(shape)) / torch.sqrt(moving_var.view(shape) + eps)
        return gamma.view(shape) * X_hat + beta.view(shape), moving_mean, moving_var
    mean, var, count = _batch_statistics(X)
    X_hat = (X - mean) / torch.sqrt(var + eps)
    with torch.no_grad():
        kept_var = var * (count / (count - 1)) if unbiased else var
        new_mean = momentum * moving_mean + (1.0 - momentum) * mean.view(moving_mean.shape)
        new_var = momentum * moving_var + (1.0 - momentum) * kept_var.view(moving_var.shape)
    return gamma.view(shape) * X_hat + beta.view(shape), new_mean, new_var


def _batch_statistics(X: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return mean and biased variance per channel, shaped to broadcast over X, and the number of values per channel."""
    count = X.numel() // X.shape[1]
    if count < 2:
        raise FeedError(
            f"BatchNorm got {count} value(s) per channel in training mode, but it needs at least 2",
            remedy="Use a larger batch, drop the last partial batch, or call eval() first",
        )
    dims = (0,) if X.dim() == 2 else (0, 2, 3)
    mean = X.mean(dim=dims, keepdim=True)  # (1, C) or (1, C, 1, 1)
    var = ((X - mean) ** 2).mean(dim=dims, keepdim=True)
    return mean, var, count


class BatchNorm(nn.Module):
    """The layer around ``batch_norm``; in eval mode it is plain arithmetic, which ``torch.export`` traces with any batch size.

    Attributes:
        gamma: Parameter (num_features,), initially ones.
        beta: Parameter (num_features,), initially zeros.
        moving_mean: Buffer (num_features,), initially zeros.
        moving_var: Buffer (num_features,), initially ones.
    """

    gamma: nn.Parameter
    beta: nn.Parameter
    moving_mean: Tensor
    moving_var: Tensor

    def __init__(
        self, num_features: int, num_dims: int, *, eps: float = 1e-5, momentum: float = 0.9, unbiased: bool = False
    ) -> None:
        """Create the layer for ``num_features`` channels; ``num_dims`` is 2 after a linear layer, 4 after a convolution.

        ``eps``, ``momentum`` and ``unbiased`` are those of ``batch_norm``; UsageError for a value that is out of range.
        """
        super().__init__()
        _check_options(num_features, num_dims, eps, momentum)
        self.num_features = num_features
        self.num_dims = num_dims
        self.eps = eps
        self.momentum = momentum
        self.unbiased = unbiased
        self.gamma = nn.Parameter(torch.ones(num_features))
        self.beta = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("moving_mean", torch.zeros(num_features))
        self.register_buffer("moving_var", torch.ones(num_features))

    def forward(self, X: Tensor) -> Tensor:
        """Normalise X of shape (N, C) or (N, C, H, W); in training mode also update the moving statistics."""
        if X.dim() != self.num_dims:
            raise FeedError(
                f"BatchNorm of num_dims={self.num_dims} got an input of {X.dim()} dimensions",
                remedy="Use num_dims=2 for (N, C) and num_dims=4 for (N, C, H, W)",
            )
        Y, moving_mean, moving_var = batch_norm(
            X,
            self.gamma,
            self.beta,
            self.moving_mean,
            self.moving_var,
            self.eps,
            self.momentum,
            training=self.training,
            unbiased=self.unbiased,
        )
        if self.training:
            self.moving_mean.copy_(moving_mean)
            self.moving_var.copy_(moving_var)
        return Y

    def extra_repr(self) -> str:
        """Return the options that ``print(module)`` shows."""
        return (
            f"{self.num_features}, num_dims={self.num_dims}, eps={self.eps}, momentum={self.momentum}, "
            f"unbiased={self.unbiased}"
        )

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        # A state dict of the chapter's own layer holds (1, C) or (1, C, 1, 1); it loads when the number of elements
        # fits.
        for name in ("gamma", "beta", "moving_mean", "moving_var"):
            value = state_dict.get(prefix + name)
            if value is not None and value.dim() > 1 and value.numel() == self.num_features:
                state_dict[prefix + name] = value.reshape(self.num_features)
        super()._load_from_state_dict(state_dict, prefix, *args)


#: The classes whose layers are BatchNorms.
BATCH_NORMS = (BatchNorm, nn.modules.batchnorm._BatchNorm)


def _check_options(num_features: int, num_dims: int, eps: float, momentum: float) -> None:
    if num_features < 1:
        raise UsageError(f"BatchNorm got num_features={num_features}", remedy="Give a positive number of channels")
    if num_dims not in (2, 4):
        raise UsageError(
            f"BatchNorm got num_dims={num_dims}", remedy="Use 2 after a fully connected layer, 4 after a convolution"
        )
    if not eps > 0 or not 0 <= momentum <= 1:
        raise UsageError(
            f"BatchNorm got eps={eps}, momentum={momentum}", remedy="Use eps above 0 and a momentum between 0 and 1"
        )
