"""The scripts: short, executable, runnable from anywhere, and honest when something is missing."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ALL = [*sorted(path for path in (ROOT / "scripts").iterdir() if path.is_file()), ROOT / ".ci" / "run"]
SHELL = [path for path in ALL if path.suffix != ".py"]
NAMES = {
    f"scripts/{name}"
    for name in ("demo", "check", "make_venv", "train_reference", "gpu_lane", "gpu_session", "build_docs")
} | {".ci/run"}


def run(command: list[str], **kwargs: object) -> subprocess.CompletedProcess[str]:
    options: dict[str, object] = {"capture_output": True, "text": True, "timeout": 60, "check": False} | kwargs
    return subprocess.run(command, **options)  # type: ignore[call-overload,no-any-return]


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)


def test_the_scripts_are_there() -> None:
    assert {path.relative_to(ROOT).as_posix() for path in SHELL} == NAMES


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.name)
def test_scripts_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 50


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_shell_scripts_are_sound(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert lines[1].startswith("# "), "the second line describes the script"
    assert "set -euo pipefail" in lines
    assert 'cd "$(dirname "${BASH_SOURCE[0]}")/.."' in lines, "it works from any folder"
    assert os.access(path, os.X_OK)
    assert run(["bash", "-n", str(path)]).returncode == 0


@pytest.mark.parametrize("path", [path for path in ALL if path.suffix == ".py"], ids=lambda path: path.name)
def test_python_scripts_compile(path: Path) -> None:
    compile(path.read_bytes(), str(path), "exec")


@pytest.mark.parametrize(
    ("body", "sentence"),
    [("exit 1", "Python 3.11 or newer is needed"), ('case "$2" in *ensurepip*) exit 1;; esac', "has no venv module")],
    ids=["old Python", "no venv module"],
)
def test_make_venv_names_what_is_missing(tmp_path: Path, body: str, sentence: str) -> None:
    for name in ("python3", "python3.11", "python3.12", "python3.13"):
        executable(tmp_path / "bin" / name, f"#!/bin/sh\n{body}\n")
    environ = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "BNEXPORT_VENV": str(tmp_path / "venv")}
    done = run([str(ROOT / "scripts" / "make_venv"), "x"], env=environ, cwd=tmp_path)
    assert done.returncode == 3
    assert done.stderr.count("\n") == 1
    assert sentence in done.stderr
    assert not (tmp_path / "venv").exists()


def test_make_venv_leaves_another_folder_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    done = run([str(ROOT / "scripts" / "make_venv"), "x"], env={**os.environ, "BNEXPORT_VENV": str(tmp_path)})
    assert done.returncode == 3
    assert "is not a virtual environment" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


#: A Python that writes down how it was called, one argument a line; $FAILS in a call makes that call fail.
PYTHON = """#!/bin/sh
{ printf '%s\\n' -- "$@"; } >> calls
case "$*" in *"$FAILS"*) echo "=== 1 failed in 2.00s ==="; exit "$CODE" ;; esac
echo "=== 3 passed in 1.00s ==="
"""


def lanes(folder: Path, script: str, *words: str, fails: str = "nothing", code: int = 1) -> tuple[int, str, list[str]]:
    """Run a script of a clone whose Python only writes down its calls; return its code, its output, and pytest's calls."""
    for name in ("scripts/check", ".ci/run"):
        executable(folder / name, (ROOT / name).read_text(encoding="utf-8"))
    executable(folder / "scripts" / "make_venv", "#!/bin/sh\n")
    executable(folder / ".venv" / "bin" / "python", PYTHON)
    environ = {"PATH": os.environ["PATH"], "FAILS": fails, "CODE": str(code)}
    done = run([str(folder / script), *words], env=environ, cwd="/")
    calls = [" ".join(call.split("\n")).strip() for call in (folder / "calls").read_text().split("--\n")]
    return done.returncode, done.stdout, [call for call in calls if call.startswith("-m pytest")]


@pytest.mark.parametrize(
    ("words", "selected"),
    [([], "-m not slow"), (["-k", "x y"], "-m not slow -k x y"), (["--all"], "-m"), (["--all", "-k", "x"], "-m  -k x")],
)
def test_check_leaves_the_slow_tests_out(tmp_path: Path, words: list[str], selected: str) -> None:
    code, printed, calls = lanes(tmp_path, "scripts/check", *words)
    assert code == 0
    assert calls == [f"-m pytest -n auto --dist loadfile {selected}"]
    assert printed.rstrip().endswith("== all checks passed")


@pytest.mark.parametrize("fails", ["ruff check", "ruff format", "mypy", "pytest"])
def test_check_ends_with_the_code_of_a_failure(tmp_path: Path, fails: str) -> None:
    code, printed, calls = lanes(tmp_path, "scripts/check", fails=fails, code=4)
    assert code == 4
    assert "all checks passed" not in printed
    assert len(calls) == (fails == "pytest")


