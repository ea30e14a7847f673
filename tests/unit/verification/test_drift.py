import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from support.onnx_builder import model_of

from bnexport.bundle import MODEL_ONNX, Bundle, Manifest, seal
from bnexport.errors import BundleError, UsageError
from bnexport.runtimes.base import Runner, RunSettings
from bnexport.runtimes.catalogue import RunnerSpec, runner_spec
from bnexport.runtimes.reference_runner import EmulatedRunner
from bnexport.tensors import Signature, TensorSpec
from bnexport.verification.drift import layer_drift

ORT = runner_spec("onnxruntime-cpu")
STRICT = RunSettings()
FEEDS = {"input": np.random.default_rng(0).random((6, 1, 28, 28), dtype=np.float32)}


def engine(opener: Callable[..., Runner]) -> RunnerSpec:
    return RunnerSpec("odd", "cpu", MODEL_ONNX, opener, lambda _: None)


def emulated(precision: str) -> RunnerSpec:
    """An engine that computes in one precision, whatever its settings are."""
    return engine(lambda bundle, *_: EmulatedRunner(bundle, precision))


def test_a_real_engine_in_strict_float32_stays_with_its_prediction(bundle: Bundle) -> None:
    files = {path: path.stat().st_mtime_ns for path in bundle.path.rglob("*")}
    drift = layer_drift(bundle, ORT, STRICT, FEEDS, precision="float32")
    assert [layer.operator for layer in drift] == ["Conv", "Conv", "Gemm", "Gemm", "Gemm"]
    assert drift[-1].layer == "logits"
    assert not any(layer.left for layer in drift)
    assert all(1e-9 < layer.error < 1e-5 and 1e-9 < layer.predicted < 1e-5 for layer in drift)
    assert {path: path.stat().st_mtime_ns for path in bundle.path.rglob("*")} == files


def test_tf32_left_on_is_seen_from_the_first_layer_that_multiplies(bundle: Bundle) -> None:
    drift = layer_drift(bundle, emulated("tf32"), STRICT, FEEDS, precision="float32")
    assert drift[0].left
    expected = layer_drift(bundle, emulated("tf32"), STRICT, FEEDS, precision="tf32")
    assert not any(layer.left for layer in expected)
    assert [layer.error for layer in expected] == pytest.approx([layer.predicted for layer in expected])


def faulty(layer: str, by: float) -> RunnerSpec:
    """An engine with one wrong kernel, that of ``layer``: it changes the weight in the copy that it gets."""

    def opened(bundle: Bundle, *_: object) -> Runner:
        model = onnx.load(bundle.file(MODEL_ONNX))
        node = next(node for node in model.graph.node if layer in node.output)
        weight = next(item for item in model.graph.initializer if item.name == node.input[1])
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(by), weight.name))
        onnx.save(model, bundle.path / MODEL_ONNX)
        return ORT.open(bundle)

    return engine(opened)


@pytest.mark.parametrize("wrong", range(5))
@pytest.mark.parametrize("by", [1.01, np.nan])
def test_the_first_layer_that_leaves_is_the_faulty_one(bundle: Bundle, wrong: int, by: float) -> None:
    names = [layer.layer for layer in layer_drift(bundle, ORT, STRICT, FEEDS, precision="float32")]
    drift = layer_drift(bundle, faulty(names[wrong], by), STRICT, FEEDS, precision="float32")
    assert next(at for at, layer in enumerate(drift) if layer.left) == wrong
    json.dumps([asdict(layer) for layer in drift], allow_nan=False)


def write(
    folder: Path, nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], shape: tuple[int, ...], **more: object
) -> Bundle:
    dtype = str(more.get("dtype", "float32"))
    element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    onnx.save(model_of(nodes, ["batch", *shape], weights, element=element), folder / MODEL_ONNX)
    out = TensorSpec("y", dtype, tuple(more.get("out", ("batch", 4))))  # type: ignore[arg-type]
    signature = Signature((TensorSpec("x", dtype, ("batch", *shape)),), (out,))
    return seal(folder, Manifest("small", 1, signature, {"source": "test"}))


def test_a_dimension_that_has_the_size_of_the_batch_by_chance_is_not_a_batch(tmp_path: Path) -> None:
    """Four samples, four channels, four pixels: only what one sample more changes is the batch."""
    rng = np.random.default_rng(1)
    nodes = [
        helper.make_node("Conv", ["x", "k"], ["maps"]),
        helper.make_node("Transpose", ["maps"], ["turned"], perm=[1, 0, 2, 3]),  # channels first
        helper.make_node("MatMul", ["turned", "m"], ["products"]),
        helper.make_node("Transpose", ["products"], ["back"], perm=[1, 0, 2, 3]),
        helper.make_node("Flatten", ["back"], ["y"]),
    ]
    weights = {
        "k": rng.standard_normal((4, 4, 1, 1)).astype(np.float32),
        "m": rng.standard_normal((4, 4)).astype(np.float32),
    }
    bundle = write(tmp_path, nodes, weights, (4, 4, 4), out=("batch", 64))
    feeds = {"x": rng.standard_normal((4, 4, 4, 4)).astype(np.float32)}
    drift = layer_drift(bundle, ORT, STRICT, feeds, precision="float32")
    assert [layer.layer for layer in drift] == ["maps", "products"]
    assert not any(layer.left for layer in drift)


