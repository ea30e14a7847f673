"""The table of small ONNX graphs: what must become of each BatchNormalization, and why it stays where it does."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper
from support.onnx_builder import Builder


@dataclass(frozen=True)
class Case:
    """One graph."""

    name: str
    build: Callable[[Builder], None]  # Fills the builder
    outcomes: tuple[tuple[str, str], ...]  # Node -> outcome, in the order of the fold report
    because: str = ""  # Part of the reason of the first that stays
    options: dict[str, Any] = field(default_factory=dict)  # The builder's options: opset, ir, dtype
    fold: dict[str, Any] = field(default_factory=dict)  # The options of ``fold_onnx``
    runs: bool = True  # False if onnxruntime has no kernel for it, or gives numbers that are not finite

    def model(self) -> ModelProto:
        builder = Builder(**self.options)
        self.build(builder)
        return builder.model()


def image(between: Callable[[Builder, str], str], channels: int = 6, *, rank: int | None = 4, **conv: Any) -> Any:
    """Conv (3 to 6 channels), something, BatchNormalization, Sigmoid."""

    def build(g: Builder) -> None:
        y = between(g, g.conv(g.input("n", 3, 8, 9), 3, 6, **conv))
        g.output(g.node("Sigmoid", g.bn(y, channels), outputs=("out",)), rank=rank)

    return build


def before(between: Callable[[Builder, str], str], **conv: Any) -> Any:
    """Sigmoid, BatchNormalization (3 channels), something, Conv."""

    def build(g: Builder) -> None:
        y = between(g, g.bn(g.node("Sigmoid", g.input("n", 3, 8, 9)), 3))
        g.output(g.conv(y, 3, 6, **conv), rank=4)

    return build


def direct(_g: Builder, x: str) -> str:
    return x


def doubled(g: Builder, x: str) -> str:
    return g.node("Resize", x, "", g.init("scales", value=np.asarray([1, 1, 2, 2.0])), mode="linear")


def through(operator: str, *constants: Any, **attributes: Any) -> Callable[[Builder, str], str]:
    def add(g: Builder, x: str) -> str:
        names = [g.init(f"c{len(g.stored)}", value=np.asarray(item)) for item in constants]
        return g.node(operator, x, *names, **attributes)

    return add


def transposed(g: Builder, *, group: int, cout: int, **attributes: Any) -> None:
    w = g.init("w", 4, cout // group, 3, 3)
    y = g.node("ConvTranspose", g.input("n", 4, 5, 6), w, name="up", group=group, **attributes)
    g.output(g.bn(y, cout), rank=4)


def gemm(g: Builder, *, trans_b: int = 0, bias: Any = None, **attributes: Any) -> None:
    x = g.input("n", 5)
    inputs = [x, g.init("w", *((7, 5) if trans_b else (5, 7)))]
    if bias is not None:
        inputs.append(g.init("b", value=bias))
    g.output(g.bn(g.node("Gemm", *inputs, name="fc", transB=trans_b, **attributes), 7), rank=2)


def matmul(g: Builder, *, features: int, add: bool = True, swapped: bool = False, channels: int = 4) -> None:
    """(n, 4, 5) @ (5, features) + bias, normalised over axis 1."""
    y = g.node("MatMul", g.input("n", 4, 5), g.init("w", 5, features), name="product")
    if add:
        b = g.init("b", features)
        y = g.node("Add", *((b, y) if swapped else (y, b)), name="plus")
    g.output(g.bn(y, channels), rank=3)


def matmul_2d(g: Builder, *, swapped: bool = False, add: bool = True) -> None:
    y = g.node("MatMul", g.input("n", 5), g.init("w", 5, 7), name="product")
    if add:
        b = g.init("b", 7)
        y = g.node("Add", *((b, y) if swapped else (y, b)), name="plus")
    g.output(g.node("Sigmoid", g.bn(y, 7)), rank=2)


def channels_last(g: Builder) -> None:
    """(n, 5, 3) @ W, the channels moved to axis 1, normalised, and moved back."""
    y = g.node("MatMul", g.input("n", 5, 3), g.init("w", 3, 4), name="product")
    y = g.bn(g.node("Transpose", y, perm=[0, 2, 1]), 4)
    g.output(g.node("Transpose", y, perm=[0, 2, 1], outputs=("out",)), rank=3)


def default_epsilon(g: Builder) -> None:
    """No epsilon attribute: the default is 1e-5 in float32, which a tiny variance shows."""
    y = g.node("Identity", g.conv(g.input("n", 3, 8, 9), 3, 6))
    names = g.statistics(6, "bn")
    del g.stored[-1]  # the variance
    given = g.node("BatchNormalization", y, *names[:3], g.init("tiny", value=np.full(6, 1e-6)), name="bn")
    g.output(given, rank=4)


def second_consumer(g: Builder) -> None:
    y = g.conv(g.input("n", 3, 8, 9), 3, 6)
    g.output(g.bn(y, 6), g.node("Relu", y), rank=4)


def output_between(g: Builder) -> None:
    y = g.conv(g.input("n", 3, 8, 9), 3, 6)
    g.output(y, g.bn(y, 6), rank=4)


def two_convs(g: Builder, *, alike: bool) -> None:
    """One weight in two convolutions, a norm behind each."""
    x = g.input("n", 3, 8, 9)
    w = g.init("w", 6, 3, 3, 3)
    first, second = (g.node("Conv", x, w, name=f"conv{index}") for index in (1, 2))
    parameters = g.statistics(6, "shared")
    a = g.bn(first, 6, name="bn1", parameters=parameters)
    b = g.node(
        "BatchNormalization", second, *(parameters if alike else g.statistics(6, "own")), name="bn2", epsilon=1e-3
    )
    if alike:
        g.nodes[-2].attribute[0].f = 1e-3
    g.output(g.node("Tanh", a), g.node("Tanh", b), rank=4)


def shared_weight(g: Builder) -> None:
    """The weight of a folded convolution is read by another one, without a norm."""
    x, w = g.input("n", 3, 8, 9), g.init("w", 6, 3, 3, 3)
    a, b = g.bn(g.node("Conv", x, w, name="conv1"), 6), g.node("Conv", x, w, name="conv2")
    g.output(g.node("Tanh", a), g.node("Tanh", b), rank=4)


def weight_is_output(g: Builder) -> None:
    y = g.bn(g.conv(g.input("n", 3, 8, 9), 3, 6), 6)
    g.output(y, rank=4)
    g.outputs.append(helper.make_tensor_value_info("conv.w", TensorProto.FLOAT, [6, 3, 3, 3]))


def overridable(g: Builder, *, what: str) -> None:
    w = g.init("conv.w", 6, 3, 3, 3, overridable=what == "weight")
    y = g.node("Conv", g.input("n", 3, 8, 9), w, name="conv")
    g.output(g.node("Sigmoid", g.bn(y, 6, overridable=what == "statistics")), rank=4)


def constant_nodes(g: Builder) -> None:
    """The weight behind Constant, Identity and Reshape nodes."""
    flat = g.rng.standard_normal(6 * 27).astype("float32")
    c = g.node("Constant", outputs=("flat",), value=helper.make_tensor("value", TensorProto.FLOAT, [6 * 27], flat))
    w = g.node("Reshape", g.node("Identity", c), g.init("shape", value=[6, 3, 3, 3]))
    g.output(g.bn(g.node("Conv", g.input("n", 3, 8, 9), w, name="conv"), 6), rank=4)


def computed_weight(g: Builder) -> None:
    """A weight that depends on the input."""
    x = g.input("n", 3, 8, 9)
    w = g.node("Mul", g.init("w", 6, 3, 3, 3), g.node("ReduceMax", x, keepdims=0))
    g.output(g.bn(g.node("Conv", x, w, name="conv"), 6), rank=4)


def training(g: Builder) -> None:
    y = g.conv(g.input("n", 3, 8, 9), 3, 6)
    y = g.bn(y, 6, outputs=("y", "m", "v"), training_mode=1)
    g.output(g.bn(g.conv(y, 6, 6, name="conv2"), 6, name="bn2"), rank=4)


def five_outputs(g: Builder) -> None:
    y = g.conv(g.input("n", 3, 8, 9), 3, 6)
    g.output(g.bn(y, 6, outputs=("y", "mean", "var", "saved_mean", "saved_var")), rank=4)


def branch(g: Builder, name: str, nodes: list[Any]) -> Any:
    value = helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)
    return helper.make_graph(nodes, name, [], [value])


def inside_if(g: Builder) -> None:
    """A norm in a branch, and one before the If."""
    flag = g.init("flag", value=np.asarray(True))
    y = g.bn(g.conv(g.input("n", 3, 8, 9), 3, 6), 6)
    inner = helper.make_node("BatchNormalization", [y, *g.statistics(6, "inner")], ["inside"], name="bn_inside")
    other = helper.make_node("Relu", [y], ["other"])
    z = g.node("If", flag, then_branch=branch(g, "then", [inner]), else_branch=branch(g, "else", [other]))
    g.output(z, rank=4)


def read_by_if(g: Builder) -> None:
    """The value that the norm reads is read by a branch too: the convolution must stay as it is."""
    flag = g.init("flag", value=np.asarray(True))
    y = g.conv(g.input("n", 3, 8, 9), 3, 6)
    then, other = helper.make_node("Relu", [y], ["a"]), helper.make_node("Tanh", [y], ["b"])
    z = g.node("If", flag, then_branch=branch(g, "then", [then]), else_branch=branch(g, "else", [other]))
    g.output(g.bn(y, 6), z, rank=4)


def weight_in_if(g: Builder) -> None:
    """The convolution's weight is read by a branch too: it must keep its numbers."""
    flag, x = g.init("flag", value=np.asarray(True)), g.input("n", 3, 8, 9)
    y = g.bn(g.conv(x, 3, 6), 6)
    then, other = helper.make_node("Conv", [x, "conv.w"], ["a"]), helper.make_node("Conv", [x, "conv.w"], ["b"])
    z = g.node("If", flag, then_branch=branch(g, "then", [then]), else_branch=branch(g, "else", [other]))
    g.output(g.node("Tanh", y), z, rank=4)


