"""Valid files with bytes changed: only bnexport's errors may result, and no reader may crash, hang or write.

Continuous integration runs few examples, always the same. ``BNEXPORT_FUZZ=20000`` runs 20,000 examples, new ones each time.
"""

import io
import json
import os
import selectors
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.hostile import Good, forge, members_of, write_zip
from support.mutations import Change, changes

from bnexport.bundle import MODEL_ONNX, MODEL_TORCHSCRIPT, WEIGHTS, Bundle
from bnexport.errors import BnexportError
from bnexport.files import Refusal
from bnexport.validation import validate_archive
from bnexport.validation.archives import check_header, validate_weights
from bnexport.validation.json_text import parse_json
from bnexport.validation.onnx_file import validate_onnx, validate_tensor
from bnexport.validation.paths import name_problem
from bnexport.validation.safetensors import validate_safetensors

_WANTED = os.environ.get("BNEXPORT_FUZZ")
#: Seconds without an answer after which a reader hangs; an answer takes milliseconds.
_HANG_S = 120


def examples(few: int) -> settings:
    return settings(
        max_examples=int(_WANTED) if _WANTED else few,
        derandomize=_WANTED is None,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of all files; no file "hacked" may appear in it."""
    folder = tmp_path_factory.mktemp("fuzz")
    yield folder
    assert not list(folder.rglob("hacked"))


def only_refused(read: Callable[[], object]) -> None:
    """Any error except a refusal passes and fails the test."""
    message = ""
    try:
        read()
    except (Refusal, BnexportError) as error:
        message = str(error)
    assert "\n" not in message
    assert len(message) < 1500


VALIDATORS: dict[str, tuple[Callable[[bytes], object], Callable[[Good], bytes]]] = {
    "json": (lambda c: parse_json(c, max_bytes=2**23), lambda good: (good.bundle / "manifest.json").read_bytes()),
    "onnx": (validate_onnx, lambda good: (good.bundle / MODEL_ONNX).read_bytes()),
    "onnx, small": (lambda c: validate_onnx(c, inside=False), lambda good: good.onnx.read_bytes()),
    "golden": (validate_tensor, lambda good: (good.bundle / "test_data_set_0/output_0.pb").read_bytes()),
    "safetensors": (lambda c: validate_safetensors(io.BytesIO(c)), lambda good: (good.bundle / WEIGHTS).read_bytes()),
    "weights": (lambda c: validate_weights(io.BytesIO(c)), lambda good: good.checkpoint.read_bytes()),
    "old weights": (lambda c: validate_weights(io.BytesIO(c)), lambda good: good.old_checkpoint.read_bytes()),
    "npy": (lambda c: check_header(c, len(c)), lambda good: _npy()),
    "names": (lambda c: name_problem(c.decode("utf-8", "surrogatepass")), lambda good: b"test_data_set_0/input_0.pb"),
}


def _npy() -> bytes:
    np.save(buffer := io.BytesIO(), np.arange(12, dtype=np.uint8).reshape(3, 4))
    return buffer.getvalue()


@pytest.mark.sampled(3, 1)
@pytest.mark.parametrize("kind", VALIDATORS)
@examples(250)
@given(change=changes(), raw=st.none() | st.binary(max_size=200))
def test_validators_only_refuse(kind: str, change: Change, raw: bytes | None, good: Good) -> None:
    validate, valid = VALIDATORS[kind]
    content = change(valid(good)) if raw is None else raw
    if kind == "names":
        content = content.decode("utf-8", "replace").encode()
    only_refused(lambda: validate(content))


@pytest.mark.parametrize("kind", ["torchscript", "pt2", "checkpoint"])
@examples(120)
@given(change=changes(), which=st.integers(0, 10**6))
def test_archives_whose_files_were_changed(kind: str, change: Change, which: int, good: Good, watched: Path) -> None:
    """The archive itself stays valid, so that the change reaches the readers of the files inside."""
    path = spoiled_archive(kind, change, which, good, watched)
    only_refused(lambda: validate_archive(path, kind))


def spoiled_archive(kind: str, change: Change, which: int, good: Good, folder: Path) -> Path:
    source = {"torchscript": good.bundle / MODEL_TORCHSCRIPT, "pt2": good.exported, "checkpoint": good.checkpoint}[kind]
    members = members_of(source)
    # Files that programs read, and not the numbers of the weights.
    texts = [m for m in members if m.name.endswith(("pkl", ".py", ".json", "model.pt", "version", "byteorder"))]
    member = texts[which % len(texts)]
    member.data = change(member.data)
    member.__post_init__()
    return write_zip(folder / f"model.{'pt2' if kind == 'pt2' else 'pt'}", members)


@examples(120)
@given(change=changes(), raw=st.booleans())
def test_manifests_with_a_digest_that_holds(change: Change, raw: bool, good: Good, watched: Path) -> None:
    folder = watched / "bundle"
    if not folder.exists():
        shutil.copytree(good.bundle, folder)
    content = change((good.bundle / "manifest.json").read_bytes())
    (folder / "manifest.json").write_bytes(content)
    if not raw:
        try:
            if not isinstance(json.loads(content), dict):
                return
            forge(folder, lambda value: value.setdefault("digest", ""))
        except (ValueError, RecursionError):
            return
    only_refused(lambda: read_all(folder))


def read_all(folder: Path) -> None:
    opened = Bundle.open(folder)
    opened.problems()
    opened.golden()


class Child:
    """The process that reads; it is started again after it died."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def ask(self, kind: str, path: Path) -> str:
        """Return the outcome for a file: "opened", "refused ...", "FAULT ...", "crashed ..." or "hangs"."""
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("reader_child.py"))],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=path.parent,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{kind} {path}\n")
        self._process.stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(_HANG_S):
                self.stop()
                return "hangs"
        answer = self._process.stdout.readline().strip()
        return answer or f"crashed with {self._process.wait()}"

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    process = Child()
    yield process
    process.stop()


