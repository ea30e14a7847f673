"""uvicorn's HTTP connection with what it lacks: limits on the size and the time of headers, and reasons in JSON."""

from __future__ import annotations

from typing import Any

import orjson
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from bnexport.serving.limits import ServingLimits

_MALFORMED = "the request is not HTTP/1.1 as it is written in RFC 9112. Let an HTTP library write it"


class LimitedConnection(HttpToolsProtocol):
    """One connection. ``limits`` is set on a subclass by ``limited``."""

    limits: ServingLimits

    def connection_made(self, transport: Any) -> None:
        """A client came."""
        self._head_open, self._head_size, self._status, self._reason = True, 0, 400, _MALFORMED
        self._since = self.loop.time()
        super().connection_made(transport)

    @property
    def expected(self) -> bool:
        """Whether the first request has not come yet, or a part of the headers of the next one has."""
        return self._head_open and (self._head_size > 0 or self.cycle is None) and not self.transport.is_closing()

    def data_received(self, data: bytes) -> None:
        """Bytes came. Those of headers that do not end are counted here, before the parser has them together."""
        if self._head_open:
            if self._head_size == 0:
                self._since = self.loop.time()
            self._head_size += len(data)
        super().data_received(data)
        if self._head_open and self._head_size > self.limits.head_bytes and not self.transport.is_closing():
            self._too_large()
            self.send_400_response("")

    def on_headers_complete(self) -> None:
        """The headers are complete, and perhaps a part of the body came with them."""
        if self._head_size > self.limits.head_bytes:
            size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
            if size > self.limits.head_bytes:
                self._too_large()
                raise ValueError("headers too large")
        self._head_open, self._since = False, self.loop.time()
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
        """Close a connection whose client does not get on with its headers or its body.

        One that is idle between two requests is uvicorn's to close.
        """
        if self._head_open:
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


def limited(limits: ServingLimits) -> type[LimitedConnection]:
    """The class of connections with these limits."""
    return type("LimitedConnection", (LimitedConnection,), {"limits": limits})
