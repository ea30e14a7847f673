"""Ctrl-C that can't get lost, and SIGTERM that is one.

Python raises KeyboardInterrupt in whatever code runs at that moment, and some of it swallows the exception: finalisers,
weak reference callbacks, bare ``except`` clauses in compilers and tracers. So the signal is noted as well, and asked about
at the points after which something new appears on disk.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

#: What Python ends with when the last of the output can't be written.
_UNFLUSHED = 120

_noted = threading.Event()


@contextlib.contextmanager
def noted() -> Iterator[None]:
    """Note interrupts inside the block; they are raised as usual, too. Outside the main thread nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _noted.clear()
    before, hook = signal.signal(signal.SIGINT, _note), sys.unraisablehook

    def report(lost: sys.UnraisableHookArgs) -> None:
        if not isinstance(lost.exc_value, KeyboardInterrupt):  # a lost interrupt is noted; its traceback tells nothing
            hook(lost)

    sys.unraisablehook = report
    try:
        yield
    finally:
        sys.unraisablehook = hook
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Inside the block SIGTERM is an interrupt as Ctrl-C is, after which everybody cleans up.

    Otherwise it ends a process at once, with other processes still there that it started; or, where the process is the first
    one of a container, it does nothing at all. Outside the main thread nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def check() -> None:
    """Raise the KeyboardInterrupt that was noted and got lost.

    Raises:
        KeyboardInterrupt: Once per interrupt, so that what cleans up after it is not stopped again.
    """
    if _noted.is_set():
        _noted.clear()
        raise KeyboardInterrupt


def _note(_number: int, _frame: FrameType | None) -> None:
    _noted.set()
    raise KeyboardInterrupt


def exit_at_once(code: int) -> NoReturn:
    """End the process with what it printed, without Python's own end, which would wait for threads or trip over them.

    Args:
        code: As of ``sys.exit``; output that can't be written makes 0 the code that Python has for it.
    """
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # a full disk, a reader that went away
        code = code or _UNFLUSHED
    os._exit(code)
