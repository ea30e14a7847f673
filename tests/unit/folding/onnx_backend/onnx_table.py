"""The whole table of small ONNX graphs: the plain ones, norms written as arithmetic, and arithmetic that is not a norm."""

from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import TensorProto, helper
from onnx_cases import PLAIN, Case, branch
from support.onnx_builder import Builder

Between = Callable[[Builder, str], str]


def behind_conv(between: Between, *, bias: bool = False, tail: str = "Relu") -> Callable[[Builder], None]:
    """Conv (3 to 6 channels), the norm, an activation."""

    def build(g: Builder) -> None:
        y = between(g, g.conv(g.input("n", 3, 8, 9), 3, 6, bias=bias))
        g.output(g.node(tail, y, outputs=("out",)), rank=4)

    return build


def steps(*operators: str, shape: tuple[int, ...] = (1, 6, 1, 1)) -> Between:
    """Arithmetic in turn, one random constant each; "-Sub" has the constant first."""

    def add(g: Builder, x: str) -> str:
        for index, operator in enumerate(operators):
            name = g.init(f"c{index}", value=g.rng.standard_normal(shape) + 0.5)
            given = (name, x) if operator.startswith("-") else (x, name)
            x = g.node(operator.removeprefix("-"), *given, name=f"norm/{index}")
        return x

    return add


def detector(g: Builder, x: str) -> str:
    """A frozen BatchNorm as detectors write it: factor and shift computed from statistics and reshaped, all constant."""
    gamma, beta, mean, var = g.statistics(6, "frozen")
    eps, shape = g.init("eps", value=np.asarray(1e-3)), g.init("shape", value=[1, -1, 1, 1])
    root = g.node("Sqrt", g.node("Add", var, eps))
    factor = g.node("Mul", gamma, g.node("Reciprocal", root))
    shift = g.node("Sub", beta, g.node("Mul", mean, factor))
    y = g.node("Mul", x, g.node("Reshape", factor, shape), name="norm/0")
    return g.node("Add", y, g.node("Reshape", shift, shape), name="norm/1")


def textbook(g: Builder, x: str) -> str:
    """``(x - mean) / sqrt(var + eps) * gamma + beta``, the constants unsqueezed."""
    gamma, beta, mean, var = g.statistics(6, "plain")
    axes = g.init("axes", value=[0, 2, 3])
    placed = {name: g.node("Unsqueeze", name, axes) for name in (gamma, beta, mean, var)}
    root = g.node("Sqrt", g.node("Add", placed[var], g.init("eps", value=np.asarray(1e-5))))
    y = g.node("Div", g.node("Sub", x, placed[mean], name="norm/0"), root, name="norm/1")
    return g.node("Add", placed[beta], g.node("Mul", placed[gamma], y, name="norm/2"), name="norm/3")


def channels_last(g: Builder) -> None:
    """Transposes around the Conv, the norm on the last axis, the weight transposed too, as tf2onnx writes."""
    x = g.node("Transpose", g.input("n", 8, 9, 3), perm=[0, 3, 1, 2])
    w = g.node("Transpose", g.init("w", 3, 3, 3, 6), perm=[3, 2, 0, 1])
    y = g.node("Transpose", g.node("Conv", x, w, name="conv"), perm=[0, 2, 3, 1])
    g.output(g.node("Relu", steps("Mul", "Add", shape=(6,))(g, y), outputs=("out",)), rank=4)


def caffe_scale(g: Builder, x: str) -> str:
    """BatchNormalization without learned numbers, then Caffe's Scale as Mul and Add."""
    ones, zeros = g.init("ones", value=np.ones(6)), g.init("zeros", value=np.zeros(6))
    statistics = [g.init("mean", 6), g.init("var", value=g.rng.random(6) + 0.1)]
    return steps("Mul", "Add")(g, g.bn(x, 6, parameters=[ones, zeros, *statistics]))


def before_conv(g: Builder) -> None:
    """Normalisation of the input."""
    y = steps("Sub", "Div", shape=(1, 3, 1, 1))(g, g.input("n", 3, 8, 9))
    g.output(g.conv(y, 3, 6), rank=4)


