"""Triton's model configuration, ``config.pbtxt``, next to a model's versions, so that ``models/`` is a Triton model repository.

The tests parse it with the fields of ``proto/model_config.proto`` and compare it with the signature.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from bnexport.bundle import MODEL_ONNX
from bnexport.errors import OutputError
from bnexport.files import write_atomically
from bnexport.tensors import ELEMENT_TYPES, Signature, TensorSpec

CONFIG = "config.pbtxt"


def triton_config(
    name: str,
    signature: Signature,
    *,
    max_batch_size: int = 64,
    preferred_batch: int | None = None,
    threads: int = 1,
    label_filename: str | None = None,
    more: Sequence[str] = (),
) -> str:
    """Return the text of ``config.pbtxt`` (Triton Inference Server, "Model Configuration").

    ``dynamic_batching`` without a delay batches the requests that were queued while the previous batch ran. Triton's ONNX
    Runtime backend otherwise gives every instance all cores; one thread per instance keeps the 99th percentile low.

    ``name`` must be the name of the model's folder. ``max_batch_size`` is ignored if the batch is fixed; the batcher may prefer
    the batch ``preferred_batch``. ``threads`` are those of one instance on a CPU. Triton's classification extension returns the
    class names in ``label_filename``, next to the configuration, for the first output. ``more`` are further blocks, such as
    instance groups.
    """
    batched = signature.batched
    preferred = "" if preferred_batch is None else f"preferred_batch_size: [ {preferred_batch} ] "
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
        *([f"dynamic_batching {{ {preferred}}}"] if batched else []),
        f'parameters {{ key: "intra_op_thread_count" value: {{ string_value: "{threads}" }} }}',
        *more,
    ]
    return "\n".join(blocks) + "\n"


def triton_type(spec: TensorSpec) -> str:
    """Return Triton's name of an element type: "TYPE_FP32"."""
    return f"TYPE_{ELEMENT_TYPES[spec.dtype].datatype}"


def triton_dims(spec: TensorSpec, *, batched: bool) -> list[int]:
    """Return dimensions as Triton counts them, -1 for one that varies; empty if a sample is a single value."""
    return [-1 if isinstance(dim, str) else dim for dim in (spec.sample_shape if batched else spec.shape)]


def quoted(text: str) -> str:
    """Quote a text for protobuf's text format: UTF-8 unchanged, because it has no surrogate pairs."""
    return json.dumps(text, ensure_ascii=False)


def _tensor(spec: TensorSpec, batched: bool, label_filename: str | None = None) -> str:
    dims = triton_dims(spec, batched=batched)
    # Triton refuses empty dims; one value per sample is written as [ 1 ] with a reshape to [ ].
    shape = ", ".join(map(str, dims)) or "1"
    lines = [f"name: {quoted(spec.name)}", f"data_type: {triton_type(spec)}", f"dims: [ {shape} ]"]
    lines += [] if dims else ["reshape: { shape: [ ] }"]
    lines += [] if label_filename is None else [f"label_filename: {json.dumps(label_filename)}"]
    return "\n".join(["  {", *(f"    {line}" for line in lines), "  }"])


def write_triton_config(bundle_path: Path, name: str, signature: Signature, *, force: bool = False) -> None:
    """Write ``config.pbtxt`` next to the versions of a model."""
    path, text = bundle_path.parent / CONFIG, triton_config(name, signature)
    check_triton_config(bundle_path, name, signature, force=force)
    write_atomically(path, text.encode())


def check_triton_config(bundle_path: Path, name: str, signature: Signature, *, force: bool = False) -> None:
    """Refuse, before anything is written, a configuration that differs from the existing one."""
    path = bundle_path.parent / CONFIG
    others = [item for item in bundle_path.parent.glob("[1-9]*") if item.is_dir() and item.name != bundle_path.name]
    if force or not others or not path.is_file() or path.read_text(encoding="utf-8") == triton_config(name, signature):
        return
    raise OutputError(
        f"{path} describes other inputs or outputs than this model, and version {others[0].name} relies on it",
        remedy="Export under another name, or pass --force to replace the configuration",
    )


def device_blocks(signature: Signature, *, device: str, instances: int, max_batch_size: int) -> list[str]:
    """Return the blocks of a configuration that depend on the device.

    Sources: "Model Configuration", instance groups and warmup; README of Triton's ONNX Runtime backend. On GPUs the first
    batch of a new size is slow, because cuDNN picks its algorithms and TensorRT builds its engines. So the smallest and the
    largest batch run before the model is ready.
    """
    kind = "KIND_CPU" if device == "cpu" else "KIND_GPU"
    blocks = [f"instance_group [ {{ count: {instances} kind: {kind} }} ]"]
    if device == "cuda":
        # 1 is the heuristic. Before ONNX Runtime 1.20 the default measures times, so each start may use other algorithms.
        blocks.append('parameters { key: "cudnn_conv_algo_search" value: { string_value: "1" } }')
    if device == "tensorrt":
        blocks.append(
            'optimization { execution_accelerators { gpu_execution_accelerator [ { name: "tensorrt"'
            ' parameters { key: "precision_mode" value: "FP32" } } ] } }'
        )
    return blocks if device == "cpu" else [*blocks, *_warmups(signature, max_batch_size)]


def _warmups(signature: Signature, max_batch_size: int) -> list[str]:
    batched = signature.batched
    shapes = [triton_dims(spec, batched=batched) for spec in signature.inputs]
    if any(-1 in dims for dims in shapes):  # a warmup needs sizes, and those of the requests are unknown
        return []
    inputs = " ".join(
        f"inputs {{ key: {quoted(spec.name)} value {{ data_type: {triton_type(spec)}"
        f" dims: [ {', '.join(map(str, dims)) or '1'} ] zero_data: true }} }}"
        for spec, dims in zip(signature.inputs, shapes, strict=True)
    )
    sizes = sorted({1, max_batch_size}) if batched else [1]
    return [f'model_warmup [ {{ name: "batch_{size}" batch_size: {size} {inputs} }} ]' for size in sizes]
