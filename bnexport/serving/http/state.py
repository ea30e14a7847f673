"""What all requests of a server share."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field

from bnexport.serving.http.access_log import JsonLog
from bnexport.serving.http.exchange import Exchange
from bnexport.serving.http.request import Intake
from bnexport.serving.http.totals import Share, Totals, totals_of
from bnexport.serving.limits import ServingLimits
from bnexport.serving.repository import Repository


@dataclass(frozen=True)
class AppSettings:
    """What clients may do.

    Attributes:
        limits: Of one request.
        token: What clients must show as a bearer token, but for the health probes; None lets everybody in.
        allow_load: Whether models may be loaded and unloaded by request.
    """

    limits: ServingLimits = field(default_factory=ServingLimits)
    token: bytes | None = None
    allow_load: bool = False


class State:
    """The models, the settings, and what is going on.

    Args:
        repository: Loaded.
        settings: What clients may do.
        log: Of requests and events.
        share: Where this process's counters are kept for the others; None where it serves alone.

    Attributes:
        intake: Reads bodies.
        draining: Whether the server is about to stop.
        active: Requests that are being answered.
        last_work: When the last request came that was no probe, by ``time.monotonic``.
        requests: (route, status) -> requests.
    """

    def __init__(
        self, repository: Repository, settings: AppSettings, log: JsonLog, *, share: Share | None = None
    ) -> None:
        self.repository, self.settings, self.log, self.share = repository, settings, log, share
        self.intake = Intake(settings.limits)
        self.draining = False
        self.active = 0
        self.last_work = time.monotonic()
        self.requests: Counter[tuple[str, int]] = Counter()

    def totals(self) -> Totals:
        """What has been counted, by all processes."""
        own = totals_of(self.repository, self.requests, self.active)
        return own if self.share is None else self.share.together(own)

    def publish(self, *, at_once: bool = True) -> None:
        """Let the other processes know what this one has counted."""
        if self.share is not None and (at_once or self.share.due()):
            self.share.publish(totals_of(self.repository, self.requests, self.active))

    def tick(self) -> None:
        """Fail what is past its deadline, and publish; to be called ten times a second."""
        for _, _, entry in self.repository.each():
            if entry.served is not None:
                entry.served.batcher.expire()
        self.publish(at_once=False)

    async def body(self, exchange: Exchange) -> bytes:
        """The request's body; the caller gives it back to ``intake.release``."""
        body = await self.intake.read(exchange.receive, exchange.headers)
        exchange.read = True
        exchange.bytes_in = len(body)
        return body
