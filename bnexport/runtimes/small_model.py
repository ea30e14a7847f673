"""A small model in every format, with the parts of users' models that depend on a device.

It has a dynamic batch, a convolution, a flatten that computes its shape from the batch, a new tensor inside the graph, and a
gemm.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bnexport.bundle import MODEL_EXPORTED, MODEL_ONNX, MODEL_TORCHSCRIPT, Bundle, Manifest, seal
from bnexport.optional import no_warnings, quiet
from bnexport.protobuf_wire import message
from bnexport.tensor_proto import write_tensor
from bnexport.tensors import Array, Signature, TensorSpec

if TYPE_CHECKING:
    from torch import nn

SIGNATURE = Signature(
    (TensorSpec("input", "float32", ("batch", 1, 8, 8)),), (TensorSpec("logits", "float32", ("batch", 3)),)
)
OPSET, IR_VERSION = 18, 8
#: Kinds of attributes: AttributeProto.AttributeType.
_INT, _TENSOR, _INTS = 2, 4, 7
#: Conv 1 to 2, 3x3, no padding; flatten; addition of ones; Linear 72 to 3.
_SHAPES = {"kernel": (2, 1, 3, 3), "shift": (2,), "matrix": (3, 72), "bias": (3,)}


def small_weights() -> dict[str, Array]:
    """Return the same float32 numbers on every machine."""
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in _SHAPES.items()}


def expected(images: Array) -> Array:
    """Return the answer of numpy in float64: images (n, 1, 8, 8) to (n, 3)."""
    weights = {name: array.astype(np.float64) for name, array in small_weights().items()}
    windows = np.lib.stride_tricks.sliding_window_view(images[:, 0].astype(np.float64), (3, 3), axis=(1, 2))
    maps = np.einsum("nhwij,cij->nchw", windows, weights["kernel"][:, 0]) + weights["shift"][:, None, None]
    flat = maps.reshape(len(images), -1)  # (n, 72)
    result: Array = (flat + 1) @ weights["matrix"].T + weights["bias"]
    return result


def write_onnx(file: Path) -> None:
    """Write the model as ONNX, without the onnx package, which a serving machine lacks.

    The nodes around Reshape are those that exporters write for ``x.view(x.size(0), -1)``. Source of the field numbers:
    onnx.proto, IR version 8.
    """
    tensors = [write_tensor(values, name) for name, values in small_weights().items()]
    numbers = {"first": np.array(0), "axes": np.array([0]), "rest": np.array([-1]), "one": np.array([1])}
    tensors += [write_tensor(values.astype(np.int64), name) for name, values in numbers.items()]
    ones = write_tensor(np.ones(1, np.float32), "")
    nodes = [
        _node("Conv", ("input", "kernel", "shift"), "maps", _attribute("kernel_shape", _INTS, (8, 3), (8, 3))),
        _node("Shape", ("maps",), "sizes"),
        _node("Gather", ("sizes", "first"), "batch"),
        _node("Unsqueeze", ("batch", "axes"), "row"),
        _node("Concat", ("row", "rest"), "flat_sizes", _attribute("axis", _INT, (3, 0))),
        _node("Reshape", ("maps", "flat_sizes"), "flat"),
        _node("Concat", ("row", "one"), "made_sizes", _attribute("axis", _INT, (3, 0))),
        _node("ConstantOfShape", ("made_sizes",), "made", _attribute("value", _TENSOR, (5, ones))),
        _node("Add", ("flat", "made"), "sum"),
        _node("Gemm", ("sum", "matrix", "bias"), "logits", _attribute("transB", _INT, (3, 1))),
    ]
    graph = message(
        *((1, node) for node in nodes),
        (2, "small"),
        *((5, tensor) for tensor in tensors),
        *((11, _value(spec)) for spec in SIGNATURE.inputs),
        *((12, _value(spec)) for spec in SIGNATURE.outputs),
    )
    file.write_bytes(message((1, IR_VERSION), (7, graph), (8, message((1, ""), (2, OPSET)))))


def _node(operator: str, inputs: tuple[str, ...], output: str, attribute: bytes | None = None) -> bytes:
    attributes = () if attribute is None else ((5, attribute),)
    return message(
        *((1, name) for name in inputs), (2, output), (3, f"{operator}_{output}"), (4, operator), *attributes
    )


def _attribute(name: str, kind: int, *values: tuple[int, int | bytes]) -> bytes:
    """Return an attribute of a kind of AttributeProto.AttributeType, with (field, value) of each of its values."""
    return message((1, name), *values, (20, kind))


def _value(spec: TensorSpec) -> bytes:
    """Return name, element type (FLOAT, 1) and sizes of an input or output."""
    dims = [message((1, dim) if isinstance(dim, int) else (2, dim)) for dim in spec.shape]
    shape = message(*((1, dim) for dim in dims))
    return message((1, spec.name), (2, message((1, message((1, 1), (2, shape))))))


def torch_module() -> nn.Module:
    """Return the model in torch, in eval mode."""
    import torch

    class Small(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear = torch.nn.Conv2d(1, 2, 3), torch.nn.Linear(72, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            maps = self.conv(x)
            made = torch.ones(maps.size(0), 1, dtype=maps.dtype, device=maps.device)
            result: torch.Tensor = self.linear(maps.view(maps.size(0), -1) + made)
            return result

    module = Small()
    for parameter, values in zip(module.parameters(), small_weights().values(), strict=True):
        parameter.data.copy_(torch.from_numpy(values))
    module.eval()
    return module


def write_torchscript(file: Path) -> None:
    """Write the model as TorchScript: scripted, since a trace turns the device of ``made`` into a constant."""
    import torch

    with no_warnings:  # deprecated upstream, but one of this project's formats
        torch.jit.save(torch.jit.freeze(torch.jit.script(torch_module())), str(file))


def write_exported(file: Path) -> None:
    """Write the model as an exported program."""
    import torch

    batch = torch.export.Dim("batch")
    program = torch.export.export(torch_module(), (torch.zeros(2, 1, 8, 8),), dynamic_shapes=({0: batch},))
    torch.export.save(program, str(file))


def small_bundle(folder: Path) -> Bundle:
    """Write a bundle of the model in a folder; a format whose package is missing is left out."""
    write_onnx(folder / MODEL_ONNX)
    for name, write in ((MODEL_TORCHSCRIPT, write_torchscript), (MODEL_EXPORTED, write_exported)):
        try:
            with quiet():  # torch 2.11 warns about its classes
                write(folder / name)
        except ImportError:
            (folder / name).unlink(missing_ok=True)
    return seal(folder, Manifest("small", 1, SIGNATURE, {"source": "doctor"}))
