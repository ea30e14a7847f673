"""Casts to float32 inside a user's forward, widened: ``x.float() / 255`` must not take the reference out of float64.

This is a separate module because the class needs torch, and ``reference`` is imported on machines without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class wide_casts(TorchFunctionMode):  # noqa: N801 -- used as a context manager, like torch.inference_mode
    """Gives float64 to every call in the block that names float32. Narrower types stay: the author wants that rounding."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call ``func`` with the wider type."""
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        named = {name: _wide(value) for name, value in (kwargs or {}).items()}
        return func(*map(_wide, args), **named)


def _wide(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value
