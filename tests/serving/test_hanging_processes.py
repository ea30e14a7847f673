"""Processes that hang are killed and replaced; processes that are only busy are not."""

import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from support.bundles import another
from support.processes import TWO, alive, running, waiting_connections
from support.serving import PATIENCE, ROOT, serving, tensor, until

pytestmark = pytest.mark.slow

#: ``bnexport serve`` whose supervisor gives up after 30 checks in 3 seconds.
HASTY = """
import sys
from bnexport.cli.main import main
from bnexport.serving.http import supervisor
supervisor._LOOK, supervisor._SILENT = 0.1, 30
sys.exit(main(sys.argv[1:]))
"""
#: Middleware that changes nothing, but makes the engines of its process slow twice.
SLOW = """
import time
from bnexport.runtimes.base import Runner
fast, pauses = Runner.run_fitting, [5.0, 5.0]

def slow(self, feeds):
    time.sleep(pauses.pop() if pauses else 0.0)
    return fast(self, feeds)

def wrap(app):
    Runner.run_fitting = slow
    return app
"""


def test_one_that_hangs_is_killed_and_replaced(models: Path, tmp_path: Path) -> None:
    program = (sys.executable, "-c", HASTY)
    with serving(models, tmp_path / "log", *TWO, program=program) as server:
        until(lambda: sorted(running(server)) == [0, 1])
        hanging = running(server)[1]
        os.kill(hanging, signal.SIGSTOP)
        with waiting_connections(server, 24) as connections:
            assert [connection.getresponse().status for connection in connections] == [200] * 24
        (death,) = server.events("process died")
        assert (death["pid"], "sent no heartbeat for 3 seconds" in death["reason"]) == (hanging, True)
        assert not alive(hanging)
        until(lambda: sorted(running(server)) == [0, 1])


def test_one_that_is_busy_is_left_alone(models: Path, tmp_path: Path, images: np.ndarray) -> None:
    """An inference, and a version that is loaded meanwhile, each of which takes longer than the supervisor's patience."""
    another(models, tmp_path / "m" / "bn_lenet" / "1", 1)
    (tmp_path / "slow.py").write_text(SLOW)
    words = (*TWO, "--workers", "2", "--poll", "0.2", "--middleware", "slow:wrap")
    program, env = (sys.executable, "-c", HASTY), {"PYTHONPATH": f"{ROOT}:{tmp_path}"}
    with serving(tmp_path / "m", tmp_path / "log", *words, program=program, env=env) as server:
        another(models, tmp_path / "m" / "bn_lenet" / "2", 2)
        assert server.infer({"inputs": [tensor(images)]}).status == 200
        loaded = until(lambda: [e for e in server.events("model ready") if e["version"] == "2"])
        assert loaded[0]["time"] - server.events("process ready")[-1]["time"] > 5.0
        assert server.events("process died") == []


def test_one_that_hangs_does_not_outlive_its_supervisor_either(models: Path, tmp_path: Path) -> None:
    """It does not handle the signal to stop, but its thread that watches the supervisor ends it."""
    (tmp_path / "hanging.py").write_text(
        "import time\ndef wrap(app):\n    return lambda scope, receive, send: time.sleep(600)\n"
    )
    words, env = (*TWO, "--grace", "0.5", "--middleware", "hanging:wrap"), {"PYTHONPATH": f"{ROOT}:{tmp_path}"}
    with serving(models, tmp_path / "log", *words, env=env) as server, waiting_connections(server, 8):
        until(lambda: sorted(running(server)) == [0, 1])
        pids = list(running(server).values())
        server.process.kill()
        server.process.wait(PATIENCE)
        until(lambda: not any(map(alive, pids)))
