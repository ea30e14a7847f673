"""Triton's model configuration, so that ``models/`` is a Triton model repository."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from bnexport.bundle import MODEL_ONNX
from bnexport.errors import ExportError, OutputError
from bnexport.files import write_atomically
from bnexport.tensors import Signature, TensorSpec

CONFIG = "config.pbtxt"

_TYPES = {
    "float16": "TYPE_FP16", "float32": "TYPE_FP32", "float64": "TYPE_FP64", "uint8": "TYPE_UINT8", "int8": "TYPE_INT8",
    "int16": "TYPE_INT16", "int32": "TYPE_INT32", "int64": "TYPE_INT64", "bool": "TYPE_BOOL",
}  # fmt: skip


def triton_config(
    name: str,
    signature: Signature,
    *,
    max_batch_size: int = 64,
    label_filename: str | None = None,
    more: Sequence[str] = (),
) -> str:
    """The text of ``config.pbtxt`` (Triton Inference Server, "Model Configuration").

    ``dynamic_batching`` without a delay batches what has queued while the previous batch ran. Triton's ONNX Runtime
    backend otherwise gives every instance all cores; one thread per instance keeps the 99th percentile low.

    Args:
        name: The model's name, which must be its folder's.
        signature: Inputs and outputs, batch first. Triton writes the dimensions without the batch, and the batch with
            them where it does not vary.
        max_batch_size: Largest batch that Triton forms; of no use where the batch does not vary.
        label_filename: File of class names beside the configuration, for the first output: Triton's classification
            extension answers with them.
        more: Further blocks, such as instance groups.
    """
    batched = signature.batched
    labels = [label_filename, *[None] * len(signature.outputs)]
    blocks = [
        f"name: {quoted(name)}",
        'backend: "onnxruntime"',
        f"default_model_filename: {json.dumps(MODEL_ONNX)}",
        f"max_batch_size: {max_batch_size if batched else 0}",
        *(f"input [\n{_tensor(spec, batched)}\n]" for spec in signature.inputs),
        *(
            f"output [\n{_tensor(spec, batched, label)}\n]"
            for spec, label in zip(signature.outputs, labels, strict=False)
        ),
        *(["dynamic_batching { }"] if batched else []),
        'parameters { key: "intra_op_thread_count" value: { string_value: "1" } }',
        *more,
    ]
    return "\n".join(blocks) + "\n"


def triton_type(spec: TensorSpec) -> str:
    """Triton's name of an element type: "TYPE_FP32".

    Raises:
        ExportError: It has none.
    """
    if spec.dtype not in _TYPES:
        raise ExportError(f"Triton has no type for {spec.dtype} ({spec.name!r})", remedy="Use another element type")
    return _TYPES[spec.dtype]


def triton_dims(spec: TensorSpec, *, batched: bool) -> list[int]:
    """Dimensions as Triton counts them, -1 for one that varies; empty where a sample is a single value."""
    return [-1 if isinstance(dim, str) else dim for dim in (spec.sample_shape if batched else spec.shape)]


def quoted(text: str) -> str:
    """As protobuf's text format takes it: UTF-8 as it is, for it knows no pairs of surrogates."""
    return json.dumps(text, ensure_ascii=False)


def _tensor(spec: TensorSpec, batched: bool, label_filename: str | None = None) -> str:
    dims = triton_dims(spec, batched=batched)
    # Triton takes no empty dims; one value per sample is written as [ 1 ] with a reshape to [ ].
    shape = ", ".join(map(str, dims)) or "1"
    lines = [f"name: {quoted(spec.name)}", f"data_type: {triton_type(spec)}", f"dims: [ {shape} ]"]
    lines += [] if dims else ["reshape: { shape: [ ] }"]
    lines += [] if label_filename is None else [f"label_filename: {json.dumps(label_filename)}"]
    return "\n".join(["  {", *(f"    {line}" for line in lines), "  }"])


def write_triton_config(bundle_path: Path, name: str, signature: Signature, *, force: bool = False) -> None:
    """Write ``config.pbtxt`` beside the versions of a model.

    Raises:
        OutputError: Another version of the model wrote another configuration; both can't be served under one name.
    """
    path, text = bundle_path.parent / CONFIG, triton_config(name, signature)
    check_triton_config(bundle_path, name, signature, force=force)
    write_atomically(path, text.encode())


def check_triton_config(bundle_path: Path, name: str, signature: Signature, *, force: bool = False) -> None:
    """Refuse, before anything is written, a configuration that differs from the one already there."""
    path = bundle_path.parent / CONFIG
    others = [item for item in bundle_path.parent.glob("[1-9]*") if item.is_dir() and item.name != bundle_path.name]
    if force or not others or not path.is_file() or path.read_text(encoding="utf-8") == triton_config(name, signature):
        return
    raise OutputError(
        f"{path} describes other inputs or outputs than this model, and version {others[0].name} relies on it",
        remedy="Export under another name, or pass --force to replace the configuration",
    )