def in_function(g: Builder) -> None:
    g.opsets.append(helper.make_opsetid("mine", 1))
    inner = helper.make_node("BatchNormalization", ["x", "s", "b", "m", "v"], ["y"], name="bn_inside")
    g.functions.append(
        helper.make_function(
            "mine", "Norm", ["x", "s", "b", "m", "v"], ["y"], [inner], [helper.make_opsetid("", g.opset)]
        )
    )
    y = g.node("Norm", g.conv(g.input("n", 3, 8, 9), 3, 6), *g.statistics(6, "f"), domain="mine")
    g.output(g.bn(g.conv(y, 6, 6, name="conv2"), 6, name="bn2"), rank=4)


def rep_vgg(g: Builder) -> None:
    """conv3(x) + conv1(x) + BN(x)."""
    x = g.node("Sigmoid", g.input("n", 6, 8, 9))
    a = g.bn(g.conv(x, 6, 6, name="c3", pads=[1] * 4), 6, name="bn3")
    b = g.bn(g.conv(x, 6, 6, 1, name="c1"), 6, name="bn1")
    total = g.node("Add", g.node("Add", a, b), g.bn(x, 6, name="bn0"))
    g.output(g.node("Relu", total, outputs=("out",)), rank=4)


def branches(g: Builder, operator: str, *, second_norm: bool = False) -> None:
    x = g.input("n", 3, 8, 9)
    a, b = g.conv(x, 3, 6, name="a"), g.conv(x, 3, 6, name="b")
    b = g.bn(b, 6, name="bn_b") if second_norm else b
    joined = g.node(operator, a, b, **({"axis": 1} if operator == "Concat" else {}))
    g.output(g.node("Sigmoid", g.bn(joined, 12 if operator == "Concat" else 6), outputs=("out",)), rank=4)


