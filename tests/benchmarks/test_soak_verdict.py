"""The demands of a soak's verdict on records made by hand, and the reading of processes and counters."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.bundles import write_bundle

from benchmarks.serving.process import resident, stat_of
from benchmarks.soak.__main__ import DEMANDS, lines, to_json, unexplained, verdict
from benchmarks.soak.clients import ACTIONS, Fault, Ledger, counters
from benchmarks.soak.server import accepted, kill_and_see, running, state
from benchmarks.soak.soak import Kill, ProcessMemory, Soak, SoakSettings, run_soak
from benchmarks.soak.traffic import KINDS, make_traffic
from bnexport.errors import UsageError

LOST = "no request is lost except on the connections of a killed process"


def good_soak() -> Soak:
    """Everything went well, with one kill from second 10.0 to 10.1 that took one request."""
    soak = Soak(SoakSettings(seconds=60), seconds=60.0, exit_code=0)
    for kind in (*KINDS, *ACTIONS):
        soak.ledger.right(kind)
    soak.kills = [Kill(1, 77, begun=10.0, done=10.1, ports=frozenset({5001, 5002}), recovery=0.8)]
    soak.ledger.add("lost", Fault("JSON", "RemoteDisconnected", 5001, 9.9, 10.05))
    soak.memory = {77: ProcessMemory(1, 77, 2**26, 2**26, 2**26)}
    return soak


def lose(**changes: float | int | None) -> Callable[[Soak], None]:
    return lambda soak: soak.ledger.add(
        "lost",
        Fault(**{"kind": "JSON", "reason": "gone", "port": 5002, "started": 10.05, "ended": 10.08} | changes),  # type: ignore[arg-type]
    )


def wrong(soak: Soak) -> None:
    soak.ledger.add("wrong", Fault("JSON", "a logit is off", 5002, 10.05, 10.08))


def fall(soak: Soak) -> None:
    soak.ledger.see({}, {"rows": 8.0, "more": 1.0})
    soak.ledger.see(soak.ledger.highest(), {"rows": 7.0, "more": 1.0})


def test_a_good_one_passes() -> None:
    soak = good_soak()
    lose()(soak)
    assert not any(verdict(soak).values())
    assert list(lines(soak))[-1] == "Verdict: PASS"
    assert to_json(soak)["passed"] is True
    assert max(map(len, lines(soak))) <= 80


@pytest.mark.parametrize(
    ("spoil", "demand"),
    [
        (wrong, "every answer is the right one"),
        (lose(port=5003), LOST),  # another connection
        (lose(port=None), LOST),  # none at all
        (lose(started=10.11, ended=10.2), LOST),  # begun after the killed process was gone
        (lose(started=9.0, ended=9.99), LOST),  # lost before the kill
        (fall, "counters never fall"),
        (lambda soak: soak.kills.clear(), LOST),
        (lambda soak: setattr(soak.kills[0], "recovery", None), "every killed process is replaced"),
        (lambda soak: soak.died.append("process 0: killed by SIGSEGV"), "no process dies by itself"),
        (lambda soak: soak.ledger.counts.pop(("picture", "right")), "every kind of request was answered"),
        (lambda soak: setattr(soak, "exit_code", None), "it stops on SIGTERM, and no process is left"),
        (lambda soak: setattr(soak, "exit_code", 3), "it stops on SIGTERM, and no process is left"),
        (lambda soak: soak.left.append(4), "it stops on SIGTERM, and no process is left"),
        (lambda soak: setattr(soak, "stuck", 1), "it stops on SIGTERM, and no process is left"),
    ],
)
def test_each_demand_can_be_broken(spoil: Callable[[Soak], object], demand: str) -> None:
    soak = good_soak()
    spoil(soak)
    broken = {name for name, reasons in verdict(soak).items() if reasons}
    assert demand in broken
    assert broken <= {demand, "processes were killed"}
    assert list(lines(soak))[-1] == "Verdict: FAIL"
    assert to_json(soak)["passed"] is False


def test_a_soak_without_kills_shows_nothing() -> None:
    soak = good_soak()
    soak.kills, soak.ledger.lost = [], []
    del soak.ledger.counts["JSON", "lost"]
    assert [name for name, reasons in verdict(soak).items() if reasons] == ["processes were killed"]
    soak.settings = SoakSettings(seconds=60, kill_every=None)
    assert not any(verdict(soak).values())
    assert set(verdict(soak)) == set(DEMANDS)


def test_more_faults_than_are_kept_are_counted() -> None:
    ledger = Ledger()
    for _ in range(1500):
        ledger.add("lost", Fault("JSON", "gone", 1, 0.0, 1.0))
    assert (len(ledger.lost), ledger.counts["JSON", "lost"]) == (1000, 1500)
    soak = good_soak()
    soak.ledger = ledger
    assert len(unexplained(soak)) == 1000
    assert "500 more" in verdict(soak)[LOST][-1]


def test_counters_are_read() -> None:
    text = '# HELP x\nbnexport_samples_total{model="a",version="1"} 3.0\nbnexport_samples_total{model="b",version="1"} 4.5\n'
    found = counters(text + "other_total 9\nbnexport_http_requests_total 1e3\n")
    assert found["bnexport_samples_total"] == 7.5
    assert found["bnexport_http_requests_total"] == 1000.0


#: Accepts one of two connections; the other one waits in the backlog.
SERVER = """
import socket, time
listener = socket.create_server(("127.0.0.1", 0), backlog=8)
print(listener.getsockname()[1], flush=True)
first, _ = listener.accept()
print("accepted", flush=True)
time.sleep(300)
"""


def test_the_connections_of_a_killed_process_are_those_that_it_accepted() -> None:
    with subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline())
            with socket.create_connection(("127.0.0.1", port)) as first:
                assert process.stdout.readline() == "accepted\n"
                with socket.create_connection(("127.0.0.1", port)):
                    assert accepted(process.pid, port) == {first.getsockname()[1]}
                    assert resident(stat_of(process.pid)) > 2**20
                    assert kill_and_see(process.pid, port) == {first.getsockname()[1]}
                    assert not running(process.pid)
        finally:
            process.kill()
    assert resident(stat_of(process.pid)) == 0
    with pytest.raises(OSError, match="No such process"):
        kill_and_see(process.pid, port)


def test_a_process_whose_first_thread_has_ended_still_runs() -> None:
    code = (
        "import threading, time, ctypes; threading.Thread(target=time.sleep, args=(300,)).start(); print(flush=True); "
    )
    code += "ctypes.CDLL(None).syscall(60, 0)"  # exit(2) of this thread alone
    if os.uname().machine != "x86_64":
        pytest.skip("the number of the system call is that of x86-64")
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            end = time.monotonic() + 240
            while state(process.pid) != "Z":
                assert time.monotonic() < end, state(process.pid)
                time.sleep(0.01)
            assert running(process.pid)
        finally:
            process.kill()


def test_answers_that_are_wrong_are_seen(tmp_path: Path) -> None:
    traffic = make_traffic(write_bundle(tmp_path / "b"), seed=3)
    assert set(traffic.good) == set(KINDS)
    for request in traffic.good["binary"][:5]:
        headers = {"inference-header-content-length": "2"}
        assert request.expected is not None
        right = request.expected.astype(np.float32)
        assert traffic.problem(request, 200, headers, b"{}" + right.tobytes()) is None
        off = right.copy()
        off[-1, -1] += 3 * traffic.bound
        assert "a logit is off by" in str(traffic.problem(request, 200, headers, b"{}" + off.tobytes()))
        off[-1, -1] = np.nan
        assert traffic.problem(request, 200, headers, b"{}" + off.tobytes()) is not None
        assert "can't be read" in str(traffic.problem(request, 200, headers, b"{}" + right.tobytes()[:-4]))
        assert "can't be read" in str(traffic.problem(request, 200, {}, right.tobytes()))
    first, second = traffic.good["picture"][:2]
    assert first.expected is not None
    body = b'{"predictions": [{"logits": %s}]}' % str(first.expected[0].tolist()).encode()
    assert traffic.problem(first, 200, {}, body) is None
    assert traffic.problem(second, 200, {}, body) is not None, "another request's answer"


def test_one_process_can_not_be_soaked(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="two processes"):
        run_soak(write_bundle(tmp_path / "b"), SoakSettings(processes=1))
