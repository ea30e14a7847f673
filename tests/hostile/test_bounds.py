"""Bombs cost little memory and time, and each limit is that of the table."""

import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from bounded_child import OPENERS
from support.hostile import Good, Member, write_zip
from support.hostile_archives import npy
from test_corpus import CORPUS

from bnexport.bundle import MODEL_TORCHSCRIPT, WEIGHTS, Bundle
from bnexport.data.images import load_images
from bnexport.errors import BadInput, BundleError, DataError
from bnexport.files import Refusal
from bnexport.loading.checkpoint import read_safetensors
from bnexport.onnx_files.models import read_validated
from bnexport.validation import validate_archive
from bnexport.validation.archives import validate_weights
from bnexport.validation.limits import LIMITS
from bnexport.validation.onnx_file import validate_onnx
from bnexport.validation.zip_directory import read_directory

#: Memory for addresses: the interpreter, numpy and its threads take about 250 MB of it.
_MEGABYTES, _SECONDS = 900, 40


@pytest.mark.slow
def test_every_bomb_in_bounded_memory_and_time(good: Good, tmp_path: Path) -> None:
    """All hostile files that need no engine, in one process that is killed when it takes too much."""
    words = []
    for number, (name, row) in enumerate(CORPUS.items()):
        if row.reader not in OPENERS or "a pipe" in name:
            continue
        folder = tmp_path / str(number) / "1"
        if row.reader == "bundle":
            shutil.copytree(good.bundle, folder)
        else:
            folder.mkdir(parents=True)
        words += [row.reader, str(row.build(folder, good))]
    child = Path(__file__).with_name("bounded_child.py")
    ended = subprocess.run(
        [sys.executable, str(child), str(_MEGABYTES), str(_SECONDS), *words],
        capture_output=True, text=True, timeout=200, check=False, cwd=tmp_path,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert len(ended.stdout.splitlines()) == len(words) // 2 >= 100
    assert not (tmp_path / "hacked").exists()


def test_weights_are_not_read(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(4)}, tmp_path / "small.pt")
    file = _Counting((tmp_path / "small.pt").read_bytes())
    validate_weights(file)
    (weights,) = (entry for entry in read_directory(file) if entry.name.endswith("/data/0"))
    assert not any(place <= weights.start < place + length for place, length in file.spans)


class _Counting(io.BytesIO):
    """Bytes that record which spans were read."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.spans: list[tuple[int, int]] = []

    def read(self, size: int | None = -1, /) -> bytes:
        place = self.tell()
        content = super().read(size)
        self.spans.append((place, len(content)))
        return content


def test_compressed_arrays_of_everyday_pass(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez_compressed(tmp_path / "a.npz", x=rng.random((64, 1, 28, 28), np.float32), labels=np.arange(64))
    validate_archive(tmp_path / "a.npz", "npz")
    np.savez(tmp_path / "b.npz", x=np.zeros((64, 3, 64, 64), np.float32), empty=np.zeros((0, 5)))
    validate_archive(tmp_path / "b.npz", "npz")
    np.savez_compressed(tmp_path / "c.npz", x=np.zeros((8, 3, 64, 64), np.float32))
    validate_archive(tmp_path / "c.npz", "npz")


def test_the_number_of_files_has_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LIMITS, "archive-files", LIMITS["archive-files"]._replace(value=10))
    header = npy("{'descr': '<f4', 'fortran_order': False, 'shape': (0,)}")
    write_zip(tmp_path / "a.npz", [Member(f"{index}.npy", header) for index in range(10)])
    validate_archive(tmp_path / "a.npz", "npz")
    write_zip(tmp_path / "b.npz", [Member(f"{index}.npy", header) for index in range(11)])
    with pytest.raises(DataError, match="holds 11 files, more than 10"):
        validate_archive(tmp_path / "b.npz", "npz")


def a_checkpoint(good: Good) -> None:
    validate_archive(good.checkpoint, "checkpoint")


def a_script(good: Good) -> None:
    validate_archive(good.bundle / MODEL_TORCHSCRIPT, "torchscript")


def a_program(good: Good) -> None:
    validate_archive(good.exported, "pt2")


def a_bundle(good: Good) -> None:
    Bundle.open(good.bundle)


#: Limit -> a number that is too small for a valid file, the reader of the file, and the words of the refusal.
LOWERED: dict[str, tuple[int, Callable[[Good], object], str]] = {
    "pickle-bytes": (10, a_checkpoint, "bytes in .*data.pkl', more than 10"),
    "pickle-steps": (10, a_checkpoint, "more than 10 opcodes"),
    "pickle-depth": (1, a_checkpoint, "more than 1 levels of values"),
    "archive-directory": (50, a_checkpoint, "table of contents of"),
    "code-bytes": (50, a_program, "more than 50"),
    "expression": (4, a_program, "longer than 4 characters"),
    "archive-inflated": (9, a_script, "more than 9"),
    "manifest-bytes": (50, a_bundle, "more than 50 bytes of JSON"),
    "json-depth": (2, a_bundle, "more than 2 levels deep"),
    "json-values": (9, a_bundle, "more than 9 values"),
    "sample-elements": (9, a_bundle, "784 elements, more than 9"),
    "bundle-files": (2, a_bundle, "files, more than 2"),
    "bundle-file-bytes": (99, a_bundle, "bytes, more than 99"),
    "name-bytes": (9, a_bundle, "more than 9 bytes"),
    "name-parts": (1, a_bundle, "2 folders deep, more than 1"),
    "onnx-fields": (50, lambda good: read_validated(good.onnx), "more than 50 fields"),
    "onnx-depth": (4, lambda good: read_validated(good.onnx), "more than 4 levels deep"),
    "onnx-expanded": (1, lambda good: read_validated(good.onnx), "nodes, more than 1"),
    "onnx-rank": (3, lambda good: read_validated(good.onnx), "dimensions, more than 3"),
    "safetensors-header": (9, lambda good: read_safetensors(good.bundle / WEIGHTS), "bytes, more than 9"),
    "picture-bytes": (9, lambda good: load_images(good.picture), "the limit is 9"),
}


@pytest.mark.parametrize("name", LOWERED)
def test_each_limit_counts(name: str, good: Good, monkeypatch: pytest.MonkeyPatch) -> None:
    value, read, words = LOWERED[name]
    read(good)
    monkeypatch.setitem(LIMITS, name, LIMITS[name]._replace(value=value))
    with pytest.raises(BadInput, match=words):
        read(good)


def test_a_model_beyond_protobuf_is_not_parsed(good: Good, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LIMITS, "onnx-bytes", LIMITS["onnx-bytes"]._replace(value=50))
    with pytest.raises(Refusal, match="more than 2 GB"):
        validate_onnx(good.onnx.read_bytes())
    with pytest.raises(BundleError, match="more than 2 GB"):
        read_validated(good.onnx)


def test_every_limit_has_a_reason() -> None:
    for name, row in LIMITS.items():
        assert row.value > 0, name
        assert len(row.what) > 10, name
        assert len(row.reason) > 10, name
