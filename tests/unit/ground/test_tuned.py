"""tuned.json: what is written is read on the same machine, and every other file is refused with a reason."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bnexport import tuned
from bnexport.bundle import MANIFEST, TUNED, Bundle, seal
from bnexport.errors import BundleError
from bnexport.tuned import Choice, Goal, Machine, Tuning, model_hash, read_tuning, tuned_choice, write_tuning
from bnexport.validation.limits import LIMITS

REFERENCE = Path(__file__).parents[3] / "models" / "bn_lenet" / "1"
CHOICE = Choice("onnxruntime-cpu", 32, 1, 2, 0.25, 113_000.5, 17.7)
CHOICES: dict[Goal, Choice] = {"throughput": CHOICE, "latency": replace(CHOICE, batch=1, sessions=1)}


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    shutil.copytree(REFERENCE, tmp_path / "1")
    return Bundle.open(tmp_path / "1")


@pytest.fixture
def tuning(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> Tuning:
    monkeypatch.setattr(tuned, "available_cores", lambda: CHOICE.threads * CHOICE.sessions)
    return Tuning.here(bundle, CHOICES)


def test_a_written_tuning_is_read(bundle: Bundle, tuning: Tuning) -> None:
    assert read_tuning(bundle) is None
    path = write_tuning(bundle.path, tuning)
    assert path == bundle.path / TUNED
    assert read_tuning(bundle.path) == tuning
    assert tuned_choice(bundle, "throughput", CHOICE.runtime) == CHOICE
    assert tuned_choice(bundle, "cpu", CHOICE.runtime) == "tuned.json has no choice for the goal cpu"
    assert str(CHOICE) == "onnxruntime-cpu, 2 sessions x 1 thread, batch 32"
    assert [item.name for item in bundle.path.iterdir() if item.name.endswith(".part")] == []


def test_the_file_is_outside_the_hashes(bundle: Bundle, tuning: Tuning, tmp_path: Path) -> None:
    before = (bundle.path / MANIFEST).read_bytes()
    write_tuning(bundle.path, tuning)
    bundle.check()
    assert bundle.problems() == bundle.unlisted() == []
    assert TUNED not in seal(bundle.path, bundle.manifest).manifest.files
    assert (bundle.path / MANIFEST).read_bytes() == before
    shutil.copytree(bundle.path, tmp_path / "copy")
    assert read_tuning(tmp_path / "copy") == tuning


def test_a_tuned_json_that_is_not_a_plain_file_is_a_foreign_file(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("{}")
    (bundle.path / TUNED).symlink_to(tmp_path / "secret")
    assert bundle.unlisted() == [TUNED]
    assert read_tuning(bundle) == "tuned.json is not a plain file: it is reached through a symbolic link"
    (bundle.path / TUNED).unlink()
    os.link(tmp_path / "secret", bundle.path / TUNED)
    assert bundle.unlisted() == [TUNED]
    assert "hard links" in str(read_tuning(bundle))


@pytest.mark.parametrize("name", ["secret", "nowhere"])
def test_a_link_is_replaced_and_not_followed(bundle: Bundle, tuning: Tuning, tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_text("{}")
    (bundle.path / TUNED).symlink_to(tmp_path / name)
    write_tuning(bundle.path, tuning)
    assert read_tuning(bundle) == tuning
    assert (tmp_path / "secret").read_text() == "{}"
    assert not (tmp_path / "nowhere").exists()


def elsewhere(**changes: Any) -> Callable[[Tuning], Tuning]:
    return lambda tuning: replace(tuning, machine=replace(tuning.machine, **changes))


OTHERS: dict[str, tuple[Callable[[Tuning], Tuning], str]] = {
    "other processor": (elsewhere(cpu="Ä"), "tuned.json was measured on another processor: '\\xc4'; this one is "),
    "other cores": (elsewhere(cores=4096), "tuned.json was measured with 4096 cores; this process has "),
    "other model": (lambda t: replace(t, model_sha256="0" * 64), "tuned.json was measured with another model file"),
    "other engine": (lambda t: replace(t, versions={}), "(none); installed: "),
    "no OpenVINO": (
        lambda t: replace(t, choices={"cpu": replace(CHOICE, runtime="openvino-cpu")}, versions={"openvino": "1"}),
        "tuned.json was measured with openvino 1; installed: ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_a_tuning_from_elsewhere_does_not_apply(name: str, bundle: Bundle, tuning: Tuning) -> None:
    change, words = OTHERS[name]
    write_tuning(bundle.path, change(tuning))
    assert words in str(read_tuning(bundle))
    assert words in str(tuned_choice(bundle, "latency", CHOICE.runtime))


def test_packages_that_no_choice_uses_do_not_matter(bundle: Bundle, tuning: Tuning) -> None:
    write_tuning(bundle.path, replace(tuning, versions=dict(tuning.versions) | {"torch": "0", "onnx": "0"}))
    assert isinstance(read_tuning(bundle), Tuning)


def test_a_container_with_fewer_cores_is_another_machine(
    bundle: Bundle, tuning: Tuning, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tuning(bundle.path, tuning)
    monkeypatch.setattr(tuned, "available_cores", lambda: tuning.machine.cores + 1)
    assert "cores; this process has" in str(read_tuning(bundle))


def within(*path: str, value: Any) -> Callable[[dict[str, Any]], object]:
    def change(document: dict[str, Any]) -> None:
        for key in path[:-1]:
            document = document[key]
        document[path[-1]] = value

    return change


_OF = ("choices", "throughput")
HOSTILE: dict[str, Callable[[dict[str, Any]], object]] = {
    "batch 0": within(*_OF, "batch", value=0),
    "negative threads": within(*_OF, "threads", value=-1),
    "a million sessions": within(*_OF, "sessions", value=10**6),
    "more threads than cores": lambda document: document["choices"]["throughput"].update(
        threads=document["machine"]["cores"] + 1, sessions=1
    ),
    "true sessions": within(*_OF, "sessions", value=True),
    "fractional batch": within(*_OF, "batch", value=1.5),
    "text batch": within(*_OF, "batch", value="32"),
    "negative time": within(*_OF, "p50_ms", value=-0.1),
    "NaN": within(*_OF, "images_per_second", value=float("nan")),
    "infinity": within(*_OF, "images_per_second", value=float("inf")),
    "runtime with escapes": within(*_OF, "runtime", value="onnxruntime-cpu\x1b[2J"),
    "runtime in a list": within(*_OF, "runtime", value=["onnxruntime-cpu"]),
    "extra key": within(*_OF, "environment", value={"LD_PRELOAD": "x"}),
    "missing key": lambda document: document["choices"]["throughput"].pop("batch"),
    "choice is a list": within(*_OF, value=[]),
    "unknown goal": within("choices", "fun", value={}),
    "no choices": within("choices", value={}),
    "choices are a list": within("choices", value=[]),
    "versions are a list": within("versions", value=[]),
    "version is a number": within("versions", "onnx", value=1),
    "machine is missing": lambda document: document.pop("machine"),
    "control characters in the CPU": within("machine", "cpu", value="\x1b[31mred"),
    "a long CPU": within("machine", "cpu", value="x" * 201),
    "negative cores": within("machine", "cores", value=-2),
    "short hash": within("model_sha256", value="00"),
    "other format": within("format", value="bnexport-bundle"),
    "newer version": within("format_version", value=2),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_content_does_not_apply(name: str, bundle: Bundle, tuning: Tuning) -> None:
    document = json.loads(json.dumps(tuning.to_json()))
    HOSTILE[name](document)
    (bundle.path / TUNED).write_text(json.dumps(document))
    reason = read_tuning(bundle)
    assert isinstance(reason, str)
    assert reason.startswith("tuned.json ")
    assert reason.isprintable()
    bundle.check()


DAMAGED = {
    "empty": b"",
    "half": b'{"format": "bnexport-tuning", ',
    "not UTF-8": b"\xff\xfe{}",
    "a list": b"[]",
    "a text": b'"x"',
    "null": b"null",
    "deep": b"[" * 100_000,
    "huge": b'{"a": "' + b"x" * 10**6 + b'"}',
    "many digits": b'{"format": ' + b"9" * 5000 + b"}",
    "twice": b'{"format": 1, "format": 2}',
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_refused(name: str, bundle: Bundle) -> None:
    (bundle.path / TUNED).write_bytes(DAMAGED[name])
    assert str(read_tuning(bundle)).startswith("tuned.json ")


def test_a_file_that_reads_back_as_damaged_is_not_written(bundle: Bundle, tuning: Tuning) -> None:
    with pytest.raises(BundleError, match="is not written, because it has 0 as batch, which must be a whole"):
        write_tuning(bundle.path, replace(tuning, choices={"latency": replace(CHOICE, batch=0)}))
    assert not (bundle.path / TUNED).exists()


def test_a_tuning_belongs_to_a_model_file(bundle: Bundle) -> None:
    assert model_hash(bundle) == bundle.manifest.files["model.onnx"]["sha256"]
    bare = Bundle(bundle.path, replace(bundle.manifest, files={}))
    with pytest.raises(BundleError, match="has no model file"):
        model_hash(bare)
    assert Machine.here() == Machine.here()


def test_the_limit_on_its_size_counts(bundle: Bundle, tuning: Tuning, monkeypatch: pytest.MonkeyPatch) -> None:
    size = write_tuning(bundle.path, tuning).stat().st_size
    monkeypatch.setitem(LIMITS, "tuning-bytes", LIMITS["tuning-bytes"]._replace(value=size))
    assert read_tuning(bundle) == tuning
    monkeypatch.setitem(LIMITS, "tuning-bytes", LIMITS["tuning-bytes"]._replace(value=size - 1))
    assert read_tuning(bundle) == f"tuned.json has more than {size - 1} bytes of JSON"
