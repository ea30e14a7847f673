"""The GPU session: the order of the steps, their limits, and a summary that a kill does not lose."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import machine, session
from benchmarks.gpu.session import Step, main, run_session, session_steps
from benchmarks.gpu.sweeps import cpu_sweeps, gpu_sweeps

ROOT = Path(__file__).parents[3]
NAMES = ["machine", "doctor", "verify", "torch", "served", "training", "tests", "combinations", "refusals"]


def step(name: str, code: str, limit: float | None = 60.0, **rest: object) -> Step:
    return Step(name, (sys.executable, "-c", code), limit, **rest)  # type: ignore[arg-type]


def summary(out: Path) -> dict[str, object]:
    return json.loads((out / "summary.json").read_text())


def states(out: Path) -> list[str]:
    return [record["state"] for record in summary(out)["steps"]]


def test_every_step_is_recorded_with_its_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = run_session([step("a", "print('PASS: one'); print('first')"), step("b", "print('two')")], tmp_path)
    assert code == 0
    found = summary(tmp_path)
    assert (found["verdict"], found["code"]) == ("PASS: every step ran and passed", 0)
    assert states(tmp_path) == ["passed", "passed"]
    assert [record["last_line"] for record in found["steps"]] == ["PASS: one", "two"]
    log = (tmp_path / "log.txt").read_text()
    assert log.index("== a") < log.index("first") < log.index("== b") < log.index("two")
    assert capsys.readouterr().out.splitlines()[-1] == "PASS: every step ran and passed"


def test_a_failing_step_does_not_stop_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = [
        step("a", "raise SystemExit(1)"),
        step("b", "raise SystemExit(3)"),
        step("c", "print('INCOMPLETE: 3 settings'); raise SystemExit(1)"),
        step("d", "print('done')"),
    ]
    assert run_session(steps, tmp_path) == 1
    assert states(tmp_path) == ["failed", "not available", "incomplete", "passed"]
    assert [record["code"] for record in summary(tmp_path)["steps"]] == [1, 3, 1, 0]
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "FAIL: 3 of 4 steps: a failed, b not available, c incomplete"


def test_a_step_that_is_not_there_fails(tmp_path: Path) -> None:
    assert run_session([Step("a", (str(tmp_path / "nothing"),), 60.0), step("b", "")], tmp_path) == 1
    assert states(tmp_path) == ["failed", "passed"]


def test_a_step_is_stopped_at_its_limit_with_all_its_processes(tmp_path: Path) -> None:
    endless = "import time; time.sleep(600)"
    start = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {endless!r}])"
    code = f"{start}; print(p.pid, flush=True); p.wait()"
    assert run_session([step("a", code, 8.0), step("b", "print('two')")], tmp_path) == 1
    assert states(tmp_path) == ["stopped", "passed"]
    record = summary(tmp_path)["steps"][0]
    assert record["code"] is None
    grandchild = int(record["last_line"])
    for _ in range(100):  # the system needs a moment to end it
        if not Path(f"/proc/{grandchild}").exists() or ") Z " in Path(f"/proc/{grandchild}/stat").read_text():
            break
        time.sleep(0.05)
    else:
        pytest.fail("a process of the stopped step still runs")


def test_no_step_starts_after_the_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first step has less than what the budget leaves, the second would have less than a step needs."""
    assert run_session([step("a", "print(1)"), step("b", "print(2)")], tmp_path, seconds=4.0) == 1
    assert states(tmp_path) == ["not reached", "not reached"]
    assert "FAIL: 2 of 2 steps: a not reached, b not reached" in capsys.readouterr().out


def test_an_open_step_leaves_the_later_steps_their_time(tmp_path: Path) -> None:
    run_session([step("open", "", None), step("last", "", 30.0)], tmp_path, seconds=100.0)
    limits = [record["limit"] for record in summary(tmp_path)["steps"]]
    assert 60 < limits[0] <= 68
    assert limits[1] == 30


def test_the_limit_is_given_to_a_step_that_can_keep_it(tmp_path: Path) -> None:
    code = "import sys; print(sys.argv[1:])"
    run_session([step("a", code, 25.0, budget_option="--seconds")], tmp_path)
    assert summary(tmp_path)["steps"][0]["last_line"] == "['--seconds', '15.0']"


