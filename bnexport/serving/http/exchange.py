"""Requests and answers over HTTP: headers, bodies within the limits on size, and errors of one sentence.

uvicorn_adapter.py enforces the limits on time.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import http
import time
import zlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from bnexport.errors import BnexportError, RequestError
from bnexport.serving.protocol.messages import sentence_of, status_of
from bnexport.serving.serving_limits import ServingLimits, above_limit
from bnexport.serving.state import RequestContext, ServerState
from bnexport.validation.limits import shown

Receive = Callable[[], Awaitable[Mapping[str, Any]]]
#: zlib's window bits: gzip's header (RFC 1952), or zlib's (RFC 1950, which HTTP calls deflate).
_WINDOWS = {b"gzip": 31, b"x-gzip": 31, b"deflate": 15}
#: Seconds for reading the rest of a refused body, so that the client can read the reason.
_LINGER = 1.0
#: Headers that must not be repeated: two programs could use different values.
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


class Exchange(RequestContext):
    """One request over HTTP."""

    __slots__ = ("arrived_ns", "client", "headers", "method", "read", "receive")

    def __init__(
        self, method: str, path: str, headers: dict[bytes, bytes], receive: Receive, request_id: str, client: str
    ) -> None:
        super().__init__(path, request_id)
        self.method, self.receive, self.client = method, receive, client
        self.headers = headers  # Lower-case name -> value
        self.read = False  # True if the body was read to its end
        self.arrived_ns = 0  # Time of the last part of the body

    def origin(self) -> tuple[str, str, str]:
        """Return the method, the client's address, and ``traceparent`` or ""."""
        return self.method, self.client, self.headers.get(b"traceparent", b"").decode("latin-1")

    async def next_message(self) -> Mapping[str, Any]:
        """Receive the next part of the body."""
        message = await self.receive()
        self.arrived_ns = time.perf_counter_ns()
        if message["type"] == "http.disconnect":
            raise Disconnected
        return message


async def read_body(state: ServerState, exchange: Exchange) -> bytes:
    """Return the whole body, unpacked, within the limits of one body and of all bodies.

    ``App`` stops counting the body when the handler returns, before it sends the answer.
    """
    limits, headers = state.settings.limits, exchange.headers
    declared = headers.get(b"content-length")
    if declared is not None and int(declared) > limits.body_bytes:
        if b"expect" not in headers:
            await _linger(exchange, limits)
        raise _too_large(f"{int(declared)} bytes", limits)
    message = await exchange.next_message()
    body: bytes = message.get("body", b"")
    if len(body) > limits.body_bytes:
        raise _too_large(f"{len(body)} bytes", limits)
    state.hold(exchange, len(body))
    if message.get("more_body", False):
        body = await _rest(state, exchange, body)
    coding = headers.get(b"content-encoding")
    if coding is not None and coding.lower() != b"identity":
        packed = len(body)
        # In a thread: detecting a decompression bomb takes a tenth of a second.
        body = await asyncio.to_thread(unpacked, body, coding.lower(), limits.inflated_bytes)
        state.hold(exchange, len(body))
        state.release(exchange, packed)
    exchange.read = True
    exchange.bytes_in = len(body)
    return body


async def _rest(state: ServerState, exchange: Exchange, start: bytes) -> bytes:
    limits, chunks, size, more = state.settings.limits, [start], len(start), True
    while more:
        message = await exchange.next_message()
        chunk, more = message.get("body", b""), message.get("more_body", False)
        state.hold(exchange, len(chunk))
        chunks.append(chunk)
        size += len(chunk)
        if size > limits.body_bytes:
            await _linger(exchange, limits)
            raise _too_large("more bytes", limits)
    return b"".join(chunks)


def _too_large(size: str, limits: ServingLimits) -> RequestError:
    return above_limit(f"the body has {size}", limits.body_bytes, remedy="Send several requests")


async def _linger(exchange: Exchange, limits: ServingLimits) -> None:
    """Read and drop the rest of a refused body: a client that is still sending would lose the answer to a closed connection."""
    seen, most = 0, 4 * limits.body_bytes
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_LINGER):
            while seen < most:
                message = await exchange.receive()
                seen += len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return


