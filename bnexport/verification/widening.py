"""Casts to float32 inside a user's forward, widened: ``x.float() / 255`` must not take the reference out of float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class wide_casts(TorchFunctionMode):  # noqa: N801 -- used as a context manager, like torch.inference_mode
    """Inside the block every call that names float32 gets float64. Narrower types stay: to round was the author's wish."""

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
