import pytest


@pytest.fixture(scope="session")
def shape_model() -> bytes:
    """Nodes of every kind that the placement check distinguishes, named for what they compute."""
    from onnx import TensorProto, helper

    def value(name: str, kind: int, *shape: int | str, unknown: bool = False) -> object:
        return helper.make_tensor_value_info(name, kind, None if unknown else shape)

    nodes = [
        helper.make_node("Shape", ["x"], ["s"], name="shape"),
        helper.make_node("Add", ["s", "one"], ["added"], name="add"),
        helper.make_node("Squeeze", ["first"], ["scalar"], name="scalar"),
        helper.make_node("Equal", ["s", "one"], ["equal"], name="flags"),
        helper.make_node("Cast", ["s"], ["f"], to=TensorProto.FLOAT, name="float"),
        helper.make_node("Relu", ["x"], ["r"], name="relu"),
        helper.make_node("BitShift", ["u", "two"], ["bits"], direction="LEFT", name="bits"),
        helper.make_node("Reshape", ["s", "wanted"], ["any"], name="unknown"),
        helper.make_node("TopK", ["f", "one"], ["best", "where"], name="mixed"),
        helper.make_node("Gather", ["s", "zero"], ["first"], name="first"),
    ]
    nodes.insert(2, nodes.pop())
    i, u, f, b = TensorProto.INT64, TensorProto.UINT8, TensorProto.FLOAT, TensorProto.BOOL
    graph = helper.make_graph(
        nodes,
        "shapes",
        [value("x", f, "n", 3), value("u", u, "n", 3), value("wanted", i, "m")],
        [
            value("added", i, 2), value("scalar", i), value("equal", b, 2), value("r", f, "n", 3), value("bits", u, "n", 3),
            value("any", i, unknown=True), value("best", f, 1), value("where", i, 1),
        ],
        [helper.make_tensor(*row) for row in (("one", i, [1], [1]), ("two", u, [1], [2]), ("zero", i, [1], [0]))],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    return bytes(model.SerializeToString())
