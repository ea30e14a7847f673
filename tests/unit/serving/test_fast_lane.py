"""Short requests take another path through the server, with the same answers."""

import asyncio
import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.bundles import write_bundle
from support.connections import IMAGES, INFER, ONE, House, packed, quiet, request
from unit.serving.conftest import loaded

from bnexport.serving.http.fast_lane import SHORT_BODY, FastLane
from bnexport.serving.http.uvicorn_adapter import LimitedConnection
from bnexport.serving.repository import Repository

TOKEN = b"a token of 16 or more"


def as_json(value: object, **headers: str) -> bytes:
    named = {key.replace("_", "-"): text for key, text in headers.items()}
    return request(INFER, json.dumps(value).encode(), {"content-type": "application/json"} | named)


IN_JSON = {"name": "input", "shape": [1, 1, 28, 28], "datatype": "FP32", "data": ONE.reshape(-1).tolist()}
BINARY_OUT = {"parameters": {"binary_data_output": True}}
#: Name -> (bytes of a request, True if the fast lane takes it).
REQUESTS: dict[str, tuple[bytes, bool]] = {
    "binary": (packed(ONE, **BINARY_OUT), True),
    "binary, five images": (packed(IMAGES[:5], **BINARY_OUT), True),
    "binary in, JSON out": (packed(ONE), True),
    "JSON": (as_json({"inputs": [IN_JSON], "id": "mine"}), True),
    "classes": (packed(ONE, outputs=[{"name": "logits", "parameters": {"classification": 3}}]), True),
    "a version": (packed(ONE, path="/v2/models/bn_lenet/versions/1/infer"), True),
    "an id": (packed(ONE, more={"x-request-id": "number-7"}), True),
    "a packed answer": (as_json({"inputs": [IN_JSON | {"shape": [1]}]}, accept_encoding="gzip"), True),
    "a raw request": (request(INFER, ONE.tobytes(), {"inference-header-content-length": "0"}), True),
    "an upgrade": (packed(ONE, more={"connection": "Upgrade, HTTP2-Settings", "upgrade": "h2c"}), True),
    "no such model": (packed(ONE, path="/v2/models/other/infer"), True),
    "no such version": (packed(ONE, path="/v2/models/bn_lenet/versions/9/infer"), True),
    "another type": (request(INFER, b"x", {"content-type": "text/html"}), True),
    "no JSON": (request(INFER, b"{", {"content-type": "application/json"}), True),
    "not finite": (packed(ONE * np.float32(np.inf)), True),
    "no body": (request(INFER), True),
    "no number": (packed(ONE, more={"inference-header-content-length": "12a"}), True),
    "too large for it": (packed(IMAGES, **BINARY_OUT), False),
    "a header twice": (packed(ONE, more={"Content-Type": "application/octet-stream"}), False),
    "closing": (packed(ONE, more={"connection": "close"}), False),
    "HTTP/1.0": (request(INFER, b"{", http="1.0"), False),
    "a query": (packed(ONE, path=INFER + "?x=1"), False),
    "an escaped name": (packed(ONE, path="/v2/models/bn%5Flenet/infer"), False),
    "an unknown coding": (packed(ONE, more={"content-encoding": "br"}), False),
    "GET": (request(INFER, method="GET"), False),
    "another route": (request("/v2/repository/index", b"{}"), False),
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """True for every request that the fast lane took, and False for every other request that it checked."""
    taken: list[bool] = []
    original = FastLane.call

    def call(self: FastLane, connection: LimitedConnection) -> Any:
        found = original(self, connection)
        taken.append(found is not None)
        return found

    monkeypatch.setattr(FastLane, "call", call)
    return taken


def without_id(answer: bytes) -> bytes:
    return re.sub(rb"x-request-id: [0-9a-f]+\r\n", b"x-request-id: ?\r\n", answer)


@pytest.mark.parametrize("name", REQUESTS)
async def test_an_answer_is_the_same_both_ways(repository: Repository, calls: list[bool], name: str) -> None:
    data, fast = REQUESTS[name]

    houses = [House(repository), House(repository, fast=False)]
    ours, plain = [await house.ask(data) for house in houses]
    assert calls == [fast]
    assert ours.startswith(b"HTTP/1.1 ")
    head, _, body = without_id(ours).partition(b"\r\n\r\n")
    expected_head, _, expected = without_id(plain).partition(b"\r\n\r\n")
    # A refusal of the slow way before the body is read ends the connection; the fast lane has read the body.
    assert head.lower() == expected_head.lower().removesuffix(b"\r\nconnection: close" if fast else b"")
    assert body == expected
    lines = [house.lines()[0] for house in houses]
    for line in lines:
        del line["time"], line["us"], line["in"]
        if name != "an id":
            del line["id"]
    assert lines[0] == lines[1]
    assert houses[0].state.requests == houses[1].state.requests
    assert (houses[0].state.held, houses[0].server_state.total_requests) == (0, 1)


async def test_a_connection_remembers_a_head_and_notices_another(repository: Repository, calls: list[bool]) -> None:
    house = House(repository, token=TOKEN)
    connection, wire = house.connect()
    token = {"authorization": f"Bearer {TOKEN.decode()}"}
    for more, path, status in (
        (token, INFER, 200),
        (token, INFER, 200),
        ({"authorization": "Bearer another one"}, INFER, 401),
        ({}, INFER, 401),
        (token, "/v2/models/other/infer", 404),
        (token, INFER, 200),
    ):
        wire.written = b""
        connection.data_received(packed(ONE, path, more))
        await quiet(house)
        assert wire.written.startswith(b"HTTP/1.1 %d " % status)
    assert calls == [True] * 6
    connection.connection_lost(None)


async def test_pipelined_requests_are_answered_in_their_order(repository: Repository, calls: list[bool]) -> None:
    house = House(repository)
    live = request("/v2/health/live", method="GET")
    for order in ("fff", "fsf", "sff", "ssf"):
        connection, wire = house.connect()
        data = b"".join(
            packed(ONE, more={"x-request-id": f"n{index}"}) if kind == "f" else live.replace(b"here", b"h")
            for index, kind in enumerate(order)
        )
        connection.data_received(data)
        for _ in range(100_000):
            await asyncio.sleep(0.001)
            if wire.written.count(b"HTTP/1.1 200 ") == 3:
                break
        found = ["s" if b"live" in part else "f" for part in wire.written.split(b"HTTP/1.1 200 ")[1:]]
        assert "".join(found) == order
        ids = re.findall(rb"x-request-id: n(\d)", wire.written)
        assert ids == [str(index).encode() for index, kind in enumerate(order) if kind == "f"]
        assert not wire.paused
        connection.connection_lost(None)


async def test_a_single_request_does_not_wait_for_a_batch(repository: Repository) -> None:
    house = House(repository)
    statistics = repository.resolve("bn_lenet", None).statistics
    (first, wire), (second, other) = house.connect(), house.connect()
    first.data_received(packed(ONE))  # the first one may have concurrent requests
    await quiet(house)
    wire.written = b""
    first.data_received(packed(ONE))
    assert wire.written.startswith(b"HTTP/1.1 200"), "answered before anything else was read"
    second.data_received(packed(ONE))
    assert not other.written
    first.data_received(packed(ONE))
    before = statistics.executions
    await quiet(house)
    assert statistics.executions == before + 1, "two connections' requests are one batch"
    assert other.written.startswith(b"HTTP/1.1 200")
    for connection in (first, second):
        connection.connection_lost(None)


async def test_the_body_may_come_in_pieces_or_not_at_all(repository: Repository) -> None:
    house = House(repository)
    connection, wire = house.connect()
    data = packed(ONE)
    for start in range(0, len(data), 400):
        assert not wire.written
        connection.data_received(data[start : start + 400])
    await quiet(house)
    assert wire.written.startswith(b"HTTP/1.1 200")
    wire.written = b""
    connection.data_received(data[:1000])
    assert house.state.active == 1, "a stop waits for it"
    connection.connection_lost(None)
    assert (house.state.active, house.state.held) == (0, 0)
    assert not wire.written


@pytest.mark.parametrize("fast", [True, False])
async def test_the_time_of_an_answer_counts_from_the_last_byte(repository: Repository, fast: bool) -> None:
    house = House(repository, fast=fast)
    connection, wire = house.connect()
    data = packed(ONE)
    start = time.perf_counter()
    connection.data_received(data[:1000])
    await asyncio.sleep(0.1)
    connection.data_received(data[1000:])
    await quiet(house)
    whole = 1e6 * (time.perf_counter() - start)
    assert wire.written.startswith(b"HTTP/1.1 200")
    connection.connection_lost(None)
    assert house.lines()[0]["us"] < whole - 90_000, "the pause of 100 ms does not count"


async def test_a_client_that_went_away_gets_no_answer(repository: Repository) -> None:
    house = House(repository)
    (gone, wire), (stays, other) = house.connect(), house.connect()
    gone.data_received(packed(ONE))
    stays.data_received(packed(ONE))
    gone.connection_lost(None)
    await quiet(house)
    assert not wire.written
    assert other.written.startswith(b"HTTP/1.1 200")
    assert house.state.held == 0


async def test_a_stop_closes_the_connection_after_the_answer(repository: Repository) -> None:
    house = House(repository)
    connection, wire = house.connect()
    connection.data_received(packed(ONE))
    connection.shutdown()  # as uvicorn does when it stops
    await quiet(house)
    assert b"\r\nconnection: close\r\n" in wire.written
    assert wire.closed


async def test_a_client_that_does_not_read_goes_the_slow_way(repository: Repository, calls: list[bool]) -> None:
    house = House(repository)
    connection, wire = house.connect()
    connection.pause_writing()
    connection.data_received(packed(ONE))
    await asyncio.sleep(0.05)
    assert not calls
    assert not wire.written
    connection.resume_writing()
    await quiet(house)
    assert wire.written.startswith(b"HTTP/1.1 200")
    connection.connection_lost(None)


async def test_a_fault_is_a_500_and_a_line_in_the_log(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("on purpose")

    house = House(repository)
    monkeypatch.setattr("bnexport.serving.http.fast_lane.infer_reply", broken)
    assert (await house.ask(packed(ONE))).startswith(b"HTTP/1.1 500 ")
    assert house.lines()[0]["error"] == "ZeroDivisionError: on purpose"
    assert house.state.active == 0


async def test_the_longest_body_is_what_uvicorn_reads_at_once(repository: Repository, calls: list[bool]) -> None:
    house = House(repository)
    for size in (SHORT_BODY, SHORT_BODY + 1):
        assert (await house.ask(request(INFER, b" " * size))).startswith(b"HTTP/1.1 400 ")
    assert calls == [True, False]


async def test_a_lower_limit_of_bodies_holds(repository: Repository, calls: list[bool]) -> None:
    house = House(repository, body_bytes=1000)
    for size, status in ((1000, 400), (1001, 413)):
        assert (await house.ask(request(INFER, b" " * size))).startswith(b"HTTP/1.1 %d " % status)
    assert calls == [True, False]


async def test_a_model_that_was_unloaded_is_not_answered_from_memory(tmp_path: Path) -> None:
    write_bundle(tmp_path / "m" / "bn_lenet" / "1")
    opened = loaded(tmp_path / "m")

    house = House(opened)
    assert (await house.ask(packed(ONE))).startswith(b"HTTP/1.1 200")
    opened.unload("bn_lenet")
    answer = await house.ask(packed(ONE))
    assert answer.startswith(b"HTTP/1.1 503 "), "the cached route of a path does not contain its model"
