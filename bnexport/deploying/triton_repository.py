"""A Triton model repository with one model: ``NAME/config.pbtxt``, ``NAME/labels.txt``, ``NAME/VERSION/model.onnx``."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from bnexport.bundle import MODEL_ONNX, Bundle
from bnexport.deploying.deploy_request import Deployment, DeployRequest, deployed_name
from bnexport.deploying.releases import check_loads
from bnexport.errors import OutputError
from bnexport.exporting.triton_config import CONFIG, device_blocks, triton_config
from bnexport.files import output_errors, refuse_existing, refuse_overlap, staged_directory, write_atomically
from bnexport.tuned import Choice, tuned_choice, tuning_line

LABELS = "labels.txt"
IMAGE = "nvcr.io/nvidia/tritonserver"


def deploy_triton(bundle: Bundle, out: Path, request: DeployRequest = DeployRequest()) -> Deployment:  # noqa: B008
    """Write a model repository that a release of Triton loads.

    Args:
        bundle: The bundle; its hashes are checked first.
        out: The repository's root.
        request: Name, release, device.

    Raises:
        BundleError: The bundle was changed.
        ExportError: The release can't load the model file.
        OutputError: ``out`` exists already, has other files, or can't be written.
        UsageError: The name can't be a folder of a repository, or the release is unknown.
    """
    name = deployed_name("triton", request, bundle.manifest.name)
    checked(bundle, out, request, writes=(name,))
    request, tuning = _tuned(bundle, request)
    with staged_directory(out, force=request.force) as stage:
        write_model(bundle, stage, name, request)
        files = names_in(stage)
    gpus = "" if request.device == "cpu" else " --gpus all"
    ports = " ".join(f"-p 127.0.0.1:{port}:{port}" for port in (8000, 8001))
    mount = shlex.quote(f"type=bind,source={out.absolute()},target=/models,readonly")
    command = f"docker run --rm{gpus} {ports} --mount {mount} {image(request.triton)}"
    return Deployment(out, files, (f"{command} tritonserver --model-repository=/models",), tuning)


def _tuned(bundle: Bundle, request: DeployRequest) -> tuple[DeployRequest, str | None]:
    """Return the request with the tuning of its bundle, if one applies here, and the line about it."""
    found = tuned_choice(bundle, "throughput", f"onnxruntime-{request.device}")
    if not isinstance(found, Choice):
        return request, None if found is None else tuning_line(found)
    request = replace(request, tuning=found)
    instances, threads, _, preferred = request.settings()
    return request, tuning_line(replace(found, sessions=instances, threads=threads, batch=preferred or 1))


def checked(bundle: Bundle, out: Path, request: DeployRequest, *, writes: Collection[str]) -> None:
    """Check the output folder, the bundle's hashes, and that Triton can load the model, before anything is written."""
    refuse_existing(out, force=request.force)
    refuse_overlap(out, bundle.path)
    if out.exists():
        _refuse_to_lose(out, writes)
    bundle.check()
    from_onnx = str(bundle.manifest.network.get("source")).lower().endswith(".onnx")
    check_loads(bundle.file(MODEL_ONNX), request.triton, from_onnx=from_onnx)


def _refuse_to_lose(out: Path, writes: Collection[str]) -> None:
    with output_errors(out):
        others = sorted(path.name for path in out.iterdir() if path.name not in writes)
    if others:
        raise OutputError(
            f"{out} contains {others[0]}, which this deployment does not write, so --force does not replace it",
            remedy="Choose another folder, or delete this one first",
        )


def image(release: str) -> str:
    """Return the name of Triton's container image."""
    return f"{IMAGE}:{release}-py3"


def write_model(bundle: Bundle, root: Path, name: str, request: DeployRequest, *, whole: bool = False) -> None:
    """Write a model's folder into a repository."""
    folder, manifest = root / name, bundle.manifest
    version = folder / str(manifest.version)
    if whole:
        shutil.copytree(bundle.path, version)
    else:
        version.mkdir(parents=True)
        shutil.copyfile(bundle.file(MODEL_ONNX), version / MODEL_ONNX)
    if labels := manifest.labels:
        write_atomically(folder / LABELS, "".join(f"{' '.join(label.split())}\n" for label in labels).encode())
    instances, threads, most, preferred = request.settings()
    text = triton_config(
        name,
        manifest.signature,
        max_batch_size=most,
        preferred_batch=preferred,
        threads=threads,
        label_filename=LABELS if labels else None,
        more=device_blocks(manifest.signature, device=request.device, instances=instances, max_batch_size=most),
    )
    write_atomically(folder / CONFIG, text.encode())


def names_in(folder: Path) -> tuple[str, ...]:
    """Return the files below a folder, as sorted POSIX paths."""
    return tuple(sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()))