#: Reader of reader_child.py (the first word) -> the valid file.
NATIVE: dict[str, Callable[[Good], Path]] = {
    "torchscript": lambda good: good.bundle / MODEL_TORCHSCRIPT,
    "onnx": lambda good: good.bundle / MODEL_ONNX,
    "onnx small": lambda good: good.onnx,
    "onnx-parsed": lambda good: good.bundle / MODEL_ONNX,
    "onnx-source": lambda good: good.onnx,
    "safetensors": lambda good: good.bundle / WEIGHTS,
    "checkpoint": lambda good: good.bundle / WEIGHTS,
    "weights": lambda good: good.checkpoint,
    "images": lambda good: good.picture,
}


@pytest.mark.parametrize("kind", [kind for kind in NATIVE if kind not in ("onnx small", "checkpoint")])
def test_engines_open_whole_files(kind: str, good: Good, child: Child) -> None:
    """Left out are an ONNX file with another signature, and weights without a network's name."""
    assert child.ask(kind.split()[0], NATIVE[kind](good)) == "opened"


@pytest.mark.parametrize("kind", NATIVE)
@examples(60)
@given(change=changes())
def test_engines_only_see_what_they_survive(kind: str, change: Change, good: Good, watched: Path, child: Child) -> None:
    valid = NATIVE[kind](good)
    path = watched / f"{kind.split()[0]}{valid.suffix}"
    path.write_bytes(change(valid.read_bytes()))
    answer = child.ask(kind.split()[0], path)
    assert answer.startswith(("opened", "refused")), answer


@pytest.mark.parametrize("kind", ["torchscript", "pt2", "weights"])
def test_engines_open_what_was_not_changed(kind: str, good: Good, watched: Path, child: Child) -> None:
    """Otherwise the tests next to this one would try nothing."""
    path = spoiled_archive("checkpoint" if kind == "weights" else kind, lambda content: content, 0, good, watched)
    assert child.ask(kind, path) == "opened"


@pytest.mark.sampled(3, 1)
@pytest.mark.parametrize("kind", ["torchscript", "pt2", "weights"])
@examples(60)
@given(change=changes(), which=st.integers(0, 10**6))
def test_engines_survive_archives_whose_files_were_changed(
    kind: str, change: Change, which: int, good: Good, watched: Path, child: Child
) -> None:
    path = spoiled_archive("checkpoint" if kind == "weights" else kind, change, which, good, watched)
    answer = child.ask(kind, path)
    assert answer.startswith(("opened", "refused")), answer
