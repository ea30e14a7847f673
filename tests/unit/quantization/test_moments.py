"""Ranges and means from BatchNorm, against samples of the distributions that they describe."""

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.distributions import Normal

from bnexport.quantization.int8_plan import QuantizationPlan
from bnexport.quantization.moments import TrainedMoments, spreads

MEAN, STD = np.array([0.5, -1.0, 2.0]), np.array([1.0, 0.3, 0.7])


def graph(nodes: list[tuple[str, list[str], str]], **settings: float) -> QuantizationPlan:
    """Return the plan of operators on the value "x" of a convolution, and another convolution behind "y"."""
    rng = np.random.default_rng(0)
    tensors = {
        "w": rng.standard_normal((3, 2, 1, 1)), "v": rng.standard_normal((2, 3, 1, 1)),
        "three": np.array(3.0), "six": np.array(6.0), "zero": np.array(0.0),
    }  # fmt: skip
    made = [helper.make_node("Conv", ["input", "w"], ["x"])]
    made += [helper.make_node(kind, inputs, [output], **settings) for kind, inputs, output in nodes]
    made.append(helper.make_node("Conv", ["y", "v"], ["out"]))
    model = helper.make_model(
        helper.make_graph(
            made,
            "g",
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", 2, 4, 4])],
            [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["n", 2, "h", "w"])],
            [numpy_helper.from_array(array.astype(np.float32), name) for name, array in tensors.items()],
        ),
        opset_imports=[helper.make_opsetid("", 18)],
    )
    return QuantizationPlan(model)


