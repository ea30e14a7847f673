import copy
import dataclasses
import warnings

import numpy as np
import onnx
import pytest
import torch
from cases import CASES
from onnx import TensorProto, helper, numpy_helper
from support.bundles import exact_answer, network
from support.onnx_builder import model_of

import bnexport
from bnexport.bundle import MODEL_ONNX, Bundle
from bnexport.errors import ProofError
from bnexport.onnx_files.emulation import PRECISIONS, Emulator
from bnexport.onnx_files.float64 import Float64Evaluator
from bnexport.onnx_files.models import read_model
from bnexport.quantization.integer_emulation import EXACT, SATURATING
from bnexport.runtimes.catalogue import runner_spec
from bnexport.verification import prediction
from bnexport.verification.budget import Budget
from bnexport.verification.forecast import Forecast
from bnexport.verification.inputs import Batch, Case
from bnexport.verification.prediction import _COARSENESS, Detected, compatible, detect, rounding_noise

X = np.random.default_rng(0).random((64, 1, 28, 28), dtype=np.float32)
FEEDS = {"input": X}
Outputs = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def exact(bundle: Bundle) -> Outputs:
    return Float64Evaluator(bundle.file(MODEL_ONNX)).evaluate(FEEDS)


@pytest.fixture(scope="module")
def emulated(bundle: Bundle) -> dict[str, Outputs]:
    return {name: Emulator(bundle.file(MODEL_ONNX), name).evaluate(FEEDS) for name in PRECISIONS}


def noisy(exact: Outputs, emulated: dict[str, Outputs], name: str, times: float = 1.0) -> Outputs:
    """The error of a precision, larger or smaller."""
    return {key: values + times * (emulated[name][key] - values) for key, values in exact.items()}


@pytest.mark.parametrize("name", list(PRECISIONS))
def test_every_precision_is_distinguished_from_every_other(
    exact: Outputs, emulated: dict[str, Outputs], name: str
) -> None:
    # Another order of sums: the noise of float32 on top, in another direction.
    rng = np.random.default_rng(1)
    given = {
        key: values + rng.normal(0, 1e-7, values.shape) * np.abs(values).max() for key, values in emulated[name].items()
    }
    seen = detect(given, exact, emulated)
    assert seen.precision == name
    if name != "float32":
        assert seen.cosine is not None
        assert seen.cosine > 0.99
    assert PRECISIONS[name].words in seen.sentence
    assert compatible(name, seen)


@pytest.mark.parametrize("name", ["tf32", "bfloat16", "float16"])
def test_the_noise_of_functions_hides_no_coarser_kernel(
    exact: Outputs, emulated: dict[str, Outputs], name: str
) -> None:
    functions = 10 * prediction._rms(prediction._difference(emulated[name], exact))
    assert name in detect(emulated[name], exact, emulated, functions=functions).precision


def test_real_float32_engines_are_float32(bundle: Bundle, exact: Outputs, emulated: dict[str, Outputs]) -> None:
    for runtime in ("onnxruntime-cpu", "torchscript-cpu"):
        with runner_spec(runtime).open(bundle) as runner:
            seen = detect(runner.run(FEEDS), exact, emulated)
        assert (seen.precision, seen.coarseness) == ("float32", 0)


#: Models whose operators torch rounds once each, as the emulation does.
HALF = ("conv2d", "conv1d", "conv-groups", "conv-stride", "linear", "two-in-a-row", "flatten-between", "residual")


