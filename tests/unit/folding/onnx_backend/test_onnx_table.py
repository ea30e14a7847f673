"""Folding of ONNX files: outcomes, exactness, stable names, idempotence, one row for each BatchNormalization."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto
from onnx_cases import Case
from onnx_table import CASES

import bnexport
from bnexport.folding.onnx_backend.onnx_proof import evaluator, example_feeds, run

#: Sums of convolutions of one value, which become one convolution.
_MERGED = ("rep-vgg", "add", "sub", "add-norm-below", "sum-of-three")
_EACH = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])


def text(model: ModelProto) -> bytes:
    return model.SerializeToString(deterministic=True)


def batch_norms(model: ModelProto) -> list[str]:
    """Counted by this test's own walk over every graph and function."""

    def walk(nodes: object) -> list[str]:
        found = []
        for node in nodes:  # type: ignore[attr-defined]
            found += [node.name] if node.op_type == "BatchNormalization" else []
            for attribute in node.attribute:
                for graph in (attribute.g, *attribute.graphs):
                    found += walk(graph.node)
        return found

    return walk(model.graph.node) + [name for function in model.functions for name in walk(function.node)]


def distance(left: list[np.ndarray], right: list[np.ndarray]) -> float:
    return max(float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)) for a, b in zip(left, right, strict=True))


@_EACH
def test_outcomes_and_exactness(case: Case) -> None:
    model = case.model()
    untouched = text(model)
    result = bnexport.fold_onnx(model, **case.fold)
    report, folded = result.report, result.model
    assert text(model) == untouched, "the source was changed"
    assert [(row.module, row.outcome) for row in report.rows] == list(case.outcomes), [
        row.reason for row in report.rows
    ]
    named = [row.module for row in report.rows if row.kind == "BatchNormalization"]
    assert sorted(named) == sorted(batch_norms(model)), "each exactly once"
    assert report.remaining == len(batch_norms(folded))
    assert not report.warnings
    assert report.error <= 1e-12
    for row in report.rows:
        assert row.gone == (row.reason == ""), row
    if case.because:
        assert case.because.lower() in next(row.reason for row in report.rows if not row.gone).lower()
    onnx.checker.check_model(folded, full_check=True)
    assert (folded.ir_version, folded.opset_import) == (model.ir_version, model.opset_import)
    (feeds,) = example_feeds(model, 3)
    before, after = run(evaluator(model), feeds), run(evaluator(folded), feeds)
    half = case.options.get("dtype") == "float16"
    assert distance(after, before) <= (2e-2 if half else 1e-5)


@_EACH
def test_names_are_stable_and_folding_again_changes_nothing(case: Case) -> None:
    model = case.model()
    result = bnexport.fold_onnx(model, **case.fold)
    folded = result.model
    for group in ("input", "output"):
        before, after = ([item.name for item in getattr(m.graph, group)] for m in (model, folded))
        stored = {tensor.name for tensor in model.graph.initializer} | {
            tensor.name for tensor in folded.graph.initializer
        }
        assert [name for name in after if name not in stored] == [name for name in before if name not in stored]
    kept = {node.name for node in folded.graph.node} & {node.name for node in model.graph.node}
    assert [n.name for n in folded.graph.node if n.name in kept] == [n.name for n in model.graph.node if n.name in kept]
    layers = {node.name for node in model.graph.node if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul")}
    if case.name not in _MERGED:
        assert layers <= kept
    read = {name for node in folded.graph.node for name in node.input}
    inside = text(folded)
    for tensor in folded.graph.initializer:
        assert tensor.name in read or inside.count(tensor.name.encode()) > 1, f"{tensor.name} is left over"
    again = bnexport.fold_onnx(folded, **case.fold)
    assert not again.changed
    assert text(again.model) == text(folded)
    assert again.report.folded == 0
    assert again.report.error == 0.0


@_EACH
def test_onnxruntime_agrees(case: Case) -> None:
    if not case.runs:
        pytest.skip("onnxruntime has no kernel for it, or its numbers are not finite")
    model = case.model()
    folded = bnexport.fold_onnx(model, prove=False, **case.fold).model
    (feeds,) = example_feeds(model, 4)
    dtype = case.options.get("dtype", "float32")
    narrow = {name: array.astype(dtype) if array.dtype.kind == "f" else array for name, array in feeds.items()}
    before, after = ([array.astype(np.float64) for array in session(m).run(None, narrow)] for m in (model, folded))
    assert distance(after, before) <= {"float16": 5e-2, "float32": 1e-4, "float64": 1e-10}[dtype]


def session(model: ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
