"""A server without a socket: connections that receive bytes, and a record of the bytes that they write."""

import asyncio
import io
import json
from typing import Any

import numpy as np
import pytest
from support.serving import binary
from uvicorn.config import Config
from uvicorn.server import ServerState as UvicornState

from bnexport.serving.access_log import JsonLog
from bnexport.serving.http.app import App
from bnexport.serving.http.fast_lane import FastLane
from bnexport.serving.http.uvicorn_adapter import LimitedConnection, limited
from bnexport.serving.repository import Repository
from bnexport.serving.serving_limits import ServingLimits
from bnexport.serving.state import AppSettings, ServerState

INFER = "/v2/models/bn_lenet/infer"
IMAGES = np.random.default_rng(0).normal(size=(21, 1, 28, 28)).astype(np.float32)
ONE = IMAGES[:1]


class Wire:
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        self.written, self.closed, self.paused, self.aborted = b"", False, False, False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("127.0.0.1", 1) if name in ("peername", "sockname") else default

    def write(self, data: bytes) -> None:
        self.written += data

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = self.aborted = True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False


class House:
    """A server without a socket; ``fast``: it has the fast lane."""

    def __init__(self, repository: Repository, *, fast: bool = True, token: bytes | None = None, **limits: int) -> None:
        self.log = io.StringIO()
        self.json_log = JsonLog(self.log)
        self.state = ServerState(repository, AppSettings(ServingLimits(**limits), token), self.json_log)
        self.app = App(self.state)
        kind = limited(ServingLimits(**limits), FastLane(self.app) if fast else None, self.app.refused)
        self.config = Config(self.app, http=kind, ws="none", lifespan="off", log_config=None, access_log=False)
        self.server_state = UvicornState()

    def connect(self) -> tuple[LimitedConnection, Wire]:
        self.config.load() if not self.config.loaded else None
        kind: Any = self.config.http_protocol_class
        connection: LimitedConnection = kind(config=self.config, server_state=self.server_state, app_state={})
        connection.connection_made(wire := Wire())
        return connection, wire

    async def ask(self, data: bytes) -> bytes:
        connection, wire = self.connect()
        connection.data_received(data)
        await quiet(self)
        connection.connection_lost(None)
        return wire.written

    def lines(self) -> list[dict[str, Any]]:
        self.json_log.close()
        return [json.loads(line) for line in self.log.getvalue().splitlines()]


async def quiet(house: House) -> None:
    """Wait until no request is being answered."""
    for _ in range(100_000):
        await asyncio.sleep(0.001 if house.state.active or house.server_state.tasks else 0)
        if house.state.active == 0 and not house.server_state.tasks:
            return
    pytest.fail("a request was not answered")


def request(
    path: str = INFER, body: bytes = b"", headers: dict[str, str] | None = None, method: str = "POST", http: str = "1.1"
) -> bytes:
    lines = [f"{method} {path} HTTP/{http}", "host: here", f"content-length: {len(body)}"]
    return "\r\n".join([*lines, *(f"{k}: {v}" for k, v in (headers or {}).items()), "", ""]).encode() + body


def packed(array: np.ndarray, path: str = INFER, more: dict[str, str] | None = None, **extra: Any) -> bytes:
    body, headers = binary(array, **extra)
    return request(path, body, headers | (more or {}))