def test_without_a_gpu_nothing_else_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_session([step("machine", "raise SystemExit(3)", decides=True), step("b", "")], tmp_path) == 3
    assert states(tmp_path) == ["not available", "not reached"]
    assert capsys.readouterr().out.splitlines()[-1] == "NO GPU: nothing was measured"


def test_a_killed_session_loses_its_current_step_alone(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from benchmarks.gpu.session import Step, run_session\n"
        "steps = [Step('a', (sys.executable, '-c', 'print(1)'), 60.0),"
        " Step('b', (sys.executable, '-c', 'import os, time; print(os.getpid(), flush=True); time.sleep(60)'), 60.0)]\n"
        "run_session(steps, Path(sys.argv[1]))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}
    ) as child:
        for _ in range(1200):
            log = (tmp_path / "log.txt").read_text() if (tmp_path / "log.txt").exists() else ""
            if (started := re.search(r"== b .*\n(\d+)\n", log)) is not None:
                break
            time.sleep(0.05)
        child.kill()
    os.kill(int(started[1]), signal.SIGKILL)
    found = summary(tmp_path)
    assert (found["verdict"], found["code"]) == ("RUNNING", None)
    assert states(tmp_path) == ["passed", "running"]
    assert found["steps"][0]["last_line"] == "1"


@pytest.mark.parametrize("rehearse", [False, True])
def test_the_steps_cover_the_lane_in_the_order_of_value(tmp_path: Path, rehearse: bool) -> None:
    steps = session_steps(tmp_path, rehearse=rehearse, data_dir=tmp_path, max_samples=7)
    assert [step.name for step in steps] == NAMES
    assert [step.limit for step in steps].count(None) == 1
    assert sum(step.limit or 0 for step in steps[:3]) <= session.SECONDS / 2
    given = [
        word
        for step in steps
        for word, before in zip(step.command[1:], step.command, strict=False)
        if before == "--sweep"
    ]
    assert sorted(given) == sorted(sweep.name for sweep in (cpu_sweeps() if rehearse else gpu_sweeps()))
    lanes = [step.command for step in steps if "benchmarks.gpu" in step.command]
    assert [("--no-training" in lane, "--no-refusals" in lane) for lane in lanes].count((False, True)) == 1
    assert [("--no-training" in lane, "--no-refusals" in lane) for lane in lanes].count((True, False)) == 1
    assert all(("--rehearse" in lane) is rehearse and "--add" in lane for lane in lanes)
    assert steps[0].decides is not rehearse
    files = {Path(word).name for step in steps for word in step.command if word.startswith(str(tmp_path))}
    files = {name for name in files if "." in name} | {"summary.json", "log.txt"}
    assert len(files) <= 8
    assert all(re.fullmatch(r"[\w.-]+", name) for name in files)


def test_a_folder_with_results_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "gpu.json").write_text("{}")
    assert main([str(tmp_path)]) == 2
    assert "holds the results of a session already. Choose another folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.json"]


def test_the_machine_step_names_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    versions = machine.dependencies()
    assert versions["numpy"] != "missing"
    assert set(versions) > {"torch", "onnx", "onnxruntime-gpu", "platformdirs", "pytest"}
    monkeypatch.setattr(machine, "gpu_machine", dict)
    monkeypatch.setattr(machine, "dependencies", lambda: {"platformdirs": "missing"})
    assert machine.main() == 3
    assert machine.main(["--rehearse"]) == 0
    assert "platformdirs: missing" in capsys.readouterr().out
    monkeypatch.setattr(machine, "gpu_machine", lambda: {"GPU": "NVIDIA H0"})
    assert machine.main() == 0
    assert "GPU: GPU NVIDIA H0" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_rehearsal_runs_every_step_on_a_cpu(tmp_path: Path) -> None:
    command = [
        str(ROOT / "scripts" / "gpu_session"),
        "--rehearse",
        "--seconds",
        "700",
        "--max-samples",
        "20",
        str(tmp_path),
    ]
    done = subprocess.run(
        command, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True, timeout=800, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert states(tmp_path) == ["passed"] * len(NAMES)
    assert {path.name for path in tmp_path.iterdir()} == {
        "summary.json",
        "log.txt",
        "gpu.json",
        "gpu.md",
        "verify.json",
    }
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert list(found["sweeps"])
    assert found["unreached"] == []
    assert len(found["refused"]) == 5
    assert "No GPU has been measured yet." in (tmp_path / "gpu.md").read_text()
