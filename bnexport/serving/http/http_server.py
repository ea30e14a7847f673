"""One serving process: a socket, uvicorn on it, and a stop that loses no request."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import uvicorn

from bnexport import interrupts
from bnexport.errors import UsageError
from bnexport.files import input_errors
from bnexport.optional import one_line
from bnexport.serving.access_log import JsonLog
from bnexport.serving.batcher import THREADS
from bnexport.serving.counters import Share
from bnexport.serving.http.app import App
from bnexport.serving.http.fast_lane import FastLane
from bnexport.serving.http.uvicorn_adapter import DrainingServer, configured, limited, missing_part
from bnexport.serving.listener import bound, free_port
from bnexport.serving.repository import Repository
from bnexport.serving.served_model import ServingSettings
from bnexport.serving.state import AppSettings, ServerState

if TYPE_CHECKING:
    from bnexport.serving.grpc.grpc_server import GrpcServer

#: Files that a process opens in addition to connections: libraries, models, gRPC.
_OTHER_FILES = 256


@dataclass(frozen=True)
class ServerSettings:
    """Options of the server."""

    host: str = "127.0.0.1"  # Address to bind
    port: int = 8000  # Port; 0 takes a free one
    grpc_port: int | None = None  # Port of the gRPC server; 0 takes a free one, None opens none
    reuse_port: bool = False  # Share the port with other servers; the system spreads the connections among them
    grace: float = 30.0  # Seconds from SIGTERM until unanswered requests are abandoned
    poll: float | None = None  # Seconds between polls for new versions; None never polls
    access_log: bool = True  # Write a line for each request to standard error
    token_file: Path | None = None  # File with the token that clients must send
    tls: tuple[Path, Path] | None = None  # Files of the certificate and of its key
    middleware: str | None = None  # "package.module:callable" that wraps the ASGI application, such as OpenTelemetry's
    allow_load: bool = False  # Allow requests to load and unload models
    models: ServingSettings = field(default_factory=ServingSettings)  # Options for opening models, and the limits


@interrupts.terminable()  # while models are loaded; afterwards, a signal starts the drain
def serve(path: Path, settings: ServerSettings, *, announce: Callable[[str], None]) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Args:
        path: A bundle, or a folder of models.
        settings: Options.
        announce: Receives one sentence when the server accepts requests.

    Raises:
        BundleError: ``path`` contains no model.
        UsageError: The port, the token file, the certificate or the middleware can't be used.
        Unavailable: The runtime does not work on this machine.
        KeyboardInterrupt: The server was stopped before it served.
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
    stopping: Callable[[], None] = lambda: None,
) -> None:
    """Serve on a bound socket until SIGTERM or Ctrl-C; ``stopping`` is called at the first signal."""
    token = None if settings.token_file is None else read_token(settings.token_file)
    log = JsonLog(sys.stderr, access=settings.access_log, process=None if share is None else share.slot)
    log.take_over("uvicorn.error", "asyncio")
    try:
        _allow_files(settings.models.limits.connections + _OTHER_FILES, log)
        if settings.grpc_port is not None:
            free_port(settings.host, settings.grpc_port, reuse=settings.reuse_port, option="--grpc-port")
        repository = Repository(path, settings.models, log.event)
        repository.load()
        state = ServerState(
            repository, AppSettings(settings.models.limits, token, settings.allow_load), log, share=share
        )
        app = App(state)
        grpc_server: GrpcServer | None = None
        if settings.grpc_port is not None:
            from bnexport.serving.grpc.grpc_server import GrpcServer

            grpc_server = GrpcServer(
                state, settings.host, settings.grpc_port, settings.tls, reuse_port=settings.reuse_port
            )
        DrainingServer(
            _config(app, settings), state, grpc_server, grace=settings.grace, poll=settings.poll,
            on_start=lambda: announce(_summary(repository, listener, grpc_server, settings)), on_stop=stopping,
        ).run([listener])  # fmt: skip
    finally:
        log.close()


def _allow_files(wanted: int, log: JsonLog) -> None:
    """Raise the limit of open files, which include connections, as far as the system allows (getrlimit(2))."""
    if sys.platform == "win32":
        return
    import resource  # missing on Windows

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    if most < wanted:
        reason = "connections are reset before the server's limit is reached"
        log.event("few files", allowed=hard, wanted=wanted, reason=reason)


def leave_engines() -> None:
    """End the process at once if an engine still runs a batch; Python would wait for its thread."""
    if any(thread.name.startswith(THREADS) for thread in threading.enumerate()):
        interrupts.exit_at_once(0)


def _summary(
    repository: Repository, listener: socket.socket, grpc_server: GrpcServer | None, settings: ServerSettings
) -> str:
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    names = ", ".join(f"{name} {version} ({entry.state.lower()})" for name, version, entry in repository.each())
    also = "" if grpc_server is None else f"grpc://{shown}:{grpc_server.port} and "
    return f"Serving {names} on {also}{'http' if settings.tls is None else 'https'}://{shown}:{port}"


def _wrapped(app: Any, middleware: str | None) -> Any:
    if middleware is None:
        return app
    module, _, name = middleware.partition(":")
    try:
        return getattr(importlib.import_module(module), name)(app)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UsageError(
            f"the middleware {middleware!r} can't be used: {one_line(error)}",
            remedy="Give an ASGI wrapper as package.module:callable",
        ) from error


def _config(app: App, settings: ServerSettings) -> uvicorn.Config:
    """Configure uvicorn, with limited connections if it has the private parts that the adapter needs."""
    kind: type[asyncio.Protocol] | Literal["auto"] = "auto"
    if (missing := missing_part()) is None:
        # Middleware must see every ASGI message, so the fast lane is off.
        fast_lane = FastLane(app) if settings.middleware is None else None
        kind = limited(settings.models.limits, fast_lane, app.refused)
    else:
        app.state.log.event(
            "plain connections",
            reason=f"uvicorn {uvicorn.__version__} has no {missing}, so the fast lane and the limits on headers are off",
        )
    return configured(_wrapped(app, settings.middleware), kind, settings.tls)


def read_token(file: Path) -> bytes:
    """Return the token in a file, without surrounding white space."""
    with input_errors(file, UsageError, remedy="Give a file with one token"):
        token = file.read_bytes().strip()
    if len(token) < 16 or len(token) > 4096 or any(not 0x21 <= byte <= 0x7E for byte in token):
        raise UsageError(
            f"{file} contains no token of 16 to 4096 visible ASCII characters", remedy="Write one: openssl rand -hex 32"
        )
    return token