def split(g: Builder) -> None:
    """One half of a convolution's channels is normalised, the other is not."""
    y = g.conv(g.input("n", 3, 8, 9), 3, 6)
    more = (g.init("sizes", value=[2, 4]),) if g.opset >= 13 else ()
    given = {} if g.opset >= 13 else {"split": [2, 4]}
    left = g.node("Split", y, *more, outputs=("left", "right"), axis=1, **given)
    g.output(g.node("Tanh", left), g.bn("right", 4), rank=4)


def flattened(g: Builder) -> None:
    """Norm, pooling, flatten, linear: each channel becomes several features."""
    y = g.bn(g.node("Sigmoid", g.input("n", 3, 4, 4)), 3)
    y = g.node("Flatten", g.node("AveragePool", y, kernel_shape=[2, 2], strides=[2, 2]))
    g.output(g.node("Gemm", y, g.init("w", 12, 5), name="fc"), rank=2)


def shuffle(g: Builder) -> None:
    """Channel shuffle by Reshape, Transpose, Reshape."""
    y = g.conv(g.input("n", 3, 8, 9), 3, 6)
    y = g.node("Reshape", y, g.init("s1", value=[-1, 2, 3, 6, 7]))
    y = g.node("Reshape", g.node("Transpose", y, perm=[0, 2, 1, 3, 4]), g.init("s2", value=[-1, 6, 6, 7]))
    g.output(g.bn(y, 6), rank=4)


