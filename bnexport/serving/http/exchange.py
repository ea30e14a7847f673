"""Requests over HTTP: their headers, their bodies within the limits of size, and the state that they share.

Limits on time are the connection's (uvicorn_adapter.py).
"""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

from bnexport.errors import RequestError
from bnexport.serving.access_log import JsonLog
from bnexport.serving.counters import Share
from bnexport.serving.repository import Repository
from bnexport.serving.serving_limits import ServingLimits
from bnexport.serving.state import AppSettings, Memory, ServerState
from bnexport.validation.limits import shown

if TYPE_CHECKING:
    from bnexport.serving.served_model import ServedModel


Receive = Callable[[], Awaitable[Mapping[str, Any]]]
#: zlib's window bits: gzip's header (RFC 1952), or zlib's (RFC 1950, which HTTP calls deflate).
_WINDOWS = {b"gzip": 31, b"x-gzip": 31, b"deflate": 15}
#: Seconds for which the rest of a body that is refused is read, so that the client gets to read the reason.
_LINGER = 1.0
#: Headers that must not come twice: two readers would take different ones.
_ONCE = (
    b"host",
    b"content-length",
    b"content-encoding",
    b"content-type",
    b"inference-header-content-length",
    b"authorization",
)


class Disconnected(Exception):
    """The client has disconnected."""


class Intake:
    """Reads bodies within the limits of one body and of all bodies in memory."""

    def __init__(self, limits: ServingLimits, memory: Memory) -> None:
        self.limits, self._memory = limits, memory

    async def read(self, receive: Receive, headers: Mapping[bytes, bytes]) -> bytes:
        """Return the whole body, unpacked. Its bytes are counted until ``release``."""
        declared = headers.get(b"content-length")
        if declared is not None and int(declared) > self.limits.body_bytes:
            if b"expect" not in headers:
                await _linger(receive, 4 * self.limits.body_bytes)
            raise self._too_large(int(declared))
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Disconnected
        body: bytes = message.get("body", b"")
        if len(body) > self.limits.body_bytes:
            raise self._too_large(len(body))
        self.hold(len(body))
        if message.get("more_body", False):
            body = await self._rest(receive, body)
        coding = headers.get(b"content-encoding")
        if coding is None or coding.lower() == b"identity":
            return body
        try:
            # In a thread: a bomb takes a tenth of a second until it is known as one.
            content = await asyncio.to_thread(unpacked, body, coding.lower(), self.limits.inflated_bytes)
            self.hold(len(content))
        finally:
            self.release(body)
        return content

    def release(self, body: bytes | bytearray) -> None:
        """Stop counting a body."""
        self._memory.release(len(body))

    def hold(self, size: int) -> None:
        """Count a body of ``size`` bytes."""
        self._memory.hold(size)

    async def _rest(self, receive: Receive, start: bytes) -> bytes:
        chunks, size, more = [start], len(start), True
        try:
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Disconnected
                chunk, more = message.get("body", b""), message.get("more_body", False)
                self.hold(len(chunk))
                chunks.append(chunk)
                size += len(chunk)
                if size > self.limits.body_bytes:
                    await _linger(receive, 4 * self.limits.body_bytes)
                    raise self._too_large(None)
        except BaseException:
            self._memory.release(size)
            raise
        return b"".join(chunks)

    def _too_large(self, size: int | None) -> RequestError:
        told = "more bytes" if size is None else f"{size} bytes"
        return RequestError(
            f"the body has {told}, the limit is {self.limits.body_bytes}", remedy="Send several requests", status=413
        )


def check_host(headers: Mapping[bytes, bytes], http_version: str) -> None:
    """Refuse a request that does not name its host (RFC 9112, 3.2)."""
    if http_version == "1.1" and b"host" not in headers:
        raise RequestError(
            "the header Host is missing, which HTTP/1.1 wants", remedy="Let an HTTP library write the request"
        )


def check_once(pairs: list[tuple[bytes, bytes]]) -> None:
    """Refuse headers that must not be repeated."""
    names = [name for name, _ in pairs]
    for name in _ONCE:
        if names.count(name) > 1:
            raise RequestError(f"the header {name.decode()} is there twice", remedy="Send it once")


def unpacked(body: bytes, coding: bytes, most: int) -> bytes:
    """Unpack a body; never more than the limit."""
    if coding not in _WINDOWS:
        raise RequestError(
            f"the content-encoding {shown(coding.decode('latin-1'))} is not known",
            remedy="Pack the body with gzip or deflate, or not at all",
            status=415,
        )
    inflater = zlib.decompressobj(_WINDOWS[coding])
    try:
        content = inflater.decompress(body, most + 1)
    except zlib.error as error:
        raise RequestError(f"the body is no {coding.decode()} data", remedy="Pack it again") from error
    if len(content) > most:
        raise RequestError(f"the body unpacks to more than {most} bytes", remedy="Send several requests", status=413)
    if not inflater.eof or inflater.unused_data:
        raise RequestError(f"the {coding.decode()} data of the body ends too early or too late", remedy="Pack it again")
    return content


async def _linger(receive: Receive, most: int) -> None:
    """Read and drop the rest of a body: closing the connection of a sending client would lose the answer on its way."""
    seen = 0
    try:
        async with asyncio.timeout(_LINGER):
            while seen < most:
                message = await receive()
                seen += len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return
    except TimeoutError:
        return


def header_length(headers: Mapping[bytes, bytes]) -> int | None:
    """Return Inference-Header-Content-Length; None without it."""
    text = headers.get(b"inference-header-content-length")
    if text is None:
        return None
    if not text.isdigit() or len(text) > 12:
        raise RequestError(
            "Inference-Header-Content-Length is no whole number",
            remedy="Give the length of the JSON before the tensors",
        )
    return int(text)


class Exchange:
    """One request, with the data that its log line needs.

    Attributes:
        method: "GET", "POST".
        path: Unquoted.
        headers: Lower-case name -> value.
        receive: ASGI's.
        id: Id of the request, the client's or a new one.
        model: The answering model, once it is known.
        rows: Samples, once they are known.
        read: True if the body was read to its end.
        bytes_in: Bytes of the body.
        arrived_ns: Time of the last part of the body; 0 before.
    """

    __slots__ = ("arrived_ns", "bytes_in", "headers", "id", "method", "model", "path", "read", "receive", "rows")

    def __init__(self, method: str, path: str, headers: dict[bytes, bytes], receive: Receive, request_id: str) -> None:
        self.method, self.path = method, path
        self.headers, self.receive, self.id = headers, receive, request_id
        self.model: ServedModel | None = None
        self.rows = 0
        self.read = False
        self.bytes_in = self.arrived_ns = 0


class State(ServerState):
    """State that all requests over HTTP share.

    Args:
        repository: Loaded.
        settings: Permissions and limits of clients.
        log: Log of requests and events.
        share: Publishes this process's counters to the others; None if it serves alone.
    """

    def __init__(
        self, repository: Repository, settings: AppSettings, log: JsonLog, *, share: Share | None = None
    ) -> None:
        super().__init__(repository, settings, log, share=share)
        self.intake = Intake(settings.limits, self.memory)  # Reads bodies

    async def body(self, exchange: Exchange) -> bytes:
        """Return the request's body; the caller returns it to ``intake.release``."""

        async def receive() -> Mapping[str, Any]:
            message = await exchange.receive()
            exchange.arrived_ns = time.perf_counter_ns()
            return message

        body = await self.intake.read(receive, exchange.headers)
        exchange.read = True
        exchange.bytes_in = len(body)
        return body
