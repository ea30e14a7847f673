"""Interrupts by Ctrl-C that can't be lost, and SIGTERM as an interrupt.

Python raises KeyboardInterrupt in the code that runs at that moment. Some code swallows the exception: finalisers, weak
reference callbacks, bare ``except`` clauses in compilers and tracers. So the signal is also recorded, and ``check`` raises it
again before new files are written.
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

#: Exit code of Python if the rest of its output can't be written.
_UNFLUSHED = 120

_noted = threading.Event()


@contextlib.contextmanager
def noted() -> Iterator[None]:
    """Record interrupts inside the block, in addition to raising them. Outside the main thread nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _noted.clear()
    before, hook = signal.signal(signal.SIGINT, _note), sys.unraisablehook

    def report(lost: sys.UnraisableHookArgs) -> None:
        if not isinstance(lost.exc_value, KeyboardInterrupt):  # the interrupt is recorded already
            hook(lost)

    sys.unraisablehook = report
    try:
        yield
    finally:
        sys.unraisablehook = hook
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Inside the block, SIGTERM raises KeyboardInterrupt as Ctrl-C does, so that files and processes are cleaned up.

    By default SIGTERM ends a process at once, without its child processes, and the first process of a container ignores it.
    Outside the main thread nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def blocked(*numbers: signal.Signals) -> Iterator[None]:
    """Delay signals until after the block. Processes that start in the block keep them blocked."""
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def check() -> None:
    """Raise KeyboardInterrupt for a recorded interrupt, once, so that the clean-up after it is not interrupted.

    Outside the main thread nothing is raised.
    """
    if _noted.is_set() and threading.current_thread() is threading.main_thread():
        _noted.clear()
        raise KeyboardInterrupt


def _note(_number: int, _frame: FrameType | None) -> None:
    _noted.set()
    raise KeyboardInterrupt


def exit_at_once(code: int) -> NoReturn:
    """Flush the output and end the process without Python's finalisation, which waits for threads and can fail on them.

    Code 0 becomes Python's code for output that can't be written.
    """
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # a full disk, or a reader that has ended
        code = code or _UNFLUSHED
    os._exit(code)
