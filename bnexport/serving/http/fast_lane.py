"""Short inference requests, answered without a task and without ASGI's messages, which cost more than a small model.

The connection passes such a request to the fast lane once its headers are complete. Everything else (large, packed or chunked
bodies, pipelined requests, other routes) goes through the application. Both call the same functions of app.py, so the
answers are the same.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol

from bnexport.errors import BnexportError, RequestError
from bnexport.serving.http.app import App, FoundRoute, find_route, infer, infer_reply, infer_request, infer_target
from bnexport.serving.http.exchange import STATUS_LINES, Exchange, Reply, error_reply, reply_headers
from bnexport.tensors import Array

#: Bytes of a short body: uvicorn buffers no more until the application reads.
SHORT_BODY = 65536
#: A request with one of these headers needs more processing than its plain body.
_SLOW_HEADERS = (b"transfer-encoding", b"content-encoding", b"expect", b"upgrade")


class Head(NamedTuple):
    """The parsed head of a request. Clients repeat the same head."""

    url: bytes
    path: str
    pairs: list[tuple[bytes, bytes]]
    found: FoundRoute
    headers: dict[bytes, bytes]


class Line(Protocol):
    """The part of a connection that the fast lane uses."""

    parser: Any  # httptools'
    url: bytes  # URL in the request
    headers: list[tuple[bytes, bytes]]  # Headers of the request that is being read
    client: tuple[str, int] | None  # Address and port
    transport: Any  # asyncio's
    known_head: Head | None  # Head of the last request in the fast lane

    def answered(self) -> None:
        """Note that a request was answered."""


class FastLane:
    """Selects the short inference requests to an application."""

    def __init__(self, app: App) -> None:
        self.app = app
        self._longest = min(SHORT_BODY, app.state.settings.limits.body_bytes)
        self._previous: Line | None = None

    def alone(self, connection: Line) -> bool:
        """Return True if this connection sent the previous request too: no other request could share its batch."""
        before, self._previous = self._previous, connection
        return before is connection

    def call(self, connection: Line) -> FastCall | None:
        """Return the request whose headers a connection has read; None if it is not a short inference request."""
        parser = connection.parser
        if parser.get_method() != b"POST" or not parser.should_keep_alive() or self.app.state.draining:
            return None
        head = connection.known_head
        if head is None or head.pairs != connection.headers or head.url != connection.url:
            if (head := self._understood(connection)) is None:
                return None
            connection.known_head = head
        return FastCall(connection, self, head)

    def _understood(self, connection: Line) -> Head | None:
        """Return the head of a request that qualifies for the fast lane; None for others."""
        url, pairs = connection.url, connection.headers
        found, headers = _infer_route(url), dict(pairs)
        length = headers.get(b"content-length", b"")
        fits = (
            found is not None
            and 0 < len(length) <= len(str(SHORT_BODY))
            and int(length) <= self._longest
            and len(headers) == len(pairs)
            and b"host" in headers
            and headers.keys().isdisjoint(_SLOW_HEADERS)
            and connection.parser.get_http_version() == "1.1"
        )
        return Head(url, url.decode(), pairs, found, headers) if found is not None and fits else None


@functools.lru_cache(1024)
def _infer_route(url: bytes) -> FoundRoute | None:
    """Return the inference route of a URL that needs no decoding; None for other URLs."""
    if not url.startswith(b"/") or not url.isascii() or any(char in url for char in b"%?#"):
        return None
    try:
        found = find_route("POST", url.decode())
    except RequestError:
        return None
    return found if found.handler is infer else None


class FastCall(Exchange):
    """One request with the attributes that uvicorn reads, and the batcher's Waiter."""

    __slots__ = (
        "_connection",
        "_lane",
        "_request",
        "_route",
        "_start",
        "body",
        "disconnected",
        "keep_alive",
        "response_complete",
    )
    # uvicorn sets this event to wake the task of a request; a fast call has no task.
    message_event = SimpleNamespace(set=lambda: None)

    def __init__(self, connection: Line, lane: FastLane, head: Head) -> None:
        client = connection.client[0] if connection.client else ""
        super().__init__("POST", head.path, head.headers, _no_more, lane.app.id_of(head.headers), client)
        self._connection, self._lane, self._route = connection, lane, head.found
        self.body = b""  # Received part
        self.keep_alive = True  # uvicorn clears it when it stops
        self.disconnected = self.response_complete = False
        lane.app.state.active += 1

    @property
    def response_started(self) -> bool:
        """True if the answer was written, which happens at once."""
        return self.response_complete

    def begin(self) -> None:
        """Decode the complete body, and queue for the answer."""
        self._start = time.perf_counter_ns()
        app, body = self._lane.app, self.body
        state = app.state
        try:
            state.let_in(self.headers.get(b"authorization", b""))
            state.hold(self, len(body))
            self.read, self.bytes_in = True, len(body)
            model = infer_target(state, self, *self._route.captured)
            self._request = request = infer_request(model, self, body)
            arrays = model.batcher.run_now(request.inputs, request.rows) if self._lane.alone(self._connection) else None
            if arrays is None:
                model.batcher.enqueue(request.inputs, request.rows, self, request.timeout)
                return
            reply = infer_reply(model.response(request, arrays))
        except Exception as error:
            reply = error_reply(state.failure(self, error))
        self._answer(reply)

    def abandon(self) -> None:
        """Note that the client disconnected before the body was complete."""
        self._lane.app.state.active -= 1

    def done(self) -> bool:
        """Return True if the answer was given."""
        return self.response_complete

    def set_result(self, result: dict[str, Array], /) -> None:
        """Answer with output name -> (rows, ...)."""
        assert self.model is not None
        try:
            reply = infer_reply(self.model.response(self._request, result))
        except Exception as error:
            reply = error_reply(self._lane.app.state.failure(self, error))
        self._answer(reply)

    def set_exception(self, exception: BnexportError, /) -> None:
        """Answer with an error."""
        self._answer(error_reply(exception))

    def _answer(self, reply: Reply) -> None:
        app, connection = self._lane.app, self._connection
        app.state.active -= 1
        app.state.release(self, self.held)
        reply = app.finished(self, self._route.name, reply, self._start)
        self.response_complete = self.read = True
        transport = connection.transport
        if self.disconnected or transport.is_closing():
            return
        close = app.state.draining or not self.keep_alive
        parts = [STATUS_LINES[reply.status]]
        for name, value in reply_headers(reply, self, close=close):
            parts += (name, b": ", value, b"\r\n")
        parts += (b"\r\n", reply.body)
        transport.write(b"".join(parts))
        if close:
            transport.close()
        connection.answered()


async def _no_more() -> Mapping[str, Any]:
    """Replace ASGI's receive: the request is read already."""
    return {"type": "http.disconnect"}
