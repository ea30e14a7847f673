"""Servers as processes: CPU time and memory with all children, their end, and the environments of other servers."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest

import bnexport
from benchmarks.serving import servers as serving_venvs
from benchmarks.serving.load import put_load
from benchmarks.serving.process import ask, counters, free_ports, started
from benchmarks.serving.servers import VENVS, WAYS, make_venv, requirements
from benchmarks.serving.wires import WireRequest
from benchmarks.soak.server import running
from bnexport.errors import RuntimeUnavailable

#: A process and its child; both work for 0.3 s of CPU time, write a file, and sleep.
FAMILY = """
import os, subprocess, sys, time
work = "import os, time\\nend = time.process_time() + 0.3\\nwhile time.process_time() < end: pass\\n"
child = work + "open('child', 'w').write(str(os.getpid()))\\ntime.sleep(60)"
process = subprocess.Popen([sys.executable, "-c", child])
blob = bytearray(64 << 20)
exec(work)
open("parent", "w").write(os.getcwd())
time.sleep(60)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_cpu_time_and_memory_are_of_the_whole_family_and_none_of_it_stays():
    with started(lambda _: [sys.executable, "-c", FAMILY], os.environ) as server:
        folder = server.log.parent
        server.wait(lambda: (folder / "parent").exists() and bool((folder / "child").read_text()))
        child = int((folder / "child").read_text())
        assert server.cpu_seconds() >= 0.55, "0.3 s each"
        assert server.resident_bytes() > 64 << 20
        assert server.peak_bytes() >= server.resident_bytes()
        assert running(child)
    end = time.monotonic() + 240
    while running(child) and time.monotonic() < end:
        time.sleep(0.01)
    assert not running(child)
    assert not folder.exists()


def test_the_reason_of_a_server_that_ends_is_reported():
    with (
        pytest.raises(RuntimeUnavailable, match="ended with code 3: no such model"),
        started(lambda _: [sys.executable, "-c", "print('no such model.'); raise SystemExit(3)"], os.environ) as server,
    ):
        server.wait(lambda: False)
    with (
        pytest.raises(RuntimeUnavailable, match="can't be started"),
        started(lambda _: ["/nowhere/python"], os.environ),
    ):
        pass


def test_ports_are_free_and_two_more_follow():
    ports = free_ports()
    assert ports.grpc not in range(ports.http, ports.http + 3)
    with pytest.raises(OSError, match="refused"):
        ask(ports.http, "GET", "/")
    with pytest.raises(RuntimeUnavailable, match="has no counters"):
        counters(ports.http)


@pytest.mark.needs("wrk")
def test_loads_without_a_server_give_no_result():
    ports = free_ports()
    for grpc in (False, True):
        with pytest.raises(RuntimeUnavailable, match="gave no result"):
            put_load(ports.http, WireRequest("/", {}, b"x"), clients=1, seconds=1, grpc=grpc)


def test_own_servers_find_this_copy_and_others_do_not(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", "else")
    own, other = WAYS["binary"].environment(), WAYS["fastapi"].environment()
    found = subprocess.run(
        [sys.executable, "-c", "import bnexport, numpy; print(bnexport.__file__, numpy.__file__, sep='\\n')"],
        env=own,
        cwd=tmp_path,  # nothing here is a package: what is found is found by the environment alone
        capture_output=True,
        text=True,
        check=True,
    )
    assert all(map(os.path.samefile, found.stdout.splitlines(), [bnexport.__file__, numpy.__file__]))
    assert "PYTHONPATH" not in other
    ports = free_ports()
    for name, way in WAYS.items():
        command = way.started_by(tmp_path / "python", bundle=tmp_path, ports=ports, answer_bytes=185)
        assert command[0] == str(tmp_path / "python"), name
        assert str(ports.http) in command, name
        assert (str(ports.grpc) in command) == (name == "grpc"), name
        assert ("185" in command) == (name == "echo"), name
        assert all(Path(word).is_file() for word in command if word.endswith("_app.py")), name


@pytest.mark.parametrize("name", VENVS)
def test_versions_are_pinned_and_the_engine_is_the_one_here(name):
    wanted = requirements(name)
    assert all("==" in item for item in wanted)
    assert any(item.startswith("onnxruntime==") for item in wanted)


def test_an_environment_is_made_once_and_again_when_its_versions_change(monkeypatch, tmp_path):
    commands = []

    def run(command, name):
        commands.append(command)
        (tmp_path / name / "bin").mkdir(exist_ok=True)
        (tmp_path / name / "bin" / "python").touch()

    monkeypatch.setattr(serving_venvs, "_run", run)
    for _ in range(2):
        assert make_venv("fastapi", tmp_path) == tmp_path / "fastapi" / "bin" / "python"
    assert len(commands) == 2
    assert commands[1][-len(requirements("fastapi")) :] == list(requirements("fastapi"))
    assert json.loads((tmp_path / "fastapi" / "bnexport.json").read_text()) == list(requirements("fastapi"))
    monkeypatch.setattr(serving_venvs, "VENVS", {"fastapi": ("fastapi==0.1",)})
    make_venv("fastapi", tmp_path)
    assert len(commands) == 4
    assert "--clear" in commands[2]


def test_the_reason_for_a_failed_environment_is_reported(monkeypatch):
    fails = "import sys; sys.stderr.write('WARNING: x\\nERROR: No matching distribution\\nwarning: y\\n'); sys.exit(1)"
    with pytest.raises(RuntimeUnavailable, match="fastapi can't be made: ERROR: No matching distribution"):
        serving_venvs._run([sys.executable, "-c", fails], "fastapi")
    monkeypatch.setattr(serving_venvs, "_PATIENCE", 0.1)
    with pytest.raises(RuntimeUnavailable, match="no end after"):
        serving_venvs._run([sys.executable, "-c", "import time; time.sleep(60)"], "fastapi")


def test_the_peers_are_programs_without_bnexport():
    folder = Path(serving_venvs.__file__).parent / "peers"
    programs = sorted(folder.glob("*_app.py"))
    assert len(programs) == 2
    for program in programs:
        text = program.read_text(encoding="utf-8")
        compile(text, str(program), "exec")
        assert "import bnexport" not in text
        assert "from bnexport" not in text
