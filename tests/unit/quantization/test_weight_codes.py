"""Pair-safe codes, their scales, corrected biases."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from bnexport.onnx_files.float64 import Float64Evaluator
from bnexport.quantization.codes import (
    LARGEST,
    PAIR,
    correction,
    encode,
    encode_bias,
    least_scales,
    saturating_channels,
)
from bnexport.quantization.int8_plan import QuantizationPlan


@given(st.integers(0, 10_000), st.integers(1, 40), st.sampled_from([1e-6, 1.0, 300.0]))
def test_no_order_of_pairs_can_saturate(seed: int, width: int, size: float) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.standard_t(2, (6, width)) * size * rng.random((6, 1))
    weight[0] = 0.0
    found = encode(weight, pair_safe=True)
    codes = found.codes.astype(int)
    for channel in codes:  # by brute force, with the largest activation code
        sums = 255 * (channel[:, None] + channel[None, :])
        np.fill_diagonal(sums, 0)
        assert sums.max(initial=0) <= 32767
        assert sums.min(initial=0) >= -32768
    assert np.abs(codes).max() <= LARGEST
    step = found.scales.astype(float)[:, None]
    assert (np.abs(found.values - weight) <= 0.5 * step * (1 + 1e-6)).all()
    assert not saturating_channels(found.codes).any()


def test_the_scale_of_a_pair_safe_channel_is_hardly_larger_than_necessary() -> None:
    rest = np.zeros(600)  # more weights than those of channels whose scale may be larger
    one = encode(np.array([[1.0, 0.01, -0.02, *rest]]), pair_safe=True)  # one large weight: all 127 codes
    both = encode(np.array([[1.0, 0.99, -0.5, *rest]]), pair_safe=True)  # two: half of them
    assert np.abs(one.codes).max() == LARGEST
    assert both.codes[0, :2].astype(int).sum() in (PAIR - 1, PAIR)


@pytest.mark.parametrize("pair_safe", [True, False])
def test_channels_with_few_weights_have_the_scale_with_the_smallest_error_of_the_output(pair_safe: bool) -> None:
    rng = np.random.default_rng(2)
    weight = rng.standard_normal((64, 2, 3, 3))
    found = encode(weight, pair_safe=pair_safe)
    smallest = encode(np.pad(weight, ((0, 0), (0, 600), (0, 0), (0, 0))), pair_safe=pair_safe)  # too many for a choice
    ratio = found.scales / smallest.scales
    assert ((ratio >= 1) & (ratio <= 1.26)).all()
    inputs = (rng.standard_normal((20_000, 2, 1)) + rng.standard_normal((20_000, 2, 9))).reshape(
        -1, 18
    )  # correlation 0.5
    errors = [(inputs @ (one.values[:, :2] - weight).reshape(64, 18).T).std(axis=0) for one in (found, smallest)]
    assert (errors[0] <= 1.02 * errors[1]).all()
    assert errors[0].mean() < 0.7 * errors[1].mean()


def test_full_range_codes_can_saturate_and_are_found() -> None:
    weight = np.random.default_rng(0).standard_normal((8, 30))
    codes = encode(weight, pair_safe=False).codes
    assert saturating_channels(codes).all()


def test_a_bias_fits_into_32_bits_where_the_weights_are_tiny() -> None:
    weight, bias = np.full((2, 4), 1e-20), np.array([3.0, -3.0])
    found = encode(weight, pair_safe=True, least=least_scales(bias, 0.02))
    scales = found.scales * np.float32(0.02)
    assert np.abs(encode_bias(bias, scales) * scales.astype(float) - bias).max() < 1e-6


def test_the_correction_is_the_mean_error_of_a_grouped_convolution() -> None:
    rng = np.random.default_rng(1)
    exact = rng.standard_normal((6, 2, 3, 3))
    rounded = encode(exact, pair_safe=True).values
    mean = rng.standard_normal(4)  # 2 groups of 2 inputs, 3 outputs each
    expected = [sum((rounded[o, i] - exact[o, i]).sum() * mean[2 * (o // 3) + i] for i in range(2)) for o in range(6)]
    np.testing.assert_allclose(correction(exact, rounded, mean, 2), expected, rtol=1e-12)


@pytest.mark.parametrize("settings", [{"pads": [2, 2, 2, 2]}, {"pads": [0, 1, 2, 0], "strides": [2, 1]}, {}])
def test_the_correction_counts_the_padding_as_zeros(settings: dict[str, list[int]]) -> None:
    rng = np.random.default_rng(3)
    weight, mean = rng.standard_normal((6, 4, 5, 5)).astype(np.float32), rng.standard_normal(4)
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"], **settings)], "g", [value("x", 1, ["n", 4, 6, 7])],
        [value("y", 1, None)], [numpy_helper.from_array(weight, "w")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    plan = QuantizationPlan(model)
    plan.set_sizes({"x": (6, 7)})
    rounded = encode(weight, pair_safe=True).values
    image = np.broadcast_to(mean[:, None, None], (1, 4, 6, 7)).astype(np.float32)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array((rounded - weight).astype(np.float32), "w"))
    errors = Float64Evaluator(model).evaluate({"x": image})["y"]
    np.testing.assert_allclose(-plan.layers[0].corrected_bias(rounded, mean), errors.mean(axis=(0, 2, 3)), rtol=1e-4)
