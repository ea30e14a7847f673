"""State that all requests of a server share, over HTTP and gRPC alike."""

from __future__ import annotations

import hmac
import os
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from bnexport.errors import NotServing, RequestError
from bnexport.serving.access_log import JsonLog
from bnexport.serving.counters import Key, ModelTotals, Share, Totals
from bnexport.serving.repository import Repository
from bnexport.serving.served_model import ServedModel
from bnexport.serving.serving_limits import ServingLimits

_LONGEST_ID = 128


@dataclass(frozen=True)
class AppSettings:
    """Permissions and limits of clients."""

    limits: ServingLimits = field(default_factory=ServingLimits)  # Limits of one request
    token: bytes | None = None  # Bearer token that clients must send, except to health probes; None requires none
    allow_load: bool = False  # Allow requests to load and unload models


class Memory:
    """Counts the bytes that requests in progress hold together, at most ``most``."""

    def __init__(self, most: int) -> None:
        self.held, self._most = 0, most

    def hold(self, size: int) -> None:
        """Count ``size`` bytes more."""
        if self.held + size > self._most:
            raise NotServing("the requests that are being answered fill the memory", remedy="Try again in a second")
        self.held += size

    def release(self, size: int) -> None:
        """Count ``size`` bytes less."""
        self.held -= size


class Answered(Protocol):
    """A request's data for its log line, for HTTP and gRPC alike."""

    id: str
    path: str
    model: ServedModel | None
    rows: int
    bytes_in: int


class Answer(NamedTuple):
    """An answer's data for its log line."""

    client: str  # The client's address
    method: str  # HTTP's, or "gRPC"
    status: int | str  # HTTP's, or the name of gRPC's code
    ns: int  # Nanoseconds from the request to the answer
    size: int  # Bytes of its body
    trace: str  # The client's ``traceparent``, or ""


class ServerState:
    """State that all requests share: models, settings, log and counters.

    Args:
        repository: Loaded.
        settings: Permissions and limits of clients.
        log: Log of requests and events.
        share: Publishes this process's counters to the others; None if it serves alone.
    """

    def __init__(
        self, repository: Repository, settings: AppSettings, log: JsonLog, *, share: Share | None = None
    ) -> None:
        self.repository, self.settings, self.log, self.share = repository, settings, log, share
        self.memory = Memory(settings.limits.held_bytes)  # Counts the bytes that requests hold
        self.draining = False  # True if the server is about to stop
        self.active = 0  # Requests in progress, over HTTP and gRPC
        self.last_work = time.monotonic()  # Time of the last request that was not a probe, by ``time.monotonic``
        self.requests: Counter[tuple[str, int]] = Counter()  # (route, status) -> requests over HTTP
        self.calls: Counter[tuple[str, str]] = Counter()  # (method, code) -> calls over gRPC
        self.calls_active = 0  # Calls over gRPC that are being answered
        self._prefix, self._count = os.urandom(6).hex(), 0

    def id_of(self, given: str | None) -> str:
        """Return a request's id: the client's, if it can be logged and returned unchanged, or a new one."""
        self._count += 1
        if given and len(given) <= _LONGEST_ID and given.isascii() and given.isprintable():
            return given
        return f"{self._prefix}{self._count:x}"

    def log_answer(self, request: Answered, answer: Answer) -> None:
        """Write the line of a request into the access log."""
        model = request.model
        fields: dict[str, Any] = {
            "time": time.time(),
            "id": request.id,
            "client": answer.client,
            "method": answer.method,
            "path": request.path[:200],
            "status": answer.status,
            "us": answer.ns // 1000,
            "in": request.bytes_in,
            "out": answer.size,
        }
        if model is not None:
            fields["model"], fields["version"], fields["rows"] = model.name, model.version, request.rows
        if answer.trace:
            fields["trace"] = answer.trace[:64]
        self.log.request(fields)

    def totals(self) -> Totals:
        """Return the counters of all processes."""
        own = self._own_totals()
        return own if self.share is None else self.share.together(own)

    def publish(self, *, at_once: bool = True) -> None:
        """Publish this process's counters to the other processes."""
        if self.share is not None and (at_once or self.share.due()):
            self.share.publish(self._own_totals())

    def tick(self) -> None:
        """Fail requests past their deadline, publish counters and the heartbeat; to be called ten times a second."""
        for _, _, entry in self.repository.each():
            if entry.served is not None:
                entry.served.batcher.expire()
        self.publish(at_once=False)
        if self.share is not None:
            self.share.beat()

    def _own_totals(self) -> Totals:
        return Totals(self.requests, self.calls, self.active, self.calls_active, _models_of(self.repository))

    def let_in(self, authorization: bytes) -> None:
        """Refuse a request without the token."""
        token = self.settings.token
        if token is None:
            return
        kind, _, shown = authorization.partition(b" ")
        if kind.lower() != b"bearer" or not hmac.compare_digest(shown.strip(), token):
            raise RequestError(
                "the request shows no token, or another one",
                remedy="Send the header Authorization: Bearer TOKEN",
                status=401,
            )

    def permit_loading(self) -> None:
        """Refuse to load and unload, unless that is allowed."""
        if not self.settings.allow_load:
            raise RequestError(
                "this server does not load or unload models by request",
                remedy="Start it with --allow-load, or let it look for changes with --poll",
                status=403,
            )


def _models_of(repository: Repository) -> dict[Key, ModelTotals]:
    """Return the totals of this process's models; the counters are shared, not copied."""
    models: dict[Key, ModelTotals] = {}
    for name, version, entry in repository.each():
        served = entry.served
        models[name, version] = (
            ModelTotals(ready=False)
            if served is None
            else ModelTotals(True, served.batcher.waiting, served.batcher.workers, served.statistics)
        )
    return models
