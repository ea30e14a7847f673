"""uvicorn's HTTP connection with what it lacks: limits on the size and the time of headers, and reasons in JSON."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httptools
import orjson
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from bnexport.serving.http.fast_lane import FastCall, FastLane, Head
from bnexport.serving.limits import ServingLimits

#: Told the client's address, the status and the reason of what was refused before it was a request.
Refused = Callable[[str, int, str], None]
_MALFORMED = "the request is not HTTP/1.1 as it is written in RFC 9112. Let an HTTP library write it"


class LimitedConnection(HttpToolsProtocol):
    """One connection. ``limits``, ``fast_lane`` and ``refused`` are set on a subclass by ``limited``."""

    limits: ServingLimits
    fast_lane: FastLane | None = None
    refused: Refused = staticmethod(lambda *_: None)
    known_head: Head | None = None

    def connection_made(self, transport: Any) -> None:
        """A client came."""
        self._head_open, self._head_size, self._status, self._reason = True, 0, 400, _MALFORMED
        self._since = self.loop.time()
        self._idle_since: float | None = None
        self._unread_since: float | None = None
        self._call: FastCall | None = None  # a short request of which the body is not complete
        super().connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """The client, or we, closed it."""
        if self._call is not None:
            self._call.abandon()
            self._call = None
        super().connection_lost(exc)

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client sends no more. One that waits for its answer still reads it, and the connection ends with that."""
        if self._waits:
            self.cycle.keep_alive = False
        return self._waits and self.scheme == "http"  # TLS has no half-closed connections

    @property
    def _waits(self) -> bool:
        """Whether the last request is whole and has no answer yet."""
        return self._head_open and self.cycle is not None and not self.cycle.response_complete

    @property
    def expected(self) -> bool:
        """Whether the first request has not come yet, or a part of the headers of the next one has."""
        return self._head_open and (self._head_size > 0 or self.cycle is None) and not self.transport.is_closing()

    def data_received(self, data: bytes) -> None:
        """Bytes came. Those of headers that do not end are counted here, before the parser has them together."""
        if self._head_open:
            if self._head_size == 0:
                self._since, self._idle_since = self.loop.time(), None
            self._head_size += len(data)
        self._unset_keepalive_if_required()
        try:
            self._feed(data)
        except httptools.HttpParserError:
            self.send_400_response("")
        if self._head_open and self._head_size > self.limits.head_bytes and not self.transport.is_closing():
            self._too_large()
            self.send_400_response("")

    def _feed(self, data: bytes | memoryview) -> None:
        """Give bytes to the parser, which takes all that follows an Upgrade header for another protocol.

        There is none here, and a server may answer as if the header were not there (RFC 9110, 7.8; Java's client sends it
        with every first request), so the request is read again without it.
        """
        while data:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                data = memoryview(data)[upgrade.args[0] :]
                head = [
                    b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
                ]
                head += [b"%s: %s" % pair for pair in self.headers if pair[0] != b"upgrade"]
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
                self.parser.feed_data(b"\r\n".join((*head, b"", b"")))

    def on_message_begin(self) -> None:
        """A request begins; what uvicorn keeps of it for ASGI is made when it turns out to be needed."""
        self.url, self.headers, self.expect_100_continue = b"", [], False

    def on_headers_complete(self) -> None:
        """The headers are complete, and perhaps a part of the body came with them."""
        if self._head_size > self.limits.head_bytes:
            size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
            if size > self.limits.head_bytes:
                self._too_large()
                raise ValueError("headers too large")
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                raise ValueError("this is no proxy")
            return
        if len(self.connections) > self.limits.connections:
            self._status = 503
            self._reason = f"{self.limits.connections} connections are open, which is the limit. Try again in a second"
            raise ValueError("too many connections")
        if len(self.pipeline) >= self.limits.pipeline:
            self._status = 503
            self._reason = (
                f"more than {self.limits.pipeline} requests wait behind another one. Read their answers first"
            )
            raise ValueError("too many requests")
        self._head_open, self._since = False, self.loop.time()
        if self.fast_lane is not None and self._free() and (call := self.fast_lane.call(self)) is not None:
            self.cycle = self._call = call  # type: ignore[assignment]
            return
        url, headers, expect = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expect
        self.headers.extend(headers)
        super().on_headers_complete()

    def _free(self) -> bool:
        """Whether no request before this one waits for its answer, and the client reads its answers."""
        return (self.cycle is None or self.cycle.response_complete) and not self.flow.write_paused

    def on_body(self, body: bytes) -> None:
        """A part of the body came."""
        if self._call is None:
            super().on_body(body)
        else:
            self._call.body += body  # mostly all of it, and then the very same bytes

    def on_message_complete(self) -> None:
        """The request is complete; what comes next are headers again."""
        if self.parser.should_upgrade():
            return
        self._head_open, self._head_size = True, 0
        if self._call is None:
            super().on_message_complete()
            return
        call, self._call = self._call, None
        call.begin()

    def answered(self) -> None:
        """A short request was answered. uvicorn would set a timer for each; ``sweep`` looks after idle connections."""
        if self.pipeline or self.flow.read_paused:
            self.on_response_complete()
        else:
            self.server_state.total_requests += 1
            self._idle_since = self.loop.time()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 -- uvicorn's words tell nobody what is wrong
        """Refuse what is no request, with a reason, and close; whole requests before it are answered first, without one."""
        if self.transport.is_closing() or (self._waits and not self.cycle.keep_alive):
            return
        body = orjson.dumps({"error": f"{self._reason}."})
        head = [
            STATUS_LINE[self._status],
            b"retry-after: 1\r\n" if self._status == 503 else b"",
            b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body),
        ]
        self.refused(self.client[0] if self.client else "", self._status, self._reason)
        if self._waits:
            self.cycle.keep_alive = False
            return
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            self.transport.write(b"".join([*head, body]))
        self.transport.close()

    def sweep(self, now: float) -> None:
        """Close a connection whose client does not get on with its headers or its body.

        One that is idle between two requests is closed as uvicorn does it, and one whose client does not read is cut off.
        """
        stuck = self.flow.write_paused or self.transport.is_closing()
        self._unread_since = None if not stuck else now if self._unread_since is None else self._unread_since
        if self._unread_since is not None and now - self._unread_since > self.limits.body_seconds:
            self.transport.abort()
        elif self._idle_since is not None and now - self._idle_since > self.timeout_keep_alive:
            self.timeout_keep_alive_handler()
        elif self._head_open:
            if self.expected and now - self._since > self.limits.head_seconds:
                self._too_slow(f"the headers were not there after {self.limits.head_seconds:g} seconds")
        elif now - self._since > self.limits.body_seconds:
            self._too_slow(f"the body was not there after {self.limits.body_seconds:g} seconds")

    def _too_slow(self, reason: str) -> None:
        self._status, self._reason = 408, f"{reason}. Send it faster"
        self.send_400_response("")

    def _too_large(self) -> None:
        self._status = 431
        self._reason = f"the headers have more than {self.limits.head_bytes} bytes. Send fewer"


def limited(
    limits: ServingLimits, fast_lane: FastLane | None = None, refused: Refused | None = None
) -> type[LimitedConnection]:
    """The class of connections with these limits; without a fast lane every request goes through the application."""
    values: dict[str, Any] = {"limits": limits, "fast_lane": fast_lane}
    if refused is not None:
        values["refused"] = staticmethod(refused)
    return type("LimitedConnection", (LimitedConnection,), values)
