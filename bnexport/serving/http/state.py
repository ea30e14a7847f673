"""What all requests over HTTP share."""

from __future__ import annotations

from bnexport.serving.access_log import JsonLog
from bnexport.serving.http.exchange import Exchange
from bnexport.serving.http.request import Intake
from bnexport.serving.repository import Repository
from bnexport.serving.state import AppSettings, ServerState


class State(ServerState):
    """What every door shares, and the reader of bodies.

    Args:
        repository: Loaded.
        settings: What clients may do.
        log: Of requests and events.

    Attributes:
        intake: Reads bodies.
    """

    def __init__(self, repository: Repository, settings: AppSettings, log: JsonLog) -> None:
        super().__init__(repository, settings, log)
        self.intake = Intake(settings.limits, self.memory)

    async def body(self, exchange: Exchange) -> bytes:
        """The request's body; the caller gives it back to ``intake.release``."""
        body = await self.intake.read(exchange.receive, exchange.headers)
        exchange.read = True
        exchange.bytes_in = len(body)
        return body
