"""Triton's model configuration read as Triton reads it: protobuf's own text parser on the fields that bnexport writes.

Source of the messages: model_config.proto of Triton Inference Server; a test compares every row with the module that
Triton's own client carries. A field that is not in the table is an error, as is a wrong type or a missing bracket.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

from bnexport.errors import ExportError
from bnexport.exporting.triton import batch_varies, triton_dims, triton_type
from bnexport.optional import one_line, require
from bnexport.tensors import Signature, TensorSpec

_REMEDY = "This is a fault in bnexport: please report it with the model's signature"
PACKAGE = "inference"


class FieldRow(NamedTuple):
    """One field of a message.

    Attributes:
        number: In the file of messages.
        kind: "string", "int32", "int64", "bool", or the name of a message or enumeration of this table.
        many: Whether it is repeated.
    """

    number: int
    kind: str
    many: bool = False


#: Message -> field -> its row: the part of model_config.proto that bnexport writes. "A.B" lies inside A.
MESSAGES: dict[str, dict[str, FieldRow]] = {
    "ModelConfig": {
        "name": FieldRow(1, "string"),
        "backend": FieldRow(17, "string"),
        "max_batch_size": FieldRow(4, "int32"),
        "input": FieldRow(5, "ModelInput", many=True),
        "output": FieldRow(6, "ModelOutput", many=True),
        "optimization": FieldRow(12, "ModelOptimizationPolicy"),
        "dynamic_batching": FieldRow(11, "ModelDynamicBatching"),
        "instance_group": FieldRow(7, "ModelInstanceGroup", many=True),
        "default_model_filename": FieldRow(8, "string"),
        "parameters": FieldRow(14, "ModelConfig.ParametersEntry", many=True),
        "model_warmup": FieldRow(16, "ModelWarmup", many=True),
    },
    "ModelConfig.ParametersEntry": {"key": FieldRow(1, "string"), "value": FieldRow(2, "ModelParameter")},
    "ModelParameter": {"string_value": FieldRow(1, "string")},
    "ModelInput": {
        "name": FieldRow(1, "string"),
        "data_type": FieldRow(2, "DataType"),
        "dims": FieldRow(4, "int64", many=True),
        "reshape": FieldRow(5, "ModelTensorReshape"),
    },
    "ModelOutput": {
        "name": FieldRow(1, "string"),
        "data_type": FieldRow(2, "DataType"),
        "dims": FieldRow(3, "int64", many=True),
        "reshape": FieldRow(5, "ModelTensorReshape"),
        "label_filename": FieldRow(4, "string"),
    },
    "ModelTensorReshape": {"shape": FieldRow(1, "int64", many=True)},
    "ModelDynamicBatching": {
        "preferred_batch_size": FieldRow(1, "int32", many=True),
        "max_queue_delay_microseconds": FieldRow(2, "uint64"),
    },
    "ModelInstanceGroup": {"kind": FieldRow(4, "ModelInstanceGroup.Kind"), "count": FieldRow(2, "int32")},
    "ModelOptimizationPolicy": {
        "execution_accelerators": FieldRow(4, "ModelOptimizationPolicy.ExecutionAccelerators"),
    },
    "ModelOptimizationPolicy.ExecutionAccelerators": {
        "gpu_execution_accelerator": FieldRow(
            1, "ModelOptimizationPolicy.ExecutionAccelerators.Accelerator", many=True
        ),
    },
    "ModelOptimizationPolicy.ExecutionAccelerators.Accelerator": {
        "name": FieldRow(1, "string"),
        "parameters": FieldRow(
            2, "ModelOptimizationPolicy.ExecutionAccelerators.Accelerator.ParametersEntry", many=True
        ),
    },
    "ModelOptimizationPolicy.ExecutionAccelerators.Accelerator.ParametersEntry": {
        "key": FieldRow(1, "string"),
        "value": FieldRow(2, "string"),
    },
    "ModelWarmup": {
        "name": FieldRow(1, "string"),
        "batch_size": FieldRow(2, "uint32"),
        "inputs": FieldRow(3, "ModelWarmup.InputsEntry", many=True),
    },
    "ModelWarmup.InputsEntry": {"key": FieldRow(1, "string"), "value": FieldRow(2, "ModelWarmup.Input")},
    "ModelWarmup.Input": {
        "data_type": FieldRow(1, "DataType"),
        "dims": FieldRow(2, "int64", many=True),
        "zero_data": FieldRow(3, "bool"),
    },
}
#: Enumeration -> value -> number.
ENUMERATIONS: dict[str, dict[str, int]] = {
    "DataType": {
        "TYPE_INVALID": 0, "TYPE_BOOL": 1, "TYPE_UINT8": 2, "TYPE_UINT16": 3, "TYPE_UINT32": 4, "TYPE_UINT64": 5,
        "TYPE_INT8": 6, "TYPE_INT16": 7, "TYPE_INT32": 8, "TYPE_INT64": 9, "TYPE_FP16": 10, "TYPE_FP32": 11,
        "TYPE_FP64": 12, "TYPE_STRING": 13, "TYPE_BF16": 14,
    },
    "ModelInstanceGroup.Kind": {"KIND_AUTO": 0, "KIND_GPU": 1, "KIND_CPU": 2, "KIND_MODEL": 3},
}  # fmt: skip
#: Kind of a plain field -> FieldDescriptorProto.Type.
_TYPES = {"int64": 3, "uint64": 4, "int32": 5, "bool": 8, "string": 9, "uint32": 13}
_MESSAGE, _ENUMERATION = 11, 14
_OPTIONAL, _REPEATED = 1, 3


def read_config(text: str) -> Any:
    """Parse a configuration: a message with the fields of MESSAGES.

    Raises:
        ExportError: It is not in protobuf's text format, or has a field, value or type that Triton does not know.
    """
    text_format = require("google.protobuf.text_format", purpose="checking Triton's configuration")
    try:
        return text_format.Parse(text, _message_class()())
    except text_format.ParseError as error:
        raise ExportError(f"Triton can't read this configuration: {one_line(error)}", remedy=_REMEDY) from error


def check_config(text: str, name: str, signature: Signature, *, files: frozenset[str]) -> None:
    """Refuse a configuration with which Triton would not load this model.

    Args:
        text: Of config.pbtxt.
        name: Of its folder.
        signature: Of the model file.
        files: Names beside the configuration, and the model file's.

    Raises:
        ExportError: Saying the first thing that does not fit.
    """
    if (problem := next(_problems(read_config(text), name, signature, files), None)) is not None:
        raise ExportError(f"Triton would not load this configuration: {problem}", remedy=_REMEDY)


def _problems(config: Any, name: str, signature: Signature, files: frozenset[str]) -> Iterator[str]:
    batched = batch_varies(signature)
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
    """Name, type and dimensions of an input or output, as the backend sees them after the reshape."""
    dims = tensor.reshape.shape if tensor.HasField("reshape") else tensor.dims
    return tensor.name, tensor.data_type, list(dims)


def _expected(spec: TensorSpec, batched: bool) -> tuple[str, int, list[int]]:
    return spec.name, ENUMERATIONS["DataType"][triton_type(spec)], triton_dims(spec, batched=batched)


@functools.cache
def _message_class() -> Any:
    """The class of ModelConfig, built from the table in a pool of its own."""
    descriptors = require("google.protobuf.descriptor_pb2", purpose="checking Triton's configuration")
    pools = require("google.protobuf.descriptor_pool", purpose="checking Triton's configuration")
    factory = require("google.protobuf.message_factory", purpose="checking Triton's configuration")
    file = descriptors.FileDescriptorProto(name="model_config_subset.proto", package=PACKAGE, syntax="proto3")
    made: dict[str, Any] = {}
    for name, fields in MESSAGES.items():
        outer, _, own = name.rpartition(".")
        made[name] = made[outer].nested_type.add(name=own) if outer else file.message_type.add(name=own)
        made[name].options.map_entry = own.endswith("Entry")
        for field, row in fields.items():
            _add_field(made[name], field, row)
    for name, values in ENUMERATIONS.items():
        outer, _, own = name.rpartition(".")
        enumeration = made[outer].enum_type.add(name=own) if outer else file.enum_type.add(name=own)
        for value, number in values.items():
            enumeration.value.add(name=value, number=number)
    pool = pools.DescriptorPool()
    pool.Add(file)
    return factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.ModelConfig"))


def _add_field(message: Any, name: str, row: FieldRow) -> None:
    field = message.field.add(name=name, number=row.number, label=_REPEATED if row.many else _OPTIONAL)
    if row.kind in _TYPES:
        field.type = _TYPES[row.kind]
    else:
        field.type = _ENUMERATION if row.kind in ENUMERATIONS else _MESSAGE
        field.type_name = f".{PACKAGE}.{row.kind}"
