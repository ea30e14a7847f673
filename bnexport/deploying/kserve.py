"""A KServe InferenceService, and the model repository that it loads."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bnexport.bundle import MODEL_ONNX, Bundle
from bnexport.deploying.deploy_request import Deployment, DeployRequest, Scaling, deployed_name
from bnexport.deploying.triton_repository import checked, names_in, write_model
from bnexport.errors import ExportError
from bnexport.files import staged_directory, write_atomically
from bnexport.optional import one_line, require

SERVICE = "inference_service.yaml"
REPOSITORY = "repository"
#: GiB of a pod in addition to the model: Triton with its ONNX Runtime backend, rounded up; GPU libraries need more.
_BASE_MEMORY = {"cpu": 1, "cuda": 4, "tensorrt": 4}
_GIB = 2**30


def deploy_kserve(
    bundle: Bundle, out: Path, request: DeployRequest, scaling: Scaling, *, namespace: str | None = None
) -> Deployment:
    """Write ``inference_service.yaml`` and the repository to upload.

    Args:
        bundle: The bundle; its hashes are checked first.
        out: The folder.
        request: Name, release, device.
        scaling: Storage and autoscaling.
        namespace: Namespace of the service; None: kubectl's.

    Raises:
        BundleError: The bundle was changed.
        ExportError: The release can't load the model file, or KServe would refuse a value.
        MissingDependency: PyYAML or jsonschema is not installed (extra ``deploy``).
        OutputError: ``out`` exists already, or can't be written.
        UsageError: The name is not a DNS label, or the release is unknown.
    """
    name = deployed_name("kserve", request, bundle.manifest.name)
    checked(bundle, out, request, writes=(SERVICE, REPOSITORY))
    size = bundle.file(MODEL_ONNX).stat().st_size
    text = checked_yaml(inference_service(name, request, scaling, model_bytes=size, namespace=namespace))
    with staged_directory(out, force=request.force) as stage:
        (stage / REPOSITORY).mkdir()
        write_model(bundle, stage / REPOSITORY, name, request)
        write_atomically(stage / SERVICE, text.encode())
        files = names_in(stage)
    return Deployment(
        out,
        files,
        (
            f"Upload the files in {out / REPOSITORY} to {scaling.storage_uri}",
            f"kubectl apply -f {shlex.quote(str(out / SERVICE))}",
            f"Send requests to /v2/models/{name}/infer",
        ),
    )


def inference_service(
    name: str, request: DeployRequest, scaling: Scaling, *, model_bytes: int, namespace: str | None = None
) -> dict[str, Any]:
    """Return the document as plain JSON values.

    ``protocolVersion: v2`` is not the default, and without it KServe finds no runtime for ONNX. ``storageUri`` is the
    repository's root, so the model's name in URLs is the name of its folder. Requests equal limits, so the pod keeps its cores.

    Source: KServe, "Control Plane API", serving.kserve.io/v1beta1.
    """
    memory = _BASE_MEMORY[request.device] + -(-2 * model_bytes * request.settings().instances // _GIB)
    quantities = {"cpu": str(request.settings().instances), "memory": f"{memory}Gi"}
    if request.device != "cpu":
        quantities["nvidia.com/gpu"] = "1"
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {"name": name} | ({} if namespace is None else {"namespace": namespace}),
        "spec": {
            "predictor": {
                "minReplicas": scaling.min_replicas,
                "maxReplicas": scaling.max_replicas,
                "scaleMetric": scaling.metric,
                "scaleTarget": scaling.target,
                "model": {
                    "modelFormat": {"name": "onnx", "version": "1"},
                    "protocolVersion": "v2",
                    "runtime": "kserve-tritonserver",
                    "runtimeVersion": f"{request.triton}-py3",
                    "storageUri": scaling.storage_uri,
                    "resources": {"requests": dict(quantities), "limits": dict(quantities)},
                },
            }
        },
    }


_SCHEMA = Path(__file__).with_name("inference_service.schema.json")


def checked_yaml(value: Mapping[str, Any]) -> str:
    """Return a document as YAML text, read back and checked against the schema."""
    yaml = require("yaml", purpose="writing YAML")
    text: str = yaml.safe_dump(dict(value), sort_keys=False, width=120)
    if check_yaml(text) != value:
        raise ExportError("the YAML text is read back as another document", remedy="Give a simpler name or address")
    return text


def check_yaml(text: str) -> Any:
    """Return the document in a YAML text; ExportError for one that the schema does not allow."""
    yaml = require("yaml", purpose="reading YAML")
    jsonschema = require("jsonschema", purpose="checking YAML")
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ExportError(f"this is not YAML: {one_line(error)}", remedy="Write it again") from error
    rules = jsonschema.Draft202012Validator(json.loads(_SCHEMA.read_text(encoding="utf-8")))
    if (found := next(iter(rules.iter_errors(document)), None)) is not None:
        place = "/".join(map(str, found.absolute_path)) or "the document"
        raise ExportError(
            f"inference_service: {place}: {one_line(ValueError(found.message), 160)}",
            remedy="Change the option that this value comes from",
        )
    return document
