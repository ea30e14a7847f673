"""The ASGI application: from a request to a handler of the table, and back as an answer, a log line and counters."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from bnexport.errors import BnexportError, NotServing
from bnexport.optional import one_line
from bnexport.serving.http.exchange import Disconnected, Exchange, Receive, State, check_host, check_once
from bnexport.serving.http.reply import Reply, error_reply, packed, reply_headers
from bnexport.serving.http.routes import find_route
from bnexport.serving.state import Answer

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class App:
    """An ASGI application (version 3.0) that serves a repository, with the state that its requests share."""

    def __init__(self, state: State) -> None:
        self.state = state

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
            check_host(headers, scope["http_version"])
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
        # The time counts from the last byte, as in the fast lane: a slow client makes no slow server.
        reply = self.told(exchange, (scope.get("client") or ("",))[0], route, reply, exchange.arrived_ns or start)
        headers_out = reply_headers(reply, exchange, close=state.draining)
        await send({"type": "http.response.start", "status": reply.status, "headers": headers_out})
        await send({"type": "http.response.body", "body": reply.body})

    def failed(self, exchange: Exchange, error: Exception) -> Reply:
        """Return the reply to an error; an unexpected one is logged."""
        if isinstance(error, BnexportError):
            return error_reply(error)
        self.state.log.event(
            "fault", id=exchange.id, path=exchange.path[:200], error=f"{type(error).__name__}: {one_line(error)}"
        )
        return error_reply(NotServing("the server failed", remedy="Its log says how", status=500))

    def let_in(self, headers: dict[bytes, bytes]) -> None:
        """Check the token, and record the time of the request."""
        self.state.let_in(headers.get(b"authorization", b""))
        self.state.last_work = time.monotonic()

    def told(self, exchange: Exchange, client: str, route: str, reply: Reply, start_ns: int) -> Reply:
        """Compress a reply if the client accepts that, count it, and log it."""
        if exchange.model is not None and (accepted := exchange.headers.get(b"accept-encoding")) is not None:
            reply = packed(reply, accepted)
        ns = time.perf_counter_ns() - start_ns
        self.state.requests[route, reply.status] += 1
        if exchange.model is not None:
            exchange.model.statistics.answered(ns, ok=reply.status < 400)
        if self.state.log.access:
            trace = exchange.headers.get(b"traceparent", b"").decode("latin-1")
            answer = Answer(client, exchange.method, reply.status, ns, len(reply.body), trace)
            self.state.log_answer(exchange, answer)
        return reply

    def refused(self, client: str, status: int, reason: str) -> None:
        """Count and log input that was refused before it was a request: malformed, too slow, too large, too many."""
        self.state.requests["", status] += 1
        if self.state.log.access:
            self.state.log.request({"time": time.time(), "client": client, "status": status, "reason": reason})

    def id_of(self, headers: dict[bytes, bytes]) -> str:
        """Return a request's id."""
        given = headers.get(b"x-request-id")
        return self.state.id_of(None if given is None else given.decode("latin-1"))
