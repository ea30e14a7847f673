"""bnexport-runtime as users install it: a wheel from scripts/runtime_wheel.py, in an environment without torch and onnx."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from email import message_from_string
from email.message import Message
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from runtime_only.absence import REFERENCE
from support.bundles import flip_bit
from support.grpc_calls import channel_to, infer
from support.serving import logits_of, serving, tensor

from bnexport import __version__
from bnexport.bundle import GOLDEN, MODEL_ONNX, Bundle
from bnexport.optional import RUNTIME_EXTRAS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "runtime_wheel.py"
#: Packages of the extras "serve" and "grpc", without pillow, which is optional.
SERVE = ("uvicorn", "httptools", "uvloop", "orjson", "prometheus-client", "grpcio", "protobuf")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def name_of(requirement: str) -> str:
    match = re.match(r"[\w.-]+", requirement)
    assert match is not None
    return match.group()


def call(*command: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=280, check=False, **options
    )


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    done = call(sys.executable, SCRIPT, folder)
    assert done.returncode == 0, done.stderr
    (file,) = folder.iterdir()
    return file


@pytest.fixture(scope="session")
def machine(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an environment like a serving machine's. onnxruntime is without its CUDA extras, which are gigabytes."""
    folder = tmp_path_factory.mktemp("machine") / "venv"
    venv.create(folder, with_pip=True)
    engine = "onnxruntime-gpu" if _has("onnxruntime-gpu") else "onnxruntime"
    names = (engine, "numpy", "click", "rich", *SERVE)
    light = [f"{name}=={metadata.version(name)}" for name in names]
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    for words in (light, ["--no-deps", str(wheel)]):
        done = call(*pip, *words)
        assert done.returncode == 0, done.stderr
    return folder


def _has(distribution: str) -> bool:
    try:
        return bool(metadata.version(distribution))
    except metadata.PackageNotFoundError:
        return False


def bnexport(machine: Path, *words: str | Path) -> tuple[int, str]:
    done = call(machine / "bin" / "bnexport", *words, cwd=machine, env={"COLUMNS": "80", "PATH": "/usr/bin:/bin"})
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout + done.stderr


def metadata_of(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return message_from_string(archive.read(name).decode())


def test_the_wheel_has_the_whole_package_and_the_light_list(wheel: Path) -> None:
    stated = metadata_of(wheel)
    assert (stated["Name"], stated["Version"]) == ("bnexport-runtime", __version__)
    every = stated.get_all("Requires-Dist") or []
    required = [text for text in every if "extra ==" not in text]
    assert {name_of(text) for text in required} == {"numpy", "onnxruntime-gpu", "onnxruntime", "click", "rich"}
    for text in PROJECT["project"]["dependencies"]:
        if name_of(text) in {name_of(other) for other in required}:
            # The lowest versions are those of bnexport.
            assert text.replace(" ", "") in {other.replace(" ", "") for other in required}
    named = {text.removeprefix("bnexport[").removesuffix("]") for text in RUNTIME_EXTRAS}
    assert set(stated.get_all("Provides-Extra") or ()) == named, "the extras that errors name exist"
    extra = {name_of(text) for text in every if "extra ==" in text}
    extras = PROJECT["project"]["optional-dependencies"]
    assert extra == {name_of(text) for name in named for text in extras[name]}
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("bnexport/")}
    there = {path.relative_to(ROOT).as_posix() for path in (ROOT / "bnexport").rglob("*") if path.is_file()}
    assert packed == {name for name in there if "__pycache__" not in name}


def test_the_script_prints_its_usage() -> None:
    done = call(sys.executable, SCRIPT)
    assert (done.returncode, done.stderr) == (2, "use: python scripts/runtime_wheel.py FOLDER\n")


def test_nothing_heavy_is_there(machine: Path) -> None:
    code = "import importlib.util as u; print([n for n in ('torch', 'onnx', 'PIL', 'safetensors') if u.find_spec(n)])"
    assert call(machine / "bin" / "python", "-c", code).stdout.strip() == "[]"


def test_a_bundle_is_verified_there(machine: Path) -> None:
    code, out = bnexport(machine, "verify", REFERENCE, "--json", "-")
    report = json.loads(out)
    assert (code, report["passed"]) == (0, True)
    assert "the float64 proof was not repeated here" in report["summary"]
    assert report["environment"]["packages"]["bnexport-runtime"] == __version__
    assert "torch" not in report["environment"]["packages"]


@pytest.mark.parametrize("name", [MODEL_ONNX, f"{GOLDEN}/output_0.pb"])
def test_a_spoiled_bundle_fails_there(machine: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(REFERENCE, tmp_path / "1")
    flip_bit(tmp_path / "1" / name)
    code, out = bnexport(machine, "verify", tmp_path / "1")
    assert code == 1
    assert f"{name} was changed" in " ".join(out.split())


def test_the_other_commands_there(machine: Path, files: Path) -> None:
    code, out = bnexport(machine, "predict", REFERENCE, files / "pixels.npy", "--json")
    assert (code, len(out.splitlines())) == (0, 3)
    assert bnexport(machine, "doctor")[0] == 0, "of bnexport-runtime only ONNX Runtime on the CPU is expected"
    assert bnexport(machine, "doctor", "--require", "torch-cpu")[0] == 3
    assert bnexport(machine, "inspect", REFERENCE)[0] == 0
    assert bnexport(machine, "verify", machine)[0] == 2
    code, out = bnexport(machine, "train", "--out", machine / "run")
    assert code == 3
    assert "pip uninstall bnexport-runtime, then pip install bnexport" in out


def test_a_bundle_is_served_there(machine: Path, tmp_path: Path) -> None:
    program = (str(machine / "bin" / "bnexport"),)
    words = ("--grpc-port", "0")
    with serving(REFERENCE, tmp_path / "log", *words, env={"PYTHONPATH": ""}, program=program) as server:
        inputs, outputs = Bundle.open(REFERENCE).golden()
        answer = server.infer({"inputs": [tensor(inputs["input"])]})
        largest = np.abs(outputs["logits"]).max()
        assert np.allclose(logits_of(answer), outputs["logits"], rtol=0, atol=1e-5 * largest)
        with channel_to(server) as channel:
            assert np.array_equal(infer(channel, inputs["input"]), logits_of(answer))
        refused = server.ask("POST", "/v2/models/bn_lenet/classify", b"x", {"content-type": "image/png"})
        assert (refused.status, "needs PIL" in refused.error) == (501, True)
        assert server.stop() == 0
    assert "Traceback" not in (tmp_path / "log").read_text()


ISOLATED = """
import sys
from bnexport.bundle import Bundle
from bnexport.runtimes.catalogue import runner_spec
from bnexport.runtimes.base import RunSettings

bundle = Bundle.open(sys.argv[1])
inputs, outputs = bundle.golden()
with runner_spec("onnxruntime-cpu").open(bundle, settings=RunSettings(isolated=True)) as runner:
    answers = runner.run(inputs)
print(all(abs(answers[name] - want).max() <= 1e-5 * abs(want).max() for name, want in outputs.items()))
"""


def test_a_runtime_in_a_separate_process_there(machine: Path) -> None:
    """GPU runtimes are verified in this way; the child must not need torch either."""
    done = call(machine / "bin" / "python", "-c", ISOLATED, REFERENCE)
    assert (done.stdout, done.stderr) == ("True\n", "")
