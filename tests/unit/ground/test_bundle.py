import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bnexport import bundle as module
from bnexport.bundle import GOLDEN, MANIFEST, MODEL_ONNX, REPORT, Bundle, Manifest, seal, write_golden
from bnexport.errors import BundleError
from bnexport.tensors import Signature, TensorSpec
from bnexport.validation.limits import LIMITS

SIGNATURE = Signature(
    (TensorSpec("image", "float32", ("batch", 2, 3)), TensorSpec("flag", "bool", ("batch",))),
    (TensorSpec("logits", "float32", ("batch", 4)), TensorSpec("rank", "int64", ("batch",))),
)
INPUTS = {"image": np.arange(12, dtype=np.float32).reshape(2, 2, 3), "flag": np.array([True, False])}
OUTPUTS = {"logits": np.array([[0.1, -0.2, 1 / 3, 4e9]] * 2), "rank": np.array([3, 2**40])}
FILL = Manifest(
    "small",
    3,
    SIGNATURE,
    {"source": "bn_lenet", "options": {"norm": "torch"}},
    dataset="digits",
    preprocessing={"scale": 1 / 255},
    labels=("ä", "b", "c", "d"),
    onnx={"opset": 18, "ir_version": 8},
    environment={"python": "3.11"},
    fold={"rows": []},
    verification={"passed": True},
)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "3"
    folder.mkdir()
    (folder / MODEL_ONNX).write_bytes(b"a model")
    (folder / REPORT).write_text("<html>")
    write_golden(folder, SIGNATURE, INPUTS, OUTPUTS)
    seal(folder, FILL)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(original, tmp_path / "3")
    return tmp_path / "3"


def forge(folder: Path, change: Callable[[dict], object]) -> None:
    """Change the manifest and give it a digest that holds, as an attacker would."""
    value = json.loads((folder / MANIFEST).read_text())
    change(value)
    value.pop("digest")
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    value["digest"] = hashlib.sha256(canonical).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(value))


def refused(folder: Path) -> str:
    with pytest.raises(BundleError) as caught:
        Bundle.open(folder).check()
    assert caught.value.remedy
    assert "\n" not in caught.value.message
    return caught.value.message


def test_round_trip(original: Path) -> None:
    opened = Bundle.open(str(original))
    opened.check()
    assert opened.problems() == []
    assert replace(opened.manifest, files={}) == FILL
    golden = [f"{GOLDEN}/{name}_{index}.pb" for name in ("input", "output") for index in (0, 1)]
    assert sorted(opened.manifest.files) == sorted([MODEL_ONNX, REPORT, *golden])
    assert opened.manifest.files[MODEL_ONNX] == {"sha256": hashlib.sha256(b"a model").hexdigest(), "size": 7}
    assert opened.file(MODEL_ONNX) == original / MODEL_ONNX
    assert list(json.loads((original / MANIFEST).read_text()))[:2] == ["format", "format_version"]


def test_seal_gives_the_bundle_that_open_reads(folder: Path) -> None:
    assert seal(folder, FILL) == Bundle.open(folder)


def test_golden_round_trip(original: Path) -> None:
    inputs, outputs = Bundle.open(original).golden()
    for have, want, specs in ((inputs, INPUTS, SIGNATURE.inputs), (outputs, OUTPUTS, SIGNATURE.outputs)):
        assert list(have) == [spec.name for spec in specs]
        for spec in specs:
            assert have[spec.name].dtype == spec.dtype
            assert np.array_equal(have[spec.name], want[spec.name].astype(spec.dtype))


def test_golden_files_have_the_layout_of_the_onnx_test_runner(original: Path) -> None:
    import onnx

    proto = onnx.TensorProto.FromString((original / GOLDEN / "output_1.pb").read_bytes())
    assert (proto.name, list(proto.dims), proto.data_type) == ("rank", [2], onnx.TensorProto.INT64)


def test_labels_and_the_rest_may_be_absent(folder: Path) -> None:
    seal(folder, Manifest("x", 1, SIGNATURE, {"source": "net.py:make"}))
    manifest = Bundle.open(folder).manifest
    assert (manifest.labels, manifest.dataset, manifest.preprocessing) == (None, None, None)


def test_a_number_that_is_not_json_is_never_written(folder: Path) -> None:
    before = (folder / MANIFEST).read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        seal(folder, replace(FILL, fold={"scale": float("nan")}))
    assert (folder / MANIFEST).read_bytes() == before