def test_a_file_in_half_precision_is_compared_in_its_own(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    weights = {
        "m": rng.standard_normal((8, 16)).astype(np.float16),
        "n": rng.standard_normal((16, 4)).astype(np.float16),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "m"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("MatMul", ["b", "n"], ["y"]),
    ]
    bundle = write(tmp_path, nodes, weights, (8,), dtype="float16")
    feeds = {"x": rng.standard_normal((16, 8)).astype(np.float16)}
    drift = layer_drift(bundle, ORT, STRICT, feeds, precision="float16")
    assert [layer.layer for layer in drift] == ["a", "y"]
    assert not any(layer.left for layer in drift)
    assert all(layer.error > 1e-5 for layer in drift)
    assert any(layer.left for layer in layer_drift(bundle, ORT, STRICT, feeds, precision="float32"))


def test_infinities_of_the_file_itself_are_not_drift(tmp_path: Path) -> None:
    weights = {"m": np.eye(4, dtype=np.float32), "b": np.array([0, np.inf, 0, 0], np.float32)}
    bundle = write(tmp_path, [helper.make_node("Gemm", ["x", "m", "b"], ["y"])], weights, (4,))
    feeds = {"x": np.random.default_rng(3).standard_normal((3, 4)).astype(np.float32)}
    (layer,) = layer_drift(bundle, ORT, STRICT, feeds, precision="float32")
    assert (layer.left, layer.error < 1e-6) == (False, True)


def test_a_layer_whose_emulation_is_exact_may_still_round(tmp_path: Path) -> None:
    bundle = write(tmp_path, [helper.make_node("MatMul", ["x", "m"], ["y"])], {"m": np.eye(4, dtype=np.float32)}, (4,))
    feeds = {"x": np.random.default_rng(3).standard_normal((3, 4)).astype(np.float32)}
    for by, left in ((1 + 1e-6, False), (1 + 1e-4, True)):
        (layer,) = layer_drift(bundle, faulty("y", by), STRICT, feeds, precision="float32")
        assert (layer.predicted, layer.left) == (0, left)


def test_a_model_without_a_linear_layer_has_no_drift(tmp_path: Path) -> None:
    bundle = write(tmp_path, [helper.make_node("Relu", ["x"], ["y"])], {}, (4,))
    assert layer_drift(bundle, ORT, STRICT, {"x": np.ones((2, 4), np.float32)}, precision="float32") == ()


def test_a_fixed_batch_is_run_as_it_is(bundle: Bundle, tmp_path: Path) -> None:
    model = onnx.load(bundle.file(MODEL_ONNX))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 2
    onnx.save(model, tmp_path / MODEL_ONNX)
    declared = bundle.manifest.signature
    fixed = [replace(spec, shape=(2, *spec.shape[1:])) for spec in (*declared.inputs, *declared.outputs)]
    small = seal(tmp_path, replace(bundle.manifest, signature=Signature((fixed[0],), (fixed[1],))))
    drift = layer_drift(small, ORT, STRICT, {"input": FEEDS["input"][:2]}, precision="float32")
    assert len(drift) == 5


def test_runners_that_can_not_be_compared_by_layer_are_refused(bundle: Bundle) -> None:
    with pytest.raises(UsageError, match=r"torchscript-cpu can't be compared: it reads model\.pt"):
        layer_drift(bundle, runner_spec("torchscript-cpu"), STRICT, FEEDS, precision="float32")
    with pytest.raises(UsageError, match="has no tf32 kernels"):
        layer_drift(bundle, ORT, RunSettings(precision="tf32"), FEEDS, precision="tf32")
    with pytest.raises(UsageError, match="'fp8' is not known"):
        layer_drift(bundle, ORT, STRICT, FEEDS, precision="fp8")
    with pytest.raises(BundleError, match="can't be evaluated"):
        layer_drift(bundle, ORT, STRICT, {"input": FEEDS["input"][:, :, :3]}, precision="float32")

    def refuses(_bundle: Bundle, *_rest: object) -> Runner:
        raise BundleError("this engine fuses everything", remedy="Choose another")

    with pytest.raises(BundleError, match="fuses everything"):
        layer_drift(bundle, engine(refuses), STRICT, FEEDS, precision="float32")


def test_the_opener_of_emulations_fits(bundle: Bundle) -> None:
    def opener(bundle: Bundle, _device: str, _module: object, settings: RunSettings) -> EmulatedRunner:
        return EmulatedRunner(bundle, settings.precision)

    spec = RunnerSpec("gpu", "emulated", MODEL_ONNX, opener, lambda _: None, "tf32", ("float32", "tf32"))
    for precision in ("float32", "tf32"):
        drift = layer_drift(bundle, spec, RunSettings(precision=precision), FEEDS, precision=precision)
        assert not any(layer.left for layer in drift)


def test_bfloat16_values_are_left_out_since_no_runner_can_give_them_out(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["c"], to=TensorProto.BFLOAT16),
        helper.make_node("Cast", ["w"], ["v"], to=TensorProto.BFLOAT16),
        helper.make_node("MatMul", ["c", "v"], ["p"]),
        helper.make_node("Cast", ["p"], ["q"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["q", "w"], ["y"]),
    ]
    bundle = write(tmp_path, nodes, {"w": np.eye(4, dtype=np.float32)}, (4,))
    feeds = {"x": np.random.default_rng(4).standard_normal((3, 4)).astype(np.float32)}
    drift = layer_drift(bundle, emulated("bfloat16"), STRICT, feeds, precision="bfloat16")
    assert [layer.layer for layer in drift] == ["y"]
