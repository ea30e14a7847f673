"""Every limit of the server with its reason, and a bounded cache for data that requests repeat."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from bnexport.errors import RequestError, UsageError

_KB, _MB = 2**10, 2**20


def _limit(value: Any, what: str, reason: str) -> Any:
    return field(default=value, metadata={"what": what, "reason": reason})


@dataclass(frozen=True)
class ServingLimits:
    """Limits of the server. The metadata of each field state what is counted, and the reason for the number."""

    body_bytes: int = _limit(64 * _MB, "bytes of a request's body", "20,000 images of 28x28 in float32")
    inflated_bytes: int = _limit(64 * _MB, "bytes of a packed body after unpacking", "the same as for an unpacked body")
    held_bytes: int = _limit(
        512 * _MB, "bytes of all bodies in memory at a time", "many clients together could use all memory"
    )
    head_bytes: int = _limit(32 * _KB, "bytes of a request's line and headers", "a browser sends 1 kB")
    json_bytes: int = _limit(
        16 * _MB, "bytes of a request without binary tensors", "parsing takes a fifth of a second; binary is faster"
    )
    header_json_bytes: int = _limit(
        _MB,
        "bytes of JSON before binary tensors; of a gRPC message besides raw tensors",
        "names and shapes; the tensors follow",
    )
    brackets: int = _limit(
        200_000, "lists and objects in JSON", "each takes 60 to 200 bytes in memory; 6,000 images of 28x28 row by row"
    )
    batch: int = _limit(1024, "samples of one request", "one request must not delay the others for long")
    queue: int = _limit(
        1024, "requests that wait for a session", "clients would give up before further ones are answered"
    )
    connections: int = _limit(4096, "open connections; over gRPC, open calls", "each takes about 20 kB")
    pipeline: int = _limit(64, "requests that wait for an earlier one of their connection", "each takes about 3 kB")
    parts: int = _limit(64, "pictures of one request", "each is decoded in memory")
    head_seconds: float = _limit(10.0, "seconds for a request's headers", "a slow client must not hold a connection")
    body_seconds: float = _limit(30.0, "seconds for a request's body, and to read an answer", "64 MB at 20 Mbit/s")
    deadline: float = _limit(
        30.0, "seconds from a complete request to its answer", "clients give up after about this time"
    )


def limits_from(texts: Iterable[str]) -> ServingLimits:
    """Return limits changed by texts such as "batch=64"."""
    kinds: dict[str, type[int] | type[float]] = {name: type(value) for name, value, _, _ in rows()}
    values: dict[str, Any] = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name not in kinds:
            raise UsageError(f"the server has no limit {name!r}", remedy=f"The limits are {', '.join(kinds)}")
        try:
            values[name] = kinds[name](value)
        except ValueError:
            values[name] = 0
        if not 0 < values[name] < math.inf:
            raise UsageError(f"the limit {text!r} is not a positive number", remedy=f"Write it as {name}=10")
    return ServingLimits(**values)


def rows() -> list[tuple[str, Any, str, str]]:
    """Return (name, value, what is counted, reason) of every limit."""
    return [(item.name, item.default, item.metadata["what"], item.metadata["reason"]) for item in fields(ServingLimits)]


def above_limit(fact: str, most: float, *, remedy: str) -> RequestError:
    """Return the error for a request that is larger than a limit."""
    return RequestError(f"{fact}, but the limit is {most}", remedy=remedy, status=413)


K = TypeVar("K")
V = TypeVar("V")


class BoundedCache(dict[K, V]):
    """A dictionary that is emptied at ``most`` entries. Reading costs the same as reading a plain dictionary."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def __setitem__(self, key: K, value: V) -> None:
        if len(self) >= self._most and key not in self:
            self.clear()
        super().__setitem__(key, value)
