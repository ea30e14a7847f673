"""Nodes that a GPU session may keep on the CPU, judged without a GPU: onnxruntime infers their outputs on the CPU."""

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
from onnx import helper

from bnexport.runtimes.node_placement import CPU, PlacedNode, not_shape_arithmetic, with_unique_names

LEVELS = onnxruntime.GraphOptimizationLevel


def judged(model: bytes, *nodes: tuple[str, str], level: object = LEVELS.ORT_ENABLE_BASIC) -> str | None:
    placed = [PlacedNode(name, operator, CPU) for name, operator in nodes]
    gpu = PlacedNode("on the GPU", "Relu", "CUDAExecutionProvider")
    return not_shape_arithmetic(onnxruntime, model, [*placed, gpu], level)


@pytest.mark.parametrize("level", [LEVELS.ORT_ENABLE_BASIC, LEVELS.ORT_DISABLE_ALL])
def test_integers_and_bools_of_rank_0_and_1_are_shape_arithmetic(shape_model: bytes, level: object) -> None:
    nodes = [("shape", "Shape"), ("add", "Add"), ("scalar", "Squeeze"), ("first", "Gather"), ("flags", "Equal")]
    assert judged(shape_model, *nodes, level=level) is None
    assert judged(shape_model) is None


@pytest.mark.parametrize(
    ("name", "operator", "words"),
    [
        ("float", "Cast", "the node 'float' (Cast) with an output of float of rank 1 runs on CPUExecutionProvider"),
        ("relu", "Relu", "the node 'relu' (Relu) with an output of float of rank 2 runs on CPUExecutionProvider"),
        ("bits", "BitShift", "the node 'bits' (BitShift) with an output of uint8 of rank 2"),
        ("unknown", "Reshape", "the node 'unknown' (Reshape) with an output of int64 of unknown rank"),
        ("mixed", "TopK", "the node 'mixed' (TopK) with an output of float of rank 1"),
        ("added by an engine", "Cast", "the node 'added by an engine' (Cast) with an output of an unknown type"),
    ],
)
def test_other_nodes_on_the_cpu_are_named(shape_model: bytes, name: str, operator: str, words: str) -> None:
    found = judged(shape_model, ("shape", "Shape"), (name, operator))
    assert found is not None
    assert found.startswith(words)
    assert "shape" not in found.replace(words, "")


def test_a_twin_in_the_branch_of_an_if_is_not_mistaken_for_a_shape_node(shape_model: bytes) -> None:
    found = judged(shape_model, ("shape", "Shape"), ("shape", "Shape")) or ""
    assert "'shape' (Shape) with an output of an unknown type" in found


def test_three_nodes_are_named_and_the_rest_is_counted(shape_model: bytes) -> None:
    nodes = [("float", "Cast"), ("relu", "Relu"), ("bits", "BitShift"), ("unknown", "Reshape"), ("mixed", "TopK")]
    found = judged(shape_model, *nodes) or ""
    assert found.count("the node ") == 3
    assert found.endswith(" and 2 more")


def test_without_knowledge_every_node_is_refused_with_the_reason() -> None:
    found = judged(b"not a model", ("a", "Add")) or ""
    assert "'a' (Add) with an output of an unknown type" in found
    assert found.endswith(")")


def test_nodes_that_the_optimiser_adds_are_found() -> None:
    """A Transpose that moves past a Shape leaves a Gather that reorders the sizes."""
    text = """
    <ir_version: 8, opset_import: ["" : 18]>
    moved (float[n, 2, 3] x) => (float[n, 2, 3] y, float[a, b, c] zeros) <int64[1] two = {2}> {
        a = Transpose <perm = [2, 0, 1]> (x)
        b = Relu (a)
        y = Transpose <perm = [1, 2, 0]> (b)
        s = Shape (b)
        doubled = Mul (s, two)
        zeros = ConstantOfShape (doubled)
    }
    """
    model = with_unique_names(onnx.parser.parse_model(text).SerializeToString())
    assert judged(model, ("Gather", "Gather")) is None
    assert "unknown type" in (judged(model, ("Gather", "Gather"), level=LEVELS.ORT_DISABLE_ALL) or "")


def anonymous(*names: str) -> bytes:
    """Return a chain of Relu nodes with these names."""
    ends = ("v0", f"v{len(names)}")
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 2]) for name in ends]
    nodes = [helper.make_node("Relu", [f"v{i}"], [f"v{i + 1}"], name=name) for i, name in enumerate(names)]
    graph = helper.make_graph(nodes, "chain", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    for node in model.graph.node:
        if not node.name:
            node.ClearField("name")
    return bytes(model.SerializeToString())


def test_nodes_without_a_name_or_with_a_shared_one_get_names() -> None:
    before = anonymous("", "twice", "node_1", "twice", "own", "")
    after = onnx.load_model_from_string(with_unique_names(before))
    names = [node.name for node in after.graph.node]
    assert len(set(names)) == 6
    assert "" not in names
    assert (names[2], names[4]) == ("node_1", "own")
    original = onnx.load_model_from_string(before)
    for node, old in zip(after.graph.node, original.graph.node, strict=True):
        node.name = old.name
        if not old.HasField("name"):
            node.ClearField("name")
    assert after == original
    onnxruntime.InferenceSession(with_unique_names(before)).run(None, {"v0": np.ones((2, 2), np.float32)})


def test_a_model_whose_nodes_have_names_keeps_its_bytes() -> None:
    model = anonymous("a", "b")
    assert with_unique_names(model) is model
