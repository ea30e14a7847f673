"""Reshape nodes with computed targets: constant where that is proved, bit for bit the same, and otherwise unchanged."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from cases import randomise
from onnx import ModelProto, TensorProto, numpy_helper
from support.onnx_builder import Builder
from torch import Tensor, nn

import bnexport
from bnexport.exporting.export_onnx import export_onnx
from bnexport.exporting.signature import ExportJob, signature_of
from bnexport.onnx_files.reshape_targets import simplify_reshapes

Build = Callable[[Builder], str]


def size(b: Builder, value: str, axis: int, name: str = "") -> str:
    """Add one size of a value as a tensor of one element, as torch.export writes it."""
    return b.node("Shape", value, start=axis, end=axis + 1, name=name or f"size_{value}_{axis}")


def joined(b: Builder, *parts: str | list[int]) -> str:
    """Add a target from computed sizes and numbers."""
    names = [part if isinstance(part, str) else b.init(f"c{len(b.stored)}", value=part) for part in parts]
    return b.node("Concat", *names, axis=0)


def reshape(b: Builder, value: str, target: str, **attributes: int) -> str:
    return b.node("Reshape", value, target, name="reshape", **attributes)


def image(b: Builder, *shape: int | str) -> str:
    return b.input(*(shape or ("batch", 6, 4, 5)))


# --- proved -----------------------------------------------------------------------------------------------------------


def flatten(b: Builder) -> str:
    x = image(b)
    scalar = b.node("Squeeze", size(b, x, 0), b.init("zero", value=[0]))
    listed = b.node("Reshape", scalar, b.init("flat", value=[-1]), allowzero=0)
    return reshape(b, x, joined(b, listed, [120]), allowzero=1)


def gathered(b: Builder) -> str:
    """torch's older exporter writes ``x.view(x.size(0), -1)`` in this way."""
    x = image(b)
    picked = b.node("Gather", b.node("Shape", x), b.init("first", value=0), axis=0)
    return reshape(b, x, joined(b, b.node("Unsqueeze", picked, b.init("axes", value=[0])), [-1]))


def sliced(b: Builder) -> str:
    x = image(b)
    ends = [b.init(name, value=[value]) for name, value in (("start", 0), ("end", 1), ("axis", 0), ("step", 1))]
    return reshape(b, x, joined(b, b.node("Slice", b.node("Shape", x), *ends), [-1]))


def of_the_input(b: Builder) -> str:
    """The batch is that of another value; a convolution and a pooling keep it."""
    x = image(b)
    y = b.node("MaxPool", b.node("Relu", b.conv(x, 6, 3)), kernel_shape=[2, 2])
    return reshape(b, y, joined(b, size(b, x, 0), [6]), allowzero=1)


def shuffled(b: Builder) -> str:
    x = image(b)
    first = b.node("Reshape", x, joined(b, size(b, x, 0), [2, 3, 4, 5]), allowzero=1)
    turned = b.node("Transpose", first, perm=[0, 2, 1, 3, 4])
    return reshape(b, turned, joined(b, size(b, x, 0, "again"), [6, 4, 5]), allowzero=1)


def of_any_size(b: Builder) -> str:
    """Batch and height stay in place, and channels are split at the end."""
    x = b.node("Transpose", image(b, "batch", 6, "height", "width"), perm=[0, 2, 3, 1])
    return reshape(b, x, joined(b, *(size(b, x, axis) for axis in range(3)), [2, 3]), allowzero=1)


def turned(b: Builder) -> str:
    """The batch is not at its place, and the products prove it."""
    x = b.node("Transpose", image(b, "batch", 6), perm=[1, 0])
    return reshape(b, x, joined(b, size(b, x, 1), [6]), allowzero=1)


def counted(b: Builder) -> str:
    """Only the batch varies; the target has the channels of the file."""
    x = image(b)
    return reshape(b, x, joined(b, size(b, x, 0), size(b, x, 1), [-1]))


