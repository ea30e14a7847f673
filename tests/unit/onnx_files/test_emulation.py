import os
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from support.bundles import copy_bundle, reseal

from bnexport.bundle import MODEL_ONNX, Bundle
from bnexport.data.datasets import load_test_images
from bnexport.data.preprocessing import Preprocessing
from bnexport.errors import BundleError, UsageError
from bnexport.onnx_files import emulation
from bnexport.onnx_files.emulation import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    PRECISIONS,
    TF32,
    Emulator,
    Format,
    cut_to,
    precision_of,
    round_to,
    step_of,
)
from bnexport.onnx_files.float64 import Float64Evaluator, samples_at_once
from bnexport.runtimes.reference_runner import EmulatedRunner
from bnexport.tensors import Signature

X = np.random.default_rng(0).random((5, 1, 28, 28), dtype=np.float32)
ANY64 = st.floats(width=64)
ANY32 = st.floats(width=32)
#: Bit patterns reach what a strategy of numbers seldom does: every exponent, subnormals, infinities, many NaN.
PATTERNS = st.integers(0, 2**32 - 1).map(lambda bits: float(np.uint32(bits).view(np.float32)))


def rounded(number: float, to: Format, dtype: type = np.float64) -> float:
    return float(round_to(np.array([number], dtype), to)[0])


def same(one: float, other: float) -> bool:
    return (np.isnan(one) and np.isnan(other)) or (one == other and np.signbit(one) == np.signbit(other))


@settings(max_examples=400, deadline=None)
@given(st.one_of(ANY64, PATTERNS))
def test_float16_is_numpys(number: float) -> None:
    with np.errstate(over="ignore"):
        assert same(rounded(number, FLOAT16), float(np.float64(number).astype(np.float16)))


@settings(max_examples=400, deadline=None)
@given(st.one_of(ANY32, PATTERNS))
def test_bfloat16_is_that_of_torch_and_of_ml_dtypes(number: float) -> None:
    mine = rounded(number, BFLOAT16, np.float32)
    assert same(mine, rounded(number, BFLOAT16))
    assert same(mine, float(torch.tensor([number], dtype=torch.float32).to(torch.bfloat16).double()[0]))
    with np.errstate(all="ignore"):
        assert same(mine, float(np.float32(number).astype(ml_dtypes.bfloat16)))


def tf32_by_remainder(number: float) -> float:
    """Return the nearest multiple of a unit in the last place, by arithmetic of whole numbers instead of bit patterns."""
    if not np.isfinite(number) or number == 0:
        return number
    _, exponent = np.frexp(max(abs(number), 2.0**-126))
    unit = 2.0 ** (int(exponent) - 11)
    whole, rest = divmod(abs(number), unit)
    up = rest > unit / 2 or (rest == unit / 2 and whole % 2 == 1)
    size = (whole + up) * unit
    return float(np.copysign(np.inf if size >= 2.0**128 else size, number))


@settings(max_examples=400, deadline=None)
@given(st.one_of(ANY32, PATTERNS))
def test_tf32_is_the_nearest_multiple_of_its_unit(number: float) -> None:
    assert same(rounded(number, TF32), tf32_by_remainder(number))
    assert same(rounded(number, TF32, np.float32), tf32_by_remainder(number))


@settings(max_examples=200, deadline=None)
@given(ANY64, st.sampled_from([FLOAT32, TF32, FLOAT16, BFLOAT16]))
def test_rounding_twice_changes_nothing_and_never_goes_past_a_neighbour(number: float, to: Format) -> None:
    once = rounded(number, to)
    assert same(rounded(once, to), once)
    if np.isfinite(once):
        assert abs(once - number) <= 0.5 * float(step_of(np.array([once]), to)[0])