SPELLINGS = {
    "relu": ([("Relu", ["x"], "y")], lambda x: np.maximum(x, 0)),
    "relu6": ([("Clip", ["x", "zero", "six"], "y")], lambda x: np.clip(x, 0, 6)),
    "sigmoid": ([("Sigmoid", ["x"], "y")], lambda x: 1 / (1 + np.exp(-x))),
    "silu": ([("Sigmoid", ["x"], "s"), ("Mul", ["x", "s"], "y")], lambda x: x / (1 + np.exp(-x))),
    "hardswish in steps": (
        [("Add", ["x", "three"], "a"), ("Clip", ["a", "zero", "six"], "c"), ("Div", ["c", "six"], "d"),
         ("Mul", ["x", "d"], "y")],
        lambda x: x * np.clip(x + 3, 0, 6) / 6,
    ),
    "hardswish": ([("HardSwish", ["x"], "y")], lambda x: x * np.clip(x + 3, 0, 6) / 6),
    "twice the same tensor": ([("Relu", ["x"], "r"), ("Add", ["x", "r"], "y")], lambda x: x + np.maximum(x, 0)),
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
def test_elementwise_operators_have_the_moments_of_samples(name: str) -> None:
    nodes, function = SPELLINGS[name]
    plan = graph(nodes)
    shapes = dict.fromkeys(("x", "y", "s", "a", "c", "d", "r"), (2, 3, 4, 4))
    found = spreads(plan, {"x": TrainedMoments(MEAN, STD)}, {}, {**shapes, "input": (2, 2, 4, 4), "out": (2, 2, 4, 4)})[
        "y"
    ]
    samples = function(np.random.default_rng(0).normal(MEAN, STD, (400_000, 3)))
    np.testing.assert_allclose(found.mean, samples.mean(axis=0), atol=5e-3)
    np.testing.assert_allclose(found.std, samples.std(axis=0), rtol=0.02, atol=2e-3)
    ends = function(np.linspace(MEAN - 4 * STD, MEAN + 4 * STD, 4001))
    assert found.values.min() == pytest.approx(ends.min(), abs=1e-3)
    assert found.values.max() == pytest.approx(ends.max(), abs=1e-3)


def test_a_clipped_normal_has_the_moments_of_the_formula() -> None:
    found = spreads(
        graph([("Relu", ["x"], "y")]), {"x": TrainedMoments(MEAN, STD)}, {}, {"x": (2, 3, 4, 4), "y": (2, 3, 4, 4)}
    )["y"]
    z, unit = torch.from_numpy(MEAN / STD), Normal(0.0, 1.0)
    expected = MEAN * unit.cdf(z).numpy() + STD * unit.log_prob(z).exp().numpy()
    np.testing.assert_allclose(found.mean, expected, atol=1e-3)


def test_independent_tensors_add_means_and_variances() -> None:
    plan = graph([("GlobalAveragePool", ["x"], "p"), ("Add", ["x", "p"], "y")])
    shapes = {"x": (2, 3, 1, 1), "p": (2, 3, 1, 1), "y": (2, 3, 1, 1)}
    found = spreads(plan, {"x": TrainedMoments(MEAN, STD), "p": TrainedMoments(2 * MEAN, STD)}, {}, shapes)["y"]
    np.testing.assert_allclose(found.mean, 3 * MEAN, atol=1e-3)
    np.testing.assert_allclose(found.std, np.sqrt(2) * STD, rtol=2e-3)


@pytest.mark.parametrize("gate", ["Sigmoid", "HardSigmoid"])
def test_a_gate_of_an_unknown_tensor_leaves_the_whole_range_of_its_product(gate: str) -> None:
    plan = graph([(gate, ["u"], "g"), ("Relu", ["x"], "r"), ("Mul", ["r", "g"], "y")])
    plan.model.graph.node.insert(1, helper.make_node("Conv", ["x", "square"], ["u"]))
    plan.model.graph.initializer.append(numpy_helper.from_array(np.ones((3, 3, 1, 1), np.float32), "square"))
    shapes = {"x": (2, 3, 4, 4), "u": (2, 3, 4, 4), "g": (2, 3, 1, 1), "r": (2, 3, 4, 4), "y": (2, 3, 4, 4)}
    found = spreads(plan, {"x": TrainedMoments(MEAN, STD)}, {}, shapes)
    assert "u" not in found
    assert found["y"].values.max() == pytest.approx(found["r"].values.max())
    assert found["y"].values.min() == 0
    np.testing.assert_allclose(found["y"].mean, found["r"].mean / 2, rtol=0.05, atol=0.01)
    assert found["y"].range().source == "derived from BatchNorm"


def test_parts_and_joined_tensors_keep_the_moments_of_their_channels() -> None:
    plan = graph([("Relu", ["a"], "r"), ("Concat", ["r", "b"], "y")])
    plan.model.graph.node[2].attribute.append(helper.make_attribute("axis", 1))
    plan.model.graph.node.insert(1, helper.make_node("Split", ["x", "sizes"], ["a", "b"], axis=1))
    plan.model.graph.initializer.append(numpy_helper.from_array(np.array([1, 2]), "sizes"))
    shapes = {"x": (2, 3, 4, 4), "a": (2, 1, 4, 4), "b": (2, 2, 4, 4), "r": (2, 1, 4, 4), "y": (2, 3, 4, 4)}
    found = spreads(plan, {"x": TrainedMoments(MEAN, STD)}, {}, shapes)
    np.testing.assert_allclose(found["b"].mean, MEAN[1:], atol=1e-6)
    np.testing.assert_allclose(found["y"].mean[1:], MEAN[1:], atol=1e-6)
    assert found["y"].mean[0] > MEAN[0], "ReLU raises the mean of the first channel alone"


def test_a_tensor_without_channels_joined_with_others_has_the_range_of_all() -> None:
    plan = graph([("Reshape", ["x", "flat"], "f"), ("Reshape", ["f", "back"], "s"), ("Concat", ["x", "s"], "y")])
    plan.model.graph.node[3].attribute.append(helper.make_attribute("axis", 1))
    for name, sizes in (("flat", [2, 2, 24]), ("back", [2, 3, 4, 4])):
        plan.model.graph.initializer.append(numpy_helper.from_array(np.array(sizes), name))
    shapes = {"x": (2, 3, 4, 4), "f": (2, 2, 24), "s": (2, 3, 4, 4), "y": (2, 6, 4, 4)}
    found = spreads(plan, {"x": TrainedMoments(MEAN, STD)}, {}, shapes)
    assert (found["s"].axis, found["y"].axis) == (-1, -1)
    assert found["y"].values.max() == found["x"].values.max()
    assert found["y"].values.min() == found["x"].values.min()
    np.testing.assert_allclose(found["y"].mean, MEAN.mean(), atol=1e-2)
