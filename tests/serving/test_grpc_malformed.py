"""Every malformed call gets a code with one sentence, the process lives, and the next good call is answered."""

import contextlib
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from serving.malformed_grpc import CASES, INFER, Case, good
from support.grpc_calls import HEALTH, SERVICE, call, channel_to, infer, infer_request
from support.serving import PATIENCE, PROGRAM, Server, close, serving, together, until


def unsent(stop: threading.Event) -> Iterator[bytes]:
    """Send no message until ``stop``."""
    stop.wait(PATIENCE)
    yield from ()


def alive(server: Server, channel: grpc.Channel, images: np.ndarray, logits: np.ndarray) -> None:
    assert server.process.poll() is None
    assert close(infer(channel, images), logits)


def test_the_table_is_long_enough() -> None:
    assert len(CASES) >= 60
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_refused_with_a_reason(
    server: Server, channel: grpc.Channel, images: np.ndarray, logits: np.ndarray, case: Case
) -> None:
    answer = call(channel, case.path, *case.messages, **case.options)
    assert (answer.code, case.reason in answer.message) == (case.code, True), answer
    assert answer.message.isprintable()
    assert len(answer.message) < 700
    alive(server, channel, images, logits)


@pytest.mark.slow
def test_bombs_leave_nothing_behind(server: Server, channel: grpc.Channel) -> None:
    bombs = [case for case in CASES if "bomb" in case.name]
    assert len(bombs) == 2
    for case in bombs * 3:
        assert call(channel, case.path, *case.messages, **case.options).code == case.code
    assert server.resident() < 700e6


def test_log_lines_of_grpc_calls_are_json(server: Server) -> None:
    lines = server.log.read_text().splitlines()
    assert [line for line in lines if not line.startswith("{")] == [], "gRPC itself writes nothing there"
    assert not server.events("fault")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_more_connections_than_there_are_files(models: Path, tmp_path: Path, images: np.ndarray) -> None:
    """gRPC itself writes nothing into the log, and accepts calls again when files are free."""
    few = ("sh", "-c", 'ulimit -n 80; exec "$@"', "sh", *PROGRAM)
    with serving(models, tmp_path / "log", "--grpc-port", "0", program=few) as server, contextlib.ExitStack() as opened:
        held = Path(f"/proc/{server.process.pid}/fd")
        for _ in range(100):
            opened.enter_context(socket.create_connection(("127.0.0.1", server.grpc_port), timeout=PATIENCE))
        until(lambda: len(list(held.iterdir())) >= 80)
        opened.close()
        with channel_to(server) as channel:
            assert infer(channel, images, wait_for_ready=True).shape == (12, 10)
        assert server.stop() == 0
        assert [line for line in server.log.read_text().splitlines() if not line.startswith("{")] == []