@pytest.mark.parametrize(
    ("number", "to", "expected"),
    [
        (1 + 2**-11, TF32, 1.0),  # ties go to even, down
        (1 + 3 * 2**-11, TF32, 1 + 2 * 2**-10),  # and up
        (1 + 2**-11 + 2**-40, TF32, 1 + 2**-10),  # through float32 this would be the tie
        (65519.0, FLOAT16, 65504.0),
        (65520.0, FLOAT16, np.inf),
        (-65520.0, FLOAT16, -np.inf),
        (2.0**-25, FLOAT16, 0.0),
        (3 * 2.0**-25, FLOAT16, 2.0**-23),
        (65520.0, BFLOAT16, 65536.0),
        (3.4e38, BFLOAT16, np.inf),
        (1e300, FLOAT32, np.inf),
    ],
)
def test_ties_limits_and_subnormals(number: float, to: Format, expected: float) -> None:
    assert rounded(number, to) == expected


def test_formats_are_the_standards() -> None:
    for to, kind in ((FLOAT32, np.float32), (FLOAT16, np.float16), (BFLOAT16, ml_dtypes.bfloat16)):
        standard = ml_dtypes.finfo(kind)
        assert (to.largest, to.smallest) == (float(standard.max), float(standard.smallest_normal))
        assert 2.0**-to.mantissa == float(standard.eps)
    assert (TF32.smallest, TF32.mantissa) == (FLOAT32.smallest, 10)


def test_shape_order_and_source_of_an_array_stay() -> None:
    array = np.asfortranarray(np.random.default_rng(0).standard_normal((3, 4, 5)))[:, ::2]
    kept = array.copy()
    np.testing.assert_array_equal(round_to(array, FLOAT16), array.astype(np.float16))
    np.testing.assert_array_equal(array, kept)
    assert round_to(np.float64(1.1).reshape(()), FLOAT16).shape == ()
    assert round_to(np.zeros((0, 3)), TF32).shape == (0, 3)
    assert round_to(np.ones(2, np.float32), TF32).dtype == np.float32


def test_cutting_goes_towards_zero() -> None:
    numbers = np.random.default_rng(1).standard_normal(500).astype(np.float32)
    cut, near = cut_to(numbers, TF32), round_to(numbers, TF32)
    assert (np.abs(cut) <= np.abs(numbers)).all()
    assert (np.abs(numbers - cut) < step_of(numbers, TF32)).all()
    assert 0.3 < (cut == near).mean() < 0.7


def model(nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], shape: list[object], **more: object) -> bytes:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("local", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8, **more).SerializeToString()


def tf32(array: np.ndarray) -> np.ndarray:
    return round_to(array.astype(np.float64), TF32)


def near(one: np.ndarray, other: np.ndarray) -> bool:
    """Return True if two arrays are equal except for the order of float32 sums."""
    return bool(np.abs(one - other).max() <= 1e-6 * np.abs(other).max())


@pytest.mark.parametrize("operator", ["Conv", "ConvTranspose", "Gemm", "MatMul"])
def test_tf32_rounds_both_factors_and_nothing_else(operator: str) -> None:
    rng = np.random.default_rng(2)
    flat = operator in ("Gemm", "MatMul")
    shape, weight = ((4, 8), (8, 8)) if flat else ((4, 8, 5, 5), (8, 8, 3, 3))
    weights = {"w": rng.standard_normal(weight).astype(np.float32)}
    inputs = ["x", "w"]
    if operator != "MatMul":
        weights["b"] = rng.standard_normal(8).astype(np.float32)
        inputs.append("b")
    x = rng.standard_normal(shape).astype(np.float32)
    nodes, sizes = [helper.make_node(operator, inputs, ["y"])], ["n", *shape[1:]]
    source = model(nodes, weights, sizes)
    by_hand = model(nodes, weights | {"w": tf32(weights["w"]).astype(np.float32)}, sizes)
    want = Float64Evaluator(by_hand).evaluate({"x": tf32(x)})["y"]
    found = Emulator(source, "tf32").evaluate({"x": x})["y"]
    assert near(found, want)
    assert not near(found, Float64Evaluator(source).evaluate({"x": x})["y"])
    only = Emulator(source, "tf32-convolutions").evaluate({"x": x})["y"]
    assert near(only, want) != flat


