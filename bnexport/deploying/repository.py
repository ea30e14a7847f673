"""A Triton model repository with one model: ``NAME/config.pbtxt``, ``NAME/labels.txt``, ``NAME/VERSION/model.onnx``."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Collection
from pathlib import Path

from bnexport.bundle import MODEL_ONNX, Bundle
from bnexport.deploying.model_config import check_config
from bnexport.deploying.releases import check_loads
from bnexport.deploying.request import Deployment, DeployRequest, deployed_name
from bnexport.errors import OutputError
from bnexport.exporting.triton import CONFIG, quoted, triton_config, triton_dims, triton_type
from bnexport.files import output_errors, refuse_existing, refuse_overlap, staged_directory, write_atomically
from bnexport.tensors import Signature

LABELS = "labels.txt"
IMAGE = "nvcr.io/nvidia/tritonserver"


def deploy_triton(bundle: Bundle, out: Path, request: DeployRequest = DeployRequest()) -> Deployment:  # noqa: B008
    """Write a model repository that a release of Triton loads.

    Args:
        bundle: Its hashes are checked first.
        out: The repository's root.
        request: Name, release, device.

    Raises:
        BundleError: The bundle is not as it was written.
        ExportError: The release can't load the model file.
        OutputError: ``out`` exists already, or is not what may be replaced, or can't be written.
        UsageError: A name that can't be a folder of a repository, or an unknown release.
    """
    name = deployed_name("triton", request, bundle.manifest.name)
    checked(bundle, out, request, writes=(name,))
    with staged_directory(out, force=request.force) as stage:
        write_model(bundle, stage, name, request)
        files = names_in(stage)
    gpus = "" if request.device == "cpu" else " --gpus all"
    ports = " ".join(f"-p 127.0.0.1:{port}:{port}" for port in (8000, 8001))
    mount = shlex.quote(f"type=bind,source={out.absolute()},target=/models,readonly")
    command = f"docker run --rm{gpus} {ports} --mount {mount} {image(request.triton)}"
    return Deployment(out, files, (f"{command} tritonserver --model-repository=/models",))


def checked(bundle: Bundle, out: Path, request: DeployRequest, *, writes: Collection[str]) -> None:
    """What every target checks before it writes: the bundle's hashes, the place, and that Triton can load the file.

    Args:
        bundle: What is deployed.
        out: The folder to write. An existing one is replaced by force, but not with what is no deployment in it.
        request: Release and force.
        writes: Names of what this target writes into ``out``.
    """
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
            f"{out} holds {others[0]}, which this deployment does not write, so --force does not replace it",
            remedy="Choose another folder, or remove this one yourself",
        )


def image(release: str) -> str:
    """Triton's container image."""
    return f"{IMAGE}:{release}-py3"


def write_model(bundle: Bundle, root: Path, name: str, request: DeployRequest, *, whole: bool = False) -> None:
    """Write a model's folder into a repository.

    Args:
        bundle: An intact one.
        root: The repository, which is there.
        name: The model's folder.
        request: Device, instances, batch.
        whole: Copy the whole bundle, which ``bnexport serve`` needs, and not the model file alone.
    """
    folder, manifest = root / name, bundle.manifest
    version = folder / str(manifest.version)
    if whole:
        shutil.copytree(bundle.path, version)
    else:
        version.mkdir(parents=True)
        shutil.copyfile(bundle.file(MODEL_ONNX), version / MODEL_ONNX)
    if labels := manifest.labels:
        write_atomically(folder / LABELS, "".join(f"{' '.join(label.split())}\n" for label in labels).encode())
    text = triton_config(
        name,
        manifest.signature,
        max_batch_size=request.max_batch_size,
        label_filename=LABELS if labels else None,
        more=device_blocks(request, manifest.signature),
    )
    check_config(text, name, manifest.signature, files=frozenset({MODEL_ONNX, *([LABELS] if labels else [])}))
    write_atomically(folder / CONFIG, text.encode())


def device_blocks(request: DeployRequest, signature: Signature) -> list[str]:
    """The blocks of a configuration that depend on the device.

    Sources: "Model Configuration", instance groups and warmup; README of Triton's ONNX Runtime backend. On GPUs the first
    batch of a new size is slow, for cuDNN picks its algorithms and TensorRT builds its engines then, so the smallest and
    the largest batch run before the model is ready.
    """
    kind = "KIND_CPU" if request.device == "cpu" else "KIND_GPU"
    blocks = [f"instance_group [ {{ count: {request.instances} kind: {kind} }} ]"]
    if request.device == "cuda":
        # 1 is the heuristic. Before ONNX Runtime 1.20 the default measures times, so each start may use other algorithms.
        blocks.append('parameters { key: "cudnn_conv_algo_search" value: { string_value: "1" } }')
    if request.device == "tensorrt":
        blocks.append(
            'optimization { execution_accelerators { gpu_execution_accelerator [ { name: "tensorrt"'
            ' parameters { key: "precision_mode" value: "FP32" } } ] } }'
        )
    return blocks if request.device == "cpu" else [*blocks, *_warmups(request, signature)]


def _warmups(request: DeployRequest, signature: Signature) -> list[str]:
    batched = signature.batched
    shapes = [triton_dims(spec, batched=batched) for spec in signature.inputs]
    if any(-1 in dims for dims in shapes):  # a warmup needs sizes, and which ones come is not known
        return []
    inputs = " ".join(
        f"inputs {{ key: {quoted(spec.name)} value {{ data_type: {triton_type(spec)}"
        f" dims: [ {', '.join(map(str, dims)) or '1'} ] zero_data: true }} }}"
        for spec, dims in zip(signature.inputs, shapes, strict=True)
    )
    sizes = sorted({1, request.max_batch_size}) if batched else [1]
    return [f'model_warmup [ {{ name: "batch_{size}" batch_size: {size} {inputs} }} ]' for size in sizes]


def names_in(folder: Path) -> tuple[str, ...]:
    """Every file below a folder, as sorted POSIX paths."""
    return tuple(sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()))
