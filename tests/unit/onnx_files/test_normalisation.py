"""Files of other exporters: normalised before the check, folded, and proved against the original file."""

from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper
from support.onnx_builder import Builder

import bnexport
from bnexport.errors import ModelError
from bnexport.folding.onnx_backend.onnx_proof import evaluator, run
from bnexport.onnx_files import normalisation
from bnexport.onnx_files.models import refill
from bnexport.onnx_files.normalisation import NORMALISATIONS, normalise, upgraded

Change = Callable[[ModelProto], None]


def network(*, opset: int = 13, ir: int = 8, norm: Callable[[Builder, str], str] | None = None) -> ModelProto:
    """Conv, BatchNormalization, Relu on (n, 3, 8, 9)."""
    g = Builder(opset=opset, ir=ir)
    y = g.conv(g.input("n", 3, 8, 9), 3, 4)
    y = g.bn(y, 4) if norm is None else norm(g, y)
    g.output(g.node("Relu", y, outputs=("y",)), rank=4)
    return g.model()


def answers(model: ModelProto) -> np.ndarray:
    """Return the answers of ONNX Runtime, which reads a file independently."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(1).standard_normal((2, 3, 8, 9)).astype(np.float32)
    return np.asarray(session.run(None, {"x": x})[0])


def domain(model: ModelProto) -> None:
    for item in (*model.opset_import, *model.graph.node):
        item.domain = "ai.onnx"


def twice_imported(model: ModelProto) -> None:
    domain(model)
    model.opset_import.append(helper.make_opsetid("", model.opset_import[0].version))


def unnamed(model: ModelProto) -> None:
    model.graph.name = ""
    for node in model.graph.node:
        node.name = ""


def negative_batch(model: ModelProto) -> None:
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = -1


def backwards(model: ModelProto) -> None:
    refill(model.graph.node, list(model.graph.node)[::-1])


def untyped(model: ModelProto) -> None:
    model.graph.output[0].ClearField("type")


def listed(model: ModelProto) -> None:
    model.graph.input.extend(
        helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims) for tensor in model.graph.initializer
    )


#: Changes of a correct file. ONNX Runtime runs the result, and gives the same answers.
CHANGES: tuple[Change, ...] = (domain, twice_imported, unnamed, negative_batch, backwards, untyped, listed)


@pytest.mark.parametrize("change", CHANGES, ids=[change.__name__ for change in CHANGES])
def test_another_spelling_folds_alike(change: Change):
    plain, spelt = network(), network()
    change(spelt)
    untouched = spelt.SerializeToString()
    result = bnexport.fold_onnx(spelt)
    assert spelt.SerializeToString() == untouched
    assert [row.outcome for row in result.report.rows] == ["backward"]
    assert result.report.error is not None
    assert result.report.error <= 1e-12
    assert result.normalised
    onnx.checker.check_model(result.model, full_check=True)
    want = answers(plain)
    assert np.array_equal(answers(spelt), want)
    assert np.abs(answers(result.model) - want).max() <= 1e-5 * np.abs(want).max()


def test_a_plain_file_is_not_normalised():
    model = network()
    before = model.SerializeToString()
    assert normalise(model) == ()
    assert upgraded(model, "the model") is model
    assert model.SerializeToString() == before
    assert bnexport.fold_onnx(model).normalised == ()


def test_every_row_has_a_separate_name():
    names = [row.name for row in NORMALISATIONS]
    assert len(set(names)) == len(names)


def test_sizes_of_zero_and_the_name_of_paddle_are_unknown():
    model = network()
    dims = model.graph.input[0].type.tensor_type.shape.dim
    dims[0].dim_value = 0
    dims[2].dim_param = dims[3].dim_param = "?"
    assert normalise(model)
    assert [dim.WhichOneof("value") for dim in dims] == [None, "dim_value", None, None]


def test_a_circle_is_refused():
    model = network()
    model.graph.node[0].input[0] = "y"
    with pytest.raises(ModelError, match="is not valid ONNX"):
        bnexport.fold_onnx(model)


def test_nodes_of_a_branch_are_sorted_too():
    g = Builder(opset=13)
    y = g.bn(g.conv(g.input("n", 3, 8, 9), 3, 4), 4)
    inner = [helper.make_node("Tanh", ["a"], ["b"]), helper.make_node("Relu", [y], ["a"])]
    other = [helper.make_node("Relu", [y], ["c"])]
    flag = g.init("flag", value=np.asarray(True))
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "bc"]
    branches = [helper.make_graph(nodes, "g", [], [out]) for nodes, out in zip((inner, other), value, strict=True)]
    g.output(g.node("If", flag, then_branch=branches[0], else_branch=branches[1], outputs=("y",)), rank=4)
    nodes, g.nodes = g.nodes, []
    model = g_model(g, nodes[::-1])
    result = bnexport.fold_onnx(model)
    assert [row.outcome for row in result.report.rows] == ["backward"]
    (branch,) = [node for node in result.model.graph.node if node.op_type == "If"]
    (then,) = [item.g for item in branch.attribute if item.name == "then_branch"]
    assert [node.op_type for node in then.node] == ["Relu", "Tanh"]


def g_model(g: Builder, nodes: list[NodeProto]) -> ModelProto:
    """Return an unchecked model, because the builder refuses such models."""
    graph = helper.make_graph(nodes, "graph", g.inputs, g.outputs, g.stored)
    return helper.make_model(graph, opset_imports=g.opsets, ir_version=g.ir)


def test_some_listed_initializers_stay_replaceable():
    model = network()
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "conv.w")
    model.graph.input.append(helper.make_tensor_value_info(weight.name, weight.data_type, weight.dims))
    result = bnexport.fold_onnx(model)
    assert result.normalised == ()
    assert [row.outcome for row in result.report.rows] == ["affine"]
    assert "a caller may replace" in result.report.rows[0].reason
    assert "conv.w" in [value.name for value in result.model.graph.input]


def old_norm(**attributes: object) -> Callable[[Builder, str], str]:
    def add(g: Builder, x: str) -> str:
        return g.node("BatchNormalization", x, *g.statistics(4, "bn"), name="bn", epsilon=2e-5, **attributes)

    return add


def test_spatial_0_with_one_number_per_channel():
    model = network(opset=8, ir=4, norm=old_norm(spatial=0))
    result = bnexport.fold_onnx(model)
    assert [row.outcome for row in result.report.rows] == ["backward"]
    want = answers(network(opset=8, ir=4, norm=old_norm()))
    assert np.abs(answers(result.model) - want).max() <= 1e-5 * np.abs(want).max()


def test_spatial_0_with_statistics_for_each_position_stays():
    g = Builder(opset=8, ir=4)
    y = g.conv(g.input("n", 3, 8, 9), 3, 4)
    names = [g.init(name, value=np.abs(g.rng.standard_normal((4, 6, 7))) + 0.1) for name in "gomv"]
    g.output(g.node("BatchNormalization", y, *names, name="bn", spatial=0, outputs=("y",)), rank=4)
    result = bnexport.fold_onnx(g.model())
    assert result.normalised == ()
    assert [row.outcome for row in result.report.rows] == ["kept"]
    assert "each position" in result.report.rows[0].reason


@pytest.mark.parametrize(("opset", "outputs"), [(9, ("", "", "", "")), (7, ("", "", "", "")), (14, ("mean", "var"))])
def test_outputs_of_a_norm_that_mean_nothing(opset: int, outputs: tuple[str, ...]):
    """ONNX Runtime crashes on the first kind and refuses the last."""
    model, want = network(opset=opset), answers(network(opset=opset))
    (node,) = [node for node in model.graph.node if node.op_type == "BatchNormalization"]
    node.output.extend(outputs)
    result = bnexport.fold_onnx(model)
    assert result.normalised
    assert [row.outcome for row in result.report.rows] == ["backward"]
    assert np.abs(answers(result.model) - want).max() <= 1e-5 * np.abs(want).max()


def test_five_named_outputs_are_training_mode_before_opset_14():
    """ONNX Runtime takes the statistics of the batch there, whether the outputs are read or not."""
    model = network(opset=9)
    (node,) = [node for node in model.graph.node if node.op_type == "BatchNormalization"]
    node.output.extend(["mean", "var", "saved_mean", "saved_var"])
    assert np.abs(answers(model) - answers(network(opset=9))).max() > 0.1
    result = bnexport.fold_onnx(model)
    assert [row.outcome for row in result.report.rows] == ["kept"]
    assert "training mode" in result.report.rows[0].reason


def old(opset: int, *, is_test: int = 1, scale: bool = True) -> ModelProto:
    """Return a model as of Caffe2's exporter: is_test, consumed_inputs, and an Add that broadcasts along axis 1."""
    g = Builder(opset=opset, ir=3)
    y = g.conv(g.input("n", 3, 8, 9), 3, 4, bias=False)
    consumed = {"consumed_inputs": [0, 0, 0, 1, 1]} if opset < 6 else {}
    y = old_norm(is_test=is_test, **consumed)(g, y)
    y = g.node("Mul", y, g.init("s", 4), axis=1, broadcast=1) if scale else y
    y = g.node("Add", y, g.init("t", 4), axis=1, broadcast=1)
    g.output(g.node("Relu", y, outputs=("y",)), rank=4)
    return g_model(g, g.nodes)