PROVED: dict[str, tuple[Build, list[int]]] = {
    "flatten": (flatten, [0, 120]),
    "gathered": (gathered, [0, 120]),
    "sliced": (sliced, [0, 120]),
    "of-the-input": (of_the_input, [0, 6]),
    "shuffled": (shuffled, [0, 6, 4, 5]),
    "of-any-size": (of_any_size, [0, 0, 0, 2, 3]),
    "turned": (turned, [-1, 6]),
    "counted": (counted, [0, 6, 20]),
}
INTEGERS = ("Shape", "Gather", "Squeeze", "Unsqueeze", "Slice", "Concat", "Constant")


@pytest.mark.parametrize("name", PROVED)
def test_a_proved_target_is_a_constant_and_every_batch_gives_the_same_bits(name: str) -> None:
    build, target = PROVED[name]
    before, after = pair(build)
    assert target_of(after) == target
    assert not [node.op_type for node in after.graph.node if node.op_type in INTEGERS]
    assert {tensor.name for tensor in after.graph.initializer if tensor.data_type == TensorProto.INT64} == {
        node.input[1] for node in after.graph.node if node.op_type == "Reshape"
    }
    onnx.checker.check_model(after, full_check=True)
    assert_same(before, after, 1, 2, 7)
    assert run(after, fed(before, 0)).shape == (0, *run(before, fed(before, 1)).shape[1:])


@pytest.mark.parametrize("seed", range(12))
def test_random_shapes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = [int(n) for n in rng.integers(1, 5, size=rng.integers(1, 4))]
    split = [factor for n in sizes for factor in ((2, n) if rng.random() < 0.5 else (n,))]
    wide = [2 * n if len(split) > len(sizes) and at == 0 else n for at, n in enumerate(sizes)]
    number = int(np.prod(wide))
    target = [number] if rng.random() < 0.4 else [-1] if rng.random() < 0.5 else [*wide[::-1]]

    def build(b: Builder) -> str:
        x = image(b, "batch", *wide)
        return reshape(b, x, joined(b, size(b, x, 0), target), allowzero=int(-1 not in target))

    before, after = pair(build)
    assert target_of(after)[0] == 0
    assert_same(before, after, 1, 2, 7)
    assert len(run(after, fed(before, 0))) == 0


# --- not proved -------------------------------------------------------------------------------------------------------


def other_batch(b: Builder) -> str:
    x = image(b)
    return reshape(b, x, joined(b, size(b, b.input("other", 2, name="y"), 0), [120]))


def unnamed_batches(b: Builder) -> str:
    x = b.input(None, 6, name="x")  # type: ignore[arg-type]
    return reshape(b, x, joined(b, size(b, b.input(None, 2, name="y"), 0), [6]))  # type: ignore[arg-type]


def product(b: Builder) -> str:
    x = image(b, "batch", "height", 5)
    both = b.node("Mul", size(b, x, 0), size(b, x, 1))
    return reshape(b, x, joined(b, both, [5]))


def two_turned(b: Builder) -> str:
    x = image(b, "batch", "height")
    return reshape(b, x, joined(b, size(b, x, 1), size(b, x, 0)))


def another_axis(b: Builder) -> str:
    """The target fits images of 5 pixels alone: -1 would turn other images into batches."""
    x = image(b, "batch", "height", 5)
    return reshape(b, x, joined(b, size(b, x, 0), [1, 25]))


def rows_as_batch(b: Builder) -> str:
    x = image(b, "batch", "height", 5)
    return reshape(b, x, joined(b, size(b, x, 1), [-1]))


def real_zero(b: Builder) -> str:
    x = image(b, "batch", 0, 3)
    return reshape(b, x, joined(b, size(b, x, 0), [0, 7]), allowzero=1)


def half(b: Builder) -> str:
    x = image(b, "batch", 6)
    return reshape(b, x, joined(b, b.node("Div", size(b, x, 0), b.init("two", value=[2])), [12]))


def declared(b: Builder) -> str:
    """The file claims a batch for a value whose size is not known."""
    x, y = image(b, "batch", 6), b.input("length", name="y")
    kept = b.node("Compress", y, b.node("Greater", y, b.init("limit", value=0.0)), axis=0)
    b.claims = [onnx.helper.make_tensor_value_info(kept, TensorProto.FLOAT, ["batch"])]  # type: ignore[attr-defined]
    return reshape(b, x, joined(b, size(b, kept, 0), [6]))


