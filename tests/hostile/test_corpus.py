"""The corpus: every hostile file is refused by its reader and on the command line, before an engine opens it."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from support.hostile import Good, Hostile, reseal_file
from support.hostile_archives import ARRAYS, CHECKPOINTS, SCRIPTS
from support.hostile_bundles import BUNDLES, PICTURES
from support.hostile_exported import PT2
from support.hostile_models import GOLDEN, ONNX, SAFETENSORS
from torch import nn

import bnexport
from bnexport.bundle import MODEL_ONNX, MODEL_TORCHSCRIPT, Bundle
from bnexport.cli.main import run
from bnexport.data.images import load_images
from bnexport.errors import BadInput
from bnexport.folding.onnx_backend.reading import read_source
from bnexport.loading.checkpoint import read_safetensors
from bnexport.loading.weights import load_weights
from bnexport.onnx_files.models import read_model
from bnexport.runtimes import onnxruntime
from bnexport.runtimes.torch_runners import load_torchscript
from bnexport.validation import validate_archive

CORPUS: dict[str, Hostile] = {
    **SCRIPTS, **PT2, **CHECKPOINTS, **ARRAYS, **ONNX, **GOLDEN, **SAFETENSORS, **BUNDLES, **PICTURES
}  # fmt: skip
Words = Callable[[Path, Good, Path], tuple[object, ...]]


def weights_of(path: Path) -> None:
    load_weights(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)), path)


class Reader(NamedTuple):
    """Readers of a kind of file."""

    library: Callable[[Path], object]  # The function of the library that opens it
    # Returns the command line that opens it, from the file, the good files and a place for output; None: no command does
    command: Words | None
    inside: str = ""  # Name of the file in a bundle, which the command line gets instead; "" for a file alone


def predict(*more: str) -> Words:
    return lambda path, good, out: ("predict", path, good.picture, *more)


READERS: dict[str, Reader] = {
    "bundle": Reader(lambda path: Bundle.open(path).check(), predict()),
    "golden": Reader(lambda path: Bundle.open(path).golden(), None),
    "torchscript": Reader(load_torchscript, predict("--runtime", "torchscript-cpu"), MODEL_TORCHSCRIPT),
    "pt2": Reader(lambda path: validate_archive(path, "pt2"), None),
    "npz": Reader(lambda path: validate_archive(path, "npz"), None),
    "onnx": Reader(read_source, lambda path, good, out: ("fold-and-export", path, "--out", out / "folded.onnx")),
    "safetensors": Reader(read_safetensors, lambda path, good, out: ("inspect", path)),
    "weights": Reader(
        weights_of,
        lambda path, good, out: (
            "fold-and-export", good.network, "--weights", path, "--input", "1x8x8", "--out", out / "m" / "1",
        ),
    ),
    "images": Reader(load_images, lambda path, good, out: ("predict", good.bundle, path)),
}  # fmt: skip
#: Hostile files that a command opens; the large one takes seconds to walk through, and once is enough.
_LARGE = "onnx: two million empty nodes"
COMMANDED = [name for name, row in CORPUS.items() if READERS[row.reader].command and name != _LARGE]
#: Functions of the engines that open files; while a hostile file is read, none of them may be reached.
ENGINES = (
    "torch.jit.load", "torch.load", "torch.export.load", "onnx.load_model_from_string", "onnx.load",
    "onnxruntime.InferenceSession", "safetensors.torch.load", "numpy.load",
)  # fmt: skip


@pytest.fixture
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every engine is a trap."""

    def reached(*_arguments: object, **_options: object) -> None:
        raise AssertionError("a hostile file reached an engine")

    for name in ENGINES:
        monkeypatch.setattr(name, reached)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to a folder that is watched; the hostile file is in a folder inside it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    return tmp_path


def build(name: str, good: Good, place: Path) -> Path:
    row = CORPUS[name]
    folder = place / "lenet" / "1"
    if row.reader in ("bundle", "golden"):
        shutil.copytree(good.bundle, folder)
    else:
        folder.mkdir(parents=True)
    return row.build(folder, good)


def everything(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if "__pycache__" not in path.parts}


