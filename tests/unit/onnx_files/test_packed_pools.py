"""Average pools as convolutions: the same numbers in float64 for every geometry, and no change where the rule does not hold."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from bnexport.onnx_files.packed_pools import pack_pools

REFERENCE = Path(__file__).parents[3] / "models" / "bn_lenet" / "1" / "model.onnx"
ACTIVATIONS = ([], ["Sigmoid"], ["Relu"], ["Tanh", "LeakyRelu"])


def network(
    rng: np.random.Generator,
    *,
    channels: int = 3,
    kernel: tuple[int, ...] = (3, 3),
    window: tuple[int, ...] = (2, 2),
    activations: list[str] | None = None,
    bias: bool = True,
    ir_version: int = 8,
    dtype: Any = np.float64,
    conv: dict[str, Any] | None = None,
    pool: dict[str, Any] | None = None,
) -> ModelProto:
    """Return x -> Conv -> activations -> AveragePool -> y for two input channels."""
    arrays = {"w": rng.standard_normal((channels, 2 // (conv or {}).get("group", 1), *kernel)).astype(dtype)}
    if bias:
        arrays["b"] = rng.standard_normal(channels).astype(dtype)
    nodes = [helper.make_node("Conv", ["x", *arrays], ["v0"], kernel_shape=kernel, **(conv or {}))]
    for operator in ["Sigmoid"] if activations is None else activations:
        nodes.append(helper.make_node(operator, [f"v{len(nodes) - 1}"], [f"v{len(nodes)}"]))
    options = {"strides": window} | (pool or {})
    nodes.append(helper.make_node("AveragePool", [f"v{len(nodes) - 1}"], ["y"], kernel_shape=window, **options))
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    x, y = (helper.make_tensor_value_info(name, kind, ["n", None, None, None]) for name in "xy")
    tensors = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    listed = [helper.make_tensor_value_info(item.name, kind, item.dims) for item in tensors if ir_version < 4]
    graph = helper.make_graph(nodes, "g", [x, *listed], [y], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=ir_version)


def run(model: ModelProto, x: np.ndarray) -> np.ndarray:
    return np.asarray(ReferenceEvaluator(model).run(None, {"x": x})[0])


@pytest.mark.parametrize("seed", range(40))
def test_the_answers_are_the_same(seed: int) -> None:
    rng = np.random.default_rng(seed)
    kernel = tuple(rng.integers(2, 6, 2).tolist())
    conv = {"strides": rng.integers(1, 3, 2).tolist(), "pads": rng.integers(0, 3, 4).tolist()}
    model = network(
        rng,
        channels=int(rng.integers(1, 5)),
        kernel=kernel,
        window=[(2, 2), (1, 2), (2, 1), (1, 4)][seed % 4],
        activations=ACTIVATIONS[int(rng.integers(4))],
        bias=bool(rng.integers(2)),
        ir_version=[3, 8][int(rng.integers(2))],
        conv=conv,
    )
    x = rng.standard_normal((2, 2, *rng.integers(14, 20, 2)))
    before = run(model, x)
    assert pack_pools(model) == 1
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node].count("AveragePool") == 0
    assert not {"w", "b"} & {item.name for item in (*model.graph.initializer, *model.graph.input)}
    after = run(model, x)
    assert after.shape == before.shape
    assert np.abs(after - before).max() <= 1e-12 * np.abs(before).max()


def test_bn_lenet() -> None:
    model = onnx.load(REFERENCE)
    assert pack_pools(model) == 1  # the second layer has 16 channels, which fill the block
    shapes = {item.name: tuple(item.dims) for item in model.graph.initializer}
    assert shapes["conv1.weight_packed"] == (24, 1, 6, 6)
    assert shapes["avg_pool2d_mean"] == (6, 24, 1, 1)
    x = np.random.default_rng(0).standard_normal((3, 1, 28, 28)).astype(np.float32)
    name = model.graph.input[0].name
    before, after = (ReferenceEvaluator(item).run(None, {name: x})[0] for item in (onnx.load(REFERENCE), model))
    assert np.abs(after - before).max() <= 1e-5 * np.abs(before).max()


def test_half_precision_keeps_its_type() -> None:
    model = network(np.random.default_rng(0), dtype=np.float16)
    assert pack_pools(model) == 1
    assert {item.data_type for item in model.graph.initializer} == {TensorProto.FLOAT16}


@pytest.mark.parametrize(
    "options",
    [
        {"channels": 12},
        {"channels": 6, "kernel": (1, 1)},
        {"window": (3, 3)},
        {"window": (1, 1)},
        {"channels": 4, "conv": {"group": 2}},
        {"conv": {"dilations": [2, 2]}},
        {"conv": {"auto_pad": "SAME_UPPER"}},
        {"pool": {"strides": [1, 1]}},
        {"pool": {"pads": [0, 1, 0, 0]}},
        {"pool": {"ceil_mode": 1}},
        {"pool": {"auto_pad": "SAME_LOWER"}},
        {"activations": ["Softmax"]},
    ],
)
def test_what_is_left_alone(options: dict[str, Any]) -> None:
    model = network(np.random.default_rng(0), **options)
    before = model.SerializeToString(deterministic=True)
    assert pack_pools(model) == 0
    assert model.SerializeToString(deterministic=True) == before


def is_output(model: ModelProto) -> None:
    model.graph.output.append(helper.make_tensor_value_info("v0", TensorProto.DOUBLE, None))


def has_another_reader(model: ModelProto) -> None:
    model.graph.node.append(helper.make_node("Relu", ["v1"], ["other"]))
    model.graph.output.append(helper.make_tensor_value_info("other", TensorProto.DOUBLE, None))


def has_a_weight_that_can_be_fed(model: ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.DOUBLE, None))


def has_another_operator(model: ModelProto) -> None:
    model.graph.node[-1].op_type = "MaxPool"


@pytest.mark.parametrize("change", [is_output, has_another_reader, has_a_weight_that_can_be_fed, has_another_operator])
def test_a_value_that_is_needed_elsewhere_is_kept(change: Callable[[ModelProto], None]) -> None:
    model = network(np.random.default_rng(0))
    change(model)
    assert pack_pools(model) == 0


def test_weights_of_two_convolutions_stay_for_the_other() -> None:
    model = network(np.random.default_rng(0))
    model.graph.node.append(helper.make_node("Conv", ["x", "w"], ["z"]))
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.DOUBLE, None))
    x = np.random.default_rng(1).standard_normal((2, 2, 9, 9))
    before = ReferenceEvaluator(model).run(None, {"x": x})
    assert pack_pools(model) == 1
    after = ReferenceEvaluator(model).run(None, {"x": x})
    assert all(np.allclose(one, other, rtol=0, atol=1e-12) for one, other in zip(before, after, strict=True))


def test_pads_that_auto_pad_overrides_stay_without_effect() -> None:
    model = network(np.random.default_rng(0), conv={"auto_pad": "VALID", "pads": [1, 1, 1, 1]})
    x = np.random.default_rng(1).standard_normal((2, 2, 9, 9))
    before = run(model, x)
    assert pack_pools(model) == 1
    after = run(model, x)
    assert after.shape == before.shape
    assert np.abs(after - before).max() <= 1e-12


def test_stated_shapes_of_inner_values_do_not_stay() -> None:
    model = onnx.shape_inference.infer_shapes(network(np.random.default_rng(0)))
    assert pack_pools(model) == 1
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, strict_mode=True)
