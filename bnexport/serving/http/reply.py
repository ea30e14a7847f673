"""Answers over HTTP: bodies, headers, and errors of one sentence."""

from __future__ import annotations

import gzip
import http
import zlib
from dataclasses import dataclass
from typing import Any

import orjson

from bnexport.errors import BnexportError, RequestError
from bnexport.serving.http.exchange import Exchange
from bnexport.serving.protocol.messages import sentence_of, status_of

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