def test_ci_runs_both_lanes_and_repeats_their_closing_lines(tmp_path: Path) -> None:
    code, printed, calls = lanes(tmp_path, ".ci/run", "-k", "x")
    assert code == 0
    assert [call.removeprefix("-m pytest -n auto --dist loadfile ") for call in calls] == [
        "-m not slow -k x",
        "-m slow -k x",
    ]
    assert printed.splitlines()[-3:] == ["== pytest, not slow and slow", *["=== 3 passed in 1.00s ==="] * 2]


@pytest.mark.parametrize(
    ("fails", "code", "ends"), [("not slow", 1, 1), ("loadfile -m slow", 1, 1), ("loadfile -m slow", 5, 0)]
)
def test_ci_fails_with_either_lane(tmp_path: Path, fails: str, code: int, ends: int) -> None:
    """Code 5: the arguments select no slow test."""
    assert lanes(tmp_path, ".ci/run", fails=fails, code=code)[0] == ends


@pytest.mark.parametrize(("beside", "given"), [(True, None), (False, None), (True, "/elsewhere")])
def test_ci_finds_the_data_next_to_the_repository(tmp_path: Path, beside: bool, given: str | None) -> None:
    repository = tmp_path / "clone"
    executable(repository / ".ci" / "run", (ROOT / ".ci" / "run").read_text(encoding="utf-8"))
    executable(repository / "scripts" / "check", '#!/bin/sh\necho "check $* with ${BNEXPORT_DATA:-nothing}"\n')
    executable(repository / ".venv" / "bin" / "python", '#!/bin/sh\necho "slow with ${BNEXPORT_DATA:-nothing}"\n')
    if beside:
        (tmp_path / "shared" / "data").mkdir(parents=True)
    environ = {key: value for key, value in os.environ.items() if key not in ("BNEXPORT_DATA", "BNEXPORT_VENV")}
    environ |= {"BNEXPORT_DATA": given} if given else {}
    done = run([str(repository / ".ci" / "run"), "-k", "x"], env=environ, cwd="/")
    expected = given or (str(tmp_path / "shared" / "data") if beside else "nothing")
    assert {f"check -k x with {expected}", f"slow with {expected}"} <= set(done.stdout.splitlines())
    assert done.returncode == 0


#: A bnexport that writes down how it was called; training on Fashion-MNIST ends with the code in $TRAIN.
FAKE = """#!/bin/sh
echo "$@" >> calls
case "$*" in *digits*) ;; train*) exit "$TRAIN" ;; esac
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "demo", tmp_path / "scripts" / "demo")
    executable(tmp_path / "scripts" / "make_venv", "#!/bin/sh\n")
    executable(tmp_path / ".venv" / "bin" / "bnexport", FAKE)
    executable(tmp_path / ".venv" / "bin" / "python", '#!/bin/sh\nmkdir -p "$3" && echo "$2" > "$3/a.png"\n')
    return tmp_path


def demo(clone: Path, code: int) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    environ = {"PATH": os.environ["PATH"], "TRAIN": str(code)}
    done = run([str(clone / "scripts" / "demo")], env=environ, cwd="/")
    return done, [line.split()[0] for line in (clone / "calls").read_text().splitlines()]


def test_demo_runs_the_whole_flow_twice(clone: Path) -> None:
    for _ in range(2):
        (clone / "calls").unlink(missing_ok=True)
        done, calls = demo(clone, 0)
        assert done.returncode == 0, done.stderr
        assert calls == ["train", "fold-and-export", "predict", "verify"]
        assert done.stdout.rstrip().endswith("runs/demo/models/bn_lenet/1/report.html")
        assert (clone / "runs" / "demo" / "images" / "fashion-mnist" / "a.png").is_file()
    assert not (clone / "models").exists(), "the committed models are not the demo's to write"


def test_demo_falls_back_to_digits_only_without_network(clone: Path) -> None:
    done, calls = demo(clone, 3)
    assert done.returncode == 0, done.stderr
    assert calls == ["train", "train", "fold-and-export", "predict", "verify"]
    assert "embedded digits set instead" in done.stdout
    assert not (clone / "runs" / "demo" / "images" / "fashion-mnist").exists()
    assert (clone / "runs" / "demo" / "images" / "digits" / "a.png").is_file()


@pytest.mark.parametrize("code", [1, 2, 130])
def test_demo_ends_with_the_code_of_a_failure(clone: Path, code: int) -> None:
    done, calls = demo(clone, code)
    assert done.returncode == code
    assert calls == ["train"]
