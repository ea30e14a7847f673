"""The state that all requests of a server share, over HTTP and gRPC, and the context of one request."""

from __future__ import annotations

import hmac
import os
import time
from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from bnexport import __version__
from bnexport.errors import BnexportError, NotServing, RequestError
from bnexport.optional import one_line
from bnexport.serving.access_log import JsonLog
from bnexport.serving.counters import Key, ModelTotals, Share, Totals
from bnexport.serving.repository import Repository
from bnexport.serving.served_model import ServedModel
from bnexport.serving.serving_limits import ServingLimits

_LONGEST_ID = 128
_STOPPING = "the server is stopping"
_EXTENSIONS = (
    "binary_tensor_data", "classification", "model_configuration", "model_repository", "schedule_policy", "statistics",
)  # fmt: skip
#: The protocol's "Server Metadata".
SERVER_METADATA = {"name": "bnexport", "version": __version__, "extensions": _EXTENSIONS}


@dataclass(frozen=True)
class AppSettings:
    """Permissions and limits of clients."""

    limits: ServingLimits = field(default_factory=ServingLimits)  # Limits of one request
    token: bytes | None = None  # Bearer token that clients must send, except to health probes; None requires none
    allow_load: bool = False  # Allow requests to load and unload models


class RequestContext(ABC):
    """One request over HTTP or gRPC, with the data of its log line."""

    __slots__ = ("bytes_in", "held", "id", "model", "path", "rows")

    def __init__(self, path: str, request_id: str) -> None:
        self.path = path  # Path in the URL, unquoted; of gRPC "/package.Service/Method"
        self.id = request_id  # The client's request id, or a new one
        self.model: ServedModel | None = None  # The answering model, once it is known
        self.rows = self.bytes_in = 0  # Samples, once they are known, and bytes of the body
        self.held = 0  # Bytes that count in ``ServerState.held``

    @abstractmethod
    def origin(self) -> tuple[str, str, str]:
        """Return the method (HTTP's, or "gRPC"), the client's address, and ``traceparent`` or ""."""


