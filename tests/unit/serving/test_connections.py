"""Connections: what is refused before it is a request, and clients that are slow, idle, or do not read."""

import asyncio
import json
import re

import pytest
from support.connections import IMAGES, INFER, ONE, House, packed, quiet, request

from bnexport.serving.repository import Repository


async def test_bytes_after_an_upgrade_are_the_body_and_then_the_next_request(repository: Repository) -> None:
    """Java's client requests HTTP/2 with its first request. Taking a body for another request would be request smuggling."""
    upgrade = {"connection": "Upgrade", "upgrade": "h2c"}
    hidden = request("/v2/health/live", method="GET")
    live = hidden.replace(b"here", b"here\r\nconnection: upgrade\r\nupgrade: websocket")
    data = packed(ONE, more=upgrade) + live + request(INFER, hidden, upgrade) + live * 300 + packed(ONE)

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


async def test_bytes_refused_before_they_are_a_request_are_counted_and_logged(repository: Repository) -> None:
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


async def test_requests_before_a_malformed_one_get_their_own_answers(repository: Repository) -> None:
    """An error written at once would be taken for the answer to the first request that waits."""
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


async def test_only_so_many_requests_wait_on_one_connection(repository: Repository) -> None:
    house = House(repository, pipeline=3)
    connection, wire = house.connect()
    connection.data_received(request("/v2", method="GET") * 1000)
    assert len(connection.pipeline) == 3
    for _ in range(100):
        await asyncio.sleep(0)
    assert wire.written.count(b"HTTP/1.1 200 ") == 4
    assert wire.closed
    assert [line["status"] for line in house.lines() if "reason" in line] == [503]


async def test_a_client_that_never_reads_is_cut_off(repository: Repository) -> None:
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


@pytest.mark.parametrize("images", [1, 21], ids=["fast lane", "application"])
async def test_a_half_closed_client_gets_connection_close(repository: Repository, images: int) -> None:
    house = House(repository)
    connection, wire = house.connect()
    connection.data_received(packed(IMAGES[:images]))
    assert not wire.written
    assert connection.eof_received(), "the connection stays open for the answer"
    await quiet(house)
    assert wire.written.startswith(b"HTTP/1.1 200 ")
    assert b"\r\nconnection: close\r\n" in wire.written
    assert wire.closed
    assert not connection.eof_received(), "but not longer"


async def test_an_idle_connection_is_closed(repository: Repository) -> None:
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
    assert wire.written.count(b"HTTP/1.1") == 2, "no message about a slow client"
