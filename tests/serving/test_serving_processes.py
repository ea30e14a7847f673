"""Several processes under one supervisor: killed, started again, counted together, and stopped without a lost request."""

import contextlib
import http.client
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.bundles import another
from support.processes import TWO, alive, counted, killed, running, serving_twice, waiting_connections
from support.serving import INFER, PATIENCE, Server, logits_of, refused, serving, starting, tensor, until
from support.serving_clients import Clients

STATS = "/v2/models/bn_lenet/stats"


@pytest.fixture
def server(models: Path, tmp_path: Path) -> Iterator[Server]:
    with serving_twice(models, tmp_path / "log") as running:
        yield running


def test_all_processes_serve_and_the_supervisor_opens_no_model(
    server: Server, images: np.ndarray, logits: np.ndarray
) -> None:
    answered: set[int] = set()

    def ask() -> bool:
        assert np.allclose(logits_of(server.infer({"inputs": [tensor(images)]})), logits, rtol=1e-4, atol=1e-4)
        answered.update(line["process"] for line in server.events() if line.get("status") == 200)
        return answered == {0, 1}

    until(ask)
    maps = Path(f"/proc/{server.process.pid}/maps").read_text()
    assert "onnxruntime" not in maps, "the supervisor has loaded an engine"
    assert all("onnxruntime" in Path(f"/proc/{pid}/maps").read_text() for pid in running(server).values())


@pytest.mark.sampled(2)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_loses_no_request_and_leaves_no_process(
    models: Path, tmp_path: Path, images: np.ndarray, logits: np.ndarray, number: int
) -> None:
    with serving_twice(models, tmp_path / "log", "--grace", "4") as server:
        pids = running(server).values()
        with Clients(server, images, logits) as clients:
            until(lambda: len(clients.answers) > 50)
            server.process.send_signal(number)
            before = len(clients.answers)
            assert server.process.wait(PATIENCE) == 0
        assert clients.failures == []
        assert len(clients.answers) > before
        assert [line["how"] for line in server.events("process stopped")] == ["exit code 0"] * 2
        assert not any(map(alive, pids))


@pytest.mark.slow
def test_a_process_that_does_not_stop_in_time_is_killed_and_reported(models: Path, tmp_path: Path) -> None:
    with serving_twice(models, tmp_path / "log", "--grace", "0.5") as server:
        stuck = running(server)[1]
        os.kill(stuck, signal.SIGSTOP)
        assert server.stop() == 3
        assert not alive(stuck)
        assert "processes 1 did not stop in time" in server.log.read_text()


def test_signals_to_all_processes_are_one_stop(
    models: Path, tmp_path: Path, images: np.ndarray, logits: np.ndarray
) -> None:
    """systemd sends SIGTERM to all processes of a service: what the supervisor passes on must not count as the second."""
    with serving_twice(models, tmp_path / "log", "--grace", "4") as server, Clients(server, images, logits) as clients:
        until(lambda: len(clients.answers) > 50)
        for pid in (*running(server).values(), server.process.pid):
            os.kill(pid, signal.SIGTERM)
        assert server.process.wait(PATIENCE) == 0
    assert clients.failures == []


