"""Pair-safe codes, their scales, corrected biases."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from bnexport.quantization.codes import (
    LARGEST,
    PAIR,
    correction,
    encode,
    encode_bias,
    least_scales,
    saturating_channels,
)


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
    one = encode(np.array([[1.0, 0.01, -0.02]]), pair_safe=True)  # one large weight: all 127 codes
    both = encode(np.array([[1.0, 0.99, -0.5]]), pair_safe=True)  # two: half of them
    assert np.abs(one.codes).max() == LARGEST
    assert both.codes[0, :2].astype(int).sum() in (PAIR - 1, PAIR)


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