def replaceable(b: Builder) -> str:
    x = image(b)
    name = b.init("rest", value=[120], overridable=True)
    return reshape(b, x, b.node("Concat", size(b, x, 0), name, axis=0))


LEFT: dict[str, Build] = {
    "batch of another input": other_batch,
    "batches without a name": unnamed_batches,
    "product of two sizes": product,
    "two sizes turned round": two_turned,
    "another axis than the batch": rows_as_batch,
    "a size that is zero": real_zero,
    "half a batch": half,
    "a shape that the file claims": declared,
    "a number that a caller may replace": replaceable,
}


@pytest.mark.parametrize("name", LEFT)
def test_an_unproved_target_is_kept_byte_for_byte(name: str) -> None:
    before, after = pair(LEFT[name])
    assert after == before


def test_sizes_that_do_not_fit_fail_as_before() -> None:
    before, after = pair(another_axis)
    assert target_of(after) == [0, 1, 25]
    for model in (before, after):
        assert run(model, {"x": np.zeros((2, 5, 5), np.float32)}).shape == (2, 1, 25)
        with pytest.raises(Exception, match="cannot be reshaped"):
            run(model, {"x": np.zeros((2, 10, 5), np.float32)})


def test_sizes_that_something_else_reads_stay() -> None:
    def build(b: Builder) -> str:
        x = image(b)
        first = size(b, x, 0)
        rows = b.node("Cast", first, to=TensorProto.FLOAT)
        return b.node("Mul", reshape(b, x, joined(b, first, [120])), rows)

    before, after = pair(build)
    assert target_of(after) == [0, 120]
    assert [node.op_type for node in after.graph.node] == ["Shape", "Cast", "Reshape", "Mul"]
    assert_same(before, after, 3)


@pytest.mark.parametrize(("opset", "ir"), [(9, 3), (9, 4), (13, 7), (21, 10)])
def test_old_and_new_files(opset: int, ir: int) -> None:
    def build(b: Builder) -> str:
        x = image(b)
        if opset < 10:
            batch = b.node("Slice", b.node("Shape", x), starts=[0], ends=[1])
        else:
            batch = b.node("Slice", b.node("Shape", x), b.init("start", value=[0]), b.init("end", value=[1]))
        return reshape(b, x, joined(b, batch, [-1]))

    before, after = pair(build, opset=opset, ir=ir)
    assert target_of(after) == [0, 120]
    onnx.checker.check_model(after, full_check=True)
    assert [value.name for value in after.graph.input][:1] == ["x"]
    assert_same(before, after, 2)


def test_a_target_that_is_an_attribute_is_left() -> None:
    b = Builder(opset=4, ir=3)
    x = image(b)
    rows = b.node("Reshape", b.node("Cast", b.node("Shape", x), to="FLOAT"), shape=[2, 2])
    b.output(b.node("Reshape", x, shape=[0, 120], name="reshape"), rows)
    graph = onnx.helper.make_graph(b.nodes, "g", b.inputs, b.outputs, b.stored)
    before = onnx.helper.make_model(graph, opset_imports=b.opsets, ir_version=3)
    after = ModelProto()
    after.CopyFrom(before)
    assert simplify_reshapes(after) == 0
    assert after == before


# --- exporting a network, and folding a file --------------------------------------------------------------------------


