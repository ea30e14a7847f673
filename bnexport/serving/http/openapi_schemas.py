"""The JSON of requests and answers as JSON Schema (draft 2020-12), by name: data, no code."""

from __future__ import annotations

from typing import Any

from bnexport.serving.protocol.messages import BYTES, DATATYPES
from bnexport.serving.repository import READY, UNAVAILABLE

_TEXT: dict[str, Any] = {"type": "string"}
_WHOLE: dict[str, Any] = {"type": "integer", "minimum": 0}
_FLAG: dict[str, Any] = {"type": "boolean"}
_NUMBER: dict[str, Any] = {"type": "number"}
_DATATYPE: dict[str, Any] = {"enum": list(DATATYPES.values())}
_SHAPE: dict[str, Any] = {"type": "array", "items": {"type": "integer", "minimum": 1}}


def _list(of: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": of}


def _object(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    """An object that a client may send: more keys are ignored."""
    return {"type": "object", "properties": required | (optional or {}), "required": list(required)}


def _exact(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    """An object of an answer: no other keys."""
    return _object(required, optional) | {"additionalProperties": False}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


_DURATION = _exact({"count": _WHOLE, "ns": _WHOLE})
_STEPS = ("compute_input", "compute_infer", "compute_output")
_DURATIONS = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output", "cache_hit", "cache_miss")
_CONFIG_TENSOR = _exact({"name": _TEXT, "data_type": _TEXT, "dims": _list({"type": "integer", "minimum": -1})})
_STATE = {"enum": [READY, UNAVAILABLE]}

#: Name -> schema. The protocol's names where it has some.
SCHEMAS: dict[str, dict[str, Any]] = {
    "Error": _exact({"error": _TEXT}),
    "Done": _exact({}),
    "Live": _exact({"live": {"const": True}}),
    "Ready": _exact({"ready": _FLAG}, {"reason": _TEXT, "problems": {"type": "object", "additionalProperties": _TEXT}}),
    "ModelReady": _exact({"name": _TEXT, "ready": _FLAG}, {"reason": _TEXT}),
    "ServerMetadata": _exact({"name": _TEXT, "version": _TEXT, "extensions": _list(_TEXT)}),
    "Document": _object({"openapi": _TEXT, "info": {"type": "object"}, "paths": {"type": "object"}}),
    "TensorMetadata": _exact(
        {"name": _TEXT, "datatype": _DATATYPE, "shape": _list({"type": "integer", "minimum": -1})}
    ),
    "ModelInput": _exact(
        {
            "name": _TEXT,
            "datatype": _DATATYPE,
            "shape": _list({"type": "integer", "minimum": -1}),
            "smallest": _list(_WHOLE),
        }
    ),
    "ModelMetadata": _exact(
        {
            "name": _TEXT,
            "versions": _list(_TEXT),
            "platform": _TEXT,
            "inputs": _list(_ref("TensorMetadata")),
            "outputs": _list(_ref("TensorMetadata")),
        }
    ),
    "ModelConfig": _exact(
        {
            "name": _TEXT,
            "platform": _TEXT,
            "backend": _TEXT,
            "max_batch_size": _WHOLE,
            "input": _list(_CONFIG_TENSOR),
            "output": _list(_CONFIG_TENSOR),
            "dynamic_batching": {"type": "object"},
            "instance_group": _list(_exact({"count": _WHOLE, "kind": {"enum": ["KIND_CPU", "KIND_GPU"]}})),
            "parameters": {"type": "object"},
        }
    ),
    "Statistics": _exact({"model_stats": _list(_ref("ModelStatistics"))}),
    "ModelStatistics": _exact(
        {
            "name": _TEXT,
            "version": _TEXT,
            "last_inference": _WHOLE,
            "inference_count": _WHOLE,
            "execution_count": _WHOLE,
            "inference_stats": _exact(dict.fromkeys(_DURATIONS, _DURATION)),
            "batch_stats": _list(
                _exact(
                    {"batch_size": _WHOLE}
                    | dict.fromkeys([f"compute_{k}" for k in ("input", "infer", "output")], _DURATION)
                )
            ),
        }
    ),
    "InferRequest": _object(
        {"inputs": _list(_ref("InputTensor")) | {"minItems": 1}},
        {
            "id": _TEXT | {"maxLength": 256},
            "outputs": _list(_ref("RequestedOutput")),
            "parameters": _object({}, {"binary_data_output": _FLAG, "timeout": _WHOLE}),
        },
    ),
    "InputTensor": _object(
        {"name": _TEXT, "shape": _SHAPE, "datatype": _DATATYPE},
        {
            "data": {"type": "array", "description": "Values in row-major order, flat or nested as the shape says."},
            "parameters": _object({}, {"binary_data_size": _WHOLE}),
        },
    ),
    "RequestedOutput": _object(
        {"name": _TEXT}, {"parameters": _object({}, {"binary_data": _FLAG, "classification": _WHOLE})}
    ),
    "InferResponse": _exact(
        {"model_name": _TEXT, "model_version": _TEXT, "outputs": _list(_ref("OutputTensor"))}, {"id": _TEXT}
    ),
    "OutputTensor": _exact(
        {"name": _TEXT, "datatype": {"enum": [*DATATYPES.values(), BYTES]}, "shape": _list(_WHOLE)},
        {"data": {"type": "array"}, "parameters": _exact({"binary_data_size": _WHOLE})},
    ),
    "Predictions": _exact(
        {"model_name": _TEXT, "model_version": _TEXT, "predictions": _list(_ref("Prediction"))},
    ),
    "Prediction": _exact(
        {
            "image": _TEXT,
            "index": _WHOLE,
            "label": _TEXT,
            "probability": _NUMBER | {"minimum": 0, "maximum": 1},
            "logits": _list(_NUMBER),
        }
    ),
    "Index": _list(_exact({"name": _TEXT, "version": _TEXT, "state": _STATE, "reason": _TEXT})),
    "Models": _exact({"models": _list(_ref("Model"))}),
    "Model": _exact(
        {
            "name": _TEXT,
            "version": _TEXT,
            "state": _STATE,
            "reason": _TEXT,
            "newest": _FLAG,
            "inputs": _list(_ref("ModelInput")),
            "outputs": _list(_ref("TensorMetadata")),
            "labels": _or_null(_list(_TEXT)),
            "image": _or_null(_exact({"channels": _WHOLE, "height": _WHOLE, "width": _WHOLE})),
            "verdict": _or_null(_exact({"passed": _FLAG, "summary": _TEXT})),
            "report": _FLAG,
        }
    ),
}
