"""A convolution and a gemm in every format: enough to show that an engine really computes on a device."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bnexport.bundle import MODEL_ONNX, MODEL_TORCHSCRIPT, Bundle, Manifest, seal
from bnexport.errors import MissingDependency
from bnexport.optional import require
from bnexport.tensors import Array, Signature, TensorSpec

if TYPE_CHECKING:
    from torch import nn

SIGNATURE = Signature(
    (TensorSpec("input", "float32", ("batch", 1, 8, 8)),), (TensorSpec("logits", "float32", ("batch", 3)),)
)
OPSET, IR_VERSION = 18, 8


@dataclass(frozen=True)
class Weights:
    """Conv 1 to 2, 3x3, no padding; flatten; Linear 72 to 3."""

    kernel: Array  # (2, 1, 3, 3)
    shift: Array  # (2,)
    matrix: Array  # (3, 72)
    bias: Array  # (3,)


def small_weights() -> Weights:
    """The same float32 numbers on every machine."""
    rng = np.random.default_rng(0)
    shapes = ((2, 1, 3, 3), (2,), (3, 72), (3,))
    return Weights(*(rng.standard_normal(shape).astype(np.float32) for shape in shapes))


def expected(images: Array) -> Array:
    """The answer in numpy, float64: images (n, 1, 8, 8) to (n, 3)."""
    weights = small_weights()
    windows = np.lib.stride_tricks.sliding_window_view(images[:, 0].astype(np.float64), (3, 3), axis=(1, 2))
    maps = np.einsum("nhwij,cij->nchw", windows, weights.kernel[:, 0].astype(np.float64))
    maps += weights.shift.astype(np.float64)[:, None, None]
    flat = maps.reshape(len(images), -1)  # (n, 72)
    result: Array = flat @ weights.matrix.astype(np.float64).T + weights.bias
    return result


def write_onnx(file: Path) -> None:
    """Write the model as ONNX.

    Raises:
        MissingDependency: onnx is not installed.
    """
    require("onnx", purpose="building a small model")
    from onnx import TensorProto, helper, numpy_helper, save_model

    weights = small_weights()
    names = ("kernel", "shift", "matrix", "bias")
    nodes = [
        helper.make_node("Conv", ["input", "kernel", "shift"], ["maps"], kernel_shape=[3, 3]),
        helper.make_node("Flatten", ["maps"], ["flat"], axis=1),
        helper.make_node("Gemm", ["flat", "matrix", "bias"], ["logits"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 1, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])],
        [numpy_helper.from_array(getattr(weights, name), name) for name in names],
    )
    opsets = [helper.make_opsetid("", OPSET)]
    save_model(helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION), str(file))


def torch_module() -> nn.Module:
    """The model in torch."""
    import torch

    weights = small_weights()
    module = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Flatten(), torch.nn.Linear(72, 3))
    for parameter, values in zip(
        module.parameters(), (weights.kernel, weights.shift, weights.matrix, weights.bias), strict=True
    ):
        parameter.data.copy_(torch.from_numpy(values))
    return module.eval()


def write_torchscript(file: Path) -> None:
    """Write the model as TorchScript."""
    import torch

    with warnings.catch_warnings():
        # Deprecated upstream; TorchScript is one of the formats asked of this project.
        warnings.filterwarnings("ignore", message=r".*torch\.jit\..*")
        traced = torch.jit.trace(torch_module(), torch.zeros(2, 1, 8, 8), check_trace=False)  # type: ignore[no-untyped-call]
        torch.jit.save(torch.jit.freeze(traced), str(file))


def small_bundle(folder: Path) -> Bundle:
    """A bundle of the model in a folder; a format whose package is missing here is left out."""
    try:
        write_onnx(folder / MODEL_ONNX)
    except MissingDependency:
        (folder / MODEL_ONNX).unlink(missing_ok=True)
    try:
        write_torchscript(folder / MODEL_TORCHSCRIPT)
    except ImportError:
        (folder / MODEL_TORCHSCRIPT).unlink(missing_ok=True)
    return seal(folder, Manifest("small", 1, SIGNATURE, {"source": "doctor"}))
