"""Stopping and switching while calls over gRPC come: no call that was accepted is lost."""

import contextlib
import queue
import signal
import socket
import sys
import threading
from pathlib import Path

import grpc
import numpy as np
import pytest
from support.grpc_calls import HEALTH, SERVICE, call, channel_to, infer_request, logits_of_message
from support.serving import PATIENCE, Server, refused, serving, until
from support.serving_clients import Threads

from bnexport.errors import UsageError
from bnexport.serving.listener import bound, free_port

INFER = SERVICE + "ModelInfer"
GRPC = ("--grpc-port", "0")


class Clients(Threads):
    """Threads that call without a pause, each on its own connection, until the server takes no more calls."""

    def __init__(self, server: Server, images: np.ndarray, logits: np.ndarray, *, count: int = 4) -> None:
        super().__init__(count)
        self.server, self.logits = server, logits
        self.data = infer_request(images).SerializeToString()
        self.lock = threading.Lock()
        self.answered, self.refused, self.failures = 0, 0, []  # type: ignore[var-annotated]

    def _run(self) -> None:
        with channel_to(self.server) as channel:
            while not self.stop.is_set():
                answer = call(channel, INFER, self.data)
                with self.lock:
                    if answer.code == "UNAVAILABLE":
                        self.refused += 1
                        return
                    if answer.code != "OK" or not np.allclose(logits_of_message(answer.data), self.logits, atol=1e-3):
                        self.failures.append(answer)
                        return
                    self.answered += 1


def logged(server: Server, status: str = "OK") -> int:
    return sum(event.get("path") == INFER and event.get("status") == status for event in server.events())


def test_sigterm_loses_nothing(models: Path, tmp_path: Path, images: np.ndarray, logits: np.ndarray) -> None:
    with serving(models, tmp_path / "log", *GRPC, "--grace", "4") as server, Clients(server, images, logits) as clients:
        until(lambda: clients.answered > 50)
        server.drain()
        with channel_to(server) as channel:
            assert call(channel, HEALTH + "Check", b"").data == b"\x08\x02", "NOT_SERVING"
        before = clients.answered
        assert server.process.wait(PATIENCE) == 0
        clients.join()
    assert clients.failures == []
    assert clients.refused == 4, "each was refused once"
    assert clients.answered > before, "it still answered after the signal"
    assert clients.answered == logged(server), "each logged answer arrived"
    assert [event["event"] for event in server.events() if "event" in event][-1] == "stopped"


def test_an_idle_server_stops_at_once(models: Path, tmp_path: Path, images: np.ndarray) -> None:
    """Idle connections, an idle stream and a watching client do not delay the stop."""
    requests: queue.Queue[bytes | None] = queue.Queue()
    with serving(models, tmp_path / "log", *GRPC, "--grace", "1000") as server, channel_to(server) as channel:
        watch = channel.unary_stream(HEALTH + "Watch")(b"", timeout=PATIENCE)
        next(watch)
        stream = channel.stream_stream(SERVICE + "ModelStreamInfer")(iter(requests.get, None), timeout=PATIENCE)
        requests.put(infer_request(images).SerializeToString())
        next(stream)
        assert server.stop() == 0
        assert list(watch) == [b"\x08\x02"]
        requests.put(None)
        assert stream.code() is grpc.StatusCode.UNAVAILABLE
        assert "is stopping" in stream.details()


def test_a_call_whose_message_is_on_its_way_is_answered(models: Path, tmp_path: Path, images: np.ndarray) -> None:
    messages: queue.Queue[bytes | None] = queue.Queue()
    with serving(models, tmp_path / "log", *GRPC, "--grace", "20") as server, channel_to(server) as channel:
        waiting = channel.stream_unary(INFER).future(iter(messages.get, None), timeout=PATIENCE)
        until(lambda: "bnexport_grpc_calls_active 1.0" in server.metrics())
        server.drain()
        messages.put(infer_request(images).SerializeToString())
        messages.put(None)
        assert logits_of_message(waiting.result()).shape == (12, 10)
        assert server.process.wait(PATIENCE) == 0


