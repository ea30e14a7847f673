"""Stage 1 for model.pt and model.pt2: the weights of model.onnx bit for bit, and the same function in float64."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

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


#: Files of torch that a bundle may hold.
TORCH_PROOFS = (MODEL_TORCHSCRIPT, MODEL_EXPORTED)


def weights_row(model: ModelProto, name: str, tensors: Sequence[Tensor]) -> Row:
    """Look for every weight and bias of model.onnx's linear operators among the tensors of a file of another format.

    A tensor is identified by its type, its number of elements and its bits; or else by the bits in sorted order,
    so that a transposed tensor matches. The other stages check the order of elements. Equal tensors (biases of zeros) may be
    stored once, as TorchScript does. A bias of zeros may be missing: the ONNX exporter adds one to some layers.
    """
    from onnx import numpy_helper

    listed = trained_tensors(model)
    missing = {tensor.name: numpy_helper.to_array(tensor) for tensor in listed}
    arrays = [_plain(tensor) for tensor in tensors]
    for ordered in (False, True):
        keys = {_key(*item, ordered=ordered) for item in arrays} if missing else set()
        missing = {key: x for key, x in missing.items() if _key(x.dtype.name, x, ordered=ordered) not in keys}
    missing = {key: x for key, x in missing.items() if x.ndim != 1 or x.any()}
    reason = f"{name} holds the same {len(listed)} tensors bit for bit"
    if not listed:
        reason = f"{MODEL_ONNX} has no weight to compare"
    elif missing:
        named = ", ".join(map(repr, list(missing)[:3]))
        reason = f"{len(missing)} of {len(listed)} tensors are not the same in {name}: {named}"
    # A network without weights passes.
    return Row("weights", name, "bits", not missing, reason, n=len(listed))


def _plain(tensor: Tensor) -> tuple[str, Array]:
    """Return a tensor's type and its elements; bfloat16, which numpy lacks, as integers of the same bits."""
    import torch

    if tensor.dtype is torch.bfloat16:
        return "bfloat16", tensor.view(torch.int16).numpy()
    return str(tensor.numpy().dtype.name), tensor.numpy()


def _key(kind: str, array: Array, *, ordered: bool) -> tuple[str, int, bytes]:
    bits = np.ascontiguousarray(array).reshape(-1).view(f"u{array.dtype.itemsize}")
    return kind, array.size, hashlib.sha256(np.sort(bits).data if ordered else bits.data).digest()


def format_rows(
    bundle: Bundle, name: str, cases: Sequence[Case], *, model: ModelProto | None, rounding: Rounding
) -> list[Row]:
    """Prove model.pt or model.pt2: its weights are those of model.onnx, and it computes in float64 what the original computes.

    The result is one row of the stage "weights", if there is a ``model``, and one of "file-proof" per case. There may be no
    case. Unavailable if torch is missing.
    """
    require("torch", purpose=f"the proof of {name}")
    from bnexport.runtimes.torch_float64 import TorchFile, TorchFloat64Evaluator

    rows = []
    try:
        file = TorchFile.load(bundle.file(name))
        rows = [] if model is None else [weights_row(model, name, file.tensors)]
        if not cases:
            return rows
        evaluator = TorchFloat64Evaluator(file, bundle.manifest.signature)
    except Unavailable:
        raise
    except BnexportError as error:
        rows = rows or ([] if model is None else [failed("weights", name, "bits", error.message)])
        return [*rows, failed("file-proof", name, "open", error.message)]
    found = each_once([case.batch for case in cases], evaluator.evaluate, together=evaluator.varies)
    return rows + float64_rows(name, cases, found, rounding, device="float64 in torch")
