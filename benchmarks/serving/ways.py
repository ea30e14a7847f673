"""Servers of one model, side by side: how each is started and asked."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.serving.process import Ports
from benchmarks.serving.venvs import make_venv
from bnexport.errors import RuntimeUnavailable
from bnexport.runtimes.isolation import import_path

_ROOT = Path(__file__).parents[2]
_PEERS = Path(__file__).parent / "peers"


@dataclass(frozen=True)
class Place:
    """What a command is made of.

    Attributes:
        python: The interpreter of the row's environment.
        bundle: The bundle that is served; absolute.
        ports: Free ones.
        answer_bytes: Bytes of a binary answer.
    """

    python: Path
    bundle: Path
    ports: Ports
    answer_bytes: int


@dataclass(frozen=True)
class Way:
    """A row of WAYS.

    Attributes:
        words: What it is.
        wire: Of WIRES.
        command: How it is started.
        venv: Of VENVS; None for the environment of bnexport.
        option: Of ``bnexport serve``, without which there is no such row.
        counted: Whether it has the counters of ``bnexport serve``, of its only process.
    """

    words: str
    wire: str
    command: Callable[[Place], Sequence[str]]
    venv: str | None = None
    option: str | None = None
    counted: bool = False

    def interpreter(self, venvs: Path) -> Path:
        """The interpreter that runs it; its environment is made if it is not there.

        Args:
            venvs: Where environments are kept.

        Raises:
            RuntimeUnavailable: The environment can't be made, or this ``bnexport serve`` has no such option.
        """
        if self.option is not None and self.option not in _help().split():
            raise RuntimeUnavailable(
                f"this bnexport serve has no {self.option}", remedy="Install the extras of bnexport serve"
            )
        return Path(sys.executable) if self.venv is None else make_venv(self.venv, venvs)

    def environment(self) -> dict[str, str]:
        """Environment variables: this copy of bnexport for its own servers, none of it for others; one thread."""
        own = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        if self.venv is None:
            own["PYTHONPATH"] = import_path()
        return own | {"OMP_NUM_THREADS": "1"}


@functools.cache
def _help() -> str:
    command = [sys.executable, "-m", "bnexport", "serve", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=_ROOT)
    return done.stdout


def _serve(*options: str) -> Callable[[Place], Sequence[str]]:
    """``bnexport serve``; "{grpc}" in an option is the port for gRPC."""

    def command(place: Place) -> list[str]:
        shared = [str(place.python), "-m", "bnexport", "serve", str(place.bundle), "--port", str(place.ports.http)]
        return [*shared, "--no-access-log", *(option.format(grpc=place.ports.grpc) for option in options)]

    return command


def _peer(program: str) -> Callable[[Place], Sequence[str]]:
    return lambda place: [
        str(place.python),
        str(_PEERS / program),
        str(place.bundle / "model.onnx"),
        str(place.ports.http),
    ]


def _echo(place: Place) -> Sequence[str]:
    return [str(place.python), str(_PEERS / "echo_app.py"), str(place.ports.http), str(place.answer_bytes)]


#: Name -> way, in the order of the table.
WAYS: Mapping[str, Way] = {
    "binary": Way("bnexport, binary tensors", "oip-binary", _serve(), counted=True),
    "json": Way("bnexport, JSON", "oip-json", _serve(), counted=True),
    "grpc": Way("bnexport, gRPC", "oip-grpc", _serve("--grpc-port", "{grpc}"), option="--grpc-port", counted=True),
    "processes": Way(
        "bnexport, binary tensors, 2 processes", "oip-binary", _serve("--processes", "2"), option="--processes"
    ),
    "echo": Way("bare ASGI echo of the binary body", "echo", _echo),
    "fastapi": Way("FastAPI, pydantic, onnxruntime; JSON", "rows-json", _peer("fastapi_app.py"), venv="fastapi"),
    "litserve": Way("LitServe, onnxruntime; JSON", "rows-json", _peer("litserve_app.py"), venv="litserve"),
    "mlserver": Way("MLServer, onnxruntime; JSON", "oip-json", _peer("mlserver_app.py"), venv="mlserver"),
}
