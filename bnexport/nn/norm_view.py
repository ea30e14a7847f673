"""One view of the two BatchNorm vocabularies: that of ``torch.nn`` and that of the layer from scratch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

#: Names of gamma, beta, the moving mean and the moving variance.
TORCH = ("weight", "bias", "running_mean", "running_var")
SCRATCH = ("gamma", "beta", "moving_mean", "moving_var")
VOCABULARIES = (SCRATCH, TORCH)


@dataclass(frozen=True)
class NormView:
    """A layer with moving statistics, whichever names its tensors (channels,) have.

    Each access reads the layer anew, because moving a module to a device replaces its buffers. Writing into a tensor changes
    the layer.

    Attributes:
        layer: The layer itself.
        names: One of VOCABULARIES.
    """

    layer: nn.Module
    names: tuple[str, str, str, str]

    @classmethod
    def of(cls, layer: nn.Module) -> NormView | None:
        """Return the view of a layer; None if the layer has no moving statistics."""
        for names in VOCABULARIES:
            if hasattr(layer, "eps") and all(getattr(layer, name, None) is not None for name in names[2:]):
                return cls(layer, names)
        return None

    @property
    def gamma(self) -> Tensor | None:
        """The learned scale, if there is one."""
        return _read(self.layer, self.names[0])

    @property
    def beta(self) -> Tensor | None:
        """The learned shift, if there is one."""
        return _read(self.layer, self.names[1])

    @property
    def mean(self) -> Tensor:
        """The moving mean."""
        mean = _read(self.layer, self.names[2])
        assert mean is not None
        return mean

    @property
    def var(self) -> Tensor:
        """The moving variance."""
        var = _read(self.layer, self.names[3])
        assert var is not None
        return var

    @property
    def eps(self) -> float:
        """The number added to the variance."""
        eps: Any = self.layer.eps
        return float(eps)

    @property
    def batches(self) -> Tensor | None:
        """The counter of training batches that layers of torch have."""
        return _read(self.layer, "num_batches_tracked")

    @property
    def statistics(self) -> list[Tensor]:
        """The buffers that training changes: mean, variance and the counter if there is one."""
        return [self.mean, self.var, *([] if self.batches is None else [self.batches])]


def _read(layer: nn.Module, name: str) -> Tensor | None:
    tensor: Tensor | None = getattr(layer, name, None)
    return tensor
