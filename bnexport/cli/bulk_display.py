"""How ``bnexport predict --out`` shows its progress, on standard error: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console

from bnexport.cli.progress_bar import make_bar
from bnexport.serving.bulk.request import BulkProgress

#: Seconds between two lines of a log.
_PAUSE = 10.0


class BulkDisplay(BulkProgress):
    """Listener that prints; use it in a ``with`` block, which ends the bar also after an error."""

    def __init__(self, console: Console | None = None, *, pause: float = _PAUSE) -> None:
        self._console = console or Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
        self._bar = make_bar(self._console)
        self._task = self._bar.add_task("images", total=None, visible=False)
        self._pause, self._told = pause, time.monotonic()
        self._rows = self._done = 0

    def __enter__(self) -> BulkDisplay:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def on_start(self, rows: int, done: int, workers: int) -> None:
        """Say how much there is to do."""
        self._rows, self._done = rows, done
        before = f", {done} of them are there already" if done else ""
        self._console.print(f"{rows} images{before}; {workers} worker{'s' if workers > 1 else ''}")
        self._bar.update(self._task, completed=done, total=rows, visible=True)

    def on_shard(self, rows: int) -> None:
        """Move the bar; in a log, print a line from time to time."""
        self._done += rows
        self._bar.update(self._task, completed=self._done)
        if not self._console.is_terminal and time.monotonic() - self._told >= self._pause:
            self._told = time.monotonic()
            self._console.print(f"{self._done} of {self._rows} images")
