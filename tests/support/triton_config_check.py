"""Triton's ``config.pbtxt``, parsed by Triton's rules, and compared with the model's signature.

Parsing uses protobuf's text parser with the fields of ``proto/model_config.proto``: an unknown field, a wrong type and a
missing bracket are errors.
"""

from collections.abc import Iterator
from typing import Any

from google.protobuf import text_format

from bnexport.exporting.triton_config import triton_dims, triton_type
from bnexport.proto_messages import message_classes
from bnexport.tensors import Signature, TensorSpec


class ConfigError(Exception):
    """Triton would refuse a configuration."""


def read_config(text: str) -> Any:
    """Parse a configuration: a message of ``proto/model_config.proto``."""
    try:
        return text_format.Parse(text, _message_class()())
    except text_format.ParseError as error:
        raise ConfigError(f"Triton can't read this configuration: {error}") from error


def check_config(text: str, name: str, signature: Signature, *, files: frozenset[str]) -> None:
    """Refuse a configuration with which Triton would not load this model."""
    if (problem := next(_problems(read_config(text), name, signature, files), None)) is not None:
        raise ConfigError(f"Triton would not load this configuration: {problem}")


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
        yield "it has dynamic_batching for a model without a varying batch"
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
    return message_classes("a test")["ModelConfig"]