class Views(nn.Module):
    """Common spellings: a view by the batch, a flatten, a channel shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.first, self.second = nn.Linear(64, 8), nn.Linear(256, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        n, _, h, w = x.shape
        x = x.view(n, 2, 2, h, w).transpose(1, 2).reshape(n, 4, h, w)
        pooled = nn.functional.avg_pool2d(x, 2)
        return self.first(pooled.view(pooled.size(0), -1)) + self.second(torch.flatten(x, 1))


def test_an_exported_network_has_no_shape_nodes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = (torch.randn(2, 3, 8, 8),)
    folded = bnexport.fold(randomise(Views()).eval(), inputs).model
    signature = signature_of(folded, inputs, input_names=("x",))
    export_onnx(ExportJob(folded, inputs, signature), file := tmp_path / "model.onnx")
    written = onnx.load(file)
    kinds = [node.op_type for node in written.graph.node]
    assert kinds == [
        "Conv",
        "Reshape",
        "Transpose",
        "Reshape",
        "AveragePool",
        "Reshape",
        "Gemm",
        "Reshape",
        "Gemm",
        "Add",
    ]
    for batch in (0, 1, 5):
        x = torch.randn(batch, 3, 8, 8)
        with torch.no_grad():
            wanted = folded(x).numpy() if batch else np.zeros((0, 8), np.float32)
        np.testing.assert_allclose(run(written, {"x": x.numpy()}), wanted, rtol=0, atol=1e-5)


def test_a_folded_file_has_no_shape_nodes() -> None:
    def build(b: Builder) -> str:
        x = image(b)
        y = b.node("Relu", b.bn(b.conv(x, 6, 3), 3))
        return reshape(b, y, joined(b, size(b, x, 0), [18]), allowzero=1)

    before = model_of(build)
    result = bnexport.fold_onnx(before)
    assert result.changed
    assert [node.op_type for node in result.model.graph.node] == ["Conv", "Relu", "Reshape"]
    assert result.report.error is not None
    feed = fed(before, 3)
    np.testing.assert_allclose(run(result.model, feed), run(before, feed), rtol=1e-4, atol=1e-4)


def test_a_file_without_batch_norm_is_changed_and_proved_too() -> None:
    before = model_of(flatten)
    result = bnexport.fold_onnx(before)
    assert result.changed
    assert result.report.error == 0.0
    assert [node.op_type for node in result.model.graph.node] == ["Reshape"]


# --- help -------------------------------------------------------------------------------------------------------------


def model_of(build: Build, *, opset: int = 18, ir: int = 8) -> ModelProto:
    b = Builder(opset=opset, ir=ir)
    b.output(build(b))
    graph = onnx.helper.make_graph(b.nodes, "g", b.inputs, b.outputs, b.stored, value_info=getattr(b, "claims", []))
    model: ModelProto = onnx.helper.make_model(graph, opset_imports=b.opsets, ir_version=ir)
    found = onnx.shape_inference.infer_shapes(model, data_prop=True).graph.output[0].type.tensor_type
    for _ in found.shape.dim or (1, 2):
        model.graph.output[0].type.tensor_type.shape.dim.add()
    return model


def pair(build: Build, *, opset: int = 18, ir: int = 8) -> tuple[ModelProto, ModelProto]:
    """Return a model, and its copy after the rewriting."""
    before = model_of(build, opset=opset, ir=ir)
    after = ModelProto()
    after.CopyFrom(before)
    assert (simplify_reshapes(after) > 0) == (after != before)
    return before, after


def target_of(model: ModelProto) -> list[int]:
    """Return the constant target of the node "reshape"."""
    (node,) = [node for node in model.graph.node if node.name == "reshape"]
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    stored |= {item.output[0]: item.attribute[0].t for item in model.graph.node if item.op_type == "Constant"}
    return [int(number) for number in numpy_helper.to_array(stored[node.input[1]])]


def fed(model: ModelProto, batch: int) -> dict[str, np.ndarray]:
    """Return random inputs; varying sizes other than the batch are 3."""
    stored, rng = {tensor.name for tensor in model.graph.initializer}, np.random.default_rng(batch)
    return {
        value.name: rng.standard_normal(
            [dim.dim_value or (batch if at == 0 else 3) for at, dim in enumerate(value.type.tensor_type.shape.dim)]
        ).astype(np.float32)
        for value in model.graph.input
        if value.name not in stored
    }


def assert_same(before: ModelProto, after: ModelProto, *batches: int) -> None:
    for batch in batches:
        feed = fed(before, batch)
        np.testing.assert_array_equal(run(after, feed), run(before, feed), strict=True)


def run(model: ModelProto, feeds: dict[str, np.ndarray]) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    # ONNX Runtime's own optimisation writes -1 for a computed batch without a proof: sizes that do not fit would pass.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, feeds)
    return np.asarray(found)