@contextlib.contextmanager
def unfinished(server: Server) -> Iterator[None]:
    """Send a request without the end of its body, so that no answer is due."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)) as client:
        client.putrequest("POST", INFER)
        client.putheader("content-length", "1000")
        client.endheaders(b"{")
        yield


def test_a_second_signal_ends_it_at_once(models: Path, tmp_path: Path) -> None:
    with serving_twice(models, tmp_path / "log", "--grace", "1000") as server, unfinished(server):
        until(lambda: counted(server, "bnexport_http_requests_active") == 2)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: server.events("stopping"))
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(PATIENCE) == 0


def test_a_second_signal_that_is_seen_first_ends_it_at_once(models: Path, tmp_path: Path) -> None:
    """Signals that wait for a busy process come in the order of their numbers."""
    words = ("--grace", "1000", "--limit", "body_seconds=1000")
    with serving_twice(models, tmp_path / "log", *words) as server, contextlib.ExitStack() as opened:
        for _ in range(8):
            opened.enter_context(unfinished(server))
        until(lambda: counted(server, "bnexport_http_requests_active") == 9)
        for pid in running(server).values():
            os.kill(pid, signal.SIGSTOP)
        for count in (1, 2):
            server.process.send_signal(signal.SIGTERM)
            until(lambda count=count: len(server.events("stopping")) == count)
        for pid in running(server).values():
            os.kill(pid, signal.SIGCONT)
        assert server.process.wait(PATIENCE) == 0


def test_a_killed_process_takes_only_its_own_requests(server: Server, images: np.ndarray, logits: np.ndarray) -> None:
    """Kept connections to the other process continue, and new connections are served meanwhile."""
    kept = [http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE) for _ in range(16)]
    owners = []
    for index, connection in enumerate(kept):
        server.ask("GET", "/v2", headers={"x-request-id": f"kept-{index}"}, connection=connection)
        owners.append(until(lambda: [e["process"] for e in server.events() if e.get("id") == f"kept-{index}"])[0])  # noqa: B023
    assert set(owners) == {0, 1}
    killed(server, 0)
    for owner, connection in zip(owners, kept, strict=True):
        if owner == 1:
            assert server.ask("GET", "/v2", connection=connection).status == 200
        else:
            with pytest.raises((http.client.RemoteDisconnected, ConnectionError)):
                server.ask("GET", "/v2", connection=connection)
        connection.close()
    (death,) = server.events("process died")
    assert (death["process"], "SIGKILL" in death["how"]) == (0, True)


def test_requests_waiting_for_a_killed_process_are_answered_by_the_next(server: Server) -> None:
    """Connections in the backlog, which no process has accepted, are not lost."""
    stopped = running(server)[0]
    os.kill(stopped, signal.SIGSTOP)
    with waiting_connections(server, 24) as connections:
        killed(server, 0)
        assert [connection.getresponse().status for connection in connections] == [200] * 24
    until(lambda: {e["process"] for e in server.events() if str(e.get("id", "")).startswith("waiting")} == {0, 1})


def test_a_stop_waits_for_a_process_for_which_clients_wait(server: Server) -> None:
    stopped = running(server)[0]
    os.kill(stopped, signal.SIGSTOP)
    with waiting_connections(server, 24) as connections:
        os.kill(stopped, signal.SIGKILL)
        until(lambda: len(server.events("process started")) == 3)
        server.process.send_signal(signal.SIGTERM)
        assert [connection.getresponse().status for connection in connections] == [200] * 24
    assert server.process.wait(PATIENCE) == 0
    assert len(server.events("stopped")) == 2


def test_a_process_stopped_alone_loses_no_request_and_gets_a_successor(
    server: Server, images: np.ndarray, logits: np.ndarray
) -> None:
    """A draining process makes its socket deaf, which the supervisor shares."""
    with Clients(server, images, logits) as clients:
        until(lambda: len(clients.answers) > 50)
        os.kill(running(server)[0], signal.SIGTERM)
        until(lambda: len(server.events("process ready")) == 3)
    assert clients.failures == []
    with waiting_connections(server, 24) as connections:
        assert [connection.getresponse().status for connection in connections] == [200] * 24
    until(lambda: {e["process"] for e in server.events() if str(e.get("id", "")).startswith("waiting")} == {0, 1})
    (death,) = server.events("process died")
    assert (death["how"], death["restart_in"]) == ("exit code 0", 0.0)


def test_a_stop_before_all_serve_is_at_once(models: Path, tmp_path: Path) -> None:
    with starting(models, tmp_path / "log", "--processes", "8", "--grace", "1000") as server:
        until(lambda: server.events("process started"))
        server.process.send_signal(signal.SIGTERM)
        out, _ = server.process.communicate(timeout=PATIENCE)
        assert (server.process.returncode, out) == (130, "")
        assert not any(alive(line["pid"]) for line in server.events("process started"))
        assert "Traceback" not in server.log.read_text()


def test_counters_are_sums_that_survive_a_kill(server: Server, images: np.ndarray) -> None:
    body = {"inputs": [tensor(images)]}
    rows = r"bnexport_samples_total"
    seen = 0.0
    for _ in range(40):
        assert server.infer(body).status == 200
        found = counted(server, rows)  # of either process, in any order
        assert found >= seen, "a counter fell"
        seen = found
    assert {e["process"] for e in server.events() if e.get("status") == 200} == {0, 1}
    until(lambda: counted(server, rows) == 40 * len(images))
    for number in (0, 1, 0):
        killed(server, number)
        assert counted(server, rows) == 40 * len(images)
    assert server.infer(body).status == 200
    until(lambda: counted(server, rows) == 41 * len(images))
    (stats,) = server.ask("GET", STATS).json["model_stats"]
    assert stats["inference_count"] == 41 * len(images)
    assert stats["inference_stats"]["success"]["count"] == 41
    assert sum(size["compute_infer"]["count"] for size in stats["batch_stats"]) == stats["execution_count"]
    assert counted(server, r'bnexport_request_seconds_bucket\{le="\+Inf"') == 41
    assert counted(server, r"bnexport_sessions\{") == 2
    assert counted(server, r"bnexport_model_ready\{") == 1
    assert counted(server, r'bnexport_process_starts_total\{process="0"\}') == 3
    pids = running(server)
    for number, pid in pids.items():
        resident = int(re.findall(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[0]) * 1024
        shown = counted(server, rf'process_resident_memory_bytes\{{process="{number}"\}}')
        assert 0.5 < shown / resident < 2


def test_a_version_that_was_loaded_again_keeps_its_counters(models: Path, tmp_path: Path, images: np.ndarray) -> None:
    another(models, tmp_path / "m" / "bn_lenet" / "1", 1)
    with serving_twice(tmp_path / "m", tmp_path / "log", "--poll", "0.2") as server:
        for _ in range(10):
            server.infer({"inputs": [tensor(images)]})
        until(lambda: counted(server, "bnexport_samples_total") == 10 * len(images))
        another(models, tmp_path / "new", 1, 2.0)
        (tmp_path / "m" / "bn_lenet" / "1").rename(tmp_path / "old")
        (tmp_path / "new").rename(tmp_path / "m" / "bn_lenet" / "1")
        until(lambda: len(server.events("model ready")) == 4)
        assert counted(server, "bnexport_samples_total") == 10 * len(images)
        server.infer({"inputs": [tensor(images)]})
        until(lambda: counted(server, "bnexport_samples_total") == 11 * len(images))


def test_it_is_announced_when_all_are_ready(models: Path, tmp_path: Path) -> None:
    with serving(models, tmp_path / "log", "--processes", "3") as server:
        announced = time.time()
        until(lambda: len(running(server)) == 3)
        assert all(line["time"] <= announced for line in server.events("process ready"))


def test_processes_do_not_outlive_their_supervisor(server: Server) -> None:
    pids = list(running(server).values())
    server.process.kill()
    server.process.wait(PATIENCE)
    until(lambda: not any(map(alive, pids)))
    assert [line["process"] for line in server.events("stopped")] in ([0, 1], [1, 0]), "they drained as they should"


def test_a_supervisor_killed_at_the_start_leaves_no_process_and_no_traceback(models: Path, tmp_path: Path) -> None:
    with starting(models, tmp_path / "log", *TWO) as server:
        started = until(lambda: server.events("process started"))
    until(lambda: not any(alive(line["pid"]) for line in started))
    assert "Traceback" not in server.log.read_text()


def test_a_process_that_can_not_start_again_is_tried_again_until_it_can(
    models: Path, tmp_path: Path, images: np.ndarray
) -> None:
    another(models, tmp_path / "m" / "bn_lenet" / "1", 1)
    with serving_twice(tmp_path / "m", tmp_path / "log") as server:
        (tmp_path / "m" / "bn_lenet").rename(tmp_path / "away")
        os.kill(running(server)[0], signal.SIGKILL)
        until(lambda: len(server.events("process died")) >= 3)
        for _ in range(12):
            assert server.infer({"inputs": [tensor(images)]}).status == 200, "the other one gets all connections"
        deaths = server.events("process died")
        assert "contains no bundle" in deaths[1]["reason"]
        assert deaths[2]["restart_in"] > deaths[1]["restart_in"] > deaths[0]["restart_in"] == 0
        (tmp_path / "away").rename(tmp_path / "m" / "bn_lenet")
        until(lambda: sorted(running(server)) == [0, 1])


@pytest.mark.slow
def test_when_none_can_start_any_more_it_ends_with_the_reason(models: Path, tmp_path: Path) -> None:
    another(models, tmp_path / "m" / "bn_lenet" / "1", 1)
    with serving_twice(tmp_path / "m", tmp_path / "log") as server:
        (tmp_path / "m" / "bn_lenet").rename(tmp_path / "away")
        for pid in running(server).values():
            os.kill(pid, signal.SIGKILL)
        assert server.process.wait(PATIENCE) == 2
        assert "contains no bundle" in server.log.read_text().splitlines()[-2]


def test_an_unservable_model_ends_as_with_one_process(models: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "short").write_text("x")
    words = ("--port", "0", *TWO)
    assert "contains no bundle" in refused(str(tmp_path / "empty"), *words, code=2)
    assert "contains no token" in refused(str(models), *words, "--token-file", str(tmp_path / "short"), code=2)
    assert "the middleware 'nowhere:x'" in refused(str(models), *words, "--middleware", "nowhere:x", code=2)
    assert "can't run here" in refused(str(models), *words, "--runtime", "onnxruntime-tensorrt", code=3)
    assert "only one of several processes" in refused(str(models), *words, "--allow-load", code=2)


def test_a_port_that_is_taken(server: Server, models: Path) -> None:
    words = (str(models), "--port", str(server.port))
    assert f"port {server.port} can't be used" in refused(*words, *TWO, code=2)
    assert f"port {server.port} can't be used" in refused(*words, code=2)


def test_log_lines_of_several_processes_are_whole(server: Server) -> None:
    long = "x" * 150
    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline:
        server.ask("GET", f"/v2/{long}")
    until(lambda: server.log.read_text().endswith("\n"))
    lines = [line for line in server.log.read_text().splitlines() if line]
    assert all(line.startswith("{") and line.endswith("}") for line in lines)
