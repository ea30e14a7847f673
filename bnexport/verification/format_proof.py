"""Stage 1 for model.pt and model.pt2: the weights of model.onnx bit for bit, and the same function in float64."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bnexport.bundle import MODEL_EXPORTED, MODEL_ONNX, MODEL_TORCHSCRIPT, Bundle
from bnexport.errors import BnexportError, Unavailable
from bnexport.onnx_files.models import trained_tensors
from bnexport.optional import require
from bnexport.tensors import Array
from bnexport.verification.inputs import Case, each_once
from bnexport.verification.stages import Rounding, failed, float64_rows
from bnexport.verification.verdict import Row

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch import Tensor


def weights_row(model: ModelProto, other_file: Path) -> Row:
    """Look for every weight and bias of model.onnx's linear operators among the tensors of a file of another format.

    A tensor is identified by its type, its number of elements and its bits in sorted order, so that a transposed one is found;
    the other stages check the places of elements. Equal tensors (biases of zeros) may be one: TorchScript stores equal
    constants once. A bias of zeros may be missing: the ONNX exporter writes one for some layers that have none.
    """
    from onnx import numpy_helper

    read = next(read for name, read in TENSORS.items() if Path(name).suffix == other_file.suffix)
    available = {_tensor_key(tensor) for tensor in read(other_file)}
    tensors = trained_tensors(model)
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in tensors}
    missing = [
        name for name, array in arrays.items() if _key(array) not in available and (array.ndim != 1 or array.any())
    ]
    reason = f"{other_file.name} holds the same {len(tensors)} tensors bit for bit"
    if not tensors:
        reason = f"{MODEL_ONNX} has no weight to compare"
    elif missing:
        named = ", ".join(map(repr, missing[:3]))
        reason = f"{len(missing)} of {len(tensors)} tensors are not the same in {other_file.name}: {named}"
    # A network without a single weight has nothing that could differ.
    return Row("weights", other_file.name, "bits", not missing, reason, n=len(tensors))


def _torchscript_tensors(file: Path) -> list[Tensor]:
    """Return constants (freezing makes weights constants), parameters and buffers of a TorchScript file."""
    from bnexport.runtimes.torch_runners import load_torchscript, tensor_constants

    module: Any = load_torchscript(file)
    constants = [node.t("value") for node in tensor_constants(module.graph)]
    return [*constants, *module.parameters(), *module.buffers()]


def _exported_tensors(file: Path) -> list[Tensor]:
    """Return parameters, buffers and constants of an exported program."""
    import torch

    from bnexport.runtimes.torch_runners import load_exported_program

    program = load_exported_program(file)
    found = (*program.state_dict.values(), *program.constants.values())
    return [value for value in found if isinstance(value, torch.Tensor)]


#: File of a bundle -> every tensor in it.
TENSORS: dict[str, Callable[[Path], list[Tensor]]] = {
    MODEL_TORCHSCRIPT: _torchscript_tensors,
    MODEL_EXPORTED: _exported_tensors,
}


def _tensor_key(tensor: Tensor) -> tuple[str, int, bytes]:
    import torch

    plain = tensor.detach()
    if plain.dtype is torch.bfloat16:  # numpy has no such type of its own
        return "bfloat16", *_key(plain.view(torch.int16).numpy())[1:]
    return _key(plain.numpy())


def _key(array: Array) -> tuple[str, int, bytes]:
    bits = np.sort(array.reshape(-1).view(f"u{array.dtype.itemsize}"))
    return array.dtype.name, array.size, hashlib.sha256(bits.tobytes()).digest()


def no_rounding(_case: Case, *, always: bool = False) -> float | None:  # noqa: ARG001 -- a Rounding
    """Return None: the fixed bound holds."""
    return None


def format_rows(
    bundle: Bundle,
    name: str,
    cases: Sequence[Case],
    *,
    model: ModelProto | None,
    rounding: Rounding = no_rounding,
) -> list[Row]:
    """Prove model.pt or model.pt2: its weights are those of model.onnx, and it computes in float64 what the original computes.

    The result is one row of the stage "weights", if there is a ``model``, and one of "file-proof" per case.
    ``rounding`` is ``Forecast.rounding``, the bound where the fixed one does not cover rounding (half precision).

    Raises:
        Unavailable: torch is missing.
    """
    require("torch", purpose=f"the proof of {name}")
    rows = [] if model is None else [_weights_row(model, bundle, name)]
    return rows + _proof(bundle, name, cases, rounding)


def _weights_row(model: ModelProto, bundle: Bundle, name: str) -> Row:
    try:
        return weights_row(model, bundle.file(name))
    except Unavailable:
        raise
    except BnexportError as error:
        return failed("weights", name, "bits", error.message)


def _proof(bundle: Bundle, name: str, cases: Sequence[Case], rounding: Rounding) -> list[Row]:
    """Compare the file with all floats widened, evaluated by torch in float64, with the reference."""
    from bnexport.runtimes.torch_float64 import TorchFloat64Evaluator

    try:
        evaluator = TorchFloat64Evaluator(bundle.file(name), bundle.manifest.signature)
    except Unavailable:
        raise
    except BnexportError as error:
        return [failed("file-proof", name, "open", error.message)]
    found = each_once([case.batch for case in cases], evaluator.evaluate, together=evaluator.varies)
    return float64_rows(name, cases, found, rounding, device="float64 in torch")