@pytest.mark.sampled(3)
@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", [name for name in HALF if any(case.name == name for case in CASES)])
def test_real_half_precision_is_predicted_and_recognised(name: str, precision: str) -> None:
    """torch on a CPU really computes in these: it is the one coarse precision that every machine has."""
    case = next(case for case in CASES if case.name == name)
    inputs = case.inputs(batch=64)
    folded = bnexport.fold(case.model(), inputs).model
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch can't find out the training mode of a traced graph
        program = torch.onnx.export(folded, inputs, dynamo=True, verbose=False, external_data=False, optimize=False)
    source = program.model_proto.SerializeToString()
    evaluator = Float64Evaluator(source)
    feeds = {key: tensor.numpy() for key, tensor in zip(evaluator.inputs, inputs, strict=True)}
    exact = evaluator.evaluate(feeds)
    names = ("float32", "tf32-convolutions", "tf32", "float16", "bfloat16")
    emulated = {key: Emulator(source, key).evaluate(feeds) for key in names}
    kind = getattr(torch, precision)
    with torch.no_grad():
        outputs = copy.deepcopy(folded).to(kind)(*(tensor.to(kind) for tensor in inputs))
    outputs = outputs if isinstance(outputs, tuple | list) else [outputs]
    given = {key: tensor.double().numpy() for key, tensor in zip(exact, outputs, strict=True)}
    seen = detect(given, exact, emulated)
    assert seen.precision == precision
    for key, values in exact.items():
        ratio = np.abs(given[key] - values).max() / np.abs(emulated[precision][key] - values).max()
        assert 1 / 3 < ratio < 3


def fault(source: bytes, name: str, factor: float, *, seed: int = 2) -> bytes:
    """Return the model with one weight tensor multiplied, channel by channel, by numbers around 1."""
    model = onnx.load_model_from_string(source)
    tensor = next(item for item in model.graph.initializer if item.name == name)
    array = numpy_helper.to_array(tensor).astype(np.float64)
    channels = 1 + factor * np.random.default_rng(seed).uniform(-1, 1, (len(array), *[1] * (array.ndim - 1)))
    tensor.CopyFrom(numpy_helper.from_array((array * channels).astype(np.float32), name))
    return model.SerializeToString()


@pytest.mark.parametrize("factor", [1e-3, 1e-2, 1e-1])
def test_a_fault_is_the_error_of_no_precision(
    bundle: Bundle, exact: Outputs, emulated: dict[str, Outputs], factor: float
) -> None:
    """Smaller than TF32's noise, as large, and larger: size alone would take some of them for a precision."""
    source = fault(bundle.file(MODEL_ONNX).read_bytes(), "conv2.weight", factor)
    seen = detect(Emulator(source, "float32").evaluate(FEEDS), exact, emulated)
    assert seen.precision == "none"
    assert seen.cosine is not None
    assert abs(seen.cosine) < 0.25
    assert " x the noise of " in seen.sentence
    assert not compatible("float32", seen)


@pytest.mark.parametrize("factor", [1e-3, 1e-2, 1e-1])
def test_a_fault_is_never_the_error_of_float32(
    bundle: Bundle, exact: Outputs, emulated: dict[str, Outputs], factor: float
) -> None:
    """Smaller than TF32's noise, as large, and larger.

    One channel with a tiny variance dominates every error of this network. A fault may therefore have the direction of a
    coarser precision by chance. None of them looks like float32.
    """
    source = bundle.file(MODEL_ONNX).read_bytes()
    for seed in range(6):
        changed = fault(source, "conv2.weight", factor, seed=seed)
        seen = detect(Emulator(changed, "float32").evaluate(FEEDS), exact, emulated)
        assert not compatible("float32", seen)
        assert "float32" not in seen.precision
        if seen.precision in ("none", "undecided"):
            assert " x the noise of " in seen.sentence


def test_a_large_fault_is_not_compatible_with_tf32(
    bundle: Bundle, exact: Outputs, emulated: dict[str, Outputs]
) -> None:
    source = fault(bundle.file(MODEL_ONNX).read_bytes(), "conv2.weight", 0.3)
    seen = detect(Emulator(source, "tf32").evaluate(FEEDS), exact, emulated)
    assert seen.precision == "none"
    assert not compatible("tf32", seen)


