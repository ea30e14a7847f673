"""Output of the commands: results for programs, progress, and prints of user code kept out of both.

Progress is a bar on a terminal and plain lines in a log.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import click

from bnexport import progress

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


def prints_aside() -> contextlib.AbstractContextManager[object]:
    """Send the prints of a user's network to standard error: they are not results, and would break --json."""
    return contextlib.redirect_stdout(sys.stderr)


def warn(text: str) -> None:
    """Print a warning on standard error; an empty text prints nothing."""
    if text:
        click.echo(f"WARNING: {text}", err=True)


#: Seconds of the shortest stage that has a line in a log: a runtime that can't run here takes none.
_SHOWN_FROM = 0.05
#: File name that stands for standard output.
STDOUT = "-"


def write_json(target: str, value: dict[str, Any]) -> None:
    """Write a document to a file, or print it where the target is STDOUT."""
    write_result(target, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def write_result(target: str, content: bytes) -> None:
    """Write bytes to a file, or print them where the target is STDOUT."""
    from bnexport.files import forget_reader, write_atomically

    if target in (STDOUT, "/dev/stdout"):  # a file behind the device would lose what is printed
        try:
            click.echo(content.decode(), nl=False)
        except BrokenPipeError:  # the exit code still reports the verdict
            forget_reader()
    else:
        write_atomically(Path(target), content, follow=True)


def make_bar(console: Console, *, timed: bool = True, counted: bool = True) -> Progress:
    """Return a bar that is shown only on a terminal, and removed at the end.

    ``timed`` shows the time left, for steps of similar length; ``counted`` shows the number of steps instead of their share.
    """
    from rich import progress as rich

    return rich.Progress(
        rich.TextColumn("{task.description}", markup=False),
        rich.BarColumn(),
        rich.MofNCompleteColumn() if counted else rich.TaskProgressColumn(),
        *((rich.TimeRemainingColumn(),) if timed else ()),
        console=console,
        transient=True,
        disable=not console.is_terminal,
        speed_estimate_period=30.0 if counted else 3600.0,
    )


class BarDisplay:
    """Base of listeners that print lines and move a bar; the ``with`` block ends the bar, also after an error."""

    def __init__(self, console: Console, description: str = "") -> None:
        self._console = console
        self._bar = make_bar(console)
        self._task = self._bar.add_task(description, total=None, visible=False)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


@contextlib.contextmanager
def stages(*, quiet: bool = False, logged: bool = True) -> Iterator[progress.Progress]:
    """Show a job's stages on standard error: a bar on a terminal; in a log, with ``logged``, one line per stage."""
    from bnexport.reporting.tables import make_console

    if quiet:
        yield progress.silent
        return
    console = make_console(stderr=True)
    with make_bar(console, counted=False) as bar:
        task, shown, begun = bar.add_task("", total=None), "", time.perf_counter()

        def end() -> None:
            seconds = time.perf_counter() - begun
            if shown and logged and not console.is_terminal and seconds >= _SHOWN_FROM:
                console.print(f"{shown}: {seconds:.1f} s", soft_wrap=True)

        def show(stage: str, done: float, total: float) -> None:
            nonlocal shown, begun
            if stage != shown:
                end()
                shown, begun = stage, time.perf_counter()
            bar.update(task, description=stage, completed=done, total=total)

        yield show
        end()


@contextlib.contextmanager
def progress_bar(words: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a function of the numbers of finished and of all images; a log gets one line, which starts with ``words``."""
    from bnexport.reporting.tables import make_console

    console = make_console(stderr=True)
    with make_bar(console) as bar:
        task, printed = bar.add_task(words, total=None), False

        def advance(done: int, total: int) -> None:
            nonlocal printed
            if not printed and not console.is_terminal:
                console.print(f"{words}: {total} images", soft_wrap=True)
            printed = True
            bar.update(task, completed=done, total=total)

        yield advance


@contextlib.contextmanager
def counting(what: str) -> Iterator[Callable[[int, int, str], None]]:
    """Show steps of different length on standard error; a log gets one line for each, which starts with ``what``.

    Yields a function to call before each step, with its number from 1, the number of steps, and the step's name.
    """
    from bnexport.reporting.tables import make_console

    console = make_console(stderr=True)
    with make_bar(console, timed=False) as bar:
        task = bar.add_task(what, total=None)

        def show(number: int, count: int, step: str) -> None:
            if console.is_terminal:
                bar.update(task, description=f"{what}: {step}", completed=number - 1, total=count)
            else:
                console.print(f"{what} {number}/{count}: {step}", soft_wrap=True)

        yield show