def linear(g: Builder) -> None:
    y = g.node("MatMul", g.input("n", 5, 4), g.init("w", 4, 7), name="product")
    g.output(g.node("Tanh", steps("Mul", "Add", shape=(7,))(g, y)), rank=3)


def shared_constant(g: Builder) -> None:
    """One scale and shift behind two convolutions: each has a row, and both fold."""
    x = g.input("n", 3, 8, 9)
    s, t = g.init("s", 6, 1, 1), g.init("t", 6, 1, 1)
    for which in "ab":
        y = g.node("Mul", g.conv(x, 3, 6, name=f"conv_{which}"), s, name=f"{which}/mul")
        g.output(g.node("Add", y, t, name=f"{which}/add"), rank=4)


def read_inside(g: Builder, *, where: str) -> None:
    """The value between Mul and Add is an output, has a second reader, or is read by a branch."""
    y = g.conv(g.input("n", 3, 8, 9), 3, 6)
    y = g.node("Mul", y, g.init("s", 6, 1, 1), name="norm/0", outputs=("inner",))
    z = g.node("Add", y, g.init("t", 6, 1, 1), name="norm/1")
    if where == "output":
        g.output(y, z, rank=4)
    elif where == "reader":
        g.output(g.node("Tanh", y), g.node("Tanh", z), rank=4)
    else:
        flag = g.init("flag", value=np.asarray(True))
        nodes = [helper.make_node(kind, [y], [kind]) for kind in ("Relu", "Tanh")]
        taken = g.node("If", flag, then_branch=branch(g, "then", nodes[:1]), else_branch=branch(g, "else", nodes[1:]))
        g.output(z, taken, rank=4)


def computed_factor(g: Builder, x: str) -> str:
    """A factor from the input (squeeze and excitation), then an Add: no norm."""
    factor = g.node("Sigmoid", g.node("GlobalAveragePool", x))
    return g.node("Add", g.node("Mul", x, factor), g.init("t", 6, 1, 1))


def enlarging(g: Builder) -> None:
    y = g.conv(g.input("n", 3, 8, 9), 3, 1)
    g.output(steps("Mul", "Add")(g, y), rank=4)


def replaceable(g: Builder, x: str) -> str:
    y = g.node("Mul", x, g.init("s", 6, 1, 1, overridable=True), name="norm/0")
    return g.node("Add", y, g.init("t", 6, 1, 1), name="norm/1")


def whole_numbers(g: Builder) -> None:
    """Mul and Add on integers, next to a layer."""
    g.inputs.append(helper.make_tensor_value_info("k", TensorProto.INT64, ["n", 6]))
    y = g.node("Add", g.node("Mul", "k", g.init("i", value=np.arange(6))), g.init("j", value=np.arange(6)))
    z = g.node("Cast", y, to=TensorProto.FLOAT)
    g.output(g.node("Gemm", z, g.init("w", 6, 4), name="fc"), rank=2)


def no_norm(g: Builder, x: str) -> str:
    """A hard sigmoid and a bias: numbers and a lone shift."""
    y = g.node("Add", g.node("Mul", x, g.init("sixth", value=np.asarray(1 / 6))), g.init("half", value=np.asarray(0.5)))
    return g.node("Add", g.node("Clip", y, g.init("lo", value=np.asarray(0.0)), g.init("hi", value=np.asarray(1.0))),
                  g.init("bias", 6, 1, 1))  # fmt: skip


def sum_of_three(g: Builder) -> None:
    """RepVGG with one Sum, as Caffe2 and tf2onnx (AddN) write it."""
    x = g.node("Sigmoid", g.input("n", 6, 8, 9))
    a = g.bn(g.conv(x, 6, 6, name="c3", pads=[1] * 4), 6, name="bn3")
    b = g.bn(g.conv(x, 6, 6, 1, name="c1"), 6, name="bn1")
    g.output(g.node("Sum", a, b, g.bn(x, 6, name="bn0"), name="sum"), rank=4)