def test_the_right_direction_alone_is_not_enough(exact: Outputs, emulated: dict[str, Outputs]) -> None:
    assert detect(noisy(exact, emulated, "tf32", 2), exact, emulated).precision == "tf32"
    assert detect(noisy(exact, emulated, "tf32", 30), exact, emulated).precision == "none"
    assert detect(noisy(exact, emulated, "tf32", -1), exact, emulated).precision == "none"


def test_an_error_of_the_right_size_that_points_half_aside_is_undecided(
    exact: Outputs, emulated: dict[str, Outputs]
) -> None:
    rng = np.random.default_rng(8)
    own = (emulated["bfloat16"]["logits"] - exact["logits"]).ravel()
    given = exact["logits"] + (0.35 * own + 0.9 * rng.permutation(own)).reshape(exact["logits"].shape)
    seen = detect({"logits": given}, exact, emulated)
    assert seen.precision == "undecided"
    assert "either a precision or a fault makes the error" in seen.sentence
    assert compatible("bfloat16", seen)
    assert not compatible("tf32", seen)


def test_indistinguishable_precisions_are_all_named() -> None:
    """A network of convolutions alone: TF32 in convolutions is TF32."""
    w = np.random.default_rng(3).standard_normal((6, 3, 3, 3)).astype(np.float32)
    source = one_node(helper.make_node("Conv", ["x", "w"], ["y"]), w, ["n", 3, 8, 8])
    feeds = {"x": np.random.default_rng(4).standard_normal((16, 3, 8, 8)).astype(np.float32)}
    exact = Float64Evaluator(source).evaluate(feeds)
    emulated = {name: Emulator(source, name).evaluate(feeds) for name in ("float32", "tf32", "tf32-convolutions")}
    seen = detect(emulated["tf32"], exact, emulated)
    assert seen.precision == "tf32 or tf32-convolutions"
    assert "can't be distinguished here" in seen.sentence
    assert compatible("tf32", seen)
    assert not compatible("float32", seen)


def test_other_weights_are_judged_by_size(exact: Outputs, emulated: dict[str, Outputs]) -> None:
    """The unfolded network rounds other numbers: the same noise in another direction."""
    rng = np.random.default_rng(5)
    other = {
        key: values + rng.permutation((emulated["tf32"][key] - values).ravel()).reshape(values.shape)
        for key, values in exact.items()
    }
    assert detect(other, exact, emulated).precision == "none"
    seen = detect(other, exact, emulated, same_weights=False)
    assert seen.precision == "tf32"
    assert seen.cosine is None
    assert "float16" in seen.sentence  # its error is as large
    assert compatible("tf32", seen)
    assert not compatible("float32", seen)
    far = noisy(exact, emulated, "bfloat16", 20)
    assert detect(far, exact, emulated, same_weights=False).precision == "none"
    assert detect(exact, exact, emulated, same_weights=False).precision == "float32"


def test_the_unfolded_networks_real_float32_is_float32(bundle: Bundle, emulated: dict[str, Outputs]) -> None:
    with torch.no_grad():
        given = {"logits": network()(torch.from_numpy(X)).numpy()}
    assert detect(given, {"logits": exact_answer(X)}, emulated, same_weights=False).precision == "float32"


def test_values_that_are_not_finite_are_of_no_precision(exact: Outputs, emulated: dict[str, Outputs]) -> None:
    spoilt = {key: values.copy() for key, values in exact.items()}
    spoilt["logits"][3, 4] = np.inf
    seen = detect(spoilt, exact, emulated)
    assert seen.precision == "none"
    assert "not all finite" in seen.sentence
    assert not any(compatible(requested, seen) for requested in PRECISIONS)


def test_a_precision_that_overflows_is_left_out(exact: Outputs, emulated: dict[str, Outputs]) -> None:
    some = emulated | {"float16": {"logits": exact["logits"] * np.inf}}
    assert detect(emulated["tf32"], exact, some).precision == "tf32"
    assert detect(exact, exact, {"float32": emulated["float32"]}).precision == "float32"
    alone = detect(emulated["bfloat16"], exact, {"float32": emulated["float32"]})
    assert (alone.precision, compatible("bfloat16", alone)) == ("none", False)


