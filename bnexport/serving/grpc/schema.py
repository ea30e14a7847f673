"""The messages of the two services as tables.

Sources: Open Inference Protocol v2, "gRPC" (KServe's grpc_predict_v2.proto), with Triton's extensions (grpc_service.proto);
gRPC's Health Checking Protocol (health.proto). A test compares every row with the modules that Triton's client carries.
"""

from __future__ import annotations

import functools
from typing import Any

from bnexport.exporting import triton_messages
from bnexport.proto_messages import Enumerations, FieldRow, Messages, message_classes

PACKAGE, HEALTH_PACKAGE = "inference", "grpc.health.v1"
_NAME_VERSION = {"name": FieldRow(1, "string"), "version": FieldRow(2, "string")}
_TENSOR = {
    "name": FieldRow(1, "string"),
    "datatype": FieldRow(2, "string"),
    "shape": FieldRow(3, "int64", many=True),
}
_DURATION = "StatisticDuration"


def _entry(kind: str) -> dict[str, FieldRow]:
    """The pairs of a map from texts."""
    return {"key": FieldRow(1, "string"), "value": FieldRow(2, kind)}


def _loading(name: str) -> dict[str, dict[str, FieldRow]]:
    """The request to load or to unload."""
    return {
        name: {
            "repository_name": FieldRow(1, "string"),
            "model_name": FieldRow(2, "string"),
            "parameters": FieldRow(3, f"{name}.ParametersEntry", many=True),
        },
        f"{name}.ParametersEntry": _entry("ModelRepositoryParameter"),
    }