class ServerState:
    """State that all requests share. ``share`` publishes this process's counters; None if it serves alone."""

    def __init__(
        self, repository: Repository, settings: AppSettings, log: JsonLog, *, share: Share | None = None
    ) -> None:
        self.repository, self.settings, self.log, self.share = repository, settings, log, share
        self.held = 0  # Bytes of the bodies of all requests in progress
        self.draining = False  # True if the server is about to stop
        self.active = 0  # Requests in progress, over HTTP and gRPC
        self.last_work = time.monotonic()  # Time of the last request that was not a probe, by ``time.monotonic``
        self.requests: Counter[tuple[str, int]] = Counter()  # (route, status) -> requests over HTTP
        self.calls: Counter[tuple[str, str]] = Counter()  # (method, code) -> calls over gRPC
        self.calls_active = 0  # Calls over gRPC that are being answered
        self._prefix, self._count = os.urandom(6).hex(), 0

    def id_of(self, given: str | None) -> str:
        """Return the client's request id if it is short printable ASCII, else a new one."""
        self._count += 1
        if given and len(given) <= _LONGEST_ID and given.isascii() and given.isprintable():
            return given
        return f"{self._prefix}{self._count:x}"

    def hold(self, request: RequestContext, size: int) -> None:
        """Count ``size`` more bytes of a request's body."""
        if self.held + size > self.settings.limits.held_bytes:
            raise NotServing("the requests in progress use all memory for bodies", remedy="Try again in a second")
        self.held += size
        request.held += size

    def release(self, request: RequestContext, size: int) -> None:
        """Stop counting ``size`` bytes of a request."""
        self.held -= size
        request.held -= size

    def answered(self, request: RequestContext, status: int | str, ns: int, size: int, *, ok: bool) -> None:
        """Count an answer of ``size`` bytes after ``ns`` nanoseconds for its model, and log it.

        ``status`` is HTTP's, or the name of gRPC's code.
        """
        model = request.model
        if model is not None:
            model.statistics.answered(ns, ok=ok)
        if not self.log.access:
            return
        method, client, trace = request.origin()
        fields: dict[str, Any] = {
            "time": time.time(),
            "id": request.id,
            "client": client,
            "method": method,
            "path": request.path[:200],
            "status": status,
            "us": ns // 1000,
            "in": request.bytes_in,
            "out": size,
        }
        if model is not None:
            fields["model"], fields["version"], fields["rows"] = model.name, model.version, request.rows
        if trace:
            fields["trace"] = trace[:64]
        self.log.request(fields)

    def failure(self, request: RequestContext, error: Exception) -> BnexportError:
        """Return the error that the client gets; log an unexpected one."""
        if isinstance(error, BnexportError):
            return error
        text = f"{type(error).__name__}: {one_line(error)}"
        self.log.event("fault", id=request.id, path=request.path[:200], error=text)
        return NotServing("the server failed", remedy="The server's log contains the error", status=500)

    def model_metadata(self, name: str, version: str | None = None) -> dict[str, Any]:
        """Return the protocol's "Model Metadata"."""
        model = self.repository.resolve(name, version)
        versions = [number for number, entry in self.repository.models[name].items() if entry.served is not None]
        return model.metadata(sorted(versions, key=int) if version is None else [version])

    def model_config(self, name: str, version: str | None = None) -> dict[str, Any]:
        """Return Triton's model configuration."""
        return self.repository.resolve(name, version).config()

    def statistics(self, name: str | None = None, version: str | None = None) -> dict[str, Any]:
        """Return the counters of one model, or of all (Triton, "Statistics Extension")."""
        if name is not None:
            self.repository.resolve(name, version)
        entries = [
            found.statistics.to_json(model, number)
            for (model, number), found in self.totals().models.items()
            if found.statistics is not None and name in (None, model) and version in (None, number)
        ]
        return {"model_stats": entries}

    def why_not_ready(self) -> str:
        """Return the reason for sending no requests to this server; "" if it is ready."""
        if self.draining:
            return _STOPPING
        if self.repository.ready():
            return ""
        problems = self.repository.problems()
        return "; ".join(f"{name}: {text}" for name, text in problems.items()) or "the server has no model"

    def why_model_not_ready(self, name: str, version: str | None = None) -> str:
        """Return the reason why a model does not answer; "" if it answers."""
        try:
            self.repository.resolve(name, version)
        except NotServing as error:
            return error.sentence
        return _STOPPING if self.draining else ""

    def totals(self) -> Totals:
        """Return the counters of all processes."""
        own = self._own_totals()
        return own if self.share is None else self.share.together(own)

    def publish(self, *, at_once: bool = True) -> None:
        """Publish this process's counters to the other processes."""
        if self.share is not None and (at_once or self.share.due()):
            self.share.publish(self._own_totals())

    def tick(self) -> None:
        """Fail requests past their deadline, publish the counters and the heartbeat. The server calls it ten times a second."""
        for _, _, entry in self.repository.each():
            if entry.served is not None:
                entry.served.batcher.expire()
        self.publish(at_once=False)
        if self.share is not None:
            self.share.beat()

    def _own_totals(self) -> Totals:
        """Return the totals of this process. They share the counters."""
        models: dict[Key, ModelTotals] = {}
        for name, version, entry in self.repository.each():
            served = entry.served
            models[name, version] = (
                ModelTotals(ready=False)
                if served is None
                else ModelTotals(True, served.batcher.waiting, served.batcher.workers, served.statistics)
            )
        return Totals(self.requests, self.calls, self.active, self.calls_active, models)

    async def load(self, name: str, *, parameters: bool) -> dict[str, Any]:
        """Load a model's versions from disk; return the protocol's empty answer."""
        self.permit_loading()
        if parameters:
            raise RequestError("a model is loaded from disk as it is, without parameters", remedy="Send no parameters")
        await self.repository.reload(name)
        return {}

    def unload(self, name: str) -> dict[str, Any]:
        """Close a model's versions; return the protocol's empty answer."""
        self.permit_loading()
        self.repository.unload(name)
        return {}

    def let_in(self, authorization: bytes) -> None:
        """Refuse a request without the required token; record the time of every accepted request."""
        token = self.settings.token
        if token is not None:
            kind, _, shown = authorization.partition(b" ")
            if kind.lower() != b"bearer" or not hmac.compare_digest(shown.strip(), token):
                raise RequestError(
                    "the request has no token, or a wrong one",
                    remedy="Send the header Authorization: Bearer TOKEN",
                    status=401,
                )
        self.last_work = time.monotonic()

    def permit_loading(self) -> None:
        """Refuse to load and unload models unless the settings allow it."""
        if not self.settings.allow_load:
            raise RequestError(
                "this server does not load or unload models by request",
                remedy="Start the server with --allow-load, or with --poll to load changes from disk",
                status=403,
            )