def test_where_tf32_hardly_differs_a_noisy_float32_is_still_float32() -> None:
    """No product: TF32 is float32 here, and an engine that sums in another order makes several times numpy's error."""
    rng = np.random.default_rng(6)
    exact = {"y": rng.standard_normal((50, 4))}
    error = rng.normal(0, 1e-7, (50, 4))
    emulated = {name: {"y": exact["y"] + error} for name in ("float32", "tf32")}
    assert detect({"y": exact["y"] + 5 * rng.permutation(error)}, exact, emulated).precision == "float32"
    assert detect({"y": exact["y"] + 50 * rng.permutation(error)}, exact, emulated).precision == "none"


@pytest.mark.parametrize(
    ("requested", "found", "fits"),
    [
        ("float32", "float32", True),
        ("float32", "tf32-convolutions", False),
        ("float32", "tf32", False),
        ("tf32", "float32", True),  # the report states that TF32 was not in effect
        ("tf32", "tf32-convolutions", True),
        ("tf32", "tf32-cut", True),
        ("tf32", "float16", False),
        ("tf32", "bfloat16", False),
        ("float16", "tf32", True),
        ("float16", "bfloat16", False),
        ("bfloat16", "float16", True),
        ("bfloat16", "bfloat16-products", True),
    ],
)
def test_the_requested_precision_must_not_be_finer(requested: str, found: str, fits: bool) -> None:
    assert compatible(requested, Detected(found, None, _COARSENESS[found], "")) == fits


def test_every_precision_has_a_rank() -> None:
    assert set(_COARSENESS) == {*PRECISIONS, EXACT, SATURATING}
    assert dataclasses.is_dataclass(Detected)


def one_node(
    node: onnx.NodeProto, weight: np.ndarray, shape: list[object], element: int = TensorProto.FLOAT
) -> onnx.ModelProto:
    model = model_of([node], shape, {"w": weight}, element=element)
    if element == TensorProto.BFLOAT16:
        narrow = helper.make_tensor("w", element, weight.shape, weight.ravel().tolist())
        model.graph.initializer[0].CopyFrom(narrow)
    return model


@pytest.mark.parametrize(
    ("element", "dtype", "unit"),
    [
        (TensorProto.FLOAT, np.float32, 2.0**-23),
        (TensorProto.FLOAT16, np.float16, 2.0**-10),
        (TensorProto.BFLOAT16, np.float32, 2.0**-7),
    ],
)
def test_rounding_noise_is_half_a_unit_of_the_stored_type(element: int, dtype: type, unit: float) -> None:
    """y = w x, every w in [1, 2): each may have been off by half a unit, never more."""
    weight = (1 + np.arange(200) / 256).astype(dtype)
    model = one_node(helper.make_node("Mul", ["x", "w"], ["y"]), weight, ["n", 200], element)
    before = model.SerializeToString()
    largest = (unit / 2) / (1 + 199 / 256)
    noise = rounding_noise(model, {"x": np.ones((1, 200))})
    assert 0.9 * largest < noise <= largest
    assert noise == rounding_noise(model, {"x": np.ones((1, 200))})
    assert model.SerializeToString() == before


def test_rounding_noise_bounds_the_files_own_rounding(bundle: Bundle, exact: Outputs) -> None:
    """The float32 file against the original in float64, and a float16 copy of it against the float32 file."""
    model = read_model(bundle.file(MODEL_ONNX))
    noise = rounding_noise(model, FEEDS)
    original = exact_answer(X)
    error = np.abs(exact["logits"] - original).max() / np.abs(original).max()
    assert error / 3 < noise < error * 10
    half = copy.deepcopy(model)
    for tensor in half.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    coarse = Float64Evaluator(half).evaluate(FEEDS)["logits"]
    moved = np.abs(coarse - exact["logits"]).max() / np.abs(exact["logits"]).max()
    noise = rounding_noise(half, FEEDS)
    assert 1e-5 < moved < 3 * noise < 30 * moved


