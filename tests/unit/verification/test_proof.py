from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from support.bundles import exact_answer
from support.onnx_builder import model_of

from bnexport.bundle import MODEL_ONNX, Bundle
from bnexport.errors import BundleError, ProofError
from bnexport.onnx_files import float64
from bnexport.onnx_files.float64 import Float64Evaluator, widen
from bnexport.onnx_files.models import declaration_problem, multiplications, read_model, trained_tensors
from bnexport.onnx_files.operators import better_operators
from bnexport.tensors import Signature
from bnexport.verification.metrics import Measurement, measure
from bnexport.verification.tolerances import TOLERANCES

X = np.random.default_rng(0).random((5, 1, 28, 28), dtype=np.float32)


def source_of(nodes: list[onnx.NodeProto], *size: int, opset: int = 18, **stored: np.ndarray) -> bytes:
    return model_of(nodes, ["batch", 3, *size], stored, opset=opset).SerializeToString()


def proved(source: bytes | Path, feeds: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> Measurement:
    """As the stage "file-proof" measures it."""
    return measure(Float64Evaluator(source).evaluate(feeds), expected, bound=TOLERANCES["file-proof"].bound)


def test_the_written_file_is_the_original_but_for_one_rounding(bundle: Bundle) -> None:
    error = proved(bundle.file(MODEL_ONNX), {"input": X}, {"logits": exact_answer(X)}).error
    assert 1e-9 < error < 2e-7
    assert proved(bundle.file(MODEL_ONNX).read_bytes(), {"input": X}, {"logits": exact_answer(X)}).error == error


def test_one_changed_weight_is_seen(bundle: Bundle) -> None:
    model = onnx.load(bundle.file(MODEL_ONNX))
    tensor = next(item for item in model.graph.initializer if item.name == "fc1.bias")
    array = numpy_helper.to_array(tensor).copy()
    array[7] += 0.01
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    assert proved(model.SerializeToString(), {"input": X}, {"logits": exact_answer(X)}).error > 1e-6


def test_chunks_do_not_change_the_answer(bundle: Bundle) -> None:
    whole = Float64Evaluator(bundle.file(MODEL_ONNX), chunk=100).evaluate({"input": X})["logits"]
    assert whole.dtype == np.float64
    np.testing.assert_allclose(
        Float64Evaluator(bundle.file(MODEL_ONNX), chunk=2).evaluate({"input": X})["logits"], whole, rtol=1e-13
    )


def test_onnxs_own_average_pool_agrees(bundle: Bundle) -> None:
    mine = Float64Evaluator(bundle.file(MODEL_ONNX)).evaluate({"input": X})["logits"]
    theirs = ReferenceEvaluator(widen(read_model(bundle.file(MODEL_ONNX)))).run(None, {"input": X.astype(np.float64)})[
        0
    ]
    np.testing.assert_allclose(mine, theirs, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    "attributes",
    [
        {"strides": [2, 2]},
        {"strides": [1, 2], "pads": [0, 0, 0, 0], "auto_pad": "VALID"},
        {},
        {"pads": [1, 1, 1, 1], "strides": [2, 2]},
        {"pads": [1, 0, 0, 1], "strides": [2, 2], "count_include_pad": 1},
        {"ceil_mode": 1, "strides": [2, 2]},
        {"dilations": [2, 2]},
    ],
)
def test_average_pooling_is_replaced_and_right(attributes: dict[str, object]) -> None:
    node = helper.make_node("AveragePool", ["x"], ["y"], kernel_shape=[2, 3], **attributes)
    source = source_of([node], 6, 6, opset=19)
    assert better_operators(read_model(source)) is not None
    x = np.random.default_rng(1).standard_normal((2, 3, 6, 6))
    # onnx's own operator is wrong where the windows are rounded up and one hangs out; onnxruntime is not.
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    expected = session.run(None, {"x": x.astype(np.float32)})[0]
    np.testing.assert_allclose(Float64Evaluator(source).evaluate({"x": x})["y"], expected, rtol=1e-5, atol=1e-6)


def test_every_kind_of_float_in_the_file_is_widened() -> None:
    third = np.float32(1 / 3)
    nodes = [
        helper.make_node("Cast", ["x"], ["a"], to=TensorProto.FLOAT),
        helper.make_node("Constant", [], ["b"], value_float=float(third)),
        helper.make_node("Constant", [], ["c"], value_floats=[float(third)] * 3),
        helper.make_node("Constant", [], ["d"], value=numpy_helper.from_array(np.array([1, 2, 3], np.float32))),
        helper.make_node("Constant", [], ["size"], value=numpy_helper.from_array(np.array([1, 3], np.int64))),
        helper.make_node(
            "ConstantOfShape", ["size"], ["e"], value=numpy_helper.from_array(np.array([0.1], np.float32))
        ),
        helper.make_node("Sum", ["a", "b", "c", "d", "e", "half"], ["f"]),
        helper.make_node("Mul", ["f", "third"], ["y"]),
    ]
    source = source_of(nodes, half=np.array([0.1], np.float16), third=np.array([third], np.float32))
    x = np.random.default_rng(2).standard_normal((4, 3)).astype(np.float32)
    wide = [np.float64(value) for value in (third, np.float32(0.1), np.float16(0.1))]
    expected = (x.astype(np.float64) + 2 * wide[0] + np.array([1, 2, 3]) + wide[1] + wide[2]) * wide[0]
    result = Float64Evaluator(source).evaluate({"x": x})["y"]
    assert result.dtype == np.float64
    np.testing.assert_allclose(result, expected, rtol=1e-15, atol=1e-15)


def test_floats_inside_subgraphs_are_widened() -> None:
    branches = {}
    for name, value in (("then_branch", 0.1), ("else_branch", 0.2)):
        constant = helper.make_node(
            "Constant", [], [name], value=numpy_helper.from_array(np.array([value], np.float32))
        )
        output = helper.make_tensor_value_info(name, TensorProto.FLOAT, [1])
        branches[name] = helper.make_graph([constant], name, [], [output])
    nodes = [helper.make_node("If", ["yes"], ["a"], **branches), helper.make_node("Add", ["x", "a"], ["y"])]
    source = source_of(nodes, yes=np.array(True))
    result = Float64Evaluator(source).evaluate({"x": np.zeros((2, 3), np.float32)})["y"]
    assert result.dtype == np.float64
    assert result[0, 0] == np.float64(np.float32(0.1))


def test_an_evaluation_that_leaves_float64_proves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_of([helper.make_node("Cast", ["x"], ["a"], to=1), helper.make_node("Identity", ["a"], ["y"])])
    monkeypatch.setattr(float64, "_TYPE_ATTRIBUTES", ())  # as an operator would that rounds by itself
    with pytest.raises(ProofError, match="left float64 at 'a'"):
        Float64Evaluator(source).evaluate({"x": np.ones((2, 3), np.float32)})


def test_outputs_that_cannot_be_compared_prove_nothing(bundle: Bundle) -> None:
    assert "not finite" in proved(bundle.file(MODEL_ONNX), {"input": X}, {"logits": exact_answer(X) * np.nan}).problem
    assert "'other' is missing" in proved(bundle.file(MODEL_ONNX), {"input": X}, {"other": exact_answer(X)}).problem


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "without a single node"),
        (b"x" * 64, "without a single node|not an ONNX model"),
        ("half", "not an ONNX model"),
    ],
)
def test_a_file_that_is_not_a_model_is_refused(bundle: Bundle, content: bytes | str, words: str) -> None:
    whole = bundle.file(MODEL_ONNX).read_bytes()
    with pytest.raises(BundleError, match=words):
        Float64Evaluator(whole[: len(whole) // 2] if isinstance(content, str) else content)


def test_a_missing_file_and_a_file_with_weights_elsewhere_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="not an ONNX model"):
        read_model(tmp_path / "none.onnx")
    model = onnx.load(bundle.file(MODEL_ONNX))
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=16)
    with pytest.raises(BundleError, match="in another file"):
        read_model(tmp_path / "m.onnx")