@pytest.mark.parametrize("opset", [5, 6])
@pytest.mark.parametrize("scale", [False, True])
def test_an_old_operator_set_is_converted_and_proved_against_the_file(opset: int, scale: bool):
    model = old(opset, scale=scale)
    result = bnexport.fold_onnx(model)
    assert {row.outcome for row in result.report.rows} == {"backward"}
    assert not result.report.warnings
    assert result.report.error is not None
    assert result.report.error <= 1e-12
    assert result.model.opset_import[0].version == 7
    assert [node.op_type for node in result.model.graph.node] == ["Conv", "Relu"]
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor).astype(np.float64) for tensor in model.graph.initializer}
    x = np.random.default_rng(1).standard_normal((2, 3, 8, 9)).astype(np.float32)
    plain = Builder(opset=13)
    weight = plain.init("w", value=stored["conv.w"])
    plain.output(plain.node("Conv", plain.input("n", 3, 8, 9), weight, outputs=("y",)), rank=4)
    y = run(evaluator(plain.model()), {"x": x.astype(np.float64)})[0]
    along = {name: array.reshape(-1, 1, 1) for name, array in stored.items() if array.ndim == 1}
    y = (y - along["bn.mean"]) / np.sqrt(along["bn.var"] + 2e-5) * along["bn.gamma"] + along["bn.beta"]
    want = np.maximum(y * (along["s"] if scale else 1.0) + along["t"], 0)
    assert np.abs(answers(result.model) - want).max() <= 1e-5 * np.abs(want).max()


def test_an_old_norm_in_training_mode_is_refused():
    """onnx.version_converter would drop the mode."""
    with pytest.raises(ModelError, match=r"BatchNormalization \(bn\) is in training mode") as caught:
        bnexport.fold_onnx(old(6, is_test=0))
    assert "operator set 7 or newer" in str(caught.value.remedy)


def test_an_old_operator_set_that_can_not_be_converted_is_refused():
    model = old(6)
    model.graph.node.append(helper.make_node("Upsample", ["y"], ["z"], height_scale=2.0, width_scale=2.0))
    model.graph.output[0].name = "z"
    model.opset_import[0].version = 1
    for node in model.graph.node:
        for attribute in [item for item in node.attribute if item.name in ("axis", "broadcast")]:
            node.attribute.remove(attribute)
    with pytest.raises(ModelError) as caught:
        bnexport.fold_onnx(model)
    assert caught.value.remedy


def test_a_conversion_that_changes_results_is_refused(monkeypatch: pytest.MonkeyPatch):
    """Without the axis written out, onnx's converter places the operand on one axis too many."""
    monkeypatch.setattr(normalisation, "_aligned", lambda model: model)
    with pytest.raises(ModelError, match="changes its results"):
        bnexport.fold_onnx(old(6))
