"""The part of Triton's model configuration that bnexport writes and reads, as a table of messages.

Source: model_config.proto of Triton Inference Server; a test compares every row with the module that Triton's own client
carries.
"""

from __future__ import annotations

from bnexport.proto_messages import FieldRow

PACKAGE = "inference"
#: Message -> field -> its row: the part of model_config.proto that bnexport writes. "A.B" lies inside A.
MESSAGES: dict[str, dict[str, FieldRow]] = {
    "ModelConfig": {
        "name": FieldRow(1, "string"),
        "platform": FieldRow(2, "string"),
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
