"""Triton's model configuration, ``config.pbtxt``: written, and read as Triton reads it.

It lies next to a model's versions, so that ``models/`` is a Triton model repository. Reading uses protobuf's text parser with
the fields of ``proto/model_config.proto``: another field is an error, as is a wrong type or a missing bracket.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bnexport.bundle import MODEL_ONNX
from bnexport.errors import ExportError, OutputError
from bnexport.files import write_atomically
from bnexport.optional import one_line, require
from bnexport.proto_messages import message_classes
from bnexport.tensors import ELEMENT_TYPES, Signature, TensorSpec

CONFIG = "config.pbtxt"


def triton_config(
    name: str,
    signature: Signature,
    *,
    max_batch_size: int = 64,
    label_filename: str | None = None,
    more: Sequence[str] = (),
) -> str:
    """Return the text of ``config.pbtxt`` (Triton Inference Server, "Model Configuration").

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
    # Triton takes no empty dims; one value per sample is written as [ 1 ] with a reshape to [ ].
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
    batch of a new size is slow, for cuDNN picks its algorithms and TensorRT builds its engines then, so the smallest and
    the largest batch run before the model is ready.
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
    if any(-1 in dims for dims in shapes):  # a warmup needs sizes, and which ones come is not known
        return []
    inputs = " ".join(
        f"inputs {{ key: {quoted(spec.name)} value {{ data_type: {triton_type(spec)}"
        f" dims: [ {', '.join(map(str, dims)) or '1'} ] zero_data: true }} }}"
        for spec, dims in zip(signature.inputs, shapes, strict=True)
    )
    sizes = sorted({1, max_batch_size}) if batched else [1]
    return [f'model_warmup [ {{ name: "batch_{size}" batch_size: {size} {inputs} }} ]' for size in sizes]


_CONFIG_REMEDY = "This is a fault in bnexport: please report it with the model's signature"


def read_config(text: str) -> Any:
    """Parse a configuration: a message of ``proto/model_config.proto``."""
    text_format = require("google.protobuf.text_format", purpose="checking Triton's configuration")
    try:
        return text_format.Parse(text, _message_class()())
    except text_format.ParseError as error:
        raise ExportError(f"Triton can't read this configuration: {one_line(error)}", remedy=_CONFIG_REMEDY) from error


def check_config(text: str, name: str, signature: Signature, *, files: frozenset[str]) -> None:
    """Refuse a configuration with which Triton would not load this model."""
    if (problem := next(_problems(read_config(text), name, signature, files), None)) is not None:
        raise ExportError(f"Triton would not load this configuration: {problem}", remedy=_CONFIG_REMEDY)


def _problems(config: Any, name: str, signature: Signature, files: frozenset[str]) -> Iterator[str]:
    batched = signature.batched
    if config.name != name:
        yield f"it is named {config.name!r}, its folder {name!r}"
    if config.backend != "onnxruntime":
        yield f"its backend is {config.backend!r}"
    if config.default_model_filename not in files:
        yield f"there is no {config.default_model_filename!r}"
    if (config.max_batch_size > 0) != batched:
        yield f"max_batch_size is {config.max_batch_size} for a batch that {'varies' if batched else 'is fixed'}"
    if config.HasField("dynamic_batching") and not config.max_batch_size:
        yield "it batches dynamically what takes no batch"
    for words, specs, found in (
        ("inputs", signature.inputs, config.input),
        ("outputs", signature.outputs, config.output),
    ):
        if (have := [_declared(tensor) for tensor in found]) != (want := [_expected(s, batched) for s in specs]):
            yield f"its {words} are {have}, the model's {want}"
    for tensor in config.output:
        if tensor.label_filename and tensor.label_filename not in files:
            yield f"there is no {tensor.label_filename!r}"
    if not config.parameters["intra_op_thread_count"].string_value:
        yield "every instance would take all cores"


def _declared(tensor: Any) -> tuple[str, int, list[int]]:
    """Return name, type and dimensions of an input or output, as the backend sees them after the reshape."""
    dims = tensor.reshape.shape if tensor.HasField("reshape") else tensor.dims
    return tensor.name, tensor.data_type, list(dims)


def _expected(spec: TensorSpec, batched: bool) -> tuple[str, int, list[int]]:
    types = _message_class().DESCRIPTOR.file.enum_types_by_name["DataType"].values_by_name
    return spec.name, types[triton_type(spec)].number, triton_dims(spec, batched=batched)


def _message_class() -> Any:
    return message_classes("checking Triton's configuration")["ModelConfig"]
