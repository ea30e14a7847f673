"""One training step, the sums of an epoch, which stay on the device until its end, and faster kernels on a CPU.

The CPU kernels change results by rounding only. docs/training.md has the measurements that justify them.
"""

from __future__ import annotations

import contextlib
import ctypes
import platform
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bnexport.errors import ModelError
from bnexport.training.processes import World

_AMP = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Sums:
    """The sums of an epoch, on the device."""

    loss: Tensor  # float64 (), sum over the images
    hits: Tensor  # int64 (), images with the right prediction
    losses: Tensor  # float64 (steps,), sum over the images of each step; shows the step of a loss that is not finite

    @classmethod
    def zeros(cls, steps: int, device: torch.device) -> Sums:
        """Return zeros for an epoch of ``steps``."""
        return cls(
            torch.zeros((), dtype=torch.float64, device=device),
            torch.zeros((), dtype=torch.int64, device=device),
            torch.zeros(steps, dtype=torch.float64, device=device),
        )


class Step:
    """Forward, loss, backward, update.

    The loss is the mean over the whole batch of all processes. Each process weights its sum by size / images, because the
    gradients are averaged over the processes, whose parts may differ by one image.
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
        """Take the step with this process's part of a batch of ``images``: X (n, channels, height, width), labels y int64 (n,).

        The loss and hits are added to ``sums``; the caller sets ``losses``. Return the sum of the losses of X, float32 (),
        on the device.
        """
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(X.device.type, self.amp) if self.amp is not None else contextlib.nullcontext():
            logits = self.model(X)
            if not isinstance(logits, Tensor):
                raise ModelError(
                    f"in training mode the network returns a {type(logits).__name__}, not logits",
                    remedy="Switch its auxiliary outputs off, such as with --model-option aux_logits=false",
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


#: Above this width the product is slower than torch's pooling, because its work grows with the square of the width.
_MAX_WIDTH = 32
# Parameters of mallopt(3), from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_NEVER = (1 << 31) - 1
_ONE_GIB = 1 << 30


def keep_freed_memory() -> bool:
    """Make malloc keep freed memory, for the whole process; return False without glibc.

    A step frees and allocates tensors of some megabytes, which glibc by default returns to the system each time.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    tune = ctypes.CDLL(None).mallopt
    return bool(tune(_M_MMAP_THRESHOLD, _ONE_GIB)) and bool(tune(_M_TRIM_THRESHOLD, _NEVER))


@contextlib.contextmanager
def pooling_by_products(model: nn.Module) -> Iterator[None]:
    """Compute small average poolings without overlap as matrix products inside the block, which is faster.

    k consecutive rows of an image of width w are one vector of k * w numbers. Its product with a constant (k * w, w / k) matrix
    is one row of the pooled image. Sums have another order, so results differ by rounding. The model's ``nn.AvgPool2d`` layers
    are restored after the block.
    """
    changed = [module for module in model.modules() if type(module) is nn.AvgPool2d and _replaceable(module)]
    for module in changed:
        module.__dict__["forward"] = _Pooling(module)
    try:
        yield
    finally:
        for module in changed:
            del module.__dict__["forward"]


def _replaceable(module: nn.AvgPool2d) -> bool:
    """Return True if the windows do not overlap and the layer has its original forward."""
    kernel = module.kernel_size
    return (
        "forward" not in module.__dict__
        and isinstance(kernel, int)
        and module.stride in (kernel, (kernel, kernel))
        and module.padding == 0
        and not module.ceil_mode
        and module.divisor_override is None
    )


class _Pooling:
    """The forward of one layer; it calls torch's forward for inputs that the product does not fit."""

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
            or torch.is_autocast_enabled("cpu")  # autocast rounds a product to bfloat16, but not a pooling
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
