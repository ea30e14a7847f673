"""Strict float32, TF32 on request, deterministic algorithms, and seeds: set inside a block, restored after it."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bnexport.errors import UsageError

#: torch's settings of the precision of float32 kernels, parents before their children -> value for "tf32".
#: oneDNN, which computes on the CPU, stays strict, because TF32 is a format of GPUs.
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
#: Value of a setting that inherits its parent's.
_INHERIT = "none"
#: Setting of the CPU threads inside one operator. Each thread has its own number; a new thread gets the last number set.
_THREADS = "threads"
#: Kind of device -> the settings of its convolutions and products.
_IN_EFFECT: dict[str, tuple[str, ...]] = {
    "cpu": ("mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn"),
    "cuda": ("cuda.matmul", "cudnn.conv", "cudnn.rnn"),
}
#: Result of ``effective_precision`` for IEEE float32 in all kernels.
STRICT = "strict float32"
#: Value of a setting -> its name in a report.
_WORDS = {"ieee": STRICT, "tf32": "TF32"}
#: This variable overrides all settings of NVIDIA's libraries: 0 switches TF32 off, 1 on.
OVERRIDE = "NVIDIA_TF32_OVERRIDE"
_OVERRIDES = {"float32": "0", "tf32": "1"}


def float32_precision(
    precision: str, *, exhaustive: bool = False, threads: int | None = None
) -> contextlib.AbstractContextManager[None]:
    """Set the precision of torch's float32 kernels inside a block, and restore every setting after it.

    Only the ``fp32_precision`` settings are used, because torch raises RuntimeError when an older ``allow_tf32`` flag that
    contradicts them is read (CUDA semantics notes, "TensorFloat-32"). After the block the older flags have their old values.

    **Threads.** torch has these settings once per process. So the first thread that enters a block sets them, and the last one
    that leaves restores them. Blocks with the same arguments run concurrently. A block with other arguments waits until these
    threads have left. Waiting threads continue in the order of their arrival. A later block of the current precision overtakes
    them only while a block is open that was entered before they arrived. So no thread waits forever if every block ends.

    **Nesting.** A thread takes part in the precision of its innermost block only: while it waits for an inner block of another
    precision, and inside that block, it does not block the outer precision. So two threads that nest the precisions in opposite
    orders can't deadlock. Leaving the inner block waits for the outer precision in the same way.

    There are two limits. A block deadlocks if its code waits for another thread that enters a block of another precision. And
    ``yield`` or ``await`` inside a block lets other code of the same thread run with its settings; they are still restored
    when the last block ends, also if blocks of one thread end in another order than they began.

    Code that changes the settings inside a block changes them for all threads in it. They are set again when the next thread
    enters. ``effective_precision`` reads the current settings.

    Args:
        precision: "float32": IEEE float32 in all kernels. "tf32": TF32 in cuBLAS and cuDNN, for convolutions and products.
        exhaustive: Let cuDNN choose algorithms by trial, so sums may differ from process to process. Otherwise its heuristic
            chooses among the deterministic ones.
        threads: CPU threads inside one operator; None keeps their number.

    Raises:
        UsageError: The precision is unknown.
    """
    if precision not in _OVERRIDES:
        raise UsageError(f"the precision {precision!r} is unknown", remedy=f"Choose one of {', '.join(_OVERRIDES)}")
    return _TURNS.block(_Mode(precision, exhaustive, threads))


def strict_float32() -> contextlib.AbstractContextManager[None]:
    """Set IEEE float32 in torch inside the block (TF32 off, also for cuDNN), with deterministic cuDNN algorithms."""
    return float32_precision("float32")


@contextlib.contextmanager
def seeded(seed: int, *, devices: Sequence[Any] = ()) -> Iterator[None]:
    """Start the generators of torch, numpy and Python from a seed inside the block, and restore their states after it.

    The generators belong to the process, so other threads draw from them too. The seed is 0 to 2**63 - 1; numpy uses its lowest
    32 bits. ``devices`` are CUDA devices whose generators are also restored.
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
    """Return the current precision of torch's float32 kernels on "cpu" or "cuda": STRICT, "TF32", or a list by library."""
    found = {place: str(_read(place)) for place in _IN_EFFECT[device]}
    if len(set(found.values())) == 1:
        return _WORDS.get(value := next(iter(found.values())), value)
    return ", ".join(f"{place} {_WORDS.get(value, value)}" for place, value in found.items())


def override_problem(precision: str) -> str | None:
    """Return why a precision is impossible on an NVIDIA GPU in this process, as a sentence without its full stop, or None.

    NVIDIA's libraries read the variable once, when they are loaded, so this process can't change it.
    """
    value = os.environ.get(OVERRIDE)
    if value is None or value == _OVERRIDES[precision]:
        return None
    return f"{OVERRIDE}={value} is set, which overrides every setting"


@dataclass(frozen=True)
class _Mode:
    """Arguments of a block; threads with equal arguments run concurrently."""

    precision: str
    exhaustive: bool
    threads: int | None

    def settings(self) -> dict[str, Any]:
        """Return the value of every setting inside the block."""
        strict = self.precision == "float32"
        values: dict[str, Any] = {place: "ieee" if strict else value for place, value in _PLACES.items()}
        values |= {"cudnn.deterministic": not self.exhaustive, "cudnn.benchmark": self.exhaustive}
        return values if self.threads is None else values | {_THREADS: self.threads}


