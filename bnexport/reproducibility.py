"""Strict float32, TF32 on purpose, deterministic algorithms, and seeds: set inside a block, restored after it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

from bnexport.errors import UsageError

#: Where torch keeps the precision of float32 kernels, parents before their children -> its value under "tf32".
#: oneDNN, which computes on the CPU, stays strict: TF32 is a format of GPUs.
_PLACES: dict[str, str] = {
    "": "tf32",
    "cuda.matmul": "tf32",
    "cudnn": "tf32",
    "cudnn.conv": "tf32",
    "cudnn.rnn": "tf32",
    "mkldnn": "ieee",
    "mkldnn.matmul": "ieee",
    "mkldnn.conv": "ieee",
    "mkldnn.rnn": "ieee",
}
#: What a place says that takes the value of its parent.
_INHERIT = "none"
#: Kind of device -> the places that its convolutions and products obey.
_IN_EFFECT: dict[str, tuple[str, ...]] = {
    "cpu": ("mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn"),
    "cuda": ("cuda.matmul", "cudnn.conv", "cudnn.rnn"),
}
#: What a place says -> for a report.
_WORDS = {"ieee": "strict float32", "tf32": "TF32"}
#: NVIDIA's libraries obey this variable before any setting: 0 switches TF32 off for good, 1 on.
OVERRIDE = "NVIDIA_TF32_OVERRIDE"
_OVERRIDES = {"float32": "0", "tf32": "1"}


@contextlib.contextmanager
def float32_precision(precision: str, *, exhaustive: bool = False) -> Iterator[None]:
    """What torch's float32 kernels may round to inside the block; every setting is as before after it.

    Only the ``fp32_precision`` settings are used, also for whoever set the older ``allow_tf32`` flags: reading a flag that
    contradicts them raises RuntimeError in torch (CUDA semantics notes, "TensorFloat-32"). What the older flags said comes
    back with them. Blocks may be nested.

    Args:
        precision: "float32": IEEE float32 everywhere. "tf32": TF32 in cuBLAS and cuDNN, for convolutions and products.
        exhaustive: Let cuDNN choose algorithms by the stopwatch, which may give other sums in each process. Otherwise its
            heuristic chooses among the deterministic ones.

    Raises:
        UsageError: There is no such precision.
    """
    if precision not in _OVERRIDES:
        raise UsageError(f"the precision {precision!r} is not known", remedy=f"Known: {', '.join(_OVERRIDES)}")
    import torch

    cudnn = torch.backends.cudnn
    deterministic, benchmark = cudnn.deterministic, cudnn.benchmark
    before: dict[str, str] = {}
    try:
        for place in _PLACES:
            # A place that says nothing answers with its parent's value. With the parents cleared first, what is read is
            # its own, and a place that inherited before inherits afterwards.
            before[place] = _read(place)
            _write(place, _INHERIT)
        for place, value in _PLACES.items():
            _write(place, "ieee" if precision == "float32" else value)
        cudnn.deterministic, cudnn.benchmark = not exhaustive, exhaustive
        yield
    finally:
        for place, value in before.items():
            _write(place, value)
        cudnn.deterministic, cudnn.benchmark = deterministic, benchmark


def strict_float32() -> contextlib.AbstractContextManager[None]:
    """IEEE float32 in torch inside the block (TF32 off, also for cuDNN), with deterministic cuDNN algorithms."""
    return float32_precision("float32")


@contextlib.contextmanager
def seeded(seed: int, *, devices: Sequence[Any] = ()) -> Iterator[None]:
    """The generators of torch, numpy and Python start from a seed inside the block, and go on as before after it.

    Args:
        seed: 0 to 2**63 - 1; numpy takes its lowest 32 bits.
        devices: CUDA devices whose generators are put back too.
    """
    import random

    import numpy as np
    import torch

    python, numpys = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=list(devices)):
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpys)


def effective_precision(device: str) -> str:
    """What torch's float32 kernels round to at this moment, read back from torch: "strict float32", "TF32", or per library.

    Args:
        device: Kind of device: "cpu" or "cuda".
    """
    found = {place: _read(place) for place in _IN_EFFECT[device]}
    if len(set(found.values())) == 1:
        return _WORDS.get(value := next(iter(found.values())), value)
    return ", ".join(f"{place} {_WORDS.get(value, value)}" for place, value in found.items())


def override_problem(precision: str) -> str | None:
    """Why a precision can't be had on an NVIDIA GPU in this process, as a sentence without its full stop; None when it can.

    The variable is read by NVIDIA's libraries once, when they are loaded, so it can't be changed from inside.
    """
    value = os.environ.get(OVERRIDE)
    if value is None or value == _OVERRIDES[precision]:
        return None
    return f"{OVERRIDE}={value} is set, which goes before every setting"


def _read(place: str) -> str:
    return str(_holder(place).fp32_precision)


def _write(place: str, value: str) -> None:
    holder = _holder(place)
    if place == "mkldnn":
        # Its attribute sets the value of all libraries instead of oneDNN's (torch 2.11 to 2.14).
        holder.set_flags(_fp32_precision=value)
    else:
        holder.fp32_precision = value


def _holder(place: str) -> Any:
    import torch

    found: Any = torch.backends
    for name in filter(None, place.split(".")):
        found = getattr(found, name)
    return found
