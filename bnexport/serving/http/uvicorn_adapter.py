"""Everything that depends on private parts of uvicorn: connections with limits, and a server that drains.

uvicorn has no limits on the size and the time of headers (its issue 157), answers malformed requests without a reason, and
makes a task and ASGI messages for each request, which costs more than a small model. It is used nevertheless: a bare echo on
two cores takes, per request at 1, 8 and 64 clients, 115, 94 and 106 us of CPU time with uvicorn, and 300, 147 and 100 us with
granian (ASGI).

``missing_part`` checks the private names that connections need; pyproject.toml bounds uvicorn's version, and
``tests/unit/serving/test_uvicorn_adapter.py`` is the contract.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import math
import signal
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

import httptools
import orjson
import uvicorn

from bnexport.errors import BnexportError, UsageError
from bnexport.files import input_errors
from bnexport.optional import one_line
from bnexport.serving.http.exchange import STATUS_LINES
from bnexport.serving.listener import backlog, deafen
from bnexport.serving.serving_limits import ServingLimits
from bnexport.serving.state import ServerState

try:
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
except ImportError:  # moved in a later uvicorn: ``missing_part`` reports it, and the server uses plain connections
    HttpToolsProtocol = RequestResponseCycle = asyncio.Protocol  # type: ignore[assignment,misc]

if TYPE_CHECKING:
    from bnexport.serving.grpc.grpc_server import GrpcServer
    from bnexport.serving.http.fast_lane import FastCall, FastLane, Head


#: Seconds without a request after which a draining server stops; balancers send none to a server that is not ready.
QUIET = 1.0
#: Seconds for half-open connections to complete before the server stops listening.
_HANDSHAKES = 0.05
#: Seconds that an idle connection is kept. It is longer than in balancers, so that they close first.
_KEEP_ALIVE = 75
#: Receives the client's address, the status and the reason for input that was refused before it became a request.
Refused = Callable[[str, int, str], None]
_MALFORMED = "the request is not valid HTTP/1.1 (RFC 9112). Write it with an HTTP library"


#: Private names of connections and requests in uvicorn: methods and attributes that ``LimitedConnection`` and the fast lane
#: use, override, or replace.
METHODS = (
    "connection_made", "connection_lost", "data_received", "on_message_begin", "on_url", "on_header", "on_headers_complete",
    "on_body", "on_message_complete", "on_response_complete", "send_400_response", "timeout_keep_alive_handler",
    "_unset_keepalive_if_required",
)  # fmt: skip
ATTRIBUTES = (
    "parser", "loop", "server_state", "connections", "transport", "flow", "client", "scheme", "pipeline", "headers", "cycle",
    "expect_100_continue", "timeout_keep_alive",
)  # fmt: skip
REQUEST_ATTRIBUTES = ("keep_alive", "disconnected", "response_started", "response_complete", "message_event", "body")


def missing_part() -> str | None:
    """Return a private name of uvicorn that is missing; None if connections can be limited."""
    for name in METHODS:
        if not callable(getattr(HttpToolsProtocol, name, None)):
            return f"HttpToolsProtocol.{name}"
    for kind, names in ((HttpToolsProtocol, ATTRIBUTES), (RequestResponseCycle, REQUEST_ATTRIBUTES)):
        made = kind.__init__.__code__.co_names  # the attributes that the constructor sets
        if (missing := next((name for name in names if name not in made), None)) is not None:
            return f"{kind.__name__}.{missing}"
    return None


class LimitedConnection(HttpToolsProtocol):
    """One connection. ``limits``, ``fast_lane`` and ``refused`` are set on a subclass by ``limited``."""

    limits: ServingLimits
    fast_lane: FastLane | None
    refused: Refused
    known_head: Head | None = None

    def connection_made(self, transport: Any) -> None:
        """Accept a client."""
        self._head_open, self._head_size, self._status, self._reason = True, 0, 400, _MALFORMED
        self._since = self.loop.time()
        self._idle_since: float | None = None
        self._unread_since: float | None = None
        self._call: FastCall | None = None  # a short request whose body is not complete
        super().connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Clean up after either side closed the connection."""
        if self._call is not None:
            self._call.abandon()
            self._call = None
        super().connection_lost(exc)

    def eof_received(self) -> bool:  # type: ignore[override]
        """Keep a connection half open while its client waits for an answer, and close it after that answer."""
        if self._waits:
            self.cycle.keep_alive = False
        return self._waits and self.scheme == "http"  # TLS has no half-closed connections

    @property
    def _waits(self) -> bool:
        """True if the last request is complete and has no answer yet."""
        return self._head_open and self.cycle is not None and not self.cycle.response_complete

    @property
    def expected(self) -> bool:
        """True if the first request has not come, or a part of the next request's headers has come."""
        return self._head_open and (self._head_size > 0 or self.cycle is None) and not self.transport.is_closing()

    def data_received(self, data: bytes) -> None:
        """Receive bytes. Incomplete headers are counted here; the parser reports complete ones only."""
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
        """Pass bytes to the parser.

        It treats everything after an Upgrade header as another protocol. This server supports none, and may ignore the header
        (RFC 9110, 7.8; Java's client sends it with every first request), so the request is parsed again without it.
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
        """Begin a request. uvicorn's ASGI scope is created only if the application needs it."""
        self.url, self.headers, self.expect_100_continue = b"", [], False

    def on_headers_complete(self) -> None:
        """Check the complete headers, and choose the fast lane or the application."""
        if self._head_size > self.limits.head_bytes:
            size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
            if size > self.limits.head_bytes:
                self._too_large()
                raise ValueError("headers too large")
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                raise ValueError("this server is not a proxy")
            return
        if len(self.connections) > self.limits.connections:
            self._status = 503
            self._reason = f"{self.limits.connections} connections are open, which is the limit. Try again in a second"
            raise ValueError("too many connections")
        if len(self.pipeline) >= self.limits.pipeline:
            self._status = 503
            self._reason = f"more than {self.limits.pipeline} requests wait for an earlier one. Read the answers first"
            raise ValueError("too many requests")
        self._head_open, self._since = False, self.loop.time()
        # No earlier request waits for its answer, and the client reads its answers.
        free = (self.cycle is None or self.cycle.response_complete) and not self.flow.write_paused
        if free and self.fast_lane is not None and (call := self.fast_lane.call(self)) is not None:
            self.cycle = self._call = call  # type: ignore[assignment]
            return
        url, headers, expect = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expect
        self.headers.extend(headers)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Receive a part of the body."""
        if self._call is None:
            super().on_body(body)
        else:
            self._call.body += body  # usually the whole body: b"" + body is body itself

    def on_message_complete(self) -> None:
        """Complete the request."""
        if self.parser.should_upgrade():
            return
        self._head_open, self._head_size = True, 0
        if self._call is None:
            super().on_message_complete()
            return
        call, self._call = self._call, None
        call.begin()

    def answered(self) -> None:
        """Record the answer to a short request. Instead of uvicorn's timer per request, ``sweep`` closes idle connections."""
        if self.pipeline or self.flow.read_paused:
            self.on_response_complete()
        else:
            self.server_state.total_requests += 1
            self._idle_since = self.loop.time()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 -- uvicorn's message has no reason
        """Refuse malformed input with a reason, and close the connection after the answers to earlier complete requests."""
        if self.transport.is_closing() or (self._waits and not self.cycle.keep_alive):
            return
        body = orjson.dumps({"error": f"{self._reason}."})
        head = [
            STATUS_LINES[self._status],
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
        """Close a connection that is idle or whose client sends too slowly; abort one whose client does not read."""
        stuck = self.flow.write_paused or self.transport.is_closing()
        self._unread_since = None if not stuck else now if self._unread_since is None else self._unread_since
        if self._unread_since is not None and now - self._unread_since > self.limits.body_seconds:
            self.transport.abort()
        elif self._idle_since is not None and now - self._idle_since > self.timeout_keep_alive:
            self.timeout_keep_alive_handler()
        elif self._head_open:
            if self.expected and now - self._since > self.limits.head_seconds:
                self._too_slow(f"the headers did not arrive within {self.limits.head_seconds:g} seconds")
        elif now - self._since > self.limits.body_seconds:
            self._too_slow(f"the body did not arrive within {self.limits.body_seconds:g} seconds")

    def _too_slow(self, reason: str) -> None:
        self._status, self._reason = 408, f"{reason}. Send it faster"
        self.send_400_response("")

    def _too_large(self) -> None:
        self._status = 431
        self._reason = f"the headers have more than {self.limits.head_bytes} bytes. Send shorter headers"


def limited(limits: ServingLimits, fast_lane: FastLane | None, refused: Refused) -> type[LimitedConnection]:
    """Return a class of connections with these limits; without a fast lane, all requests go through the application."""
    values = {"limits": limits, "fast_lane": fast_lane, "refused": staticmethod(refused)}
    return type("LimitedConnection", (LimitedConnection,), values)


def configured(
    app: Any, kind: type[asyncio.Protocol] | Literal["auto"], tls: tuple[Path, Path] | None
) -> uvicorn.Config:
    """Configure uvicorn for an application."""
    config = uvicorn.Config(
        app, http=kind, ws="none", lifespan="off", interface="asgi3", log_config=None, access_log=False,
        server_header=False, date_header=False, proxy_headers=False, timeout_keep_alive=_KEEP_ALIVE,
        **({} if tls is None else _tls_options(*tls)),
    )  # fmt: skip
    try:
        config.load()
    except (OSError, ValueError) as error:
        files = " and ".join(map(str, tls or ()))
        raise UsageError(
            f"the TLS files {files} can't be used: {one_line(error)}",
            remedy="Give a certificate and its key as PEM files",
        ) from error
    return config


def _tls_options(certificate: Path, key: Path) -> dict[str, Any]:
    with input_errors(key, UsageError, remedy="Check its permissions"):  # a pipe can be read only once
        locked = key.is_file() and b"ENCRYPTED" in key.read_bytes()
    if locked:
        raise UsageError(
            f"the key in {key} has a passphrase",
            remedy="Remove it, and make the file readable for this user only: openssl pkey -in KEY -out PLAIN",
        )
    return {"ssl_certfile": str(certificate), "ssl_keyfile": str(key)}


class DrainingServer(uvicorn.Server):
    """uvicorn's server, which at SIGTERM first reports that it is not ready, and serves until no more requests come.

    uvicorn itself closes its socket at once, before balancers can detect that the server is not ready.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        state: ServerState,
        grpc_server: GrpcServer | None,
        *,
        grace: float,
        poll: float | None,
        on_start: Callable[[], None],
        on_stop: Callable[[], None],
    ) -> None:
        super().__init__(config)
        self._state, self._grpc_server = state, grpc_server
        self._grace, self._poll_seconds = grace, poll  # as in ServerSettings
        self._on_start = on_start  # called once the socket accepts
        self._on_stop = on_stop  # called at the first signal
        self._stop_at: float | None = None
        self._polled = time.monotonic()
        self._poll_task: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen."""
        await super().startup(sockets)
        if self._grpc_server is not None:
            await self._grpc_server.start()
        gc.set_threshold(700)  # cli/main.py sets a larger one, but requests leave short-lived cycles
        gc.collect()
        gc.freeze()  # loaded objects stay alive: the collector need not traverse them again
        self._on_start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 -- uvicorn's signature
        """Start the drain at the first signal, end it at the second.

        One process of several gets signals from its supervisor and possibly from the system too (systemd signals all processes
        of a service). There, SIGINT ends the drain, even if it is handled before an earlier SIGTERM.
        """
        first = self._stop_at is None
        if first:
            self._state.draining = True
            self._state.last_work = time.monotonic()
            self._stop_at = time.monotonic() + self._grace
            self._on_stop()
        if not first if self._state.share is None else sig == signal.SIGINT:
            self.should_exit = self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Check ten times a second: deadlines, slow clients, new versions, and the stop."""
        self._state.tick()
        now, loop_now = time.monotonic(), asyncio.get_running_loop().time()
        for connection in self._limited():
            connection.sweep(loop_now)
        poll = self._poll_seconds
        if poll is not None and self._poll_task is None and now - self._polled >= poll and self._stop_at is None:
            self._poll_task = asyncio.create_task(self._poll())
        if self._stop_at is not None and not self.should_exit:
            self._consider_exit(now, self._stop_at)
        return await super().on_tick(counter)

    def _consider_exit(self, now: float, stop_at: float) -> None:
        quiet = self._state.active == 0 and now - self._state.last_work >= QUIET
        # Half of the time is for new requests, the other half for requests in progress.
        if quiet or now >= stop_at - self._grace / 2:
            self._state.log.event("closing", quiet=quiet, active=self._state.active)
            self.config.timeout_graceful_shutdown = max(1, math.ceil(stop_at - now))
            self.should_exit = True

    async def _poll(self) -> None:
        try:
            await self._state.repository.poll()
        except BnexportError as error:
            self._state.log.event("poll failed", reason=str(error))
        except Exception as error:  # an error in one poll must not end the polling
            self._state.log.event("fault", error=f"{type(error).__name__}: {one_line(error)}")
        finally:
            self._polled, self._poll_task = time.monotonic(), None

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the socket, answer accepted requests, free the models."""
        expiring = asyncio.create_task(self._keep_expiring())
        try:
            closing = asyncio.create_task(self._close_grpc(self.config.timeout_graceful_shutdown))
            await self._stop_accepting(sockets or [])
            await super().shutdown(sockets)
            await closing
        finally:
            expiring.cancel()
            self._state.publish()
        if self._poll_task is not None:
            self._poll_task.cancel()
        if not self.force_exit:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._state.repository.close(), 5.0)
        self._state.log.event("stopped")

    async def _stop_accepting(self, sockets: Sequence[socket.socket]) -> None:
        """Close the listening socket without resetting clients that the system has connected already.

        Closing the socket would reset the connections in its backlog, and uvicorn closes connections without a request.
        """
        loop = asyncio.get_running_loop()
        if all(deafen(listener) for listener in sockets):
            await asyncio.sleep(_HANDSHAKES)
        waiting = [client for listener in sockets for client in backlog(listener)]
        for server in self.servers:
            server.close()
        kind: Any = self.config.http_protocol_class
        made = functools.partial(kind, config=self.config, server_state=self.server_state, app_state={})
        for client in waiting:
            with contextlib.suppress(OSError):
                await loop.connect_accepted_socket(made, client, ssl=self.config.ssl)
        end = loop.time() + QUIET
        while loop.time() < end and not self.force_exit and any(each.expected for each in self._limited()):
            await asyncio.sleep(0.01)

    async def _close_grpc(self, grace: float | None) -> None:
        if self._grpc_server is None:
            return
        stopping = asyncio.create_task(self._grpc_server.stop(grace))
        while not stopping.done() and not self.force_exit:
            await asyncio.sleep(0.01)
        if self.force_exit:
            await self._grpc_server.stop(None)
        await stopping

    def _limited(self) -> list[LimitedConnection]:
        return [each for each in self.server_state.connections if isinstance(each, LimitedConnection)]

    async def _keep_expiring(self) -> None:
        while True:
            self._state.tick()
            await asyncio.sleep(0.1)
