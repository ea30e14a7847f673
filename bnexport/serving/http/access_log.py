"""Log lines as JSON, one object per line, written together and not one by one."""

from __future__ import annotations

import asyncio
import time
from typing import IO, Any

import orjson

#: Seconds that a line may wait for others, and lines that are written at once.
_DELAY, _MANY = 0.1, 1000


class JsonLog:
    """Writes events to a stream. A stream whose reader went away is no reason to stop serving.

    Args:
        stream: Text; standard error of the process.
        access: Whether each request gets a line, too.
    """

    def __init__(self, stream: IO[str], *, access: bool = True) -> None:
        self.access = access
        self._stream = stream
        self._lines: list[bytes] = []
        self._timer: asyncio.TimerHandle | None = None

    def event(self, what: str, /, **fields: Any) -> None:
        """Log an event at once."""
        self._lines.append(_line({"time": round(time.time(), 6), "event": what, **fields}))
        self.flush()

    def request(self, fields: dict[str, Any]) -> None:
        """Log a request, soon."""
        self._lines.append(_line(fields))
        if len(self._lines) >= _MANY:
            self.flush()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_DELAY, self.flush)

    def flush(self) -> None:
        """Write what waits."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        lines, self._lines = self._lines, []
        try:
            self._stream.write(b"".join(lines).decode())
            self._stream.flush()
        except (OSError, ValueError):  # the reader went away, or the disk is full
            return


def _line(fields: dict[str, Any]) -> bytes:
    return orjson.dumps(fields, default=str, option=orjson.OPT_APPEND_NEWLINE)
