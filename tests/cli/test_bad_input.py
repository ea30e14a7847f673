"""Bad input: one clear sentence, the right exit code, never a traceback, nothing half-written."""

import contextlib
import gzip
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cases import randomise
from safetensors.torch import save_file
from support.bundles import flip_bit

import bnexport
from bnexport.bundle import MODEL_ONNX, seal
from bnexport.cli.main import run
from bnexport.loading.checkpoint import Checkpoint, save_checkpoint

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def bad(capfd: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs a command that must fail: its exit code and standard error."""

    def invoke(*arguments: object) -> tuple[int, str]:
        code = run([str(item) for item in arguments])
        printed = capfd.readouterr().err.strip()
        assert "Traceback" not in printed
        assert 1 <= len(printed.splitlines()) <= 5, printed
        return code, printed

    return invoke


def checkpoint(path: Path, **options: object) -> Path:
    torch.manual_seed(0)
    network = {"source": "bn_lenet", "options": {"norm": "torch", **options}}
    model = randomise(bnexport.bn_lenet("torch", **options))  # type: ignore[arg-type]
    preprocessing = {"channels": 1, "height": 28, "width": 28, "scale": 1 / 255, "mean": [0.0], "std": [1.0]}
    metadata = {"network": network, "dataset": None, "labels": None, "preprocessing": preprocessing, "training": {}}
    save_checkpoint(path, Checkpoint(model.state_dict(), metadata))
    return path


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint and a bundle of it."""
    folder = tmp_path_factory.mktemp("good")
    checkpoint(folder / "model.safetensors")
    result = bnexport.fold_and_export(str(folder / "model.safetensors"), folder / "models" / "lenet" / "1")
    assert result.bundle is not None
    return folder


@pytest.fixture
def bundle(good: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(good / "models" / "lenet" / "1", tmp_path / "lenet" / "1"))


class Code:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("hacked",)


NET = """
from torch import nn
def build():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
"""


def test_sources(bad: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.safetensors").touch()
    Path("text.safetensors").write_text("this is a text file, not a checkpoint\n" * 9)
    Path("net.py").write_text(NET)
    Path("code.pt").write_bytes(pickle.dumps({"0.weight": Code()}))
    torch.save({"0.weight": Code()}, "zipped.pt")
    torch.save(torch.nn.Linear(2, 2).state_dict(), "other.pt")
    Path("run").mkdir()
    export = ("fold-and-export", "--out", "m/x/1")
    for arguments, part in (
        (("missing.safetensors",), "does not exist"),
        (("empty.safetensors",), "is empty"),
        (("text.safetensors",), "not a complete safetensors file"),
        (("run",), "holds no model.safetensors"),
        (("net.py:nothing",), "has no function 'nothing'"),
        (("net.py:build", "--weights", "code.pt", "--input", "1x8x8"), "not a plain state dict"),
        (("net.py:build", "--weights", "zipped.pt", "--input", "1x8x8"), "not a plain state dict"),
        (("net.py:build", "--weights", "other.pt", "--input", "1x8x8"), "does not fit Sequential"),
        (("net.py:build", "--input", "1x8x8"), "never trained"),
        (("net.py:build", "--input", "1,8,8"), "not of the form"),
        (("net.py:build", "--input", "2x8x8", "--allow-untrained"), "fails on an example input of shape 2x2x8x8"),
    ):
        code, message = bad(*export, *arguments)
        assert code == 2, message
        assert part in message
    assert not Path("hacked").exists()
    assert not Path("m").exists()


def test_weights_of_another_architecture(bad: Run, tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "model.safetensors", num_classes=7)
    content = path.read_bytes().replace(b'\\"num_classes\\": 7', b'\\"num_classes\\": 9')
    path.write_bytes(content)
    code, message = bad("fold-and-export", path, "--out", tmp_path / "x" / "1")
    assert code == 2
    assert "do not fit its network" in message


def test_output_that_exists(bad: Run, good: Path) -> None:
    code, message = bad("fold-and-export", good / "model.safetensors", "--out", good / "models" / "lenet" / "1")
    assert code == 2
    assert "exists already" in message
    assert "--force" in message
    bnexport.Bundle.open(good / "models" / "lenet" / "1").check()


def test_bundle_with_one_byte_changed(bad: Run, bundle: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("model.onnx", "model.pt", "weights.safetensors", "report.html", "test_data_set_0/output_0.pb"):
        path = bundle / name
        flip_bit(path)
        code, message = bad("predict", bundle, "picture.png")
        assert code == 2
        assert f"{name} was changed" in message
        assert run(["verify", str(bundle), "--runtime", "onnxruntime-cpu"]) == 1
        assert "FAIL" in capfd.readouterr().out
        flip_bit(path)
    manifest = bundle / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"version": 1', b'"version": 2', 1))
    code, message = bad("verify", bundle)
    assert code == 2
    assert "was changed after it was written" in message


def test_zero_byte_model(bad: Run, bundle: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (bundle / MODEL_ONNX).write_bytes(b"")
    assert bad("predict", bundle, "picture.png")[0] == 2
    opened = bnexport.Bundle.open(bundle)
    seal(bundle, opened.manifest)  # even with a hash that fits
    assert run(["verify", str(bundle), "--runtime", "onnxruntime-cpu"]) == 1
    assert "FAIL" in capfd.readouterr().out
    assert bad("predict", bundle, "picture.png")[0] == 2


def test_images(bad: Run, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "short.idx").write_bytes(bytes([0, 0, 8, 3, 0, 0, 0, 9, 0, 0, 0, 28, 0, 0, 0, 28, 1, 2, 3]))
    for name in ("missing.png", "text.png", "short.idx"):
        code, message = bad("predict", bundle, tmp_path / name)
        assert code == 2
        assert name in message


def test_data_sets(bad: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BNEXPORT_DATA", raising=False)
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (raw / f"{part}-ubyte.gz").write_bytes(gzip.compress(b"\0\0\x08\x03wrong"))
    code, message = bad("train", "--data-dir", tmp_path, "--epochs", "1", "--out", tmp_path / "run")
    assert code == 2, message
    assert "ubyte.gz" in message
    assert not (tmp_path / "run").exists()


def test_no_gpu_and_unknown_words(bad: Run, bundle: Path, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        assert bad("train", "--dataset", "digits", "--device", "cuda", "--out", tmp_path / "run")[0] == 3
    for arguments in (
        ("verify", bundle, "--runtime", "abacus"),
        ("predict", bundle, "picture.png", "--runtime", "abacus"),
        ("fold-and-export", "x", "--out", "m/x/1", "--format", "gif"),
        ("fold-and-export", "x", "--out", "m/x/1", "--dataset", "gif"),
        ("verify", tmp_path / "nowhere"),
        ("inspect", tmp_path / "nowhere"),
        ("explode",),
        ("train", "--epochs", "many"),
    ):
        assert bad(*arguments)[0] == 2


def bnexport_process(*arguments: object, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "bnexport", *map(str, arguments)]
    return subprocess.Popen(  # type: ignore[call-overload,no-any-return]
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def limit_file_size() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="file size limits are POSIX")
def test_full_disk(good: Path, tmp_path: Path) -> None:
    """The system refuses to write more than 60 kB into any file, as a full disk would."""
    out = tmp_path / "lenet" / "1"
    with bnexport_process(
        "fold-and-export", good / "model.safetensors", "--out", out, preexec_fn=limit_file_size
    ) as process:
        _, errors = process.communicate()
    assert process.returncode == 2, errors
    assert "can't be written" in errors
    assert "Traceback" not in errors
    assert [item for item in tmp_path.rglob("*") if item.is_file()] == []


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX")
def test_interrupt(good: Path, tmp_path: Path) -> None:
    out = tmp_path / "lenet" / "1"
    with bnexport_process("fold-and-export", good / "model.safetensors", "--out", out) as process:
        while process.poll() is None and not list(tmp_path.glob("lenet/.*.part/model.onnx")):
            time.sleep(0.02)
        # Python drops an interrupt that comes while an object is being finalised; a user presses the keys again.
        while process.poll() is None:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
        _, errors = process.communicate()
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "Interrupted" in errors
    assert [item for item in tmp_path.rglob("*") if item.is_file()] == []


def test_help_and_version_do_not_load_torch() -> None:
    code = (
        "import sys; from bnexport.cli.main import run\n"
        "assert run(['--help']) == 0 and run(['--version']) == 0\n"
        "for name in ('train', 'fold-and-export', 'verify', 'predict', 'inspect', 'doctor', 'serve', 'deploy'):\n"
        "    assert run([name, '--help']) == 0\n"
        "names = 'torch torchvision onnx onnxruntime matplotlib PIL uvicorn grpc pyarrow'.split()\n"
        "heavy = set(names) & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_ascii_terminal(good: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0", "COLUMNS": "80"}
    bundle = good / "models" / "lenet" / "1"
    code = (
        "import sys; from bnexport.cli.main import run; print('both', run(['inspect', sys.argv[1]]), run(sys.argv[2:]))"
    )
    words = [sys.executable, "-c", code, bundle, "verify", bundle, "--runtime", "onnxruntime-cpu"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.splitlines()[-1] == "both 0 0", done.stderr
    assert done.stdout.isascii()
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_names_in_files_do_not_steer_the_terminal(bad: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    hostile = "layer\x1b[31m"
    state = {f"{hostile}.{name}": torch.rand(3) for name in ("weight", "bias", "running_mean", "running_var")}
    save_file(state, tmp_path / "other.safetensors")
    assert run(["inspect", str(tmp_path / "other.safetensors")]) == 0
    shown = capfd.readouterr().out
    assert "layer?[31m" in shown
    assert "\x1b" not in shown
    (tmp_path / "net.py").write_text(NET)
    code, message = bad(
        "fold-and-export", f"{tmp_path}/net.py:build", "--weights", tmp_path / "other.safetensors",
        "--input", "1x8x8", "--out", tmp_path / "m" / "1",
    )  # fmt: skip
    assert code == 2
    assert "layer?[31m" in message
    assert "\x1b" not in message


def test_unknown_fault_is_one_sentence(bad: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_arguments: object, **_options: object) -> None:
        raise RuntimeError("something\nunexpected")

    monkeypatch.setattr("bnexport.loading.inspection.inspect_path", broken)
    code, message = bad("inspect", "x")
    assert code == 70
    assert "something unexpected" in message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("audit", "missing.onnx"), "missing.onnx does not exist"),
        (("audit", "good.onnx", "--reference", "other.onnx"), "other.onnx does not exist"),
        (("train", "--model", "nosuch", "--dataset", "digits"), "'nosuch' is not a network"),
    ],
)
def test_missing_files_and_names_are_stated_as_missing(
    words: tuple[str, ...], message: str, bad: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("good.onnx").touch()
    code, printed = bad(*words)
    assert code == 2
    assert message in printed
