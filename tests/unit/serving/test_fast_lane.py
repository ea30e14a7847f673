"""Short requests take another way through the server than the rest, and nobody can tell."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.bundles import write_bundle
from support.connections import House, quiet
from support.serving import binary

from bnexport.serving.http.connection import LimitedConnection
from bnexport.serving.http.fast_lane import SHORT_BODY, FastLane
from bnexport.serving.repository import Repository
from bnexport.serving.served_model import ServingSettings

IMAGES = np.random.default_rng(0).normal(size=(21, 1, 28, 28)).astype(np.float32)
INFER = "/v2/models/bn_lenet/infer"
TOKEN = b"a token of 16 or more"


def request(
    path: str = INFER, body: bytes = b"", headers: dict[str, str] | None = None, method: str = "POST", http: str = "1.1"
) -> bytes:
    lines = [f"{method} {path} HTTP/{http}", "host: here", f"content-length: {len(body)}"]
    return "\r\n".join([*lines, *(f"{k}: {v}" for k, v in (headers or {}).items()), "", ""]).encode() + body


def packed(array: np.ndarray, path: str = INFER, more: dict[str, str] | None = None, **extra: Any) -> bytes:
    body, headers = binary(array, **extra)
    return request(path, body, headers | (more or {}))


def as_json(value: object, **headers: str) -> bytes:
    named = {key.replace("_", "-"): text for key, text in headers.items()}
    return request(INFER, json.dumps(value).encode(), {"content-type": "application/json"} | named)


ONE = IMAGES[:1]
IN_JSON = {"name": "input", "shape": [1, 1, 28, 28], "datatype": "FP32", "data": ONE.reshape(-1).tolist()}
BINARY_OUT = {"parameters": {"binary_data_output": True}}
#: Name -> (bytes of a request, whether it is for the fast lane).
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


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    folder = tmp_path_factory.mktemp("models")
    write_bundle(folder / "bn_lenet" / "1")
    opened = Repository(folder, ServingSettings(), lambda *_, **__: None)
    opened.load()
    return opened


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For every request that the fast lane looked at, whether it took it."""
    taken: list[bool] = []
    original = FastLane.call

    def call(self: FastLane, connection: LimitedConnection) -> Any:
        found = original(self, connection)
        taken.append(found is not None)
        return found

    monkeypatch.setattr(FastLane, "call", call)
    return taken


