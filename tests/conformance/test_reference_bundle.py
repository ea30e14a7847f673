"""The committed bundle: complete, small, free of any machine's paths, and verified again here."""

import json
import re
from pathlib import Path

import onnx
import pytest

import bnexport
from bnexport.bundle import MODEL_ONNX
from bnexport.exporting.triton_config import CONFIG, triton_config
from bnexport.folding.fold_report import FoldReport

BUNDLE = Path(__file__).parents[2] / "models" / "bn_lenet" / "1"


def test_it_is_whole_and_small() -> None:
    bundle = bnexport.Bundle.open(BUNDLE)
    assert bundle.problems() == []
    assert sum(item.stat().st_size for item in BUNDLE.rglob("*") if item.is_file()) < 2_000_000
    assert (BUNDLE.parent / CONFIG).read_text() == triton_config("bn_lenet", bundle.manifest.signature)


def test_it_is_the_chapters_network_folded_and_proven_on_real_images() -> None:
    manifest = bnexport.Bundle.open(BUNDLE).manifest
    assert manifest.dataset == "fashion-mnist"
    assert manifest.labels is not None
    assert manifest.labels[-1] == "ankle boot"
    fold = FoldReport.from_json(manifest.fold)
    assert [row.outcome for row in fold.rows] == ["backward"] * 4
    assert fold.remaining == 0
    assert manifest.verification["passed"] is True
    assert manifest.verification["accuracy"]["n"] == 10_000
    assert manifest.verification["accuracy"]["correct"] > 8_400


def test_its_graph_has_no_shape_nodes() -> None:
    """ONNX Runtime would place them on the CPU, also next to a GPU."""
    graph = onnx.load(BUNDLE / MODEL_ONNX).graph
    first = ["Conv", "Sigmoid", "AveragePool"] * 2
    assert [node.op_type for node in graph.node] == [*first, "Reshape", "Gemm", "Sigmoid", "Gemm", "Sigmoid", "Gemm"]


def test_it_names_no_machine() -> None:
    for path in (item for item in BUNDLE.rglob("*") if item.is_file()):
        content = path.read_bytes()
        for pattern in (rb"/(home|root|tmp|work|Users)/", rb"site-packages"):
            assert not re.search(pattern, content), f"{path.name} holds {pattern!r}"


@pytest.mark.slow
def test_it_verifies_here() -> None:
    report = bnexport.verify(BUNDLE)
    assert report.passed, report.summary()
    assert json.dumps(report.to_json(), allow_nan=False)


@pytest.mark.slow
@pytest.mark.needs("data")
def test_it_verifies_on_all_test_images() -> None:
    report = bnexport.verify(BUNDLE, runtimes=["onnxruntime-cpu"])
    assert report.passed, report.summary()
    images = [row for row in report.rows if row.case == "images" and row.stage == "strict"]
    assert [row.n for row in images] == [10_000]
    flips = images[0].flips
    assert flips is not None
    assert flips.unexplained == 0
    assert flips.certified > 9_900
