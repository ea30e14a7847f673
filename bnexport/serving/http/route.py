"""One row of the table of routes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import NamedTuple

from bnexport.serving.http.reply import Reply

Handler = Callable[..., Awaitable[Reply]]


class Route(NamedTuple):
    """One row of ROUTES.

    Attributes:
        method: HTTP's.
        pattern: Segments of the path; {..} takes any one segment, and what stands in [..] may be missing.
        handler: (state, exchange, *captured segments) -> reply.
        probe: Whether it is a probe of a supervisor: open without a token, and no work that a stop waits for.
    """

    method: str
    pattern: str
    handler: Handler
    probe: bool = False