@dataclass(eq=False)
class _Block:
    """One open block."""

    mode: _Mode  # Its arguments
    stack: list[_Block]  # All open blocks of its thread, the innermost last
    around: dict[str, Any] = field(default_factory=dict)  # Settings of the enclosing block when this one was entered


class _Turns:
    """The threads inside blocks and the waiting threads; ``float32_precision`` states the rules.

    A thread is identified by its stack of blocks, since another thread may close a generator. A thread is inside if the mode of
    its innermost block is in force.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._own = threading.local()
        self._arrivals = itertools.count()
        self._mode: _Mode | None = None  # mode of all threads inside
        self._outside: dict[str, Any] = {}  # settings before the first thread entered
        self._inside: dict[int, int] = {}  # id of a stack -> number of its arrival
        self._waiting: dict[int, _Mode] = {}  # number of an arrival -> mode
        self._threads: dict[int, int] = {}  # id of a stack -> CPU threads of its thread, to be restored

    @contextlib.contextmanager
    def block(self, mode: _Mode) -> Iterator[None]:
        """Enter a block of a mode, and leave it at the end."""
        if not hasattr(self._own, "stack"):
            self._own.stack = []
        block = _Block(mode, self._own.stack)
        try:
            self._enter(block)
            yield
        finally:
            self._leave(block)

    def _enter(self, block: _Block) -> None:
        with self._changed:
            stack, nested = block.stack, id(block.stack) in self._inside
            if nested:
                block.around = {name: _read(name) for name in block.mode.settings()}
            stack.append(block)
            if nested and block.mode == self._mode:
                _change(block.mode.settings())
                return
            self._step_out(stack)
            self._step_in(stack, block.mode)

    def _leave(self, block: _Block) -> None:
        with self._changed:
            stack = block.stack
            if block not in stack:  # interrupted before it was entered
                return
            at = stack.index(block)
            stack.remove(block)
            if at < len(stack):  # a generator's block, left before a later one
                stack[at].around = block.around
                return
            outer = stack[-1].mode if stack else None
            if outer is None or outer != block.mode or id(stack) not in self._inside:
                self._step_out(stack)
                if outer is None:
                    return
                self._step_in(stack, outer)
            alone = len(self._inside) == 1
            _change(block.around if alone else outer.settings())

    def _step_in(self, stack: list[_Block], mode: _Mode) -> None:
        """Wait until a thread may enter a mode, and set the mode."""
        number = next(self._arrivals)
        self._waiting[number] = mode
        try:
            self._changed.wait_for(lambda: self._may_enter(number, mode))
        finally:
            del self._waiting[number]
            self._changed.notify_all()  # the next thread may enter now
        first = not self._inside
        self._inside[id(stack)] = number  # from here _step_out can restore the state
        if first:
            self._mode = mode
            _take(mode.settings(), into=self._outside)
        if mode.threads is not None:
            self._threads[id(stack)] = self._outside[_THREADS] if first else self._threads_before(mode.threads)
        _change(mode.settings())

    def _may_enter(self, number: int, mode: _Mode) -> bool:
        if not self._inside:
            return number == min(self._waiting)
        oldest = min(self._inside.values())
        passed = [other for other, wanted in self._waiting.items() if other < number and wanted != mode]
        return mode == self._mode and all(oldest < other for other in passed)

    def _step_out(self, stack: list[_Block]) -> None:
        """Leave the current mode; the last thread restores the settings before it."""
        if self._inside.pop(id(stack), None) is None:
            return
        if (threads := self._threads.pop(id(stack), None)) is not None:
            _write(_THREADS, threads)
        if not self._inside:
            for name, value in self._outside.items():
                _write(name, value)
            self._outside, self._mode = {}, None
        self._changed.notify_all()

    def _threads_before(self, threads: int) -> int:
        """Return the CPU threads of a thread that joins others; before its first computation it has those of the block."""
        found = int(_read(_THREADS))
        return int(self._outside[_THREADS]) if found == threads else found


_TURNS = _Turns()


def _take(names: Mapping[str, Any], *, into: dict[str, Any]) -> None:
    """Read settings one by one into a dict, so that after an interrupt it has all settings that may have changed.

    A setting without a value returns its parent's. The parents are cleared first, so each setting returns its own value, and an
    inherited setting is inherited afterwards.
    """
    for name in names:
        into[name] = _read(name)
        if name in _PLACES:
            _write(name, _INHERIT)


def _change(settings: Mapping[str, Any]) -> None:
    """Write the settings that have another value now; the others are not written, because other threads compute."""
    for name, value in settings.items():
        if _read(name) != value:
            _write(name, value)


def _read(name: str) -> Any:
    holder, attribute = _holder(name)
    value = getattr(holder, attribute)
    return value() if name == _THREADS else value


def _write(name: str, value: Any) -> None:
    holder, attribute = _holder(name)
    if name == _THREADS:
        holder.set_num_threads(value)
    elif name == "mkldnn":
        # Its attribute sets the value of all libraries instead of oneDNN's (torch 2.11 to 2.14).
        holder.set_flags(_fp32_precision=value)
    else:
        setattr(holder, attribute, value)


def _holder(name: str) -> tuple[Any, str]:
    """Return the object that has a setting, and the attribute that reads it."""
    import torch

    if name == _THREADS:
        return torch, "get_num_threads"
    found: Any = torch.backends
    parts = [*filter(None, name.split(".")), "fp32_precision"] if name in _PLACES else name.split(".")
    for part in parts[:-1]:
        found = getattr(found, part)
    return found, parts[-1]
