"""A convolution and a gemm in every format: enough to show that an engine really computes on a device."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bnexport.bundle import MODEL_EXPORTED, MODEL_ONNX, MODEL_TORCHSCRIPT, Bundle, Manifest, seal
from bnexport.optional import quiet
from bnexport.protobuf_wire import message
from bnexport.tensor_proto import write_tensor
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
    """Write the model as ONNX, without the onnx package: a serving machine has none, and its GPU has to be tried all the same.

    Source of the field numbers: onnx.proto, IR version 8.
    """
    weights = small_weights()
    tensors = [write_tensor(getattr(weights, name), name) for name in ("kernel", "shift", "matrix", "bias")]
    nodes = [
        _node("Conv", ("input", "kernel", "shift"), "maps", _attribute("kernel_shape", 3, 3)),
        _node("Flatten", ("maps",), "flat", _attribute("axis", 1)),
        _node("Gemm", ("flat", "matrix", "bias"), "logits", _attribute("transB", 1)),
    ]
    graph = message(
        *((1, node) for node in nodes),
        (2, "small"),
        *((5, tensor) for tensor in tensors),
        *((11, _value(spec)) for spec in SIGNATURE.inputs),
        *((12, _value(spec)) for spec in SIGNATURE.outputs),
    )
    file.write_bytes(message((1, IR_VERSION), (7, graph), (8, message((1, ""), (2, OPSET)))))


def _node(operator: str, inputs: tuple[str, ...], output: str, attribute: bytes) -> bytes:
    return message(*((1, name) for name in inputs), (2, output), (4, operator), (5, attribute))


def _attribute(name: str, *values: int) -> bytes:
    """One number (kind INT, 2), or several (kind INTS, 7)."""
    if len(values) == 1:
        return message((1, name), (3, values[0]), (20, 2))
    return message((1, name), *((8, value) for value in values), (20, 7))


def _value(spec: TensorSpec) -> bytes:
    """Name, element type (FLOAT, 1) and sizes of an input or output."""
    dims = [message((1, dim) if isinstance(dim, int) else (2, dim)) for dim in spec.shape]
    shape = message(*((1, dim) for dim in dims))
    return message((1, spec.name), (2, message((1, message((1, 1), (2, shape))))))


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


def write_exported(file: Path) -> None:
    """Write the model as an exported program."""
    import torch

    batch = torch.export.Dim("batch")
    program = torch.export.export(torch_module(), (torch.zeros(2, 1, 8, 8),), dynamic_shapes=({0: batch},))
    torch.export.save(program, str(file))


def small_bundle(folder: Path) -> Bundle:
    """A bundle of the model in a folder; a format whose package is missing here is left out."""
    write_onnx(folder / MODEL_ONNX)
    for name, write in ((MODEL_TORCHSCRIPT, write_torchscript), (MODEL_EXPORTED, write_exported)):
        try:
            with quiet():  # torch 2.11 warns of its own classes
                write(folder / name)
        except ImportError:
            (folder / name).unlink(missing_ok=True)
    return seal(folder, Manifest("small", 1, SIGNATURE, {"source": "doctor"}))