def test_rounding_noise_leaves_settings_and_exponents_alone() -> None:
    power = one_node(helper.make_node("Pow", ["x", "w"], ["y"]), np.array([2.0], np.float32), ["n", 3])
    assert rounding_noise(power, {"x": -np.ones((2, 3))}) == 0
    size = one_node(
        helper.make_node("Resize", ["x", "", "w"], ["y"], mode="nearest"), np.array([1, 4 / 3], np.float32), ["n", 3]
    )
    assert rounding_noise(size, {"x": np.ones((2, 3))}) == 0
    constant = one_node(helper.make_node("Mul", ["x", "w"], ["y"]), np.zeros(3, np.float32), ["n", 3])
    assert rounding_noise(constant, {"x": np.ones((2, 3))}) == 0


def test_rounding_noise_of_a_constant_node_counts_and_infinity_is_refused() -> None:
    model = one_node(helper.make_node("Mul", ["x", "c"], ["y"]), np.ones(3, np.float32), ["n", 3])
    value = numpy_helper.from_array(np.array([1.5, 1.25, 1.125], np.float32))
    model.graph.node.insert(0, helper.make_node("Constant", [], ["c"], value=value))
    assert 1e-9 < rounding_noise(model, {"x": np.ones((2, 3))}) < 1e-7
    endless = one_node(helper.make_node("Div", ["x", "w"], ["y"]), np.zeros(3, np.float32), ["n", 3])
    with pytest.raises(ProofError, match="not finite"):
        rounding_noise(endless, {"x": np.ones((2, 3))})


def test_a_batch_that_would_fail_is_predicted_by_the_largest_noise_of_four_draws(bundle: Bundle) -> None:
    model = read_model(bundle.file(MODEL_ONNX))
    right, rounded = Float64Evaluator(model), Emulator(model, "tf32")
    budget = Budget(real=2, noise=2, one_hot=2, constant=2, proof=2, proof_other=2, batch_sizes=(), repeat=1)
    last = 0
    for seed in range(6):
        x = np.random.default_rng(seed).standard_normal((2, 1, 28, 28)).astype(np.float32)
        case = Case(Batch("noise", {"input": x}), right.evaluate({"input": x}))
        errors = []
        for draw in range(4):
            feeds = {"input": x * np.float32(1 + draw * 2.0**-12)}
            expected = right.evaluate(feeds)["logits"]
            errors.append(np.abs(rounded.evaluate(feeds)["logits"] - expected).max() / np.abs(expected).max())
        forecast = Forecast(model, cases=[case], budget=budget, varies=True)
        assert forecast.noise("tf32", case) == pytest.approx(errors[0])
        assert forecast.noise("tf32", case, on=case) == pytest.approx(max(errors))
        last += max(errors) == errors[-1]
    assert last, "no largest noise is that of the last draw"


def test_the_worst_samples_keep_the_scale_of_all() -> None:
    expected = {
        "a": np.array([[8.0], [1.0], [1.0], [2.0]]),
        "b": np.array([[1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [1.0, 2.0]]),
    }
    candidate = {
        "a": expected["a"] + [[0.0], [0.8], [0.08], [0.0]],
        "b": expected["b"] + [[0.0, 0.0], [0, 0], [0, 0], [-0.1, 0]],
    }
    case = Case(Batch("noise", {"input": np.arange(4.0)[:, None]}), expected)
    part = case.worst(candidate, 2)
    assert part.batch.feeds["input"].tolist() == [[1.0], [3.0]]
    assert part.expected["a"].tolist() == [[1.0], [2.0]]
    assert (part.scales, case.worst(candidate, 9).batch.n) == ({"a": 8.0, "b": 2.0}, 4)