def sum_stays(g: Builder) -> None:
    """A Sum of four values that only a constant joins stays one Sum."""
    x = g.input("n", 3, 8, 9)
    y = g.bn(g.conv(x, 3, 6), 6)
    values = [g.node(kind, y) for kind in ("Tanh", "Sigmoid", "Softplus", "Relu")]
    g.output(g.node("Sum", *values, name="sum"), rank=4)


def computed_weight_growth(g: Builder) -> None:
    """A weight that the file computes from one number."""
    fill = helper.make_tensor("value", TensorProto.FLOAT, [1], [0.25])
    w = g.node("ConstantOfShape", g.init("k", value=[16, 3, 3, 3]), value=fill)
    g.output(g.bn(g.node("Conv", g.input("n", 3, 8, 9), w, name="conv"), 16), rank=4)


def _one(outcome: str, name: str = "norm/1") -> tuple[tuple[str, str], ...]:
    return ((name, outcome),)


_MAP: dict[str, Any] = {"shape": (1, 6, 6, 7)}

CASES = (
    *PLAIN,
    Case("arithmetic-mul-add", behind_conv(steps("Mul", "Add")), _one("backward")),
    Case("arithmetic-add-mul", behind_conv(steps("Add", "Mul"), bias=True), _one("backward")),
    Case("arithmetic-sub-div-mul-add", behind_conv(steps("Sub", "Div", "Mul", "Add")), _one("backward", "norm/3")),
    Case("arithmetic-constant-first", behind_conv(steps("-Mul", "-Sub")), _one("backward")),
    Case("arithmetic-scale-alone", behind_conv(steps("Mul")), _one("backward", "norm/0")),
    Case("arithmetic-detector", behind_conv(detector), _one("backward")),
    Case("arithmetic-textbook", behind_conv(textbook), _one("backward", "norm/3")),
    Case("arithmetic-channels-last", channels_last, _one("through")),
    Case("arithmetic-caffe-scale", behind_conv(caffe_scale), (("bn", "backward"), ("norm/1", "backward"))),
    Case("arithmetic-input", before_conv, _one("forward")),
    Case("arithmetic-linear", linear, _one("backward")),
    Case("arithmetic-shared-constants", shared_constant, (("a/add", "backward"), ("b/add", "backward"))),
    Case("arithmetic-half", behind_conv(steps("Mul", "Add")), _one("backward"), options={"dtype": "float16"}),
    Case("arithmetic-behind-tanh", behind_conv(lambda g, x: steps("Mul", "Add")(g, g.node("Tanh", x))), _one("affine"), "tanh"),
    Case("arithmetic-per-position", behind_conv(steps("Mul", "Add", **_MAP)), _one("affine"), "it normalises axis 2, 3"),
    Case("arithmetic-table-of-positions", behind_conv(steps("Add", **_MAP)), ()),
    Case("arithmetic-mask", behind_conv(steps("Mul", **_MAP)), ()),
    Case("arithmetic-inner-output", lambda g: read_inside(g, where="output"), _one("backward", "norm/0")),
    Case("arithmetic-inner-reader", lambda g: read_inside(g, where="reader"), _one("backward", "norm/0")),
    Case("arithmetic-inner-branch", lambda g: read_inside(g, where="branch"), _one("backward", "norm/0")),
    Case("arithmetic-computed-factor", behind_conv(computed_factor), ()),
    Case("arithmetic-enlarges", enlarging, _one("kept", "norm/0"), "enlarge the value"),
    Case("arithmetic-replaceable", behind_conv(replaceable), _one("kept", "norm/0"), "a caller may replace"),
    Case("arithmetic-whole-numbers", whole_numbers, ()),
    Case("arithmetic-no-norm", behind_conv(no_norm), ()),
    Case("sum-of-three", sum_of_three, (("bn3", "backward"), ("bn1", "backward"), ("bn0", "merged"))),
    Case("sum-stays", sum_stays, (("bn", "backward"),)),
    Case("growth-of-a-computed-weight", computed_weight_growth, (("bn", "affine"),), "computed from fewer numbers"),
    Case("growth-allowed", computed_weight_growth, (("bn", "backward"),), fold={"max_growth": 10.0}),
)  # fmt: skip
