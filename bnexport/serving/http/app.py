"""The ASGI application: finds a request's handler in the table of routes, sends the answer, logs and counts it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from bnexport.errors import BnexportError, NotServing
from bnexport.serving.http.exchange import (
    Disconnected,
    Exchange,
    Receive,
    Reply,
    check_host,
    check_once,
    error_reply,
    packed,
    reply_headers,
)
from bnexport.serving.http.routes import find_route
from bnexport.serving.state import ServerState

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class App:
    """An ASGI application (version 3.0) that serves a repository."""

    def __init__(self, state: ServerState) -> None:
        self.state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        state = self.state
        start = time.perf_counter_ns()
        pairs = scope["headers"]
        headers = dict(pairs)
        client = (scope.get("client") or ("",))[0]
        exchange = Exchange(scope["method"], scope["path"], headers, receive, self.id_of(headers), client)
        state.active += 1
        route = ""
        try:
            if len(headers) != len(pairs):
                check_once(pairs)
            check_host(headers, scope["http_version"])
            found = find_route(exchange.method, exchange.path)
            route = found.name
            if not found.probe:
                self.let_in(headers)
            reply = await found.handler(state, exchange, *found.captured)
        except Disconnected:
            return
        except asyncio.CancelledError:
            reply = error_reply(NotServing("the server stopped before it could answer", remedy="Try again"))
        except Exception as error:
            reply = self.failed(exchange, error)
        finally:
            state.active -= 1
        # The time counts from the last byte, as in the fast lane: a slow client must not look like a slow server.
        reply = self.finished(exchange, route, reply, exchange.arrived_ns or start)
        headers_out = reply_headers(reply, exchange, close=state.draining)
        await send({"type": "http.response.start", "status": reply.status, "headers": headers_out})
        await send({"type": "http.response.body", "body": reply.body})

    def failed(self, exchange: Exchange, error: Exception) -> Reply:
        """Return the reply to an error; log an unexpected one."""
        if isinstance(error, BnexportError):
            return error_reply(error)
        return error_reply(self.state.fault(exchange, error))

    def let_in(self, headers: dict[bytes, bytes]) -> None:
        """Check the token, and record the time of the request."""
        self.state.let_in(headers.get(b"authorization", b""))
        self.state.last_work = time.monotonic()

    def finished(self, exchange: Exchange, route: str, reply: Reply, start_ns: int) -> Reply:
        """Compress a reply if the client accepts that, count it, and log it."""
        if exchange.model is not None and (accepted := exchange.headers.get(b"accept-encoding")) is not None:
            reply = packed(reply, accepted)
        ns = time.perf_counter_ns() - start_ns
        self.state.requests[route, reply.status] += 1
        self.state.answered(exchange, reply.status, ns, len(reply.body), ok=reply.status < 400)
        return reply

    def refused(self, client: str, status: int, reason: str) -> None:
        """Count and log input that was refused before it became a request: malformed, too slow, too large, too many."""
        self.state.requests["", status] += 1
        if self.state.log.access:
            self.state.log.request({"time": time.time(), "client": client, "status": status, "reason": reason})

    def id_of(self, headers: dict[bytes, bytes]) -> str:
        """Return a request's id."""
        given = headers.get(b"x-request-id")
        return self.state.id_of(None if given is None else given.decode("latin-1"))
