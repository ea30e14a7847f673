"""BatchNorm whose batch is spread over several processes, on any backend of torch.distributed.

The moments of all processes' values are merged by the formula of Chan, Golub and LeVeque (1979) in float64, so a process
may hold any number of values, also none. In the gradient of the input the two sums of Ioffe and Szegedy (2015) run over all
processes too. torch's own SyncBatchNorm does the same on GPUs alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from bnexport.errors import FeedError
from bnexport.nn.batch_norm import BatchNorm


def synchronised(model: nn.Module) -> nn.Module:
    """Replace every BatchNorm that has moving statistics by one over all processes.

    Parameters and buffers are shared with the old layers, names stay: a state dict fits both. On CUDA torch's own layers
    become ``nn.SyncBatchNorm``.

    Args:
        model: Changed in place.

    Returns:
        The model, or the new layer where the model is itself a BatchNorm.
    """
    if isinstance(model, BatchNorm):
        return _twin(model, SyncedScratchBatchNorm.__new__(SyncedScratchBatchNorm))
    if isinstance(model, nn.modules.batchnorm._BatchNorm) and model.running_mean is not None:
        if model.running_mean.is_cuda:
            on_gpu: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
            return on_gpu
        return _twin(model, SyncedBatchNorm.__new__(SyncedBatchNorm))
    for name, child in list(model.named_children()):
        new = synchronised(child)
        if new is not child:
            setattr(model, name, new)
    return model


def _twin(layer: nn.Module, new: nn.Module) -> nn.Module:
    new.__dict__.update(layer.__dict__)
    return new


class SyncedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """``nn.BatchNorm1d/2d/3d`` over all processes; made by ``synchronised``."""

    def forward(self, X: Tensor) -> Tensor:
        """Normalise X of shape (N, C) or (N, C, ...)."""
        if not self.training or self.running_mean is None or self.running_var is None:
            return super().forward(X)
        Y, mean, var, count = _normalised(X, self.weight, self.bias, self.eps)
        with torch.no_grad():
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            weight = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), weight)
            self.running_var.lerp_((var * (count / (count - 1))).to(self.running_var.dtype), weight)
        return Y

    def _check_input_dim(self, X: Tensor) -> None:
        if X.dim() < 2:
            raise FeedError(
                f"BatchNorm got an input of {X.dim()} dimensions, expected (N, C, ...)",
                remedy="Give it batches of samples",
            )


class SyncedScratchBatchNorm(BatchNorm):
    """The BatchNorm from scratch over all processes; made by ``synchronised``."""

    def forward(self, X: Tensor) -> Tensor:
        """Normalise X of shape (N, C) or (N, C, H, W)."""
        if not self.training:
            return super().forward(X)
        Y, mean, var, count = _normalised(X, self.gamma, self.beta, self.eps)
        with torch.no_grad():
            kept = var * (count / (count - 1)) if self.unbiased else var
            self.moving_mean.mul_(self.momentum).add_(mean.to(X.dtype), alpha=1.0 - self.momentum)
            self.moving_var.mul_(self.momentum).add_(kept.to(X.dtype), alpha=1.0 - self.momentum)
        return Y


def _normalised(X: Tensor, gamma: Any, beta: Any, eps: float) -> tuple[Tensor, Tensor, Tensor, int]:
    """Y, and over all processes the mean and biased variance (float64 (C,)) and the number of values per channel."""
    local = X.numel() // X.shape[1]
    dims = [dim for dim in range(X.dim()) if dim != 1]
    with torch.no_grad():
        if local:
            var, mean = torch.var_mean(X.double(), dim=dims, correction=0)
        else:
            var = mean = torch.zeros(X.shape[1], dtype=torch.float64, device=X.device)
        mean, var, count = _merged(mean, var, local)
    if count < 2:
        raise FeedError(
            f"BatchNorm got {count} value(s) per channel over all processes, it needs at least 2",
            remedy="Use a larger batch",
        )
    shape = (1, X.shape[1]) + (1,) * (X.dim() - 2)
    X_hat = _Normalise.apply(X, mean.view(shape), var.view(shape), eps, count)
    if gamma is not None:
        X_hat = X_hat * gamma.view(shape)
    return (X_hat if beta is None else X_hat + beta.view(shape)), mean, var, count


def _merged(mean: Tensor, var: Tensor, count: int) -> tuple[Tensor, Tensor, int]:
    """Moments of all processes' values from those of each."""
    mine = torch.cat([torch.full((1,), float(count), dtype=torch.float64, device=mean.device), mean, var])
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, mine)
    every = torch.stack(parts)
    counts, means, variances = every[:, :1], every[:, 1 : 1 + len(mean)], every[:, 1 + len(mean) :]
    total = counts.sum()
    merged = (counts * means).sum(0) / total
    squares = (counts * (variances + (means - merged) ** 2)).sum(0)
    return merged, squares / total, int(total.item())


class _Normalise(torch.autograd.Function):
    """(X - mean) / sqrt(var + eps), where mean and var depend on every process's X."""

    @staticmethod
    def forward(ctx: Any, X: Tensor, mean: Tensor, var: Tensor, eps: float, count: int) -> Tensor:
        scale = torch.rsqrt(var + eps).to(X.dtype)
        X_hat = (X - mean.to(X.dtype)) * scale
        ctx.save_for_backward(X_hat, scale)
        ctx.count = count
        return X_hat

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        X_hat, scale = ctx.saved_tensors
        (grad,) = grads
        dims = [dim for dim in range(grad.dim()) if dim != 1]
        sums = torch.stack([grad.sum(dims), (grad * X_hat).sum(dims)])
        dist.all_reduce(sums)
        sums /= ctx.count
        shape = scale.shape
        return (grad - sums[0].view(shape) - X_hat * sums[1].view(shape)) * scale, None, None, None, None