def test_a_half_precision_rounds_what_every_operator_stores() -> None:
    weights = {"w": np.array([1 + 2**-12, 3.0], np.float32)}
    nodes = [helper.make_node("Mul", ["x", "w"], ["a"]), helper.make_node("Add", ["a", "a"], ["y"])]
    x = np.array([[1 + 2**-12, 1 / 3]], np.float32)
    values = Emulator(model(nodes, weights, ["n", 2]), "float16").intermediate({"x": x})
    third = float(np.float16(1 / 3))
    assert values["a"].tolist() == [[1.0, float(np.float16(3 * third))]]
    assert values["y"].tolist() == [[2.0, float(np.float16(2 * values["a"][0, 1]))]]


def test_overflow_in_half_precision_is_infinite_there_alone() -> None:
    nodes = [helper.make_node("Mul", ["x", "x"], ["a"]), helper.make_node("Div", ["a", "x"], ["y"])]
    source, x = model(nodes, {}, ["n", 1]), np.array([[300.0], [2.0]], np.float32)
    found = {name: Emulator(source, name).evaluate({"x": x})["y"].ravel().tolist() for name in PRECISIONS}
    assert found["float16"] == [np.inf, 2.0]
    assert all(value == [300.0, 2.0] for name, value in found.items() if name != "float16")


def test_graphs_inside_nodes_and_functions_round_too() -> None:
    rng = np.random.default_rng(3)
    w, x = rng.standard_normal((8, 8)).astype(np.float32), rng.standard_normal((4, 8)).astype(np.float32)
    plain = model([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": w}, ["n", 8])
    want = Emulator(plain, "tf32").evaluate({"x": x})["y"]
    output = helper.make_tensor_value_info("z", TensorProto.FLOAT, None)
    body = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["z"])], "body", [], [output])
    branch = helper.make_node("If", ["yes"], ["y"], then_branch=body, else_branch=body)
    nested = model([branch], {"w": w, "yes": np.array(True)}, ["n", 8])
    np.testing.assert_array_equal(Emulator(nested, "tf32").evaluate({"x": x})["y"], want)
    product = helper.make_node("MatMul", ["p", "q"], ["r"])
    function = helper.make_function("local", "Twice", ["p", "q"], ["r"], [product], [helper.make_opsetid("", 18)])
    calls = [
        helper.make_node("Twice", ["x", "w"], ["a"], domain="local"),
        helper.make_node("Twice", ["x", "w"], ["b"], domain="local"),
        helper.make_node("Max", ["a", "b"], ["y"]),
    ]
    called = model(calls, {"w": w}, ["n", 8], functions=[function])
    np.testing.assert_array_equal(Emulator(called, "tf32").evaluate({"x": x})["y"], want)


def test_numbers_that_are_sizes_or_settings_are_not_rounded() -> None:
    """In bfloat16 widths of 300 and 301 are both 300, so the output would have another shape."""
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Cast", ["s"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["f", "one"], ["g"]),
        helper.make_node("Cast", ["g"], ["sizes"], to=TensorProto.INT64),
        helper.make_node("Resize", ["x", "", "", "sizes"], ["a"], mode="nearest"),
        helper.make_node("Resize", ["a", "", "scales"], ["y"], mode="nearest"),
    ]
    weights = {"one": np.ones(4, np.float32), "scales": np.array([1, 1, 1, 1.01], np.float32)}
    x = np.random.default_rng(4).standard_normal((1, 1, 1, 301)).astype(np.float32)
    source = model(nodes, weights, ["n", 1, 1, 301])
    assert Emulator(source, "bfloat16").evaluate({"x": x})["y"].shape == (1, 1, 1, 304)