def shaped_by_input(g: Builder) -> None:
    """A Reshape whose target is computed from the shape of the value itself."""
    y = g.conv(g.input("n", 3, 8, 9), 3, 6)
    n = g.node("Gather", g.node("Shape", y), g.init("zero", value=[0]), axis=0)
    target = g.node("Concat", n, g.init("rest", value=[6, -1]), axis=0)
    g.output(g.bn(g.node("Reshape", y, target), 6), rank=3)


def plain_arithmetic(g: Builder) -> None:
    y = g.conv(g.input("n", 3, 8, 9), 3, 6)
    y = g.node("Mul", g.node("Sub", y, g.init("m", 6, 1, 1)), g.init("s", 1, 6, 1, 1))
    g.output(g.bn(g.node("Neg", y), 6), rank=4)


def big_half(g: Builder) -> None:
    """Gains that float16 can't hold."""
    y = g.conv(g.input("n", 3, 8, 9), 3, 6)
    values = [np.full(6, 60000.0), np.zeros(6), np.zeros(6), np.full(6, 1e-4)]
    names = [g.init(f"p{index}", value=value) for index, value in enumerate(values)]
    g.output(g.bn(y, 6, parameters=names), rank=4)


def two_norms(g: Builder) -> None:
    g.output(g.bn(g.bn(g.conv(g.input("n", 3, 8, 9), 3, 6), 6, name="bn1"), 6, name="bn2"), rank=4)


def stuck_twice(g: Builder) -> None:
    """Two norms in a row that no layer can take: one remains."""
    y = g.bn(g.bn(g.node("Sigmoid", g.input("n", 6, 8, 9)), 6, name="bn1"), 6, name="bn2")
    g.output(g.node("Sigmoid", y, outputs=("out",)), rank=4)


def output_is_taken_over(g: Builder) -> None:
    g.output(g.bn(g.node("Identity", g.conv(g.input("n", 3, 8, 9), 3, 6)), 6, outputs=("answer",)), rank=4)


def static_map(g: Builder) -> None:
    """A shift behind zero padding with fixed sizes and a stride: a map of constants is smaller than the input."""
    y = g.bn(g.node("Sigmoid", g.input("n", 3, 8, 8)), 3)
    g.output(g.conv(y, 3, 2, name="conv", pads=[1] * 4, strides=[4, 4]), rank=4)


def positive_before(operator: str) -> Any:
    def build(g: Builder) -> None:
        y = g.node(operator, g.conv(g.input("n", 3, 8, 9), 3, 6), **POOL)
        g.output(g.node("Sigmoid", g.bn(y, 6, positive=True)), rank=4)

    return build


POOL: dict[str, Any] = {"kernel_shape": [2, 2], "strides": [2, 2]}
GONE, IN, OUT = (("bn", "through"),), (("bn", "backward"),), (("bn", "forward"),)
STAYS, KEPT = (("bn", "affine"),), (("bn", "kept"),)