def check_headers(headers: Mapping[bytes, bytes], pairs: list[tuple[bytes, bytes]], http_version: str) -> None:
    """Refuse repeated headers that must not be repeated, and an HTTP/1.1 request without Host (RFC 9112, 3.2)."""
    if len(headers) != len(pairs):
        names = [name for name, _ in pairs]
        for name in _ONCE:
            if names.count(name) > 1:
                raise RequestError(f"the header {name.decode()} was sent more than once", remedy="Send it once")
    if http_version == "1.1" and b"host" not in headers:
        raise RequestError(
            "the header Host is missing, which HTTP/1.1 requires", remedy="Let an HTTP library write the request"
        )


def unpacked(body: bytes, coding: bytes, most: int) -> bytes:
    """Unpack a body of at most ``most`` bytes."""
    if coding not in _WINDOWS:
        raise RequestError(
            f"the content-encoding {shown(coding.decode('latin-1'))} is not supported",
            remedy="Pack the body with gzip or deflate, or not at all",
            status=415,
        )
    inflater = zlib.decompressobj(_WINDOWS[coding])
    try:
        content = inflater.decompress(body, most + 1)
    except zlib.error as error:
        raise RequestError(f"the body is not {coding.decode()} data", remedy="Pack the body again") from error
    if len(content) > most:
        raise RequestError(f"the body unpacks to more than {most} bytes", remedy="Send several requests", status=413)
    if not inflater.eof or inflater.unused_data:
        raise RequestError(
            f"the {coding.decode()} data of the body is truncated, or followed by other bytes",
            remedy="Pack the body again",
        )
    return content


def header_length(headers: Mapping[bytes, bytes]) -> int | None:
    """Return Inference-Header-Content-Length; None without it."""
    text = headers.get(b"inference-header-content-length")
    if text is None:
        return None
    if not text.isdigit() or len(text) > 12:
        raise RequestError(
            "Inference-Header-Content-Length is not a whole number",
            remedy="Give the length of the JSON before the tensors",
        )
    return int(text)


#: Smaller bodies are not packed: packing would cost more than it saves, and some clients always send Accept-Encoding: gzip.
PACKED_BYTES = 1024
JSON, BINARY, TEXT = b"application/json", b"application/octet-stream", b"text/plain; version=0.0.4; charset=utf-8"
#: Status -> the first line of an answer.
STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in http.HTTPStatus}


@dataclass(slots=True)
class Reply:
    """One answer."""

    status: int  # HTTP's
    body: bytes = b""  # The whole body
    content_type: bytes = JSON  # Its media type
    headers: tuple[tuple[bytes, bytes], ...] = ()  # Headers in addition to those of every answer


def json_reply(value: Any, status: int = 200) -> Reply:
    """Return a reply with a JSON value."""
    return Reply(status, orjson.dumps(value))


def error_reply(error: BnexportError) -> Reply:
    """Return a reply {"error": "fact and remedy"} (Open Inference Protocol v2, "Inference Errors")."""
    status = status_of(error)
    headers: tuple[tuple[bytes, bytes], ...] = ()
    if status == 401:
        headers = ((b"www-authenticate", b"Bearer"),)
    elif isinstance(error, RequestError) and error.allow:
        headers = ((b"allow", ", ".join(error.allow).encode()),)
    elif status == 503:
        headers = ((b"retry-after", b"1"),)
    return Reply(status, orjson.dumps({"error": sentence_of(error)}), JSON, headers)


def packed(reply: Reply, accepted: bytes) -> Reply:
    """Compress a large answer if the client accepts that."""
    if len(reply.body) < PACKED_BYTES:
        return reply
    taken = {
        name.strip().lower()
        for item in accepted.split(b",")
        for name, _, weight in (item.partition(b";"),)
        if weight.replace(b" ", b"").lower().rstrip(b"0.") != b"q="
    }
    if b"gzip" in taken:
        coding, body = b"gzip", gzip.compress(reply.body, 1, mtime=0)
    elif b"deflate" in taken:
        coding, body = b"deflate", zlib.compress(reply.body, 1)
    else:
        return reply
    headers = (*reply.headers, (b"content-encoding", coding), (b"vary", b"accept-encoding"))
    return Reply(reply.status, body, reply.content_type, headers)


def reply_headers(reply: Reply, exchange: Exchange, *, close: bool) -> list[tuple[bytes, bytes]]:
    """Return the headers of an answer."""
    headers = [
        (b"content-type", reply.content_type),
        (b"content-length", b"%d" % len(reply.body)),
        (b"x-request-id", exchange.id.encode()),
        *reply.headers,
    ]
    # The unread rest of a request would cost the next request time and memory.
    unread = not exchange.read and reply.status >= 400 and exchange.method == "POST"
    if close or unread:
        headers.append((b"connection", b"close"))
    return headers
