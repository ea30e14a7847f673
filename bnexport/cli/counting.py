"""Progress of work that is counted in steps: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import click


@contextlib.contextmanager
def counting(what: str) -> Iterator[Callable[[int, int, str], None]]:
    """Show steps on standard error, where they disturb no result.

    Args:
        what: What is done, as the start of each line.

    Yields:
        What to call before each step: its number from 1, how many there are, and what it is.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)

        def show(number: int, count: int, step: str) -> None:
            if console.is_terminal:
                bar.update(task, description=f"{what}: {step}", completed=number - 1, total=count)
            else:
                click.echo(f"{what} {number}/{count}: {step}", err=True)

        yield show
