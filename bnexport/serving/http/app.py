"""The ASGI application: from a request to a handler of the table, and back as an answer, a log line and counters."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from bnexport.errors import BnexportError, NotServing
from bnexport.optional import one_line
from bnexport.serving.http.exchange import Exchange
from bnexport.serving.http.reply import Reply, error_reply, packed
from bnexport.serving.http.request import Disconnected, Receive, check_once
from bnexport.serving.http.routes import find_route
from bnexport.serving.http.state import State

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
_LONGEST_ID = 128


class App:
    """An ASGI application (version 3.0) that serves a repository.

    Args:
        state: What its requests share.
    """

    def __init__(self, state: State) -> None:
        self.state = state
        self._prefix, self._count = os.urandom(6).hex(), 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        state = self.state
        start = time.perf_counter_ns()
        self._count += 1
        pairs = scope["headers"]
        headers = dict(pairs)
        exchange = Exchange(scope, headers, receive, self._id(headers.get(b"x-request-id")))  # type: ignore[arg-type]
        state.active += 1
        route = ""
        try:
            if len(headers) != len(pairs):
                check_once(pairs)
            found = find_route(exchange.method, exchange.path)
            route = found.name
            if not found.probe:
                state.let_in(headers.get(b"authorization", b""))
                state.last_work = time.monotonic()
            reply = await found.handler(state, exchange, *found.captured)
        except BnexportError as error:
            reply = error_reply(error)
        except Disconnected:
            return
        except asyncio.CancelledError:
            reply = error_reply(NotServing("the server stopped before the answer was there", remedy="Try again"))
        except Exception as error:
            self.state.log.event(
                "fault", id=exchange.id, path=exchange.path[:200], error=f"{type(error).__name__}: {one_line(error)}"
            )
            reply = error_reply(NotServing("the server failed", remedy="Its log says how", status=500))
        finally:
            state.active -= 1
        if b"accept-encoding" in headers and exchange.model is not None:
            reply = packed(reply, headers[b"accept-encoding"])
        self._count_and_log(exchange, scope, route, reply, time.perf_counter_ns() - start)
        await _answer(send, reply, exchange, close=state.draining)

    def _id(self, given: bytes | None) -> str:
        """The client's, if it can be logged and sent back as it is."""
        if given and len(given) <= _LONGEST_ID and given.isascii():
            text = given.decode()
            if text.isprintable():
                return text
        return f"{self._prefix}{self._count:x}"

    def _count_and_log(self, exchange: Exchange, scope: Scope, route: str, reply: Reply, ns: int) -> None:
        self.state.requests[route, reply.status] += 1
        model = exchange.model
        if model is not None:
            model.statistics.answered(ns, ok=reply.status < 400)
        if not self.state.log.access:
            return
        fields: dict[str, Any] = {
            "time": time.time(),
            "id": exchange.id,
            "client": (scope.get("client") or ("",))[0],
            "method": exchange.method,
            "path": exchange.path[:200],
            "status": reply.status,
            "us": ns // 1000,
            "in": exchange.bytes_in,
            "out": len(reply.body),
        }
        if model is not None:
            fields["model"], fields["version"], fields["rows"] = model.name, model.version, exchange.rows
        if (trace := exchange.headers.get(b"traceparent")) is not None:
            fields["trace"] = trace.decode("latin-1")[:64]
        self.state.log.request(fields)


async def _answer(send: Send, reply: Reply, exchange: Exchange, *, close: bool) -> None:
    headers = [
        (b"content-type", reply.content_type),
        (b"content-length", b"%d" % len(reply.body)),
        (b"x-request-id", exchange.id.encode()),
        *reply.headers,
    ]
    # What was not read of a request would be taken for the next one's time and memory.
    unread = not exchange.read and reply.status >= 400 and exchange.method == "POST"
    if close or unread:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": reply.status, "headers": headers})
    await send({"type": "http.response.body", "body": reply.body})
