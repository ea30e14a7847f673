"""What makes a small network's training faster on a CPU, without another result than rounding gives.

The figures that decided are in docs/training.md.
"""

from __future__ import annotations

import contextlib
import ctypes
import platform
from collections.abc import Iterator

import torch
from torch import Tensor, nn

#: Above this width the product costs more than torch's pooling: its work grows with the square of the width.
_MAX_WIDTH = 32
# Parameters of mallopt(3), from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_NEVER = (1 << 31) - 1
_ONE_GIB = 1 << 30


def keep_freed_memory() -> bool:
    """Let malloc keep what is freed, for the whole process, so that a step does not fault its pages in again.

    A step frees and takes tensors of some megabytes, which glibc hands back to the system each time.

    Returns:
        Whether the C library could be told (glibc on Linux).
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    tune = ctypes.CDLL(None).mallopt
    return bool(tune(_M_MMAP_THRESHOLD, _ONE_GIB)) and bool(tune(_M_TRIM_THRESHOLD, _NEVER))


@contextlib.contextmanager
def pooling_by_products(model: nn.Module) -> Iterator[None]:
    """Inside the block, small average poolings without overlap are matrix products, which torch computes faster.

    k rows of an image of width w lie one after the other in memory: as one vector of k * w numbers, times a constant
    (k * w, w / k) matrix, they give one row of the pooled image. Sums are taken in another order, so results differ by
    rounding.

    Args:
        model: Its ``nn.AvgPool2d`` layers are changed inside the block, and put back after it.
    """
    changed = [module for module in model.modules() if type(module) is nn.AvgPool2d and _without_overlap(module)]
    for module in changed:
        module.__dict__["forward"] = _Pooling(module)
    try:
        yield
    finally:
        for module in changed:
            del module.__dict__["forward"]


def _without_overlap(module: nn.AvgPool2d) -> bool:
    kernel = module.kernel_size
    return (
        isinstance(kernel, int)
        and module.stride in (kernel, (kernel, kernel))
        and module.padding == 0
        and not module.ceil_mode
        and module.divisor_override is None
    )


class _Pooling:
    """The forward of one layer; falls back to torch's where the product would not fit."""

    def __init__(self, module: nn.AvgPool2d) -> None:
        self._torch = type(module).forward.__get__(module)
        self._k = int(module.kernel_size)  # type: ignore[arg-type]
        self._matrices: dict[tuple[int, torch.dtype], Tensor] = {}

    def __call__(self, X: Tensor) -> Tensor:
        k = self._k
        if (
            X.dim() != 4
            or X.device.type != "cpu"
            or X.shape[3] > _MAX_WIDTH
            or X.shape[2] % k
            or X.shape[3] % k
            or not X.is_contiguous()
        ):
            pooled: Tensor = self._torch(X)
            return pooled
        n, channels, height, width = X.shape
        rows = X.reshape(-1, k * width) @ self._matrix(width, X.dtype)
        return rows.view(n, channels, height // k, width // k)

    def _matrix(self, width: int, dtype: torch.dtype) -> Tensor:
        key = (width, dtype)
        if key not in self._matrices:
            one_row = torch.eye(width // self._k, dtype=dtype).repeat_interleave(self._k, 0) / self._k**2
            self._matrices[key] = one_row.repeat(self._k, 1)  # (k * width, width / k)
        return self._matrices[key]
