"""Servers of one model, side by side: their start, their requests, and the environments of other servers.

An environment has pinned versions; pip makes it once, and it is kept.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.command import last_line, output_of
from benchmarks.serving.process import Ports
from bnexport.data.locate import cache_folder
from bnexport.environment import versions_of
from bnexport.errors import RuntimeUnavailable
from bnexport.files import write_atomically
from bnexport.optional import installed
from bnexport.runtimes.isolation import import_path

#: Name -> packages that pip installs next to the engine.
VENVS: Mapping[str, tuple[str, ...]] = {
    "fastapi": ("fastapi==0.165.0", "pydantic==2.14.4", "uvicorn[standard]==0.54.0"),
}
_PEERS = Path(__file__).parent / "peers"
_PATIENCE = 600.0
_COMPLETE = "bnexport.json"


@dataclass(frozen=True)
class ServerWay:
    """A row of WAYS."""

    words: str
    wire: str  # of WIRES
    command: tuple[str, ...]  # after the interpreter; its placeholders are the arguments of ``started_by``
    venv: str | None = None  # of VENVS; None for the environment of bnexport
    counted: bool = False  # it has the counters of ``bnexport serve`` with one process

    def started_by(self, python: Path, *, bundle: Path, ports: Ports, answer_bytes: int) -> list[str]:
        """Return its command; ``answer_bytes``: length of a binary answer."""
        values = {"bundle": bundle, "answer_bytes": answer_bytes, "peers": _PEERS, **asdict(ports)}
        return [str(python), *(word.format(**values) for word in self.command)]

    def interpreter(self, venvs: Path) -> Path:
        """Return its interpreter; a missing environment is made in the folder ``venvs``.

        RuntimeUnavailable: the environment can't be made.
        """
        return Path(sys.executable) if self.venv is None else make_venv(self.venv, venvs)

    def environment(self) -> dict[str, str]:
        """Return environment variables: one thread, and this copy of bnexport for its own servers only."""
        own = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        if self.venv is None:
            own["PYTHONPATH"] = import_path()
        return own | {"OMP_NUM_THREADS": "1"}


_SERVE = ("-m", "bnexport", "serve", "{bundle}", "--port", "{http}", "--no-access-log")
_FASTAPI = ("{peers}/fastapi_app.py", "{bundle}/model.onnx", "{http}")
#: Name -> server, in the order of the table.
WAYS: Mapping[str, ServerWay] = {
    "binary": ServerWay("bnexport, binary tensors", "oip-binary", _SERVE, counted=True),
    "json": ServerWay("bnexport, JSON", "oip-json", _SERVE, counted=True),
    "grpc": ServerWay("bnexport, gRPC", "oip-grpc", (*_SERVE, "--grpc-port", "{grpc}"), counted=True),
    "processes": ServerWay("bnexport, binary tensors, 2 processes", "oip-binary", (*_SERVE, "--processes", "2")),
    "echo": ServerWay("bare ASGI echo of the binary body", "echo", ("{peers}/echo_app.py", "{http}", "{answer_bytes}")),
    "fastapi": ServerWay("FastAPI, pydantic, onnxruntime; JSON", "rows-json", _FASTAPI, venv="fastapi"),
}


def default_folder() -> Path:
    """Return the folder of environments in the user's cache."""
    return cache_folder() / "benchmark"


def requirements(name: str) -> tuple[str, ...]:
    """Return a row of VENVS with the versions of onnxruntime and numpy that are installed here."""
    engine = next(iter(versions_of("onnxruntime-gpu", "onnxruntime").values()))
    return (*VENVS[name], f"onnxruntime=={engine}", f"numpy=={versions_of('numpy')['numpy']}")


def make_venv(name: str, folder: Path) -> Path:
    """Return the interpreter of an environment of VENVS, which is made unless it is complete.

    RuntimeUnavailable: Python has no venv, or pip can't install the packages.
    """
    wanted = list(requirements(name))
    place = folder / name
    interpreter, mark = place / "bin" / "python", place / _COMPLETE
    if mark.is_file() and interpreter.exists() and json.loads(mark.read_text(encoding="utf-8")) == wanted:
        return interpreter
    if not installed("ensurepip"):
        problem = "this Python can't make environments"
        raise RuntimeUnavailable(problem, remedy="Install its venv package (python3-venv)")
    place.mkdir(parents=True, exist_ok=True)
    _run([sys.executable, "-m", "venv", "--clear", str(place)], name)
    _run([str(interpreter), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted], name)
    write_atomically(mark, json.dumps(wanted).encode())
    return interpreter


def _run(command: list[str], name: str) -> None:
    def failed(text: str) -> RuntimeUnavailable:
        errors = [line for line in text.splitlines() if line.startswith("ERROR")]
        problem = f"the environment {name} can't be made: {last_line(errors[-1] if errors else text)}"
        return RuntimeUnavailable(problem, remedy="Give pip access to its package index")

    output_of(command, failed, timeout=_PATIENCE)
