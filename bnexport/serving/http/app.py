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
from bnexport.serving.http.reply import Reply, error_reply, packed, reply_headers
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
        pairs = scope["headers"]
        headers = dict(pairs)
        exchange = Exchange(scope["method"], scope["path"], headers, receive, self.id_of(headers))
        state.active += 1
        route = ""
        try:
            if len(headers) != len(pairs):
                check_once(pairs)
            found = find_route(exchange.method, exchange.path)
            route = found.name
            if not found.probe:
                self.let_in(headers)
            reply = await found.handler(state, exchange, *found.captured)
        except Disconnected:
            return
        except asyncio.CancelledError:
            reply = error_reply(NotServing("the server stopped before the answer was there", remedy="Try again"))
        except Exception as error:
            reply = self.failed(exchange, error)
        finally:
            state.active -= 1
        reply = self.told(exchange, (scope.get("client") or ("",))[0], route, reply, start)
        headers_out = reply_headers(reply, exchange, close=state.draining)
        await send({"type": "http.response.start", "status": reply.status, "headers": headers_out})
        await send({"type": "http.response.body", "body": reply.body})

    def failed(self, exchange: Exchange, error: Exception) -> Reply:
        """The reply to an error; one that nobody foresaw is logged."""
        if isinstance(error, BnexportError):
            return error_reply(error)
        self.state.log.event(
            "fault", id=exchange.id, path=exchange.path[:200], error=f"{type(error).__name__}: {one_line(error)}"
        )
        return error_reply(NotServing("the server failed", remedy="Its log says how", status=500))

    def let_in(self, headers: dict[bytes, bytes]) -> None:
        """Check the token, and take note that there is work.

        Raises:
            RequestError: The token is missing or another one (401).
        """
        self.state.let_in(headers.get(b"authorization", b""))
        self.state.last_work = time.monotonic()

    def told(self, exchange: Exchange, client: str, route: str, reply: Reply, start_ns: int) -> Reply:
        """Pack a reply if the client takes that, count it, and log it.

        Args:
            exchange: What it is the reply to.
            client: The client's address.
            route: For the counters; "" where there is none.
            reply: To be sent.
            start_ns: When the request came, by ``time.perf_counter_ns``.
        """
        if exchange.model is not None and (accepted := exchange.headers.get(b"accept-encoding")) is not None:
            reply = packed(reply, accepted)
        self._count_and_log(exchange, client, route, reply, time.perf_counter_ns() - start_ns)
        return reply

    def id_of(self, headers: dict[bytes, bytes]) -> str:
        """A request's id: the client's, if it can be logged and sent back as it is, or a new one."""
        self._count += 1
        given = headers.get(b"x-request-id")
        if given and len(given) <= _LONGEST_ID and given.isascii():
            text = given.decode()
            if text.isprintable():
                return text
        return f"{self._prefix}{self._count:x}"

    def _count_and_log(self, exchange: Exchange, client: str, route: str, reply: Reply, ns: int) -> None:
        self.state.requests[route, reply.status] += 1
        model = exchange.model
        if model is not None:
            model.statistics.answered(ns, ok=reply.status < 400)
        if not self.state.log.access:
            return
        fields: dict[str, Any] = {
            "time": time.time(),
            "id": exchange.id,
            "client": client,
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
