"""uvicorn's HTTP connection with what it lacks: limits on the size and the time of headers, and reasons in JSON."""

from __future__ import annotations

from typing import Any

import orjson
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

_MALFORMED = "the request is not HTTP/1.1 as it is written in RFC 9112. Let an HTTP library write it"


class LimitedConnection(HttpToolsProtocol):
    """One connection. ``head_bytes`` and ``head_seconds`` are set on a subclass by ``limited``."""

    head_bytes = 2**15
    head_seconds = 10.0

    def connection_made(self, transport: Any) -> None:
        """A client came."""
        self._head_open, self._head_size, self._status, self._reason = True, 0, 400, _MALFORMED
        self._head_since = self.loop.time()
        super().connection_made(transport)

    def data_received(self, data: bytes) -> None:
        """Bytes came. Those of headers that do not end are counted here, before the parser has them together."""
        if self._head_open:
            if self._head_size == 0:
                self._head_since = self.loop.time()
            self._head_size += len(data)
        super().data_received(data)
        if self._head_open and self._head_size > self.head_bytes and not self.transport.is_closing():
            self._too_large()
            self.send_400_response("")

    def on_message_begin(self) -> None:
        """A request starts."""
        self._header_size = 0
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header is complete."""
        self._header_size += len(name) + len(value) + 4
        if self._header_size > self.head_bytes:
            self._too_large()
            raise ValueError("headers too large")
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The headers are complete."""
        if self._header_size + len(self.url) > self.head_bytes:
            self._too_large()
            raise ValueError("headers too large")
        self._head_open = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The request is complete; what comes next are headers again."""
        self._head_open, self._head_size = True, 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 -- uvicorn's words tell nobody what is wrong
        """Refuse what is no request, with a reason, and close."""
        if self.transport.is_closing():
            return
        body = orjson.dumps({"error": f"{self._reason}."})
        head = [
            STATUS_LINE[self._status],
            b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body),
        ]
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            self.transport.write(b"".join([*head, body]))
        self.transport.close()

    def sweep(self, now: float) -> None:
        """Close a connection whose client does not get on with its headers."""
        started = self._head_size > 0 or self.cycle is None
        if self._head_open and started and now - self._head_since > self.head_seconds:
            if self._head_size > 0:
                self._status = 408
                self._reason = f"the headers were not there after {self.head_seconds:g} seconds. Send them faster"
                self.send_400_response("")
            else:
                self.transport.close()

    def _too_large(self) -> None:
        self._status = 431
        self._reason = f"the headers have more than {self.head_bytes} bytes. Send fewer"


def limited(*, head_bytes: int, head_seconds: float) -> type[LimitedConnection]:
    """The class of connections with these limits."""
    return type("LimitedConnection", (LimitedConnection,), {"head_bytes": head_bytes, "head_seconds": head_seconds})