def test_the_source_stays_as_it_was_and_chunks_change_nothing(bundle: Bundle) -> None:
    source = onnx.load(bundle.file(MODEL_ONNX))
    before = source.SerializeToString()
    whole = Emulator(source, "bfloat16", chunk=100).evaluate({"input": X})["logits"]
    assert source.SerializeToString() == before
    parts = Emulator(before, "bfloat16", chunk=2).evaluate({"input": X})["logits"]
    assert np.abs(parts - whole).max() <= 0.01 * np.abs(whole).max()
    exact = Float64Evaluator(source).evaluate({"input": X})["logits"]
    assert 1e-4 < np.abs(whole - exact).max() / np.abs(exact).max() < 0.1


def test_tf32_is_that_of_an_emulation_in_torch(bundle: Bundle) -> None:
    """This emulation is independent: torch's own operators in float32, with factors rounded in another way."""

    def cut(tensor: torch.Tensor) -> torch.Tensor:
        # Veltkamp's splitting: the high part has 53 - 42 = 11 significant bits.
        wide = tensor.double()
        far = wide * (2.0**42 + 1)
        return (far - (far - wide)).float()

    weights = {item.name: numpy_helper.to_array(item) for item in onnx.load(bundle.file(MODEL_ONNX)).graph.initializer}
    x = torch.from_numpy(X)
    for layer in ("conv1", "conv2", "fc1", "fc2", "fc3"):
        weight, bias = (torch.from_numpy(weights[f"{layer}.{kind}"].copy()) for kind in ("weight", "bias"))
        if layer.startswith("conv"):
            padding = 2 if layer == "conv1" and pads(bundle) else 0
            x = torch.nn.functional.conv2d(cut(x), cut(weight), bias, padding=padding)
            x = torch.nn.functional.avg_pool2d(torch.sigmoid(x), 2)
        else:
            x = torch.nn.functional.linear(cut(x.flatten(1)), cut(weight), bias)
            x = torch.sigmoid(x) if layer != "fc3" else x
    found = Emulator(bundle.file(MODEL_ONNX), "tf32").evaluate({"input": X})["logits"]
    exact = Float64Evaluator(bundle.file(MODEL_ONNX)).evaluate({"input": X})["logits"]
    noise = np.abs(found - exact).max()
    assert np.abs(found - x.numpy()).max() < 0.15 * noise  # a sum just beside a tie may round the other way


def pads(bundle: Bundle) -> bool:
    node = next(node for node in onnx.load(bundle.file(MODEL_ONNX)).graph.node if node.op_type == "Conv")
    return any(any(item.ints) for item in node.attribute if item.name == "pads")


def test_values_have_the_files_names_and_the_precisions_numbers(bundle: Bundle) -> None:
    emulator = Emulator(bundle.file(MODEL_ONNX), "bfloat16")
    values = emulator.intermediate({"input": X})
    names = {name for node in onnx.load(bundle.file(MODEL_ONNX)).graph.node for name in node.output}
    assert set(values) == names
    np.testing.assert_array_equal(values["logits"], emulator.evaluate({"input": X})["logits"])
    for value in values.values():
        if value.dtype.kind == "f":
            np.testing.assert_array_equal(round_to(value, BFLOAT16), value)


def test_a_weight_is_rounded_once_whatever_the_number_of_chunks(
    monkeypatch: pytest.MonkeyPatch, bundle: Bundle
) -> None:
    seen: list[tuple[int, ...]] = []

    def counting(array: np.ndarray, to: Format) -> np.ndarray:
        if to == TF32:
            seen.append(array.shape)
        return round_to(array, to)

    monkeypatch.setattr(emulation, "round_to", counting)
    Emulator(bundle.file(MODEL_ONNX), "tf32", chunk=1).evaluate({"input": X})
    assert seen.count((6, 1, 5, 5)) == 1
    assert len(seen) == 5 + 5 * len(X)  # five weights; five activations of each sample


