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

from bnexport.errors import FeedError, ModelError
from bnexport.nn.batch_norm import BatchNorm


def synchronised(model: nn.Module) -> nn.Module:
    """Replace every BatchNorm of a model that has moving statistics by one over all processes, in place.

    Parameters and buffers are shared with the old layers and keep their names, so a state dict fits both. On CUDA torch's own
    layers become ``nn.SyncBatchNorm``. Return the model, or the new layer if the model is itself a BatchNorm. ModelError if the
    forward of a user's class does more than BatchNorm.
    """
    made: dict[int, nn.Module] = {}  # a layer may have several names in the network

    def visit(module: nn.Module) -> nn.Module:
        if id(module) not in made:
            made[id(module)] = _synced(module)
            if made[id(module)] is module:
                for name, child in module._modules.items():
                    if child is not None:
                        module._modules[name] = visit(child)
        return made[id(module)]

    return visit(model)


def _synced(layer: nn.Module) -> nn.Module:
    """Return the layer over all processes; the same object if it has no moving statistics or is synchronised already."""
    scratch = isinstance(layer, BatchNorm)
    if not scratch and (not isinstance(layer, nn.modules.batchnorm._BatchNorm) or layer.running_mean is None):
        return layer
    if isinstance(layer, SyncedScratchBatchNorm | SyncedBatchNorm | nn.SyncBatchNorm):
        return layer
    if type(layer).forward is not (BatchNorm if scratch else nn.modules.batchnorm._BatchNorm).forward:
        raise ModelError(
            f"a {type(layer).__name__} does more than BatchNorm in its forward, so it can't be synchronised",
            remedy="Leave --sync-batch-norm out, or build the network with torch's own BatchNorm",
        )
    if scratch:
        scratch_twin = SyncedScratchBatchNorm.__new__(SyncedScratchBatchNorm)
        scratch_twin.__dict__.update(layer.__dict__)
        return scratch_twin
    if next(layer.buffers()).is_cuda:
        on_gpu: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(layer)  # type: ignore[no-untyped-call]
        return on_gpu
    twin = SyncedBatchNorm.__new__(SyncedBatchNorm)
    dimensions: Any = layer._check_input_dim
    twin.__dict__.update(layer.__dict__, _check_input_dim=dimensions)  # 2-D, 3-D, ... as the layer had it
    return twin


class SyncedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """``nn.BatchNorm1d/2d/3d`` over all processes; made by ``synchronised``."""

    def forward(self, X: Tensor) -> Tensor:
        """Normalise X of shape (N, C) or (N, C, ...)."""
        if not self.training or self.running_mean is None or self.running_var is None:
            return super().forward(X)
        self._check_input_dim(X)  # type: ignore[no-untyped-call]
        Y, mean, var, count = _normalised(X, self.weight, self.bias, self.eps)
        with torch.no_grad():
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            weight = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), weight)
            self.running_var.lerp_((var * (count / (count - 1))).to(self.running_var.dtype), weight)
        return Y


class SyncedScratchBatchNorm(BatchNorm):
    """The BatchNorm from scratch over all processes; made by ``synchronised``."""

    def forward(self, X: Tensor) -> Tensor:
        """Normalise X of shape (N, C) or (N, C, H, W)."""
        if not self.training:
            return super().forward(X)
        Y, mean, var, count = _normalised(X, self.gamma, self.beta, self.eps)
        with torch.no_grad():
            kept = var * (count / (count - 1)) if self.unbiased else var
            self.moving_mean.mul_(self.momentum).add_(mean.to(self.moving_mean.dtype), alpha=1.0 - self.momentum)
            self.moving_var.mul_(self.momentum).add_(kept.to(self.moving_var.dtype), alpha=1.0 - self.momentum)
        return Y


def _normalised(X: Tensor, gamma: Any, beta: Any, eps: float) -> tuple[Tensor, Tensor, Tensor, int]:
    """Return Y, and over all processes the mean and biased variance (float64 (C,)) and the number of values per channel.

    Half precision is widened, as torch's own kernels do.
    """
    given = X.dtype
    X = X.float() if given in (torch.bfloat16, torch.float16) else X
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
            f"BatchNorm got {count} value(s) per channel over all processes, but it needs at least 2",
            remedy="Use a larger batch",
        )
    shape = (1, X.shape[1]) + (1,) * (X.dim() - 2)
    X_hat = _Normalise.apply(X, mean.view(shape), var.view(shape), eps, count)
    if gamma is not None:
        X_hat = X_hat * gamma.view(shape)
    Y = X_hat if beta is None else X_hat + beta.view(shape)
    return Y.to(given), mean, var, count


def _merged(mean: Tensor, var: Tensor, count: int) -> tuple[Tensor, Tensor, int]:
    """Return the moments of all processes' values from those of each process."""
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
