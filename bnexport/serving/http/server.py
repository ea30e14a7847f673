"""The process: a socket, uvicorn on it, and a stop that loses no request."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import importlib
import math
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn

from bnexport import interrupts
from bnexport.errors import BnexportError, UsageError
from bnexport.optional import one_line
from bnexport.serving.access_log import JsonLog
from bnexport.serving.batcher import THREADS
from bnexport.serving.http.app import App
from bnexport.serving.http.connection import LimitedConnection, limited
from bnexport.serving.http.credentials import read_token, tls_options
from bnexport.serving.http.fast_lane import FastLane
from bnexport.serving.http.state import State
from bnexport.serving.listener import backlog, bound, deafen, free_port
from bnexport.serving.repository import Repository
from bnexport.serving.served_model import ServingSettings
from bnexport.serving.state import AppSettings
from bnexport.serving.totals import Share

if TYPE_CHECKING:
    from bnexport.serving.grpc.door import GrpcDoor

#: Seconds without a request after which a server that is to stop does so; balancers stop sending when it is not ready.
QUIET = 1.0
#: Seconds for connections that are half made when the server stops to listen.
_HANDSHAKES = 0.05
#: Files that a process opens beside its connections: libraries, models, the door of gRPC.
_OTHER_FILES = 256
#: Seconds that an idle connection is kept; longer than balancers keep theirs, so that they close first.
_KEEP_ALIVE = 75


def _nothing() -> None:
    """What is called where nobody wants to know."""


@dataclass(frozen=True)
class ServerSettings:
    """How the process serves.

    Attributes:
        host: Address to bind.
        port: 0 takes a free one.
        grpc_port: Of the gRPC door; 0 takes a free one, None opens none.
        reuse_port: Whether other servers share the port; the system spreads the connections among them.
        grace: Seconds from SIGTERM until what is still not answered is given up.
        poll: Seconds between looks for new versions; None looks never.
        access_log: Whether each request gets a line on standard error.
        token_file: A file with the token that clients must show.
        tls: Files of the certificate and of its key.
        middleware: "package.module:callable" that wraps the ASGI application, such as OpenTelemetry's.
        allow_load: Whether models may be loaded and unloaded by request.
        models: How models are opened, and the limits.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    grpc_port: int | None = None
    reuse_port: bool = False
    grace: float = 30.0
    poll: float | None = None
    access_log: bool = True
    token_file: Path | None = None
    tls: tuple[Path, Path] | None = None
    middleware: str | None = None
    allow_load: bool = False
    models: ServingSettings = field(default_factory=ServingSettings)