def test_an_unknown_operator_is_one_sentence() -> None:
    source = source_of([helper.make_node("Teleport", ["x"], ["y"])])
    with pytest.raises(BundleError, match="can't be evaluated in float64") as caught:
        Float64Evaluator(source).evaluate({"x": np.ones((2, 3), np.float32)})
    assert "\n" not in caught.value.message


def test_the_work_of_a_lenet_is_counted(bundle: Bundle) -> None:
    model = read_model(bundle.file(MODEL_ONNX))
    assert multiplications(model) == 6 * 25 * 24 * 24 + 16 * 6 * 25 * 8 * 8 + 256 * 120 + 120 * 84 + 84 * 10
    assert {tensor.name for tensor in trained_tensors(model)} >= {"conv1.weight", "conv1.bias", "fc3.bias"}
    assert len(trained_tensors(model)) == 10


def test_the_declarations_of_the_file_are_compared_with_the_manifest(bundle: Bundle) -> None:
    manifest, model = bundle.manifest, read_model(bundle.file(MODEL_ONNX))
    assert declaration_problem(model, manifest) is None
    (spec,), (out,) = manifest.signature.inputs, manifest.signature.outputs

    def refusal(**changes: object) -> str:
        return declaration_problem(model, replace(manifest, **changes)) or ""

    assert "has the inputs ['input']" in refusal(signature=Signature((replace(spec, name="x"),), (out,)))
    assert "has the outputs ['logits']" in refusal(signature=Signature((spec,), (out, out)))
    assert "float32, the manifest states float16" in refusal(
        signature=Signature((replace(spec, dtype="float16"),), (out,))
    )
    assert "states 3x1x28x28" in refusal(signature=Signature((replace(spec, shape=(3, 1, 28, 28)),), (out,)))
    assert "states batchx9" in refusal(signature=Signature((spec,), (replace(out, shape=("batch", 9)),)))
    assert refusal(onnx={"opset": 17}) == "the file has opset 18, the manifest states 17"
    assert refusal(onnx={"ir_version": 9}) == "the file has ir_version 8, the manifest states 9"
    assert refusal(onnx={}) == ""
    for key, text in manifest.model_facts().items():  # what an export repeats in the file itself
        model.metadata_props.add(key=key, value=text)
    assert refusal() == ""
    assert "metadata 'bnexport.labels'" in refusal(labels=(*manifest.labels[1:], manifest.labels[0]))
    assert "metadata 'bnexport.preprocessing'" in refusal(preprocessing={**manifest.preprocessing, "scale": 1.0})
    assert "metadata 'bnexport.name'" in refusal(name="another")
    # A file may leave an output's size open, not an input's, and must leave the batch open.
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_param = "classes"
    assert declaration_problem(model, manifest) is None
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"
    assert "has shape" in (declaration_problem(model, manifest) or "")
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 28
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    assert "has shape 2x1x28x28" in (declaration_problem(model, manifest) or "")
