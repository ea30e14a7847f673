"""Pooling of the float64 proof against torch, whose rounding up of window counts is that of the exporter."""

import itertools

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper
from torch.nn import functional

from bnexport.onnx_files.float64 import Float64Evaluator
from bnexport.onnx_files.kernels import WindowAxis, average_pool, axes_of, max_pool
from bnexport.onnx_files.models import read_model
from bnexport.onnx_files.operators import better_operators

GEOMETRIES = [
    (kernel, stride, pad, dilation, ceil)
    for kernel, stride, pad, dilation, ceil in itertools.product((2, 3), (1, 2, 3), (0, 1), (1, 2), (False, True))
    if pad <= kernel // 2
]


def _axes(x: np.ndarray, kernel: int, stride: int, pad: int, dilation: int, ceil: bool) -> tuple[WindowAxis, ...]:
    pairs = {"strides": (stride,) * 2, "pads": (pad,) * 4, "dilations": (dilation,) * 2}
    return axes_of(x.shape[2:], (kernel,) * 2, **pairs, ceil=ceil)


@pytest.mark.parametrize(("kernel", "stride", "pad", "dilation", "ceil"), GEOMETRIES)
def test_max_pool_is_torch_s(kernel: int, stride: int, pad: int, dilation: int, ceil: bool) -> None:
    for size in (7, 8, 9):
        x = np.random.default_rng(size).standard_normal((2, 3, size, size + 1)) - 5.0  # a padding of zeros would win
        want = functional.max_pool2d(torch.from_numpy(x), kernel, stride, pad, dilation, ceil_mode=ceil).numpy()
        have = max_pool(x, _axes(x, kernel, stride, pad, dilation, ceil))
        np.testing.assert_array_equal(have, want)


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize(("kernel", "stride", "pad", "dilation", "ceil"), [item for item in GEOMETRIES if item[3] == 1])
def test_average_pool_is_torch_s(kernel: int, stride: int, pad: int, dilation: int, ceil: bool, counted: bool) -> None:
    for size in (7, 8, 9):
        x = np.random.default_rng(size).standard_normal((2, 3, size, size + 1)) + 5.0
        want = functional.avg_pool2d(torch.from_numpy(x), kernel, stride, pad, ceil, counted).numpy()
        have = average_pool(x, _axes(x, kernel, stride, pad, dilation, ceil), counted=counted)
        np.testing.assert_allclose(have, want, rtol=1e-13, atol=1e-15)


def test_average_pool_with_steps_inside_a_window() -> None:
    x = np.arange(1.0, 8.0).reshape(1, 1, 7)
    axes = axes_of((7,), (2,), strides=(3,), pads=(1, 0), dilations=(2,))
    assert average_pool(x, axes, counted=True).tolist() == [[[1.0, 4.0]]]
    assert average_pool(x, axes, counted=False).tolist() == [[[2.0, 4.0]]]


def test_max_pool_of_whole_numbers() -> None:
    x = np.arange(-8, 1, dtype=np.int64).reshape(1, 1, 9)
    assert max_pool(x, axes_of((9,), (2,), strides=(2,), pads=(1, 1))).tolist() == [[[-8, -6, -4, -2, 0]]]


def model(outputs: list[str], operator: str = "MaxPool", **attributes: object) -> bytes:
    node = helper.make_node(operator, ["x"], outputs, kernel_shape=[3, 3], **attributes)
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3, None, None]) for name in ("x", "y"))
    made = helper.make_model(helper.make_graph([node], "g", [x], [y]), opset_imports=[helper.make_opsetid("", 18)])
    return made.SerializeToString()


@pytest.mark.parametrize(
    ("outputs", "attributes", "fast"),
    [(["y"], {"ceil_mode": 1}, True), (["y", "at"], {}, False), (["y"], {"pads": [-1, 0, 0, 0]}, False)],
)
def test_only_what_is_understood_is_replaced(outputs: list[str], attributes: dict[str, object], fast: bool) -> None:
    assert (better_operators(read_model(model(outputs, **attributes))) is not None) == fast


def test_the_proof_takes_a_padded_rounded_up_window() -> None:
    """onnx's reference implementation computes GoogLeNet's pooling branch two pixels too large."""
    source = model(["y"], strides=[1, 1], pads=[1, 1, 1, 1], ceil_mode=1)
    x = np.random.default_rng(3).standard_normal((2, 3, 8, 8))
    want = functional.max_pool2d(torch.from_numpy(x), 3, 1, 1, ceil_mode=True).numpy()
    np.testing.assert_array_equal(Float64Evaluator(source).evaluate({"x": x})["y"], want)


@pytest.mark.parametrize("counted", [0, 1])
def test_the_proof_takes_a_mean_that_hangs_out(counted: int) -> None:
    """onnx's reference implementation divides by the whole kernel there."""
    pads = {"pads": [1, 1, 1, 1], "count_include_pad": counted}
    source = model(["y"], "AveragePool", strides=[4, 4], ceil_mode=1, **pads)
    x = np.random.default_rng(3).standard_normal((2, 3, 6, 9)) + 1.0
    want = functional.avg_pool2d(torch.from_numpy(x), 3, 4, 1, ceil_mode=True, count_include_pad=bool(counted)).numpy()
    np.testing.assert_allclose(Float64Evaluator(source).evaluate({"x": x})["y"], want, rtol=1e-13)