def run(main: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(main(), 60)

    asyncio.run(bounded())


def without_id(answer: bytes) -> bytes:
    return re.sub(rb"x-request-id: [0-9a-f]+\r\n", b"x-request-id: ?\r\n", answer)


@pytest.mark.parametrize("name", REQUESTS)
def test_an_answer_does_not_tell_which_way_it_came(repository: Repository, calls: list[bool], name: str) -> None:
    data, fast = REQUESTS[name]

    async def main() -> None:
        houses = [House(repository), House(repository, fast=False)]
        ours, plain = [await house.ask(data) for house in houses]
        assert calls == [fast]
        assert ours.startswith(b"HTTP/1.1 ")
        head, _, body = without_id(ours).partition(b"\r\n\r\n")
        expected_head, _, expected = without_id(plain).partition(b"\r\n\r\n")
        # What the slow way refuses before it has read the body ends the connection; the fast lane has read it.
        assert head.lower() == expected_head.lower().removesuffix(b"\r\nconnection: close" if fast else b"")
        assert body == expected
        lines = [house.lines()[0] for house in houses]
        for line in lines:
            del line["time"], line["us"], line["in"]
            if name != "an id":
                del line["id"]
        assert lines[0] == lines[1]
        assert houses[0].state.requests == houses[1].state.requests
        assert (houses[0].state.memory.held, houses[0].server_state.total_requests) == (0, 1)

    run(main)


def test_a_connection_remembers_a_head_and_notices_another(repository: Repository, calls: list[bool]) -> None:
    async def main() -> None:
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

    run(main)


def test_pipelined_requests_are_answered_in_their_order(repository: Repository, calls: list[bool]) -> None:
    async def main() -> None:
        house = House(repository)
        live = request("/v2/health/live", method="GET")
        for order in ("fff", "fsf", "sff", "ssf"):
            connection, wire = house.connect()
            data = b"".join(
                packed(ONE, more={"x-request-id": f"n{index}"}) if kind == "f" else live.replace(b"here", b"h")
                for index, kind in enumerate(order)
            )
            connection.data_received(data)
            for _ in range(200):
                await asyncio.sleep(0.001)
                if wire.written.count(b"HTTP/1.1 200 ") == 3:
                    break
            found = ["s" if b"live" in part else "f" for part in wire.written.split(b"HTTP/1.1 200 ")[1:]]
            assert "".join(found) == order
            ids = re.findall(rb"x-request-id: n(\d)", wire.written)
            assert ids == [str(index).encode() for index, kind in enumerate(order) if kind == "f"]
            assert not wire.paused
            connection.connection_lost(None)

    run(main)


def test_what_follows_an_upgrade_is_the_body_and_then_the_next_request(repository: Repository) -> None:
    """Java's client asks for HTTP/2 with its first request. A body that is taken for another request would be smuggled."""
    upgrade = {"connection": "Upgrade", "upgrade": "h2c"}
    hidden = request("/v2/health/live", method="GET")
    live = hidden.replace(b"here", b"here\r\nconnection: upgrade\r\nupgrade: websocket")
    data = packed(ONE, more=upgrade) + live + request(INFER, hidden, upgrade) + live * 300 + packed(ONE)

    async def main() -> None:
        for size in (len(data), 5000, 700):
            house = House(repository, pipeline=1000)
            connection, wire = house.connect()
            for start in range(0, len(data), size):
                connection.data_received(data[start : start + size])
                await asyncio.sleep(0.001)
            while wire.written.count(b"HTTP/1.1 ") < 304:
                await asyncio.sleep(0.001)
            statuses = re.findall(rb"HTTP/1.1 (\d+) ", wire.written)
            assert statuses == [b"200", b"200", b"400", *[b"200"] * 301]
            assert b"not JSON" in wire.written, "the request in the body was not answered"
            assert not wire.closed
            connection.connection_lost(None)
            assert not house.lines()[0].get("event")

    run(main)


def test_what_is_refused_before_it_is_a_request_is_counted_and_logged(repository: Repository) -> None:
    async def main() -> None:
        house = House(repository, connections=2)
        others = [house.connect()[0] for _ in range(2)]
        answer = await house.ask(packed(ONE))
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"\r\nretry-after: 1\r\n" in answer
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"].startswith("2 connections are open")
        others.pop().connection_lost(None)
        assert (await house.ask(packed(ONE))).startswith(b"HTTP/1.1 200 ")
        for data in (b"CONNECT here:80 HTTP/1.1\r\nhost: here\r\n\r\n", b"hello\r\n\r\n"):
            assert (await house.ask(data)).startswith(b"HTTP/1.1 400 ")
        others.pop().connection_lost(None)
        assert [(line["client"], line["status"]) for line in house.lines()] == [
            ("127.0.0.1", status) for status in (503, 200, 400, 400)
        ]
        assert house.state.requests["", 400] == 2

    run(main)


def test_requests_before_a_malformed_one_get_their_own_answers(repository: Repository) -> None:
    """An error written at once would be taken for the answer to the first request that waits."""

    async def main() -> None:
        house = House(repository)
        first, second = house.connect(), house.connect()
        second[0].data_received(packed(ONE))
        await quiet(house)
        first[0].data_received(packed(ONE) + request("/v2", method="GET") + b"no request\r\n\r\n")
        assert not first[1].written
        await quiet(house)
        await asyncio.sleep(0.01)
        parts = first[1].written.split(b"HTTP/1.1 ")[1:]
        assert [part[:3] for part in parts] == [b"200", b"200"]
        assert (b"logits" in parts[0], b"extensions" in parts[1]) == (True, True)
        assert first[1].closed
        assert sorted(line["status"] for line in house.lines()) == [200, 200, 200, 400]

    run(main)


def test_only_so_many_requests_wait_on_one_connection(repository: Repository) -> None:
    async def main() -> None:
        house = House(repository, pipeline=3)
        connection, wire = house.connect()
        connection.data_received(request("/v2", method="GET") * 1000)
        assert len(connection.pipeline) == 3
        for _ in range(100):
            await asyncio.sleep(0)
        assert wire.written.count(b"HTTP/1.1 200 ") == 4
        assert wire.closed
        assert [line["status"] for line in house.lines() if "reason" in line] == [503]

    run(main)


def test_a_client_that_never_reads_is_cut_off(repository: Repository) -> None:
    async def main() -> None:
        house = House(repository)
        (reads, wire), (stalls, other), (goes, third) = (house.connect() for _ in range(3))
        now = asyncio.get_running_loop().time()
        seconds = reads.limits.body_seconds
        for connection in (reads, stalls):
            connection.data_received(packed(ONE))
            connection.pause_writing()
        goes.transport.close()  # and what was written does not get through
        for connection in (reads, stalls, goes):
            connection.sweep(now)
        reads.resume_writing()
        reads.sweep(now + 1)
        reads.pause_writing()
        for connection in (reads, stalls, goes):
            connection.sweep(now + seconds + 0.5)
        assert [found.aborted for found in (wire, other, third)] == [False, True, True]
        await quiet(house)
        for connection in (reads, stalls, goes):
            connection.connection_lost(None)

    run(main)


def test_who_asks_alone_has_no_batch_to_wait_for(repository: Repository) -> None:
    async def main() -> None:
        house = House(repository)
        statistics = repository.resolve("bn_lenet", None).statistics
        (first, wire), (second, other) = house.connect(), house.connect()
        first.data_received(packed(ONE))  # the first one of all may have company
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

    run(main)


def test_the_body_may_come_in_pieces_or_not_at_all(repository: Repository) -> None:
    async def main() -> None:
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
        assert (house.state.active, house.state.memory.held) == (0, 0)
        assert not wire.written

    run(main)


@pytest.mark.parametrize("fast", [True, False])
def test_the_time_of_an_answer_counts_from_the_last_byte(repository: Repository, fast: bool) -> None:
    async def main() -> None:
        house = House(repository, fast=fast)
        connection, wire = house.connect()
        data = packed(ONE)
        connection.data_received(data[:1000])
        await asyncio.sleep(0.5)
        connection.data_received(data[1000:])
        await quiet(house)
        assert wire.written.startswith(b"HTTP/1.1 200")
        connection.connection_lost(None)
        assert house.lines()[0]["us"] < 400_000

    run(main)


def test_a_client_that_went_away_gets_no_answer(repository: Repository) -> None:
    async def main() -> None:
        house = House(repository)
        (gone, wire), (stays, other) = house.connect(), house.connect()
        gone.data_received(packed(ONE))
        stays.data_received(packed(ONE))
        gone.connection_lost(None)
        await quiet(house)
        assert not wire.written
        assert other.written.startswith(b"HTTP/1.1 200")
        assert house.state.memory.held == 0

    run(main)


def test_a_stop_closes_the_connection_behind_the_answer(repository: Repository) -> None:
    async def main() -> None:
        house = House(repository)
        connection, wire = house.connect()
        connection.data_received(packed(ONE))
        connection.shutdown()  # as uvicorn does when it stops
        await quiet(house)
        assert b"\r\nconnection: close\r\n" in wire.written
        assert wire.closed

    run(main)


def test_a_client_that_does_not_read_goes_the_slow_way(repository: Repository, calls: list[bool]) -> None:
    async def main() -> None:
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

    run(main)


def test_an_idle_connection_is_closed(repository: Repository) -> None:
    async def main() -> None:
        house = House(repository)
        connection, wire = house.connect()
        connection.data_received(packed(ONE))
        await quiet(house)
        now = asyncio.get_running_loop().time()
        connection.sweep(now + connection.timeout_keep_alive - 1)
        assert not wire.closed
        connection.data_received(packed(ONE)[:40])  # the next one has begun
        connection.sweep(now + connection.limits.head_seconds / 2)
        assert not wire.closed
        connection.data_received(packed(ONE)[40:])
        await quiet(house)
        connection.sweep(now + connection.timeout_keep_alive + 1)
        assert wire.closed
        assert wire.written.count(b"HTTP/1.1") == 2, "no word about being slow"

    run(main)


def test_a_fault_is_a_500_and_a_line_in_the_log(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("on purpose")

    async def main() -> None:
        house = House(repository)
        monkeypatch.setattr("bnexport.serving.http.fast_lane.infer_reply", broken)
        assert (await house.ask(packed(ONE))).startswith(b"HTTP/1.1 500 ")
        assert house.lines()[0]["error"] == "ZeroDivisionError: on purpose"
        assert house.state.active == 0

    run(main)


def test_the_longest_body_is_what_uvicorn_reads_at_once(repository: Repository, calls: list[bool]) -> None:
    async def main() -> None:
        house = House(repository)
        for size in (SHORT_BODY, SHORT_BODY + 1):
            assert (await house.ask(request(INFER, b" " * size))).startswith(b"HTTP/1.1 400 ")
        assert calls == [True, False]

    run(main)


def test_a_lower_limit_of_bodies_holds(repository: Repository, calls: list[bool]) -> None:
    async def main() -> None:
        house = House(repository, body_bytes=1000)
        for size, status in ((1000, 400), (1001, 413)):
            assert (await house.ask(request(INFER, b" " * size))).startswith(b"HTTP/1.1 %d " % status)
        assert calls == [True, False]

    run(main)


def test_a_model_that_was_unloaded_is_not_answered_from_memory(tmp_path: Path) -> None:
    write_bundle(tmp_path / "m" / "bn_lenet" / "1")
    opened = Repository(tmp_path / "m", ServingSettings(), lambda *_, **__: None)
    opened.load()

    async def main() -> None:
        house = House(opened)
        assert (await house.ask(packed(ONE))).startswith(b"HTTP/1.1 200")
        opened.unload("bn_lenet")
        answer = await house.ask(packed(ONE))
        assert answer.startswith(b"HTTP/1.1 503 "), "what is remembered of a path is its route, not its model"

    run(main)
