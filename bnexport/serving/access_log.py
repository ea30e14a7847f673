"""A log of JSON objects, one per line. A thread writes it, so that a slow reader can't stop the server."""

from __future__ import annotations

import asyncio
import json
import logging
import queue
import select
import threading
import time
from collections.abc import Iterator
from typing import IO, Any

import orjson

#: Longest delay in seconds and number of requests' lines that are written together, which takes less than a millisecond and
#: is faster than line by line.
_DELAY, _MANY = 0.1, 250
#: Pieces that may wait for a slow reader; further ones are dropped and counted.
_PIECES = 256
#: Seconds for writing the last lines when the log is closed.
_PATIENCE = 2.0


class JsonLog:
    """Writes events to a text stream. The server keeps serving if the stream's reader is gone.

    ``access`` adds a line for each request. ``process`` is the number among several processes, and a field of each line.
    """

    def __init__(self, stream: IO[str], *, access: bool = True, process: int | None = None) -> None:
        self.access = access
        self._own = {} if process is None else {"process": process}
        self._stream = stream
        self._entries: list[dict[str, Any]] = []
        self._dropped = 0
        self._timer: asyncio.TimerHandle | None = None
        self._pieces: queue.Queue[bytes | None] = queue.Queue(_PIECES)
        self._loggers: list[logging.Logger] = []
        self._handler = _Handler(self)
        self._thread = threading.Thread(target=self._write, name="bnexport-log", daemon=True)
        self._thread.start()

    def event(self, what: str, /, **fields: Any) -> None:
        """Log an event at once."""
        self._entries.append({"time": round(time.time(), 6), "event": what, **self._own, **fields})
        self.flush()

    def request(self, fields: dict[str, Any]) -> None:
        """Log a request within a tenth of a second."""
        self._entries.append(fields | self._own if self._own else fields)
        if len(self._entries) >= _MANY:
            self.flush()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_DELAY, self.flush)

    def take_over(self, *names: str) -> None:
        """Log warnings and errors of libraries' loggers as events."""
        for logger in map(logging.getLogger, names):
            logger.addHandler(self._handler)
            logger.propagate = False
            self._loggers.append(logger)

    def flush(self) -> None:
        """Pass waiting lines to the writing thread."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        lines, self._entries = list(map(_line, self._entries)), []
        if self._dropped:
            lines.append(_line({"time": round(time.time(), 6), "event": "log lines dropped", "lines": self._dropped}))
        try:
            self._pieces.put_nowait(b"".join(lines))
            self._dropped = 0
        except queue.Full:
            self._dropped += len(lines) - bool(self._dropped)

    def close(self) -> None:
        """Write waiting lines, unless the stream's reader is gone."""
        for logger in self._loggers:
            logger.removeHandler(self._handler)
            logger.propagate = True
        self.flush()
        try:
            self._pieces.put(None, timeout=_PATIENCE)
        except queue.Full:
            return
        self._thread.join(_PATIENCE)

    def _write(self) -> None:
        while (piece := self._pieces.get()) is not None:
            try:
                for part in _parts(piece) if self._own else (piece,):
                    self._stream.write(part.decode())
                    self._stream.flush()
            except (OSError, ValueError):  # the reader is gone, or the disk is full
                continue


class _Handler(logging.Handler):
    """Logs records of libraries as events. Their own handlers write no JSON, and block on a slow reader."""

    def __init__(self, log: JsonLog) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        """Log a record; ``trace`` is the traceback, in one text."""
        fields = {"logger": record.name, "message": record.getMessage()}
        if record.exc_info:
            fields["trace"] = logging.Formatter().formatException(record.exc_info)
        self._log.event("fault" if record.levelno >= logging.ERROR else "warning", **fields)


def _parts(piece: bytes) -> Iterator[bytes]:
    """Yield whole lines in pieces that a pipe writes atomically (pipe(7): PIPE_BUF), so that processes do not mix them."""
    start = 0
    while start < len(piece):
        end = piece.rfind(b"\n", start, start + select.PIPE_BUF) + 1 or piece.find(b"\n", start) + 1 or len(piece)
        yield piece[start:end]
        start = end


def _line(fields: dict[str, Any]) -> bytes:
    """Return a line of JSON in ASCII, which every encoding of a stream can write."""
    try:
        line = orjson.dumps(fields, default=str, option=orjson.OPT_APPEND_NEWLINE)
    except TypeError:  # a file name that is not UTF-8; the other lines must still be written
        return json.dumps(fields, default=str).encode() + b"\n"
    return line if line.isascii() else json.dumps(orjson.loads(line)).encode() + b"\n"
