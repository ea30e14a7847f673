"""A Dockerfile for ``bnexport serve`` and a compose file that also knows Triton."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

from bnexport import __version__
from bnexport.bundle import Bundle
from bnexport.deploying.repository import checked, image, names_in, write_model
from bnexport.deploying.request import Deployment, DeployRequest, deployed_name, suggested_name
from bnexport.deploying.yaml_text import COMPOSE, checked_yaml
from bnexport.errors import ExportError, UsageError
from bnexport.files import staged_directory, write_atomically

DOCKERFILE = "Dockerfile"
COMPOSE_FILE = "compose.yaml"
IGNORED = ".dockerignore"
MODELS = "models"
WHEELS = "wheels"
PORT, GRPC_PORT = 8000, 8001
#: Seconds in which the server stops; Docker must wait longer, or it kills what is still being answered after 10.
GRACE = 30
_REMEDY = "This is a fault in bnexport: please report it with the options given"
#: Instruction -> whether its argument must be a JSON list, as one without a shell is.
_INSTRUCTIONS = {
    "FROM": False, "ARG": False, "ENV": False, "RUN": False, "COPY": False, "USER": False, "EXPOSE": False,
    "HEALTHCHECK": False, "ENTRYPOINT": True, "CMD": True,
}  # fmt: skip
#: pip keeps these names: a wheel under another one is not installed.
_WHEEL = re.compile(r"bnexport(_runtime)?-[\w.+!]+-py3-none-any\.whl")


def deploy_docker(
    bundle: Bundle,
    out: Path,
    request: DeployRequest = DeployRequest(),  # noqa: B008  (frozen)
    *,
    wheel: Path | None = None,
) -> Deployment:
    """Write a build context: Dockerfile, compose.yaml, and the bundle in a model repository that both servers read.

    Args:
        bundle: Its hashes are checked first.
        out: The folder.
        request: Name (of the compose project), release and device of Triton.
        wheel: A wheel of bnexport to install; None: this version from pip's package index.

    Raises:
        BundleError: The bundle is not as it was written.
        ExportError: The release can't load the model file.
        MissingDependency: PyYAML or jsonschema is not here (extra ``deploy``).
        OutputError: ``out`` exists already, or can't be written.
        UsageError: A name that Compose refuses, an unknown release, or a file that is no wheel of bnexport.
    """
    name = deployed_name("docker", request, bundle.manifest.name)
    folder = _folder(bundle.manifest.name)
    if wheel is not None and not (_WHEEL.fullmatch(wheel.name) and wheel.is_file()):
        raise UsageError(f"{wheel} is no wheel of bnexport", remedy="Make one: python scripts/runtime_wheel.py FOLDER")
    checked(bundle, out, request, writes=(DOCKERFILE, COMPOSE_FILE, IGNORED, MODELS, WHEELS))
    with staged_directory(out, force=request.force) as stage:
        (stage / MODELS).mkdir()
        write_model(bundle, stage / MODELS, folder, request, whole=True)
        if wheel is not None:
            (stage / WHEELS).mkdir()
            shutil.copyfile(wheel, stage / WHEELS / wheel.name)
        text = dockerfile(None if wheel is None else wheel.name)
        check_dockerfile(text, stage)
        write_atomically(stage / DOCKERFILE, text.encode())
        write_atomically(stage / IGNORED, b"*\n!models\n!wheels\n")
        write_atomically(stage / COMPOSE_FILE, checked_yaml(compose(name, request), COMPOSE).encode())
        _let_read(stage / MODELS)
        files = names_in(stage)
    where = shlex.quote(str(out))
    steps = (
        f"docker compose --project-directory {where} up --build serve",
        f"docker compose --project-directory {where} --profile triton up triton",
    )
    return Deployment(out, files, steps)


def _folder(name: str) -> str:
    """The model's folder, as near to its name as Triton takes it; ``--name`` is the compose project's."""
    try:
        return deployed_name("triton", DeployRequest(), name)
    except UsageError:
        return suggested_name("triton", name)


def _let_read(folder: Path) -> None:
    """COPY keeps permissions, and the server's user is another one than the user here, whose mask may be strict."""
    for entry in (folder, *folder.rglob("*")):
        entry.chmod(0o755 if entry.is_dir() else 0o644)