@pytest.mark.parametrize(
    "data", [b"GET / HTTP/1.1\r\n\r\n", bytes(range(256)) * 8, b"", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"]
)
def test_no_http2(server: Server, channel: grpc.Channel, images: np.ndarray, logits: np.ndarray, data: bytes) -> None:
    with socket.create_connection(("127.0.0.1", server.grpc_port), timeout=PATIENCE) as client:
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        while client.recv(65536):
            pass
    alive(server, channel, images, logits)


def test_a_message_that_does_not_come(models: Path, tmp_path: Path) -> None:
    words = ["--grpc-port", "0", "--limit", "body_seconds=0.5"]
    with serving(models, tmp_path / "log", *words) as hasty, channel_to(hasty) as channel:
        stop = threading.Event()
        waiting = channel.stream_unary(INFER).future(unsent(stop), timeout=PATIENCE)
        try:
            error = waiting.exception()
        finally:
            stop.set()
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "Send it faster" in error.details()
        assert call(channel, INFER, good().SerializeToString()).code == "OK"


def test_limits_are_the_servers(models: Path, tmp_path: Path, images: np.ndarray) -> None:
    words = ["--grpc-port", "0", "--limit", "body_bytes=20000", "--limit", "batch=3"]
    with serving(models, tmp_path / "log", *words) as small, channel_to(small) as channel:
        assert call(channel, INFER, bytes(30_000)).code == "RESOURCE_EXHAUSTED"
        packed = call(channel, INFER, bytes(30_000), compression=grpc.Compression.Gzip)
        assert packed.code == "RESOURCE_EXHAUSTED"
        assert infer(channel, images[:3]).shape == (3, 10)


def test_a_client_that_leaves_is_not_a_fault(server: Server, channel: grpc.Channel, images, logits) -> None:
    message = good().SerializeToString()
    for path in (INFER, SERVICE + "ServerMetadata"):
        for _ in range(20):
            started = channel.unary_unary(path).future(message if path == INFER else b"", timeout=PATIENCE)
            started.cancel()
    answer = call(channel, INFER, message, timeout=1e-4)
    assert answer.code in ("DEADLINE_EXCEEDED", "OK")
    alive(server, channel, images, logits)
    assert not server.events("fault")


def test_no_more_calls_than_the_limit(models: Path, tmp_path: Path, images: np.ndarray) -> None:
    words = ["--grpc-port", "0", "--limit", "connections=3"]
    stop = threading.Event()
    with serving(models, tmp_path / "log", *words) as small, contextlib.ExitStack() as opened:
        channels = [opened.enter_context(channel_to(small)) for _ in range(6)]
        held = [channel.stream_unary(INFER).future(unsent(stop), timeout=PATIENCE) for channel in channels]
        until(lambda: sum(future.done() for future in held) == 3)
        over = [future for future in held if future.done()]
        stop.set()
        assert {future.exception().code() for future in over} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        rest = {future.exception().code() for future in held if future not in over}
        assert rest == {grpc.StatusCode.INVALID_ARGUMENT}, "these came without a message"
        assert infer(channels[0], images).shape == (12, 10)


def test_messages_that_fill_the_memory_together(models: Path, tmp_path: Path, images: np.ndarray) -> None:
    words = ["--grpc-port", "0", "--limit", "held_bytes=20000"]
    with serving(models, tmp_path / "log", *words) as small, channel_to(small) as channel:
        answer = call(channel, INFER, bytes(30_000))
        assert (answer.code, "use all memory" in answer.message) == ("UNAVAILABLE", True)
        for _ in range(10):
            assert infer(channel, images[:3]).shape == (3, 10)


def test_a_full_queue(models: Path, tmp_path: Path, images: np.ndarray) -> None:
    """Two sessions run in threads, so that the queue is real; one request of it may wait."""
    few = ["--grpc-port", "0", "--workers", "2", "--max-batch", "1", "--limit", "queue=1"]
    with serving(models, tmp_path / "log", *few) as server:
        data = infer_request(np.tile(images, (60, 1, 1, 1))).SerializeToString()
        found: list[tuple[str, bool]] = []

        def ask(_: int) -> None:
            with channel_to(server) as channel:
                for _ in range(6):
                    answer = call(channel, INFER, data)
                    found.append((answer.code, "which is the limit" in answer.message))

        together(8, ask)
        assert set(found) == {("OK", False), ("UNAVAILABLE", True)}


def test_the_number_of_health_watchers_is_limited(server: Server, channel: grpc.Channel, images, logits) -> None:
    watching = [channel.unary_stream(HEALTH + "Watch")(b"", timeout=PATIENCE) for _ in range(256)]
    assert {next(watch) for watch in watching} == {b"\x08\x01"}
    with pytest.raises(grpc.RpcError, match="are watching already"):
        next(channel.unary_stream(HEALTH + "Watch")(b"", timeout=PATIENCE))
    alive(server, channel, images, logits)
    for watch in watching:
        watch.cancel()
