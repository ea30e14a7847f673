"""Every reason for which a norm stays in an ONNX file is the true one: a small network for each."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from onnx import helper
from support.onnx_builder import Builder

import bnexport
from bnexport.errors import ModelError

Build = Callable[[Builder], str]


def parameters(g: Builder, count: int = 6, **replaced: Any) -> list[str]:
    names = dict(zip(("gamma", "beta", "mean", "var"), g.statistics(count, "p"), strict=True))
    for part, value in replaced.items():
        names[part] = value if isinstance(value, str) else g.init(f"other.{part}", value=np.asarray(value, np.float32))
    return list(names.values())


def image(g: Builder) -> str:
    return g.input("batch", 6, 8, 9)


def without_shape(g: Builder) -> str:
    """A value whose shape depends on the numbers of an input."""
    g.inputs.append(helper.make_tensor_value_info("sizes", 7, ["rank"]))
    return g.node("Reshape", image(g), "sizes")


def in_training(g: Builder) -> str:
    outputs = ("y", "mean_out", "var_out")
    return g.bn(image(g), 6, training_mode=1, outputs=outputs)


def with_parameter_inputs(g: Builder) -> str:
    x = image(g)
    return g.bn(x, 6, parameters=parameters(g, gamma=g.input(6, name="gamma")))


def with_computed_parameters(g: Builder) -> str:
    x = image(g)
    mean = g.node("ReduceMean", x, g.init("axes", value=np.array([0, 2, 3])), keepdims=0)
    return g.bn(x, 6, parameters=parameters(g, mean=mean))


def of_a_constant(g: Builder) -> str:
    x = image(g)
    return g.node("Add", x, g.bn(g.init("stored", 1, 6, 8, 9), 6))


def of_one_axis(g: Builder) -> str:
    return g.bn(g.input("batch"), 1)


def by_position(g: Builder) -> str:
    sizes = (6, 8, 9)
    names = [g.init(part, value=g.rng.random(sizes) + 0.5) for part in ("gamma", "beta", "mean", "var")]
    return g.bn(image(g), 6, parameters=names, spatial=0)


def named_like_a_function(g: Builder) -> str:
    opsets = [helper.make_opsetid("", 18)]
    body = [helper.make_node("Identity", ["a"], ["r"])]
    names = ["a", "b", "c", "d", "e"]
    g.functions.append(helper.make_function("", "BatchNormalization", names, ["r"], body, opsets))
    return g.bn(image(g), 6)


def in_a_function(g: Builder) -> str:
    opsets = [helper.make_opsetid("", 18)]
    names = ["a", "b", "c", "d", "e"]
    body = [helper.make_node("BatchNormalization", names, ["r"], name="bn")]
    g.functions.append(helper.make_function("mine", "Inner", names, ["r"], body, opsets))
    g.opsets.append(helper.make_opsetid("mine", 1))
    return g.node("Inner", image(g), *parameters(g), domain="mine")


def in_a_branch(g: Builder) -> str:
    x = image(g)
    inner = [helper.make_node("BatchNormalization", [x, *parameters(g)], ["r1"], name="bn")]
    other = [helper.make_node("Neg", [x], ["r2"])]
    one, two = (
        helper.make_graph(nodes, "branch", [], [helper.make_tensor_value_info(name, 1, ["batch", 6, 8, 9])])
        for nodes, name in ((inner, "r1"), (other, "r2"))
    )
    g.inputs.append(helper.make_tensor_value_info("flag", 9, []))
    return g.node("If", "flag", then_branch=one, else_branch=two)


def with_dtypes(g: Builder, dtype: type) -> str:
    """Parameters of another element type than a norm may have; the checker does not look."""
    x = image(g)
    names = [g.init(part, value=np.arange(1, 7).astype(dtype)) for part in ("gamma", "beta", "mean", "var")]
    return g.node("Relu", g.bn(x, 6, parameters=names))


def of_whole_numbers(g: Builder) -> str:
    g.inputs.append(helper.make_tensor_value_info("x", 7, ["batch", 6, 8, 9]))
    return g.node("Cast", g.bn("x", 6), to=1)


def with_parameters_that_can_not_be_computed(g: Builder) -> str:
    x = image(g)
    gamma = g.node("Reshape", g.init("stored", 6), g.init("four", value=[4]))
    return g.bn(x, 6, parameters=parameters(g, gamma=gamma))


#: Reason -> a network with a BatchNormalization, and the operator set.
BATCH_NORMS: dict[str, tuple[Build, int]] = {
    "it is in training mode, so it uses batch statistics": (in_training, 18),
    "it has statistics for each position (spatial=0)": (by_position, 8),
    "its parameters are inputs of the model with a default value, which a caller may replace": (
        lambda g: g.bn(g.conv(image(g), 6, 6), 6, overridable=True), 18,
    ),
    "its parameters are inputs of the model": (with_parameter_inputs, 18),
    "its parameters are computed in the graph": (with_computed_parameters, 18),
    "the file does not state the shape of its input": (lambda g: g.bn(without_shape(g), 6), 18),
    "its input has no channel axis": (of_one_axis, 18),
    "its input is a constant": (of_a_constant, 18),
    "its variance plus eps is not above 0 in 1 channel": (
        lambda g: g.bn(image(g), 6, parameters=parameters(g, var=[1, 2, -3, 1, 1, 1])), 18,
    ),
    "its statistics or parameters contain infinity, NaN": (
        lambda g: g.bn(image(g), 6, parameters=parameters(g, gamma=[1, 2, math.inf, 1, 1, 1])), 18,
    ),
    "its parameters have different lengths": (
        lambda g: g.bn(image(g), 6, parameters=parameters(g, var=[1, 2, 3])), 18,
    ),
    "its parameters are for 5 channels, and its input has 6": (lambda g: g.bn(image(g), 5), 18),
    "its input or its parameters are not float16": (lambda g: with_dtypes(g, np.int64), 18),
    "its input or its parameters are not": (of_whole_numbers, 18),
    "its attributes and constants contradict each other": (with_parameters_that_can_not_be_computed, 18),
    "a function of the file has its name": (named_like_a_function, 18),
    "it is inside the body of the function Inner": (in_a_function, 18),
    "it is inside the body of an If, Loop or Scan": (in_a_branch, 18),
}  # fmt: skip


def vector(g: Builder, name: str, *shape: int, **options: Any) -> str:
    return g.init(name, value=g.rng.random(shape) + 0.5, **options)


def arithmetic(g: Builder, x: str, scale: str, channels: int = 6) -> str:
    return g.node("Add", g.node("Mul", x, scale, name="norm"), vector(g, "shift", channels, 1, 1))


#: Reason -> a network with a norm written as arithmetic.
ARITHMETIC: dict[str, Build] = {
    "the file does not state the shape of its input": lambda g: arithmetic(
        g, without_shape(g), vector(g, "s", 6, 1, 1)
    ),
    "the file does not state the size of the axis that it normalises": (
        lambda g: arithmetic(g, g.input("batch", "c", 8, 9), vector(g, "s", 6, 1, 1))
    ),
    "the file does not state the size of the axis": (
        lambda g: arithmetic(g, g.input("batch", "c", 8, 9), vector(g, "s", 2, 1, 1), channels=2)
    ),
    "its constants enlarge the value": lambda g: arithmetic(g, g.input("batch", 1, 8, 9), vector(g, "s", 6, 1, 1)),
    "its scale or shift is not finite": (
        lambda g: arithmetic(g, image(g), g.init("s", value=np.array([1, 2, math.inf, 1, 1, 1.0]).reshape(6, 1, 1)))
    ),
    "its parameters are inputs of the model with a default value, which a caller may replace": (
        lambda g: arithmetic(g, image(g), vector(g, "s", 6, 1, 1, overridable=True))
    ),
}


def row_of(build: Build, opset: int = 18) -> Any:
    g = Builder(opset=opset)
    g.output(build(g), rank=1 if build is of_one_axis else 4)
    (row,) = bnexport.fold_onnx(g.model(), prove=False).report.rows
    assert not row.gone
    return row


@pytest.mark.parametrize("reason", BATCH_NORMS)
def test_why_a_batch_normalization_stays(reason: str) -> None:
    row = row_of(*BATCH_NORMS[reason])
    assert row.outcome == "kept"
    assert f"{row.reason} ".startswith((f"{reason} ", f"{reason},")), row


@pytest.mark.parametrize("reason", ARITHMETIC)
def test_why_a_norm_written_as_arithmetic_stays(reason: str) -> None:
    row = row_of(ARITHMETIC[reason])
    assert (row.module, row.outcome) == ("norm", "kept")
    assert f"{row.reason} ".startswith(f"{reason} ")


#: Reason -> a network whose BatchNormalization can't go into its convolution.
WEIGHTS: dict[str, Build] = {
    "its weights are inputs of the model with a default value, which a caller may replace": (
        lambda g: g.node("Conv", image(g), g.init("w", 6, 6, 3, 3, overridable=True))
    ),
    "its weights are inputs of the model;": lambda g: g.node("Conv", image(g), g.input(6, 6, 3, 3, name="w")),
    "its weights are computed in the graph": (
        lambda g: g.node("Conv", image(g), g.node("Mul", vector(g, "w", 6, 6, 3, 3), g.input(1, name="factor")))
    ),
}


@pytest.mark.parametrize("reason", WEIGHTS)
def test_why_the_weights_of_a_layer_are_not_constants(reason: str) -> None:
    row = row_of(lambda g: g.bn(WEIGHTS[reason](g), 6))
    assert reason in f"{row.reason};", row.reason


def node(operator: str, *constants: Any, rank: int = 4, **attributes: Any) -> tuple[Callable[[Builder, str], str], int]:
    """Return the maker of one node, which reads a value and constants, and the axes of its result."""

    def made(g: Builder, x: str) -> str:
        names = [g.init(f"c{index}", value=value) for index, value in enumerate(constants)]
        return g.node(operator, x, *names, name="next", **attributes)

    return made, rank


def weight(*shape: int) -> Any:
    return np.random.default_rng(0).standard_normal(shape)


#: Reason -> the operation that follows a norm, with which the norm can't be joined, and the operator set.
FOLLOWERS: tuple[tuple[str, tuple[Callable[[Builder, str], str], int], int], ...] = (
    ("its sizes contradict each other", node("Conv", weight(6, 6, 3, 3), group=4), 18),
    ("its sizes contradict each other", node("Conv", weight(6, 5, 3, 3)), 18),
    ("its sizes contradict each other", node("Conv", weight(6, 6, 3, 3), weight(5)), 18),
    ("its sizes contradict each other", node("Conv", weight(6, 6, 3, 3), kernel_shape=[5, 5]), 18),
    ("its attributes and constants contradict each other", node("Slice", [0], [3, 4]), 18),
    ("it takes a position beyond the 6 of its axis", node("Gather", [0, 1, 2, 3, 4, 11], axis=1), 18),
    ("it takes a position beyond the 6 of its axis", node("Gather", [0, 1, 2, 3, 4, -7], axis=1), 18),
    ("a product with a vector has no channel axis", node("MatMul", weight(9), rank=3), 18),
    ("its weight adds axes to the value", node("MatMul", weight(2, 1, 6, 9, 4), rank=5), 18),
    ("operator set 7 has no maximum with one bound per channel", node("Clip", min=0.5), 7),
)  # fmt: skip


@pytest.mark.parametrize(("reason", "following", "opset"), FOLLOWERS)
def test_why_a_norm_can_not_join_what_follows(
    reason: str, following: tuple[Callable[[Builder, str], str], int], opset: int
) -> None:
    g = Builder(opset=opset)
    g.output(following[0](g, g.bn(image(g), 6)), rank=following[1])
    (row,) = bnexport.fold_onnx(g.model(), prove=False).report.rows
    assert row.outcome == "affine"
    assert f"(next): {reason}" in row.reason, row.reason


def with_second(g: Builder, operator: str, kind: int, **attributes: Any) -> str:
    """An operation after a convolution, with a second output that the model returns too."""
    outputs = ("first", "second")
    y = g.node(operator, g.conv(image(g), 6, 6), outputs=outputs, **attributes)
    g.outputs.append(helper.make_tensor_value_info("second", kind, [None] * 4))
    return y


#: Reason -> a layer before a norm of 6 channels.
LAYERS: dict[str, Build] = {
    "it takes its input transposed (transA=1)": lambda g: g.node("Gemm", g.input(5, "n"), g.init("w", 5, 6), transA=1),
    "its bias differs between rows": lambda g: g.node("Gemm", g.input(2, 5), g.init("w", 5, 6), g.init("b", 2, 6)),
    "its mask is used": lambda g: with_second(g, "Dropout", kind=9),
    "the positions that it gives are used": lambda g: with_second(g, "MaxPool", kind=7, kernel_shape=[2, 2]),
}


@pytest.mark.parametrize("reason", LAYERS)
def test_why_a_norm_can_not_join_what_precedes(reason: str) -> None:
    g = Builder()
    y = LAYERS[reason](g)
    g.output(g.bn(y, 6), rank=2 if "Gemm" in g.nodes[0].op_type else 4)
    (row,) = bnexport.fold_onnx(g.model(), prove=False).report.rows
    assert row.outcome == "affine"
    assert f"): {reason};" in row.reason, row.reason


def test_sizes_that_contradict_each_other_are_a_fault_of_the_file() -> None:
    g = Builder()
    g.output(g.node("Transpose", g.bn(image(g), 6), perm=[0, 1, 5, 7]), rank=4)
    with pytest.raises(ModelError, match="the sizes in the file contradict each other") as caught:
        bnexport.fold_onnx(g.model())
    assert "full_check" in caught.value.remedy


def test_a_tensor_without_elements_is_read() -> None:
    """Resize has an empty second input in files of operator set 11."""
    g = Builder()
    scales = g.init("scales", value=np.array([1, 1, 2, 2], np.float32))
    y = g.node("Resize", g.conv(image(g), 6, 6), g.init("roi", value=np.zeros(0)), scales)
    g.output(g.bn(y, 6), rank=4)
    assert bnexport.fold_onnx(g.model()).report.rows[0].gone