def dockerfile(wheel: str | None) -> str:
    """The Dockerfile's text; it installs a wheel of the build context, or this version from a package index."""
    install = ['RUN pip install --no-cache-dir "$BNEXPORT"']
    source = f"bnexport-runtime[serve,grpc]=={__version__}"
    if wheel is not None:
        source = f"/{WHEELS}/{wheel}[serve,grpc]"
        install.insert(0, f"COPY {WHEELS} /{WHEELS}")
    # Not urllib, which would ask the proxy that Docker's settings put into the environment of containers.
    health = (
        f"import http.client as h; c = h.HTTPConnection('127.0.0.1', {PORT}, timeout=3); "
        "c.request('GET', '/v2/health/ready'); raise SystemExit(c.getresponse().status != 200)"
    )
    command = ["serve", f"/{MODELS}", "--host", "0.0.0.0", "--port", f"{PORT}", "--grpc-port", f"{GRPC_PORT}"]
    command += ["--grace", f"{GRACE}"]
    lines = [
        "# bnexport serve with one model, in bnexport-runtime: the part of bnexport that needs no torch.",
        "ARG PYTHON_VERSION=3.11.13",
        "FROM python:${PYTHON_VERSION}-slim-bookworm",
        "ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1",
        "RUN useradd --create-home --uid 10001 bnexport",
        f"ARG BNEXPORT={source}",
        *install,
        f"COPY {MODELS} /{MODELS}",
        "USER 10001",
        f"EXPOSE {PORT} {GRPC_PORT}",
        f'HEALTHCHECK --interval=10s --start-period=60s CMD ["python", "-c", {json.dumps(health)}]',
        'ENTRYPOINT ["bnexport"]',
        f"CMD {json.dumps(command)}",
    ]
    return "\n".join(lines) + "\n"


def check_dockerfile(text: str, context: Path) -> None:
    """Refuse a Dockerfile that can't be built from a folder, or whose server would run as root.

    Args:
        text: Of the Dockerfile; no continued lines.
        context: The folder that it is built from.

    Raises:
        ExportError: Naming the line.
    """
    found = [line.partition(" ")[::2] for line in text.splitlines() if line and not line.startswith("#")]
    words = [word for word, _ in found]
    for word, rest in found:
        if word not in _INSTRUCTIONS or not rest:
            raise ExportError(f"the Dockerfile has an unknown line {word!r}", remedy=_REMEDY)
        if _INSTRUCTIONS[word] and not _is_list(rest):
            raise ExportError(f"the Dockerfile's {word} is no JSON list: {rest}", remedy=_REMEDY)
        for source in rest.split()[:-1] if word == "COPY" else ():
            if not (context / source).exists():
                raise ExportError(f"the Dockerfile copies {source}, which is not there", remedy=_REMEDY)
    if words.count("FROM") != 1 or "FROM" not in words[:2]:
        raise ExportError("the Dockerfile does not start from one image", remedy=_REMEDY)
    users = [rest for word, rest in found if word == "USER"]
    if not users or users[-1] in ("0", "root") or "RUN" in words[words.index("USER") :]:
        raise ExportError("the Dockerfile's server would run as root", remedy=_REMEDY)


def _is_list(text: str) -> bool:
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def compose(name: str, request: DeployRequest) -> dict[str, Any]:
    """compose.yaml as plain JSON values; Triton's service waits for ``--profile triton``. Ports are this machine's alone.

    Source: the Compose specification.
    """
    triton: dict[str, Any] = {
        "image": image(request.triton),
        "profiles": ["triton"],
        "command": ["tritonserver", f"--model-repository=/{MODELS}"],
        "ports": [f"127.0.0.1:{PORT + 100 + number}:{PORT + number}" for number in range(3)],
        "volumes": [{"type": "bind", "source": f"./{MODELS}", "target": f"/{MODELS}", "read_only": True}],
        "restart": "unless-stopped",
    }
    if request.device != "cpu":
        devices = [{"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}]
        triton["deploy"] = {"resources": {"reservations": {"devices": devices}}}
    serve = {
        "build": ".",
        "init": True,  # as process 1 it could not be stopped before it has begun to listen to signals
        "stop_grace_period": f"{GRACE + 10}s",
        "ports": [f"127.0.0.1:{port}:{port}" for port in (PORT, GRPC_PORT)],
        "read_only": True,
        "tmpfs": ["/tmp"],
        "restart": "unless-stopped",
    }
    return {"name": name, "services": {"serve": serve, "triton": triton}}