@pytest.mark.usefixtures("no_engine")
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name == _LARGE)) for name in CORPUS])
def test_the_library_refuses_in_one_sentence(name: str, good: Good, place: Path) -> None:
    path = build(name, good, place)
    before = everything(place)
    with pytest.raises(BadInput) as caught:
        READERS[CORPUS[name].reader].library(path)
    assert CORPUS[name].words in caught.value.message
    assert caught.value.remedy
    assert len(caught.value.message) < 600
    assert "\n" not in caught.value.message
    assert everything(place) == before


@pytest.mark.parametrize("name", COMMANDED)
def test_the_command_line_refuses_with_2(name: str, good: Good, place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = build(name, good, place)
    reader = READERS[CORPUS[name].reader]
    if reader.inside:
        path = sealed_with(path, reader.inside, good, place)
    before = everything(place)
    assert reader.command is not None
    code = run([str(word) for word in reader.command(path, good, place / "out")])
    shown, printed = capfd.readouterr()
    assert code == 2, printed
    assert CORPUS[name].words in printed
    assert printed.startswith("Error: ")
    assert len(printed.strip().splitlines()) == 2, printed
    assert "Traceback" not in shown + printed
    assert all(char.isprintable() or char == "\n" for char in printed)
    assert everything(place) == before


def sealed_with(file: Path, name: str, good: Good, place: Path) -> Path:
    """Return a bundle with one hostile file whose hash holds."""
    content = file.read_bytes()
    return reseal_file(Path(shutil.copytree(good.bundle, place / "sealed" / "1")), name, content)


#: Hostile ONNX files in a bundle. The verdict must be FAIL.
IN_A_BUNDLE = "cut off", "more elements than data", "data at an absolute place", "22 graphs in each other"


@pytest.mark.parametrize("name", [f"onnx: {name}" for name in IN_A_BUNDLE])
def test_a_bundle_with_a_hostile_model_fails(
    name: str, good: Good, place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bundle = sealed_with(build(name, good, place), MODEL_ONNX, good, place)
    with pytest.raises(BadInput):
        read_model(bundle / MODEL_ONNX)
    with pytest.raises(BadInput):
        onnxruntime.OnnxRuntimeRunner(bundle / MODEL_ONNX, Bundle.open(bundle).manifest.signature)
    assert run(["verify", str(bundle), "--runtime", "onnxruntime-cpu"]) == 1
    assert "FAIL" in capfd.readouterr().out


@pytest.mark.parametrize("name", [name for name in GOLDEN if "gigabytes" not in name])  # those take seconds to hash
def test_a_bundle_with_hostile_golden_vectors_fails(
    name: str, good: Good, place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["verify", str(build(name, good, place)), "--runtime", "onnxruntime-cpu"]) in (1, 2)
    shown, printed = capfd.readouterr()
    assert "Traceback" not in shown + printed
    assert "FAIL" in shown or "Error: " in printed


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", ["script: pickle with code", "place: pipe", "onnx: sizes that overflow"])
def test_a_real_process_refuses_too(name: str, good: Good, place: Path) -> None:
    path = build(name, good, place)
    reader = READERS[CORPUS[name].reader]
    path = sealed_with(path, reader.inside, good, place) if reader.inside else path
    assert reader.command is not None
    words = [str(word) for word in reader.command(path, good, place / "out")]
    ended = subprocess.run(
        [sys.executable, "-m", "bnexport", *words],
        capture_output=True, text=True, timeout=120, check=False, cwd=place, env={**os.environ, "COLUMNS": "80"},
    )  # fmt: skip
    assert ended.returncode == 2, ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 2
    assert CORPUS[name].words in ended.stderr


def test_the_good_files_pass(good: Good) -> None:
    """A validation that refuses everything would pass the tests above."""
    Bundle.open(good.bundle).check()
    Bundle.open(good.bundle).golden()
    load_torchscript(good.bundle / MODEL_TORCHSCRIPT)
    read_model(good.bundle / MODEL_ONNX)
    read_source(good.onnx)
    read_safetensors(good.bundle / "weights.safetensors")
    validate_archive(good.exported, "pt2")
    validate_archive(good.checkpoint, "checkpoint")
    assert run(["predict", str(good.bundle), str(good.picture)]) == 0
    for weights in (good.checkpoint, good.old_checkpoint):
        weights_of(weights)
    assert bnexport.fold_onnx(good.onnx)


def test_the_corpus_is_large() -> None:
    assert len(CORPUS) >= 60
    assert {row.reader for row in CORPUS.values()} == set(READERS)
