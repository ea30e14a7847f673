"""A short soak, and servers with a fault each: each fault breaks its demand of the verdict."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.bundles import write_bundle
from support.serving import PATIENCE, ROOT, until

from benchmarks.serving.process import Ports, Running
from benchmarks.soak.__main__ import lines, unexplained, verdict
from benchmarks.soak.server import running
from benchmarks.soak.soak import SoakSettings, run_soak
from bnexport.bundle import Bundle

pytestmark = pytest.mark.slow

#: Wrong in one request of fifty; each is given the application, and gives one.
FAULTS = '''
import itertools, os, signal

class Fault:
    def __init__(self, app):
        self.app, self.count, self.kept = app, itertools.count(1), None

    async def __call__(self, scope, receive, send):
        await self.serve(scope, receive, send, next(self.count) % 50 == 0)

    async def serve(self, scope, receive, send, now):
        await self.app(scope, receive, send)

    async def answer_of(self, scope, receive):
        messages = []
        async def keep(message):
            messages.append(message)
        await self.app(scope, receive, keep)
        return messages

class MixedUp(Fault):
    """One client's answer for another one."""
    async def serve(self, scope, receive, send, now):
        messages = await self.answer_of(scope, receive)
        if messages and messages[0]["status"] == 200 and scope["path"].endswith("/infer"):
            messages, self.kept = (self.kept if now and self.kept else messages), messages
        for message in messages:
            await send(message)

class Dropped(Fault):
    """A connection that is closed in the middle of an answer."""
    async def serve(self, scope, receive, send, now):
        if not now or not scope["path"].endswith("/infer"):
            return await self.app(scope, receive, send)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1000")]})
        await send({"type": "http.response.body", "body": b"{", "more_body": True})

class Lenient(Fault):
    """Malformed requests are accepted."""
    async def serve(self, scope, receive, send, now):
        messages = await self.answer_of(scope, receive)
        if messages and messages[0]["status"] == 400:
            messages[0]["status"] = 200
        for message in messages:
            await send(message)

class Failing(Fault):
    """A 503 without a reason."""
    async def serve(self, scope, receive, send, now):
        messages = await self.answer_of(scope, receive)
        if now and messages:
            messages[0]["status"] = 503
        for message in messages:
            await send(message)

class Forgetful(Fault):
    """Counters that are sometimes those of one process."""
    async def serve(self, scope, receive, send, now):
        messages = await self.answer_of(scope, receive)
        if scope["path"] == "/metrics" and next(self.count) % 2:
            messages[1]["body"] = messages[1]["body"].replace(b'route="v2/health', b'x="').split(b"bnexport_model_ready")[0]
            messages[0]["headers"] = [h for h in messages[0]["headers"] if h[0] != b"content-length"]
        for message in messages:
            await send(message)

class Mortal(Fault):
    """A process that a request kills."""
    async def serve(self, scope, receive, send, now):
        if now and next(self.count) > 400:
            os.kill(os.getpid(), signal.SIGKILL)
        await self.app(scope, receive, send)
'''
COMMAND = [sys.executable, "-m", "benchmarks.soak"]
RIGHT = "every answer is the right one"
ANSWERED = "no request is lost except on the connections of a killed process"


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_bundle(folder / "bn_lenet" / "1")
    return folder


def run_environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def test_a_short_soak_passes(models: Path, tmp_path: Path) -> None:
    """20 seconds and two kills, by the script."""
    words = ["--seconds", "20", "--kill-every", "7", "--clients", "6", "--out", str(tmp_path / "soak.json")]
    done = subprocess.run(
        [*COMMAND, str(models / "bn_lenet" / "1"), *words], capture_output=True, text=True, timeout=240,
        env=run_environment(), cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Verdict: PASS" in done.stdout
    assert max(map(len, done.stdout.splitlines()[:-1])) <= 80
    found = json.loads((tmp_path / "soak.json").read_text())
    assert found["passed"] is True
    assert len(found["kills"]) == 2
    assert all(kill["recovery"] > 0 and kill["ports"] for kill in found["kills"]), (
        "they had connections, and were replaced"
    )
    assert sum(count for _, outcome, count in found["counts"] if outcome == "right") > 500
    assert all(memory["last"] > 2**20 for memory in found["memory"])
    assert len(found["memory"]) == 4


def test_an_interrupted_soak_leaves_no_process(models: Path, tmp_path: Path) -> None:
    bundle, out = str(models / "bn_lenet" / "1"), str(tmp_path / "soak.json")
    words = [bundle, "--seconds", "600", "--kill-every", "0.5", "--out", out]
    with subprocess.Popen(
        [*COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=run_environment(), cwd=ROOT,
    ) as child:  # fmt: skip
        try:
            family: set[int] = set()

            def all_started() -> bool:
                family.update(pid for pid, _ in Running(child, Ports(0, 0), tmp_path)._rows())
                return len(family) > 4  # itself, the supervisor, two processes, and one that came after a kill

            until(all_started)
            child.terminate()
            out, errors = child.communicate(timeout=PATIENCE)
        finally:
            child.kill()
    assert (child.returncode, out) == (130, "")
    assert errors == "soak: interrupted, so there is no result\n"
    until(lambda: not any(map(running, family)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fault", "demand", "words"),
    [
        ("MixedUp", RIGHT, ("a logit is off", "can't be read")),
        ("Dropped", ANSWERED, ("IncompleteRead", "RemoteDisconnected", "reset", "Broken pipe")),
        ("Lenient", RIGHT, ("status 200 instead of 400",)),
        ("Failing", RIGHT, ("status 503 instead of",)),
        ("Forgetful", "counters never fall", ("fell from",)),
        ("Mortal", "no process dies by itself", ("SIGKILL",)),
    ],
)
def test_a_faulty_server_fails(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, demand: str, words: tuple[str, ...]
) -> None:
    (tmp_path / "faults.py").write_text(FAULTS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    settings = SoakSettings(4.0, clients=4, kill_every=None, pause=0.003, options=("--middleware", f"faults:{fault}"))
    soak = run_soak(Bundle.open(models / "bn_lenet" / "1"), settings)
    broken = {name: reasons for name, reasons in verdict(soak).items() if reasons}
    assert demand in broken, "\n".join(lines(soak))
    assert all(any(word in reason for word in words) for reason in broken[demand]), broken[demand]
    assert list(lines(soak))[-1] == "Verdict: FAIL"
    expected = {demand} | ({ANSWERED} if fault == "Mortal" else set())
    assert set(broken) <= expected, "nothing else is wrong with it"
    if fault == "Mortal":
        assert len(unexplained(soak)) == len(soak.ledger.lost) > 0, "a kill that was not ordered explains nothing"