@interrupts.terminable()  # while models are loaded; from then on a signal begins the drain
def serve(path: Path, settings: ServerSettings, *, announce: Callable[[str], None]) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Args:
        path: A bundle, or a folder of models.
        settings: How.
        announce: Called with one sentence once requests can come.

    Raises:
        BundleError: There is no model.
        UsageError: The port, the token file, the certificate or the middleware can't be used.
        Unavailable: The runtime does not work here.
        KeyboardInterrupt: It was stopped before it served.
    """
    with contextlib.closing(bound(settings.host, settings.port, reuse=settings.reuse_port)) as listener:
        serve_on(listener, path, settings, announce=announce)


def serve_on(
    listener: socket.socket,
    path: Path,
    settings: ServerSettings,
    *,
    announce: Callable[[str], None],
    share: Share | None = None,
    stopping: Callable[[], None] = _nothing,
) -> None:
    """Serve on a socket that is bound until SIGTERM or Ctrl-C.

    Args:
        listener: The socket.
        path: A bundle, or a folder of models.
        settings: How.
        announce: Called with one sentence once requests can come.
        share: Of the counters, where this is one process of several.
        stopping: Called at the first signal to stop.

    Raises:
        BnexportError: As ``serve``.
    """
    token = None if settings.token_file is None else read_token(settings.token_file)
    log = JsonLog(sys.stderr, access=settings.access_log, process=None if share is None else share.slot)
    log.take_over("uvicorn.error", "asyncio")
    try:
        _allow_files(settings.models.limits.connections + _OTHER_FILES, log)
        if settings.grpc_port is not None:
            free_port(settings.host, settings.grpc_port, reuse=settings.reuse_port, option="--grpc-port")
        repository = Repository(path, settings.models, log.event)
        repository.load()
        state = State(repository, AppSettings(settings.models.limits, token, settings.allow_load), log, share=share)
        app = App(state)
        # Middleware sees ASGI's messages, so with it nothing may go around them.
        fast_lane = FastLane(app) if settings.middleware is None else None
        kind = limited(settings.models.limits, fast_lane, app.refused)
        config = _config(_wrapped(app, settings.middleware), settings, kind)
        server = DrainingServer(config, state, settings)
        told = functools.partial(_told, repository, listener, server.door, settings)
        server.run([listener], on_start=lambda: announce(told()), on_stop=stopping)
    finally:
        log.close()


def _allow_files(wanted: int, log: JsonLog) -> None:
    """Let the process open so many files, as far as the system lets it (getrlimit(2)): connections count, too."""
    if sys.platform == "win32":
        return
    import resource  # not on Windows

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    if most < wanted:
        log.event(
            "few files", allowed=hard, wanted=wanted, reason="connections are reset before their limit is reached"
        )


def leave_engines() -> None:
    """End the process where an engine still runs a batch after the time to stop, for which Python would wait at its end."""
    if any(thread.name.startswith(THREADS) for thread in threading.enumerate()):
        interrupts.exit_at_once(0)


def _told(repository: Repository, listener: socket.socket, door: GrpcDoor | None, settings: ServerSettings) -> str:
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    names = ", ".join(f"{name} {version} ({entry.state.lower()})" for name, version, entry in repository.each())
    also = "" if door is None else f"grpc://{shown}:{door.port} and "
    return f"Serving {names} on {also}{'http' if settings.tls is None else 'https'}://{shown}:{port}"


class DrainingServer(uvicorn.Server):
    """uvicorn, which at SIGTERM first says that it is not ready, then goes on until nobody asks any more.

    uvicorn itself closes its socket at once, when balancers do not know yet that they must not send requests here.

    Args:
        config: Of uvicorn.
        state: Of the application.
        settings: Grace and polling.
    """

    def __init__(self, config: uvicorn.Config, state: State, settings: ServerSettings) -> None:
        super().__init__(config)
        self._state, self._settings = state, settings
        self._stop_at: float | None = None
        self._polled = time.monotonic()
        self._poll_task: asyncio.Task[None] | None = None
        self._on_start = self._on_stop = _nothing
        self.door = None if settings.grpc_port is None else _door(state, settings, settings.grpc_port)

    def run(
        self,
        sockets: list[socket.socket] | None = None,
        *,
        on_start: Callable[[], None] = _nothing,
        on_stop: Callable[[], None] = _nothing,
    ) -> None:
        """Serve until told to stop; ``on_start`` is called once the socket accepts, ``on_stop`` at the first signal."""
        self._on_start, self._on_stop = on_start, on_stop
        super().run(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen."""
        await super().startup(sockets)
        if self.door is not None:
            await self.door.start()
        gc.collect()
        gc.freeze()  # what was loaded stays: the collector needs not look through it again and again
        self._on_start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 -- uvicorn's signature
        """The first signal starts the drain, the second one ends it.

        One process of several is told by its supervisor, and perhaps by the system as well (systemd signals all processes
        of a service): there a SIGINT ends the drain, also when it is seen before a SIGTERM that was sent earlier.
        """
        first = self._stop_at is None
        if first:
            self._state.draining = True
            self._state.last_work = time.monotonic()
            self._stop_at = time.monotonic() + self._settings.grace
            self._on_stop()
        if not first if self._state.share is None else sig == signal.SIGINT:
            self.should_exit = self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: deadlines, slow clients, new versions, and whether to stop."""
        self._state.tick()
        now, loop_now = time.monotonic(), asyncio.get_running_loop().time()
        for connection in list(self.server_state.connections):
            if isinstance(connection, LimitedConnection):
                connection.sweep(loop_now)
        poll = self._settings.poll
        if poll is not None and self._poll_task is None and now - self._polled >= poll and self._stop_at is None:
            self._poll_task = asyncio.create_task(self._poll())
        if self._stop_at is not None and not self.should_exit:
            self._consider_exit(now, self._stop_at)
        return await super().on_tick(counter)

    def _consider_exit(self, now: float, stop_at: float) -> None:
        quiet = self._state.active == 0 and now - self._state.last_work >= QUIET
        # Half of the time is for requests that come, the other half for those that are being answered.
        if quiet or now >= stop_at - self._settings.grace / 2:
            self._state.log.event("closing", quiet=quiet, active=self._state.active)
            self.config.timeout_graceful_shutdown = max(1, math.ceil(stop_at - now))
            self.should_exit = True

    async def _poll(self) -> None:
        try:
            await self._state.repository.poll()
        except BnexportError as error:
            self._state.log.event("poll failed", reason=str(error))
        except Exception as error:  # a fault in one look must not end the looking
            self._state.log.event("fault", error=f"{type(error).__name__}: {one_line(error)}")
        finally:
            self._polled, self._poll_task = time.monotonic(), None

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the socket, answer what was accepted, free the models."""
        expiring = asyncio.create_task(self._keep_expiring())
        try:
            closing = asyncio.create_task(self._close_door(self.config.timeout_graceful_shutdown))
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
        """Close the listening socket so that nobody whom the system has connected already is cut off.

        What waits in the socket's backlog would be reset by closing it, and uvicorn closes connections on which no request
        has come yet.
        """
        loop = asyncio.get_running_loop()
        if all(deafen(listener) for listener in sockets):
            await asyncio.sleep(_HANDSHAKES)
        waiting = [client for listener in sockets for client in backlog(listener)]
        for server in self.servers:
            server.close()
        for client in waiting:
            with contextlib.suppress(OSError):
                await loop.connect_accepted_socket(self._connection, client, ssl=self.config.ssl)
        end = loop.time() + QUIET
        while loop.time() < end and not self.force_exit and any(map(_expected, self.server_state.connections)):
            await asyncio.sleep(0.01)

    async def _close_door(self, grace: float | None) -> None:
        if self.door is None:
            return
        stopping = asyncio.create_task(self.door.stop(grace))
        while not stopping.done() and not self.force_exit:
            await asyncio.sleep(0.01)
        if self.force_exit:
            await self.door.stop(None)
        await stopping

    def _connection(self) -> asyncio.Protocol:
        kind: Any = self.config.http_protocol_class
        protocol: asyncio.Protocol = kind(config=self.config, server_state=self.server_state, app_state={})
        return protocol

    async def _keep_expiring(self) -> None:
        while True:
            self._state.tick()
            await asyncio.sleep(0.1)


