"""A progress bar on a terminal and one plain line in a log, both on standard error."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress_bar(words: str) -> Iterator[Callable[[int, int], None]]:
    """Yields a function that is told how much is done and how much there is; the bar vanishes at the end.

    Args:
        words: What is done: "evaluating".
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from bnexport.reporting.tables import make_console

    console = make_console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task, told = bar.add_task(words, total=None), False

        def advance(done: int, total: int) -> None:
            nonlocal told
            if not told and not console.is_terminal:
                console.print(f"{words}: {total} images")
            told = True
            bar.update(task, completed=done, total=total)

        yield advance
