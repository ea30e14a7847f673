import itertools
from pathlib import Path

import onnx
import pytest
from unit.deploying.conftest import FOREIGN, foreign_bundle, foreign_model

from bnexport.bundle import MODEL_ONNX, Bundle
from bnexport.deploying.releases import (
    DEFAULT_RELEASE,
    ONNX_RUNTIMES,
    TRITON_RELEASES,
    Reads,
    check_loads,
    file_versions,
    release_reads,
)
from bnexport.errors import BundleError, ExportError, UsageError
from bnexport.exporting.export_request import DEFAULT_IR_VERSION, DEFAULT_OPSET


def test_every_release_has_a_known_runtime() -> None:
    for release in TRITON_RELEASES:
        assert release_reads(release) == ONNX_RUNTIMES[TRITON_RELEASES[release].rpartition(".")[0]]
    assert max(TRITON_RELEASES) == DEFAULT_RELEASE


def test_newer_runtimes_read_no_less() -> None:
    for older, newer in itertools.pairwise(ONNX_RUNTIMES.values()):
        assert newer.opset >= older.opset
        assert newer.ir_version >= older.ir_version
    newest_first = [tuple(map(int, TRITON_RELEASES[release].split("."))) for release in sorted(TRITON_RELEASES)[::-1]]
    assert newest_first == sorted(newest_first, reverse=True)


def test_an_operator_set_goes_with_the_file_format_of_its_time() -> None:
    """Each operator set needs an IR version, by onnx's table; a runtime that reads the set must read the version."""
    for version, able in ONNX_RUNTIMES.items():
        needed = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", able.opset)])
        assert needed <= able.ir_version, version


def test_default_exports_load_in_every_release(bundle: Bundle) -> None:
    has = file_versions(bundle.file(MODEL_ONNX))
    assert has == Reads(DEFAULT_OPSET, DEFAULT_IR_VERSION)
    for release in TRITON_RELEASES:
        assert check_loads(bundle.file(MODEL_ONNX), release) == has


@pytest.mark.parametrize(("opset", "ir_version"), [(17, 8), (21, 10), (22, 10), (13, 8)])
def test_versions_are_read_from_the_file(tmp_path: Path, opset: int, ir_version: int) -> None:
    (tmp_path / "m.onnx").write_bytes(foreign_model(FOREIGN, opset=opset, ir_version=ir_version))
    assert file_versions(tmp_path / "m.onnx") == Reads(opset, ir_version)


OLD = "IR version 10, and Triton 23.04 (ONNX Runtime 1.14.1) reads IR versions up to 8"


@pytest.mark.parametrize(
    ("release", "opset", "ir_version", "expected", "option"),
    [
        ("23.04", 17, 10, OLD, "17 --ir-version 8"),
        ("24.04", 21, 10, "operator set 21, and Triton 24.04 (ONNX Runtime 1.17.3)", "--opset 20 --ir-version 9"),
        ("24.05", 22, 10, "operator set 22", "--opset 21 --ir-version 10"),
    ],
)
def test_a_file_that_a_release_can_not_load_is_refused_with_the_options(
    tmp_path: Path, release: str, opset: int, ir_version: int, expected: str, option: str
) -> None:
    bundle = foreign_bundle(tmp_path / "1", opset=opset, ir_version=ir_version)
    with pytest.raises(ExportError) as caught:
        check_loads(bundle.file(MODEL_ONNX), release)
    assert expected in caught.value.message
    assert option in caught.value.remedy
    assert check_loads(bundle.file(MODEL_ONNX), DEFAULT_RELEASE) == Reads(opset, ir_version)


def test_an_unknown_release_and_a_file_that_is_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'24\.5' is not in"):
        release_reads("24.5")
    (tmp_path / "m.onnx").write_bytes(b"\xff\xff")
    with pytest.raises(BundleError):
        file_versions(tmp_path / "m.onnx")
    (tmp_path / "m.onnx").write_bytes(b"")
    with pytest.raises(ExportError, match="does not declare"):
        file_versions(tmp_path / "m.onnx")