def test_a_message_that_does_not_come_is_given_up(models: Path, tmp_path: Path) -> None:
    """At the end of --grace, or at the second signal."""
    for grace, signals in (("1", 1), ("1000", 2)):
        messages: queue.Queue[bytes | None] = queue.Queue()
        with serving(models, tmp_path / "log", *GRPC, "--grace", grace) as server, channel_to(server) as channel:
            waiting = channel.stream_unary(INFER).future(iter(messages.get, None), timeout=PATIENCE)
            until(lambda: "bnexport_grpc_calls_active 1.0" in server.metrics())
            for _ in range(signals):
                server.process.send_signal(signal.SIGTERM)
                until(server.stopping)
            assert server.process.wait(PATIENCE) == 0
            messages.put(None)
            assert waiting.exception().code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        assert "Traceback" not in server.log.read_text()


def test_a_model_is_loaded_again_under_way(models: Path, tmp_path: Path, images, logits) -> None:
    with (
        serving(models, tmp_path / "log", *GRPC, "--allow-load") as server,
        Clients(server, images, logits, count=3) as clients,
    ):
        for count in (20, 40, 60):
            until(lambda count=count: clients.answered > count or clients.failures or clients.refused)
            assert server.ask("POST", "/v2/repository/models/bn_lenet/load", b"{}").status == 200
        before = clients.answered
        until(lambda: clients.answered > before + 20)
    assert (clients.failures, clients.refused) == ([], 0)


#: ``bnexport`` without the package grpc.
WITHOUT_GRPC = (
    "import sys; sys.modules['grpc'] = None; from bnexport.cli.main import main; sys.exit(main(sys.argv[1:]))"
)


def test_a_model_that_can_not_be_opened_ends_with_a_sentence(server: Server, models: Path) -> None:
    words = (str(models), "--port", "0", "--grpc-port")
    assert f"port {server.grpc_port} can't be used" in refused(*words, str(server.grpc_port), code=2)
    missing = refused(*words, "0", code=3, program=(sys.executable, "-c", WITHOUT_GRPC))
    assert "bnexport serve --grpc-port needs grpc" in missing
    assert "bnexport[grpc]" in missing
    refused(*words, "70000", code=2)


def test_checking_a_free_port_does_not_listen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system would send clients of another server on the port there, and they would be cut off a moment later."""
    with bound("127.0.0.1", 0, reuse=True) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(UsageError) as caught:
            free_port("127.0.0.1", port, option="--grpc-port")
        assert "Choose another --host or --grpc-port" in caught.value.sentence
        monkeypatch.setattr(socket.socket, "listen", lambda *_: pytest.fail("it listened"))
        assert free_port("127.0.0.1", port, reuse=True) == port
        assert free_port("127.0.0.1", 0) > 0


def test_both_servers_have_the_same_addresses(models: Path, tmp_path: Path) -> None:
    """localhost has two of them on most machines."""
    with serving(models, tmp_path / "log", "--host", "localhost", *GRPC) as server:

        def is_at(address: str, port: int) -> bool:
            with contextlib.suppress(OSError), socket.create_connection((address, port), timeout=PATIENCE):
                return True
            return False

        for address in ("127.0.0.1", "::1"):
            assert is_at(address, server.grpc_port) == is_at(address, server.port)


def test_two_servers_share_a_port(models: Path, tmp_path: Path, images: np.ndarray) -> None:
    with serving(models, tmp_path / "a", "--reuse-port", *GRPC) as first:
        words = ["--reuse-port", "--grpc-port", str(first.grpc_port)]
        with serving(models, tmp_path / "b", *words) as second:
            assert first.grpc_port == second.grpc_port
            data = infer_request(images).SerializeToString()

            def ask() -> bool:
                with channel_to(first) as channel:
                    assert call(channel, INFER, data).code == "OK"
                return logged(first) > 0 and logged(second) > 0

            until(ask)
            assert second.stop() == 0
        with channel_to(first) as channel:
            assert call(channel, INFER, data).code == "OK", "the other one answers all"
