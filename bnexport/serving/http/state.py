"""What all requests over HTTP share."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from bnexport.serving.access_log import JsonLog
from bnexport.serving.http.exchange import Exchange
from bnexport.serving.http.request import Intake
from bnexport.serving.repository import Repository
from bnexport.serving.state import AppSettings, ServerState
from bnexport.serving.totals import Share


class State(ServerState):
    """What every door shares, and the reader of bodies.

    Args:
        repository: Loaded.
        settings: What clients may do.
        log: Of requests and events.
        share: Where this process's counters are kept for the others; None where it serves alone.

    Attributes:
        intake: Reads bodies.
    """

    def __init__(
        self, repository: Repository, settings: AppSettings, log: JsonLog, *, share: Share | None = None
    ) -> None:
        super().__init__(repository, settings, log, share=share)
        self.intake = Intake(settings.limits, self.memory)

    async def body(self, exchange: Exchange) -> bytes:
        """The request's body; the caller gives it back to ``intake.release``."""

        async def receive() -> Mapping[str, Any]:
            message = await exchange.receive()
            exchange.arrived_ns = time.perf_counter_ns()
            return message

        body = await self.intake.read(receive, exchange.headers)
        exchange.read = True
        exchange.bytes_in = len(body)
        return body
