"""scripts/gpu_session: the order of the steps, their exit codes, and the files. A shell script stands in for Python."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu.sweeps import cpu_sweeps

SCRIPT = Path(__file__).parents[3] / "scripts" / "gpu_session"
#: A stand-in for Python: it ends with the code of FAKE_CODES ("words=code ...") for the first words that its line contains.
FAKE = """#!/bin/sh
line="$*"
for pair in $FAKE_CODES; do
  case "$line" in *"${pair%=*}"*) echo odd; exit "${pair#*=}";; esac
done
echo "done $line"
"""


def session(out: Path, *words: str, python: Path | str = sys.executable, codes: str = "") -> tuple[int, str]:
    environ = os.environ | {"PYTHON": str(python), "FAKE_CODES": codes}
    done = subprocess.run(
        [str(SCRIPT), str(out), *words], env=environ, capture_output=True, text=True, timeout=800, check=False
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    path = tmp_path / "python"
    path.write_text(FAKE)
    path.chmod(0o755)
    return path


def steps(out: Path) -> list[tuple[str, int]]:
    lines = (out / "summary.txt").read_text().splitlines()
    return [(line.partition(" exit ")[0].strip(), int(line.partition(" exit ")[2].split()[0])) for line in lines]


def test_the_steps_of_a_gpu_in_the_order_of_their_value(tmp_path: Path, fake: Path) -> None:
    out = tmp_path / "out"
    code, printed = session(out, "--max-samples", "7", python=fake)
    assert code == 0, printed
    names = ["machine", "doctor", "verify", "lane --no-training", "lane --no-sweeps", "tests", "lane --no-sweeps"]
    assert steps(out) == [(name, 0) for name in names]
    log = (out / "log.txt").read_text()
    assert "doctor --require onnxruntime-cuda" in log
    assert log.count("--max-samples 7") == 8, "verify and three lanes, each with its command and what that printed"
    assert log.count("--add --seconds") == 6
    assert "--rehearse" not in log


def test_a_failing_step_does_not_stop_the_rest(tmp_path: Path, fake: Path) -> None:
    code, _ = session(tmp_path / "out", "--rehearse", python=fake, codes="doctor=3 no-training=1")
    assert code == 1
    found = steps(tmp_path / "out")
    assert [code for _, code in found] == [3, 0, 1, 0, 1], "the last lane measures no training either"
    assert "machine" not in dict(found)
    assert "tests" not in dict(found)


def test_without_a_gpu_nothing_else_runs(tmp_path: Path, fake: Path) -> None:
    assert session(tmp_path / "out", python=fake, codes="gpu_machine=3")[0] == 3
    assert steps(tmp_path / "out") == [("machine", 3)]


def test_bad_use(tmp_path: Path, fake: Path) -> None:
    (tmp_path / "gpu.json").write_text("{}")
    code, printed = session(tmp_path, python=fake)
    assert (code, printed.count("\n")) == (2, 1)
    assert "has the results of a session already" in printed
    assert not (tmp_path / "summary.txt").exists()
    done = subprocess.run([str(SCRIPT)], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 2
    assert "Use: " in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_rehearsal_runs_every_step_on_a_cpu(tmp_path: Path) -> None:
    code, printed = session(tmp_path / "out", "--rehearse", "--max-samples", "20")
    assert code == 0, printed
    found = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert set(found["sweeps"]) == {sweep.name for sweep in cpu_sweeps()}
    assert found["unreached"] == []
    assert len(found["refused"]) == 5
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "summary.txt", "log.txt", "gpu.json", "gpu.md", "verify.json",
    }  # fmt: skip
    assert "No GPU has been measured yet." in (tmp_path / "out" / "gpu.md").read_text()