PLAIN = (
    # the layer before it
    Case("conv", image(direct), IN),
    Case("conv-no-bias", image(direct, bias=False), IN),
    Case("conv-grouped", image(direct, group=3), IN),
    Case("conv-strided-padded", image(direct, strides=[2, 1], pads=[1, 2, 0, 1], dilations=[1, 2]), IN),
    Case("conv-same-upper", image(direct, auto_pad="SAME_UPPER"), IN),
    Case("transposed", lambda g: transposed(g, group=1, cout=6), IN),
    Case("transposed-equal-channels", lambda g: transposed(g, group=1, cout=4, strides=[2, 1], pads=[1, 0, 1, 1]), IN),
    Case("transposed-grouped-multiplier", lambda g: transposed(g, group=2, cout=6, strides=[2, 2], output_padding=[1, 0]), IN),
    Case("gemm", gemm, IN),
    Case("gemm-transposed", lambda g: gemm(g, trans_b=1, bias=np.arange(7.0)), IN),
    Case("gemm-alpha-beta", lambda g: gemm(g, trans_b=1, bias=np.arange(7.0), alpha=0.5, beta=3.0), IN),
    Case("gemm-alpha-row-bias", lambda g: gemm(g, bias=np.arange(7.0)[None], alpha=-2.0, beta=0.25), IN),
    Case("gemm-scalar-bias", lambda g: gemm(g, bias=np.asarray(1.5), alpha=-2.0), IN),
    Case("gemm-opset-9", lambda g: gemm(g, bias=np.arange(7.0)), IN, options={"opset": 9}),
    Case("matmul", lambda g: matmul_2d(g, add=False), IN),
    Case("matmul-add", matmul_2d, IN),
    Case("matmul-add-swapped", lambda g: matmul_2d(g, swapped=True), IN),
    Case("matmul-3d", lambda g: matmul(g, features=7), STAYS, "it normalises axis 1"),
    Case("matmul-3d-equal-sizes", lambda g: matmul(g, features=4), STAYS, "equal sizes would not make it right"),
    Case("matmul-channels-last", channels_last, GONE),
    Case("constant-nodes", constant_nodes, IN),
    Case("default-epsilon", default_epsilon, IN),
    # across what lies between
    Case("dropout", image(through("Dropout")), IN),
    Case("average-pool", image(through("AveragePool", **POOL)), GONE),
    Case("average-pool-padded", image(through("AveragePool", pads=[1] * 4, **POOL)), GONE),
    Case("average-pool-zeros-counted", image(through("AveragePool", pads=[1] * 4, count_include_pad=1, **POOL)), STAYS,
         "averages or pads with zeros"),
    Case("global-average", image(through("GlobalAveragePool")), GONE),
    Case("reduce-mean-18", image(through("ReduceMean", [2, 3])), GONE),
    Case("reduce-mean-13", image(through("ReduceMean", axes=[2, 3])), GONE, options={"opset": 13}),
    Case("max-pool-both-signs", image(through("MaxPool", **POOL)), STAYS, "keeps the order"),
    Case("max-pool-positive", positive_before("MaxPool"), GONE),
    Case("resize", image(doubled), GONE),
    Case("upsample-9", image(through("Upsample", [1.0, 1.0, 2.0, 2.0], mode="nearest")), GONE, options={"opset": 9}),
    Case("pad-reflect", image(through("Pad", [0, 0, 1, 1, 0, 0, 1, 1], mode="reflect")), GONE),
    Case("pad-zeros", image(through("Pad", [0, 0, 1, 1, 0, 0, 1, 1])), STAYS, "pads with zeros"),
    Case("depth-to-space", image(through("DepthToSpace", blocksize=1, mode="CRD")), GONE),
    Case("depth-to-space-dcr", image(through("DepthToSpace", blocksize=1)), STAYS, "mode DCR"),
    Case("gather-channels", image(through("Gather", [5, 0, 1, 4, 3, 2], axis=1)), GONE),
    Case("gather-some-twice", image(through("Gather", [0, 0, 1, 4, 3, 2], axis=1)), STAYS, "more than once"),
    Case("slice", image(through("Slice", [1], [5], [1]), channels=4), GONE),
    Case("relu-between", image(through("Relu")), STAYS, "relu"),
    Case("clip-between", image(through("Clip", 0.0, 6.0)), STAYS, "clip"),
    Case("tanh-between", image(through("Tanh")), STAYS, "no rule moves a scale and shift across"),
    Case("concat", lambda g: branches(g, "Concat"), GONE),
    Case("add", lambda g: branches(g, "Add"), GONE),
    Case("sub", lambda g: branches(g, "Sub"), GONE),
    Case("add-norm-below", lambda g: branches(g, "Add", second_norm=True), (("bn_b", "backward"), ("bn", "through"))),
    Case("mul", lambda g: branches(g, "Mul"), STAYS, "product of two values"),
    Case("split", split, GONE),
    Case("split-11", split, GONE, options={"opset": 11}),
    Case("channel-shuffle", shuffle, GONE),
    Case("reshape-by-shape", shaped_by_input, GONE),
    Case("plain-arithmetic", plain_arithmetic, (("neg3", "backward"), ("bn", "backward"))),
    # the layer after it
    Case("before-conv", before(direct), OUT),
    Case("before-conv-grouped", before(direct, group=3), OUT),
    Case("before-conv-padded", before(direct, pads=[1] * 4), STAYS, "pads its input with zeros"),
    Case("before-conv-same", before(direct, auto_pad="SAME_LOWER"), STAYS, "pads its input with zeros"),
    Case("before-conv-through-pool", before(through("AveragePool", **POOL)), GONE),
    Case("before-conv-edge-padding", before(through("Pad", [0, 0, 1, 1, 0, 0, 1, 1], mode="edge")), GONE),
    Case("before-gemm-flattened", flattened, GONE),
    Case("map-of-constants", static_map, OUT, fold={"max_growth": 10.0}),
    # several at once
    Case("two-in-a-row", two_norms, (("bn1", "backward"), ("bn2", "backward"))),
    Case("two-stuck", stuck_twice, (("bn1", "merged"), ("bn2", "affine"))),
    Case("rep-vgg", rep_vgg, (("bn3", "backward"), ("bn1", "backward"), ("bn0", "merged"))),
    # who else reads it
    Case("second-consumer", second_consumer, STAYS, "second consumer"),
    Case("second-consumer-is-output", output_between, STAYS, "second consumer"),
    Case("shared-weight", shared_weight, STAYS, "used 2 times"),
    Case("shared-weight-copied", shared_weight, IN, fold={"max_growth": 2.0}),
    Case("shared-alike", lambda g: two_convs(g, alike=True), (("bn1", "backward"), ("bn2", "backward"))),
    Case("shared-unlike", lambda g: two_convs(g, alike=False), (("bn1", "affine"), ("bn2", "affine")), "used 2 times"),
    Case("weight-is-output", weight_is_output, STAYS, "used 2 times"),
    Case("weight-is-output-copied", weight_is_output, IN, fold={"max_growth": 2.0}),
    Case("overridable-weight", lambda g: overridable(g, what="weight"), STAYS, "a caller may replace"),
    Case("overridable-statistics", lambda g: overridable(g, what="statistics"), KEPT, "a caller may replace"),
    Case("computed-weight", computed_weight, STAYS, "computed in the graph"),
    Case("output-taken-over", output_is_taken_over, IN),
    # what can't be read, or lies elsewhere
    Case("training-mode", training, (("bn", "kept"), ("bn2", "backward")), "training mode"),
    Case("five-outputs", five_outputs, KEPT, "training mode", options={"opset": 9}, runs=False),
    Case("inside-if", inside_if, (("bn", "backward"), ("bn_inside", "kept")), "inside the body of an If"),
    Case("value-read-by-if", read_by_if, STAYS, "second consumer"),
    Case("weight-read-by-if", weight_in_if, STAYS, "used 3 times"),
    Case("weight-read-by-if-copied", weight_in_if, IN, fold={"max_growth": 3.0}),
    Case("in-function", in_function, (("bn2", "backward"), ("bn_inside", "kept")), "body of the function Norm"),
    # versions and precisions
    Case("opset-7", image(direct), IN, options={"opset": 7, "ir": 3}),
    Case("opset-9-ir-3", image(direct), IN, options={"opset": 9, "ir": 3}),
    Case("opset-13", image(direct), IN, options={"opset": 13}),
    Case("opset-22", image(direct), IN, options={"opset": 22, "ir": 10}),
    Case("opset-9-stays", image(through("Tanh")), STAYS, "tanh", options={"opset": 9}),
    Case("half", image(direct), IN, options={"dtype": "float16"}),
    Case("half-overflow", big_half, STAYS, "does not fit into torch.float16", options={"dtype": "float16"},
         runs=False),
    Case("double", gemm, IN, options={"dtype": "float64"}),
    # with a bound per channel allowed
    Case("clamps", before(through("Relu")), GONE, fold={"clamps": True}),
    Case("clamps-clip", before(through("Clip", 0.0, 6.0)), GONE, fold={"clamps": True}),
    Case("clamps-opset-7", before(through("Relu")), STAYS, "relu", fold={"clamps": True}, options={"opset": 7, "ir": 3}),
)  # fmt: skip
