"""A program for an environment with KServe's SDK: reads InferenceServices into its classes and writes them again.

Use: python kserve_service_program.py < documents.json, a list. Prints one JSON list: each document as the classes
write it, or {"refused": reason}. Unknown fields are missing in it.
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any, ClassVar

import kserve.models
from kserve import ApiClient
from kubernetes import client as kubernetes


class _Kept:
    """Stands for a class of Kubernetes, which the SDK's reader looks for among its own: the value stays as it is."""

    openapi_types: ClassVar[dict[str, str]] = {}


kserve.models.V1ObjectMeta = kserve.models.V1ResourceRequirements = _Kept


def written_again(document: dict[str, Any]) -> Any:
    api = ApiClient()
    try:
        service = api.deserialize(SimpleNamespace(data=json.dumps(document)), "V1beta1InferenceService")
        model = service.spec.predictor.model
        service.metadata = kubernetes.V1ObjectMeta(**service.metadata)
        model.resources = kubernetes.V1ResourceRequirements(**model.resources)
    except (TypeError, ValueError) as error:
        return {"refused": str(error)}
    model.name = model.name or None  # the class makes it an empty one
    return api.sanitize_for_serialization(service)


print(json.dumps([written_again(document) for document in json.load(sys.stdin)]))