MESSAGES: Messages = {
    "ServerLiveRequest": {},
    "ServerLiveResponse": {"live": FieldRow(1, "bool")},
    "ServerReadyRequest": {},
    "ServerReadyResponse": {"ready": FieldRow(1, "bool")},
    "ModelReadyRequest": _NAME_VERSION,
    "ModelReadyResponse": {"ready": FieldRow(1, "bool")},
    "ServerMetadataRequest": {},
    "ServerMetadataResponse": _NAME_VERSION | {"extensions": FieldRow(3, "string", many=True)},
    "ModelMetadataRequest": _NAME_VERSION,
    "ModelMetadataResponse": {
        "name": FieldRow(1, "string"),
        "versions": FieldRow(2, "string", many=True),
        "platform": FieldRow(3, "string"),
        "inputs": FieldRow(4, "ModelMetadataResponse.TensorMetadata", many=True),
        "outputs": FieldRow(5, "ModelMetadataResponse.TensorMetadata", many=True),
    },
    "ModelMetadataResponse.TensorMetadata": _TENSOR,
    "InferParameter": {
        "bool_param": FieldRow(1, "bool", oneof="parameter_choice"),
        "int64_param": FieldRow(2, "int64", oneof="parameter_choice"),
        "string_param": FieldRow(3, "string", oneof="parameter_choice"),
        "double_param": FieldRow(4, "double", oneof="parameter_choice"),
        "uint64_param": FieldRow(5, "uint64", oneof="parameter_choice"),
    },
    "InferTensorContents": {
        "bool_contents": FieldRow(1, "bool", many=True),
        "int_contents": FieldRow(2, "int32", many=True),
        "int64_contents": FieldRow(3, "int64", many=True),
        "uint_contents": FieldRow(4, "uint32", many=True),
        "uint64_contents": FieldRow(5, "uint64", many=True),
        "fp32_contents": FieldRow(6, "float", many=True),
        "fp64_contents": FieldRow(7, "double", many=True),
        "bytes_contents": FieldRow(8, "bytes", many=True),
    },
    "ModelInferRequest": {
        "model_name": FieldRow(1, "string"),
        "model_version": FieldRow(2, "string"),
        "id": FieldRow(3, "string"),
        "parameters": FieldRow(4, "ModelInferRequest.ParametersEntry", many=True),
        "inputs": FieldRow(5, "ModelInferRequest.InferInputTensor", many=True),
        "outputs": FieldRow(6, "ModelInferRequest.InferRequestedOutputTensor", many=True),
        "raw_input_contents": FieldRow(7, "bytes", many=True),
    },
    "ModelInferRequest.ParametersEntry": _entry("InferParameter"),
    "ModelInferRequest.InferInputTensor": _TENSOR
    | {
        "parameters": FieldRow(4, "ModelInferRequest.InferInputTensor.ParametersEntry", many=True),
        "contents": FieldRow(5, "InferTensorContents"),
    },
    "ModelInferRequest.InferInputTensor.ParametersEntry": _entry("InferParameter"),
    "ModelInferRequest.InferRequestedOutputTensor": {
        "name": FieldRow(1, "string"),
        "parameters": FieldRow(2, "ModelInferRequest.InferRequestedOutputTensor.ParametersEntry", many=True),
    },
    "ModelInferRequest.InferRequestedOutputTensor.ParametersEntry": _entry("InferParameter"),
    "ModelInferResponse": {
        "model_name": FieldRow(1, "string"),
        "model_version": FieldRow(2, "string"),
        "id": FieldRow(3, "string"),
        "parameters": FieldRow(4, "ModelInferResponse.ParametersEntry", many=True),
        "outputs": FieldRow(5, "ModelInferResponse.InferOutputTensor", many=True),
        "raw_output_contents": FieldRow(6, "bytes", many=True),
    },
    "ModelInferResponse.ParametersEntry": _entry("InferParameter"),
    "ModelInferResponse.InferOutputTensor": _TENSOR,
    "ModelStreamInferResponse": {
        "error_message": FieldRow(1, "string"),
        "infer_response": FieldRow(2, "ModelInferResponse"),
    },
    "ModelConfigRequest": _NAME_VERSION,
    "ModelConfigResponse": {"config": FieldRow(1, "ModelConfig")},
    "ModelStatisticsRequest": _NAME_VERSION,
    "ModelStatisticsResponse": {"model_stats": FieldRow(1, "ModelStatistics", many=True)},
    "StatisticDuration": {"count": FieldRow(1, "uint64"), "ns": FieldRow(2, "uint64")},
    "InferStatistics": {
        "success": FieldRow(1, _DURATION),
        "fail": FieldRow(2, _DURATION),
        "queue": FieldRow(3, _DURATION),
        "compute_input": FieldRow(4, _DURATION),
        "compute_infer": FieldRow(5, _DURATION),
        "compute_output": FieldRow(6, _DURATION),
        "cache_hit": FieldRow(7, _DURATION),
        "cache_miss": FieldRow(8, _DURATION),
    },
    "InferBatchStatistics": {
        "batch_size": FieldRow(1, "uint64"),
        "compute_input": FieldRow(2, _DURATION),
        "compute_infer": FieldRow(3, _DURATION),
        "compute_output": FieldRow(4, _DURATION),
    },
    "ModelStatistics": {
        "name": FieldRow(1, "string"),
        "version": FieldRow(2, "string"),
        "last_inference": FieldRow(3, "uint64"),
        "inference_count": FieldRow(4, "uint64"),
        "execution_count": FieldRow(5, "uint64"),
        "inference_stats": FieldRow(6, "InferStatistics"),
        "batch_stats": FieldRow(7, "InferBatchStatistics", many=True),
    },
    "RepositoryIndexRequest": {"repository_name": FieldRow(1, "string"), "ready": FieldRow(2, "bool")},
    "RepositoryIndexResponse": {"models": FieldRow(1, "RepositoryIndexResponse.ModelIndex", many=True)},
    "RepositoryIndexResponse.ModelIndex": {
        "name": FieldRow(1, "string"),
        "version": FieldRow(2, "string"),
        "state": FieldRow(3, "string"),
        "reason": FieldRow(4, "string"),
    },
    "ModelRepositoryParameter": {
        "bool_param": FieldRow(1, "bool", oneof="parameter_choice"),
        "int64_param": FieldRow(2, "int64", oneof="parameter_choice"),
        "string_param": FieldRow(3, "string", oneof="parameter_choice"),
        "bytes_param": FieldRow(4, "bytes", oneof="parameter_choice"),
    },
    **_loading("RepositoryModelLoadRequest"),
    "RepositoryModelLoadResponse": {},
    **_loading("RepositoryModelUnloadRequest"),
    "RepositoryModelUnloadResponse": {},
    **triton_messages.MESSAGES,
}
HEALTH_MESSAGES: Messages = {
    "HealthCheckRequest": {"service": FieldRow(1, "string")},
    "HealthCheckResponse": {"status": FieldRow(1, "HealthCheckResponse.ServingStatus")},
}
HEALTH_ENUMERATIONS: Enumerations = {
    "HealthCheckResponse.ServingStatus": {"UNKNOWN": 0, "SERVING": 1, "NOT_SERVING": 2, "SERVICE_UNKNOWN": 3},
}


@functools.cache
def classes() -> dict[str, Any]:
    """Name -> class, of the messages of both services."""
    purpose = "bnexport serve --grpc-port"
    inference = message_classes(PACKAGE, MESSAGES, triton_messages.ENUMERATIONS, purpose=purpose)
    return inference | message_classes(HEALTH_PACKAGE, HEALTH_MESSAGES, HEALTH_ENUMERATIONS, purpose=purpose)
