"""Strict float32 and deterministic algorithms."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def strict_float32() -> Iterator[None]:
    """IEEE float32 in torch inside the block (TF32 off, also for cuDNN), with deterministic cuDNN algorithms; restored after.

    Only the ``fp32_precision`` settings are used: mixing them with the older ``allow_tf32`` flags raises RuntimeError
    in torch (CUDA semantics notes, "TensorFloat-32").
    """
    import torch

    holders = [
        torch.backends,
        torch.backends.cuda.matmul,
        torch.backends.cudnn,
        torch.backends.cudnn.conv,  # type: ignore[attr-defined]
        torch.backends.cudnn.rnn,
        torch.backends.mkldnn,
        torch.backends.mkldnn.matmul,  # type: ignore[attr-defined]
        torch.backends.mkldnn.conv,  # type: ignore[attr-defined]
        torch.backends.mkldnn.rnn,  # type: ignore[attr-defined]
    ]
    before = [holder.fp32_precision for holder in holders]
    deterministic, benchmark = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    try:
        for holder in holders:
            holder.fp32_precision = "ieee"
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
        yield
    finally:
        # Parents first: setting a parent also sets its children, which are put back after it.
        for holder, value in zip(holders, before, strict=True):
            holder.fp32_precision = value
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = deterministic, benchmark
