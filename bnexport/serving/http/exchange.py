"""One request and what is known of it by the time it is logged."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bnexport.serving.http.request import Receive

if TYPE_CHECKING:
    from bnexport.serving.served_model import ServedModel


class Exchange:
    """One request on its way.

    Attributes:
        method: "GET", "POST".
        path: Unquoted.
        headers: Lower-case name -> value.
        receive: ASGI's.
        id: Of the request, the client's or ours.
        model: That answers it, once it is known.
        rows: Samples, once they are known.
        read: Whether the body was read to its end.
        bytes_in: Bytes of the body.
        arrived_ns: When the last part of the body came; 0 before.
    """

    __slots__ = ("arrived_ns", "bytes_in", "headers", "id", "method", "model", "path", "read", "receive", "rows")

    def __init__(self, method: str, path: str, headers: dict[bytes, bytes], receive: Receive, request_id: str) -> None:
        self.method, self.path = method, path
        self.headers, self.receive, self.id = headers, receive, request_id
        self.model: ServedModel | None = None
        self.rows = 0
        self.read = False
        self.bytes_in = self.arrived_ns = 0