def spoil(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def manifest_text(change: Callable[[str], str]) -> Callable[[Path], object]:
    return lambda folder: (folder / MANIFEST).write_text(change((folder / MANIFEST).read_text()))


def link(folder: Path) -> None:
    (folder.parent / "elsewhere").write_bytes((folder / MODEL_ONNX).read_bytes())
    (folder / MODEL_ONNX).unlink()
    (folder / MODEL_ONNX).symlink_to(folder.parent / "elsewhere")


def link_folder(folder: Path) -> None:
    (folder / GOLDEN).rename(folder.parent / "elsewhere")
    (folder / GOLDEN).symlink_to(folder.parent / "elsewhere")


def folder_for_file(folder: Path) -> None:
    (folder / REPORT).unlink()
    (folder / REPORT).mkdir()


def dangling(folder: Path) -> None:
    (folder / "extra").symlink_to(folder / "nowhere")


def hidden(folder: Path) -> None:
    (folder / GOLDEN / ".extra").write_bytes(b"")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "3 does not exist"),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), f"has no {MANIFEST}"),
    "empty manifest": (spoil(MANIFEST, b""), "can't be read: it is not JSON: Expecting value"),
    "half a manifest": (manifest_text(lambda text: text[: len(text) // 2]), "can't be read"),
    "manifest of other bytes": (spoil(MANIFEST, b"\xff\x00\xfe{"), "can't be read"),
    "manifest nested too deep": (spoil(MANIFEST, b"[" * 100_000), "can't be read"),
    "manifest with an endless number": (spoil(MANIFEST, b"1" * 10_000), "can't be read"),
    "manifest of another thing": (spoil(MANIFEST, b'{"format": "other"}'), "is not a bnexport manifest"),
    "manifest that is a list": (spoil(MANIFEST, b"[1]"), "is not a bnexport manifest"),
    "newer format": (
        manifest_text(lambda text: text.replace('"format_version": 1', '"format_version": 2')),
        "version 2",
    ),
    "unknown key": (manifest_text(lambda text: text.replace('"format"', '"odd": 1, "format"')), "unknown keys: odd"),
    "missing key": (lambda folder: forge(folder, lambda value: value.pop("fold")), "missing or unknown keys: fold"),
    "no digest": (manifest_text(lambda text: text.replace(',\n "digest"', ',\n "dig"')), "unknown keys: dig"),
    "other name": (manifest_text(lambda text: text.replace('"small"', '"large"')), "its digest does not match"),
    "wrong bytes": (spoil(MODEL_ONNX, b"A model"), "model.onnx was changed"),
    "fewer bytes": (spoil(MODEL_ONNX, b"a mode"), "model.onnx has 6 bytes, the manifest states 7"),
    "missing file": (lambda folder: (folder / MODEL_ONNX).unlink(), "model.onnx is missing"),
    "folder for a file": (folder_for_file, "report.html is not a plain file"),
    "linked file": (link, "model.onnx is not a plain file"),
    "linked folder": (link_folder, f"{GOLDEN}/input_0.pb is not a plain file"),
    "unlisted file": (spoil("extra.bin", b"x"), "extra.bin is not in the manifest"),
    "unlisted hidden file": (hidden, f"{GOLDEN}/.extra is not in the manifest"),
    "unlisted dangling link": (dangling, "extra is not in the manifest"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(folder: Path, damage: str) -> None:
    change, message = DAMAGE[damage]
    change(folder)
    assert message in refused(folder)


def test_a_manifest_that_is_too_large_is_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LIMITS, "manifest-bytes", LIMITS["manifest-bytes"]._replace(value=100))
    assert "more than 100 bytes of JSON" in refused(folder)


def test_no_byte_of_the_manifest_can_change(folder: Path) -> None:
    """Every position, one bit each: what still reads as the same JSON is the same manifest."""
    file = folder / MANIFEST
    right = file.read_bytes()
    for position in range(len(right)):
        wrong = bytearray(right)
        wrong[position] ^= (1, 4, 32)[position % 3]
        file.write_bytes(wrong)
        try:
            Bundle.open(folder)
        except BundleError:
            continue
        assert json.loads(wrong) == json.loads(right), f"byte {position}: {bytes(wrong[position - 20 : position + 20])}"


@pytest.mark.parametrize(
    "name",
    ["../evil", "a/../../evil", "/etc/passwd", "//x", "..", ".", "", "a//b", "a/./b", "./a", "a\\..\\..\\b", "a/", "a\0b"],
)  # fmt: skip
def test_names_that_leave_the_bundle_are_refused(folder: Path, name: str) -> None:
    (folder.parent / "evil").write_bytes(b"a model")

    def rename(value: dict) -> None:
        value["files"][name] = value["files"].pop(MODEL_ONNX)

    forge(folder, rename)
    assert "is not a plain path inside the bundle" in refused(folder)


@pytest.mark.parametrize(
    "entry",
    [None, [], {}, "x", {"sha256": "0" * 64}, {"sha256": "0" * 63, "size": 7}, {"sha256": "G" * 64, "size": 7},
     {"sha256": 7, "size": 7}, {"sha256": "0" * 64, "size": "7"}, {"sha256": "0" * 64 + "\n", "size": 7}],
)  # fmt: skip
def test_entries_without_hash_and_size_are_refused(folder: Path, entry: object) -> None:
    forge(folder, lambda value: value["files"].update({MODEL_ONNX: entry}))
    assert "can't be read" in refused(folder)


KINDS = {"name": str, "version": int, "network": dict, "onnx": dict, "environment": dict, "fold": dict, "files": dict,
         "verification": dict}  # fmt: skip


@pytest.mark.parametrize("odd", [None, 1, 1.5, "x", [], {}, True])
@pytest.mark.parametrize("key", [*KINDS, "signature", "labels", "dataset", "preprocessing"])
def test_a_forged_value_of_another_kind_is_refused_or_harmless(folder: Path, key: str, odd: object) -> None:
    forge(folder, lambda value: value.update({key: odd}))
    try:
        manifest = Bundle.open(folder).manifest
    except BundleError:
        return
    assert type(odd) is KINDS.get(key) or (key, type(odd)) in {
        ("labels", type(None)), ("labels", list), ("dataset", type(None)), ("dataset", str),
        ("preprocessing", type(None)), ("preprocessing", dict),
    }  # fmt: skip
    assert manifest.to_json()[key] == odd


_Y = {"name": "y", "dtype": "float32", "shape": ["n"]}
_X = {"name": "x", "dtype": "float32", "shape": ["n", "h"]}
SIGNATURES = {
    "no inputs": {"inputs": [], "outputs": [_Y]},
    "unknown element type": {"inputs": [{"name": "x", "dtype": "float8", "shape": ["n"]}], "outputs": []},
    "no shape": {"inputs": [{"name": "x", "dtype": "float32"}], "outputs": []},
    "half a dimension": {"inputs": [_X | {"shape": ["n", 1.5]}], "outputs": [_Y]},
    **{
        f"smallest of {smallest}": {"inputs": [_X | {"smallest": smallest}], "outputs": [_Y]}
        for smallest in ({"w": 3}, {"h": 3.0}, {"h": True}, {"h": -1}, {"h": 2**62}, [3], "h", 3)
    },
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_forged_signature_is_refused(folder: Path, name: str) -> None:
    forge(folder, lambda value: value.update(signature=SIGNATURES[name]))
    assert "can't be read" in refused(folder)


def test_all_problems_are_listed(folder: Path) -> None:
    (folder / MODEL_ONNX).unlink()
    (folder / REPORT).write_text("<HTML>")
    (folder / "a").write_text("")
    assert Bundle.open(folder).problems() == [
        "model.onnx is missing",
        "report.html was changed: its SHA-256 is not the manifest's",
        "a is not in the manifest",
    ]


def refuse(path: Path) -> str:
    raise PermissionError(13, "Permission denied", str(path))


def test_a_file_that_can_not_be_read_is_a_problem(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Bundle.open(folder)
    monkeypatch.setattr(module, "sha256", refuse)
    assert "Permission denied" in (opened.problem(MODEL_ONNX) or "")
    with pytest.raises(BundleError, match="Let this user read it"):  # writing it again would not help
        opened.check()


def test_a_folder_that_can_not_be_entered_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_file", refuse)
    with pytest.raises(BundleError, match="Permission denied"):
        Bundle.open(folder)


def test_file_gives_only_what_is_listed_and_there(folder: Path) -> None:
    opened = Bundle.open(folder)
    (folder / "extra").write_text("x")
    (folder / MODEL_ONNX).unlink()
    for name in ("extra", MODEL_ONNX, MANIFEST, "../3/report.html"):
        with pytest.raises(BundleError, match=f"3 has no {name}"):
            opened.file(name)


@pytest.mark.parametrize("content", [b"", b"\x00\x01 text", b"\x0a\x08"])
def test_a_golden_file_that_is_not_a_tensor(folder: Path, content: bytes) -> None:
    (folder / GOLDEN / "output_0.pb").write_bytes(content)
    opened = seal(folder, FILL)
    opened.check()
    with pytest.raises(BundleError, match=r"output_0\.pb is not a tensor"):
        opened.golden()


def test_a_missing_golden_file(folder: Path) -> None:
    (folder / GOLDEN / "input_1.pb").unlink()
    with pytest.raises(BundleError, match=r"has no test_data_set_0/input_1\.pb"):
        seal(folder, FILL).golden()


def test_golden_vectors_are_read_without_onnx(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    inputs, outputs = Bundle.open(original).golden()
    assert list(inputs) == ["image", "flag"]
    assert outputs["rank"].tolist() == [3, 2**40]


def test_other_paths_get_a_hint(folder: Path) -> None:
    with pytest.raises(BundleError, match="is a file, not a bundle's directory"):
        Bundle.open(folder / REPORT)
    with pytest.raises(BundleError) as caught:
        Bundle.open(folder.parent)
    assert caught.value.remedy == f"Did you mean {folder}?"
    shutil.copytree(folder, folder.parent / "10")
    with pytest.raises(BundleError) as caught:
        Bundle.open(folder.parent)
    assert caught.value.remedy == f"Did you mean {folder.parent / '10'}?"
    with pytest.raises(BundleError, match="not a bundle") as caught:
        Bundle.open(folder / GOLDEN)
    assert "fold-and-export" in caught.value.remedy