def _expected(connection: object) -> bool:
    """Whether a connection's first request, or the rest of its next one's headers, is on its way."""
    return isinstance(connection, LimitedConnection) and connection.expected


def _door(state: State, settings: ServerSettings, port: int) -> GrpcDoor:
    from bnexport.serving.grpc.door import GrpcDoor, GrpcSettings  # its packages are an extra's

    return GrpcDoor(state, GrpcSettings(settings.host, port, settings.reuse_port, settings.tls))


def _wrapped(app: Any, middleware: str | None) -> Any:
    if middleware is None:
        return app
    module, _, name = middleware.partition(":")
    try:
        return getattr(importlib.import_module(module), name)(app)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UsageError(
            f"the middleware {middleware!r} can't be used: {one_line(error)}",
            remedy="Write it as package.module:callable",
        ) from error


def _config(app: Any, settings: ServerSettings, kind: type[LimitedConnection]) -> uvicorn.Config:
    tls = {} if settings.tls is None else tls_options(*settings.tls)
    config = uvicorn.Config(
        app,
        http=kind,
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE,
        **tls,
    )
    try:
        config.load()
    except (OSError, ValueError) as error:
        told = " and ".join(map(str, settings.tls or ()))
        raise UsageError(
            f"the TLS files {told} can't be used: {one_line(error)}",
            remedy="Give a certificate and its own key, as PEM files",
        ) from error
    return config
