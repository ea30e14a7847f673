"""Whether model.pt holds the very weights of model.onnx, bit for bit."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from bnexport.runtimes.onnx_file import read_model, trained_tensors
from bnexport.tensors import Array
from bnexport.verification.verdict import Row


def weights_row(onnx_file: Path, torchscript_file: Path) -> Row:
    """Look for every weight and bias of the ONNX file's linear operators among the TorchScript file's tensors.

    A tensor is known by its type, its number of elements and its bits in sorted order, so that one which a format
    stores transposed is still found; where an element sits is what the other stages check. Equal tensors (biases that are
    all zero) may be one: TorchScript keeps equal constants once. A bias of zeros may be missing: the ONNX exporter writes
    one for some layers that have none.

    Raises:
        BundleError: A file can't be read.
    """
    from onnx import numpy_helper

    available = {_key(array) for array in _torchscript_tensors(torchscript_file)}
    tensors = trained_tensors(read_model(onnx_file))
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in tensors}
    missing = [
        name for name, array in arrays.items() if _key(array) not in available and (array.ndim != 1 or array.any())
    ]
    reason = f"{torchscript_file.name} holds the same {len(tensors)} tensors bit for bit"
    if not tensors:
        reason = f"{onnx_file.name} has no weight to compare"
    elif missing:
        named = ", ".join(map(repr, missing[:3]))
        reason = f"{len(missing)} of {len(tensors)} tensors are not the same in {torchscript_file.name}: {named}"
    # A network without a single weight has nothing that could differ.
    return Row("weights", torchscript_file.name, "bits", not missing, reason, n=len(tensors))


def _torchscript_tensors(file: Path) -> list[Array]:
    """Constants (freezing makes weights constants), parameters and buffers of a TorchScript file."""
    from bnexport.runtimes.torchscript import load

    module: Any = load(file)
    constants = [node.t("value") for node in module.graph.findAllNodes("prim::Constant", True) if _holds_tensor(node)]
    return [tensor.detach().numpy() for tensor in (*constants, *module.parameters(), *module.buffers())]


def _holds_tensor(node: Any) -> bool:
    return bool(node.hasAttribute("value") and node.kindOf("value") == "t")


def _key(array: Array) -> tuple[str, int, bytes]:
    bits = np.sort(array.reshape(-1).view(f"u{array.dtype.itemsize}"))
    return array.dtype.name, array.size, hashlib.sha256(bits.tobytes()).digest()