@pytest.mark.parametrize("precision", list(PRECISIONS))
def test_a_runner_that_emulates_reports_it(bundle: Bundle, precision: str) -> None:
    with EmulatedRunner(bundle, precision) as runner:
        outputs = runner.run({"input": X})
    assert (runner.name, runner.effective_device) == (f"emulated-{precision}", "cpu")
    assert "not a real engine" in runner.description["engine"]
    assert "emulated" in runner.description["precision"]
    assert outputs["logits"].dtype == np.float32
    np.testing.assert_array_equal(
        outputs["logits"], Emulator(bundle.file(MODEL_ONNX), precision).evaluate({"input": X})["logits"]
    )


def test_outputs_have_the_signatures_type_and_overflow_is_infinite(
    bundle: Bundle, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = copy_bundle(bundle, tmp_path_factory.mktemp("half") / "1")
    declared = bundle.manifest.signature
    half = reseal(folder, signature=Signature(declared.inputs, (replace(declared.outputs[0], dtype="float16"),)))
    with EmulatedRunner(half, "bfloat16") as runner:
        assert runner.run({"input": X})["logits"].dtype == np.float16


def test_every_row_has_a_source_and_a_description() -> None:
    assert set(PRECISIONS) >= {"float32", "tf32", "float16", "bfloat16", "tf32-convolutions"}
    for name, row in PRECISIONS.items():
        assert row.name == name
        assert row.source
        assert row.words


def test_an_unknown_precision_and_an_unknown_operator_are_one_sentence(bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="'fp8' is not known"):
        precision_of("fp8")
    with pytest.raises(UsageError, match="'fp8' is not known"):
        Emulator(bundle.file(MODEL_ONNX), "fp8")
    with pytest.raises(BundleError, match="can't be evaluated"):
        Emulator(model([helper.make_node("Teleport", ["x"], ["y"])], {}, ["n", 2]), "tf32")
    with pytest.raises(BundleError, match="can't be evaluated in bfloat16"):
        Emulator(bundle.file(MODEL_ONNX), "bfloat16").intermediate({"input": X[:, :, :3]})


@pytest.mark.needs("data")
def test_the_reference_bundles_noise_is_that_of_the_measurements() -> None:
    """TF32 in convolutions 5.2e-4, everywhere 7.6e-4, float16 9.5e-4 of scale over 10,000 images of another training."""
    bundle = Bundle.open(Path(__file__).parents[3] / "models" / "bn_lenet" / "1")
    pixels, _ = load_test_images("fashion-mnist", data_dir=os.environ["BNEXPORT_DATA"], download=False)
    assert bundle.manifest.preprocessing is not None
    feeds = {"input": Preprocessing.from_json(bundle.manifest.preprocessing).apply(pixels[:2000])}
    exact = Float64Evaluator(bundle.file(MODEL_ONNX)).evaluate(feeds)["logits"]
    noise = {
        name: np.abs(Emulator(bundle.file(MODEL_ONNX), name).evaluate(feeds)["logits"] - exact).max()
        / np.abs(exact).max()
        for name in ("float32", "tf32-convolutions", "tf32", "float16", "bfloat16")
    }
    assert 1e-7 < noise["float32"] < 2e-6
    assert 5.2e-4 / 2.5 < noise["tf32-convolutions"] <= noise["tf32"] < 7.6e-4 * 2.5
    assert 9.5e-4 / 2.5 < noise["float16"] < 9.5e-4 * 2.5
    assert 4 * noise["float16"] < noise["bfloat16"] < 12 * noise["float16"]


def test_an_input_without_dimensions_does_not_count_for_the_samples_at_once() -> None:
    feeds = {"x": np.zeros((5, 1000, 1000)), "factor": np.zeros(())}
    assert samples_at_once(feeds) == 2
