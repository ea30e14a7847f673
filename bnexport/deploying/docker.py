"""A Dockerfile for ``bnexport serve``, and a Compose file for ``bnexport serve`` and Triton."""

from __future__ import annotations

import re
import shlex
import shutil
import string
from pathlib import Path

from bnexport import __version__
from bnexport.bundle import Bundle
from bnexport.deploying.deploy_request import Deployment, DeployRequest, deployed_name, suggested_name
from bnexport.deploying.triton_repository import checked, image, names_in, write_model
from bnexport.errors import UsageError
from bnexport.files import staged_directory, write_atomically

DOCKERFILE = "Dockerfile"
COMPOSE_FILE = "compose.yaml"
IGNORED = ".dockerignore"
MODELS = "models"
WHEELS = "wheels"
#: Names of wheels; pip does not install a wheel under another name.
_WHEEL = re.compile(r"bnexport(_runtime)?-[\w.+!]+-py3-none-any\.whl")


def deploy_docker(
    bundle: Bundle,
    out: Path,
    request: DeployRequest = DeployRequest(),  # noqa: B008  (frozen)
    *,
    wheel: Path | None = None,
) -> Deployment:
    """Write a build context: Dockerfile, compose.yaml, and a model repository for both servers.

    Args:
        bundle: The bundle; its hashes are checked first.
        out: The folder.
        request: Name of the Compose project, release and device of Triton.
        wheel: A wheel of bnexport to install; None: this version from pip's package index.

    Raises:
        BundleError: The bundle was changed.
        ExportError: The release can't load the model file.
        OutputError: ``out`` exists already, or can't be written.
        UsageError: Compose refuses the name, the release is unknown, or the file is not a wheel of bnexport.
    """
    name = deployed_name("docker", request, bundle.manifest.name)
    folder = _folder(bundle.manifest.name)
    if wheel is not None and not (_WHEEL.fullmatch(wheel.name) and wheel.is_file()):
        raise UsageError(
            f"{wheel} is not a wheel of bnexport", remedy="Make one: python scripts/runtime_wheel.py FOLDER"
        )
    checked(bundle, out, request, writes=(DOCKERFILE, COMPOSE_FILE, IGNORED, MODELS, WHEELS))
    with staged_directory(out, force=request.force) as stage:
        (stage / MODELS).mkdir()
        write_model(bundle, stage / MODELS, folder, request, whole=True)
        if wheel is not None:
            (stage / WHEELS).mkdir()
            shutil.copyfile(wheel, stage / WHEELS / wheel.name)
        write_atomically(stage / DOCKERFILE, dockerfile(None if wheel is None else wheel.name).encode())
        write_atomically(stage / IGNORED, b"*\n!models\n!wheels\n")
        write_atomically(stage / COMPOSE_FILE, compose(name, request).encode())
        _let_read(stage / MODELS)
        files = names_in(stage)
    where = shlex.quote(str(out))
    steps = (
        f"docker compose --project-directory {where} up --build serve",
        f"docker compose --project-directory {where} --profile triton up triton",
    )
    return Deployment(out, files, steps)


def _folder(name: str) -> str:
    """Return the name of the model's folder, changed if Triton refuses it; ``--name`` is for the Compose project."""
    try:
        return deployed_name("triton", DeployRequest(), name)
    except UsageError:
        return suggested_name("triton", name)


def _let_read(folder: Path) -> None:
    """Make files readable for all: COPY keeps permissions, and the server runs as another user."""
    for entry in (folder, *folder.rglob("*")):
        entry.chmod(0o755 if entry.is_dir() else 0o644)


def dockerfile(wheel: str | None) -> str:
    """Fill the template of the Dockerfile, which installs a wheel of the build context or this version from an index.

    The health check does not use urllib, because urllib would connect to a proxy of the container's environment.
    """
    if wheel is None:
        return _filled("Dockerfile", source=f"bnexport-runtime[serve,grpc]=={__version__}", copy="")
    return _filled("Dockerfile", source=f"/{WHEELS}/{wheel}[serve,grpc]", copy=f"COPY {WHEELS} /{WHEELS}\n")


def compose(name: str, request: DeployRequest) -> str:
    """Fill the template of compose.yaml (Compose specification): ports are local, Triton has the profile "triton"."""
    devices = "" if request.device == "cpu" else _filled("compose_gpu.yaml")
    return _filled("compose.yaml", name=name, image=image(request.triton), devices=devices)


def _filled(template: str, **values: str) -> str:
    text = Path(__file__).with_name("templates").joinpath(template).read_text(encoding="utf-8")
    return string.Template(text).substitute(values)
