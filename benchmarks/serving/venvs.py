"""Environments for other servers: each its own, with pinned versions, made once by pip and kept."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from bnexport.data.locate import cache_folder
from bnexport.environment import versions_of
from bnexport.errors import RuntimeUnavailable
from bnexport.files import write_atomically
from bnexport.optional import installed

#: Name -> what pip installs beside the engine. uvloop 0.22 removed what MLServer's worker processes start with.
VENVS: Mapping[str, tuple[str, ...]] = {
    "fastapi": ("fastapi==0.165.0", "pydantic==2.14.4", "uvicorn[standard]==0.54.0"),
    "litserve": ("litserve==0.2.19", "fastapi==0.165.0", "uvicorn[standard]==0.54.0"),
    "mlserver": ("mlserver==1.7.1", "fastapi==0.115.14", "uvicorn==0.54.0", "uvloop==0.21.0"),
}
_PATIENCE = 600.0
_COMPLETE = "bnexport.json"


def default_folder() -> Path:
    """Where environments are kept: in the user's cache."""
    return cache_folder() / "benchmark"


def requirements(name: str) -> tuple[str, ...]:
    """What goes into an environment: a row of VENVS, and the versions of onnxruntime and numpy that are installed here."""
    found = versions_of("onnxruntime-gpu", "onnxruntime")
    engine = next(iter(found.values()))
    return (*VENVS[name], f"onnxruntime=={engine}", f"numpy=={versions_of('numpy')['numpy']}")


def make_venv(name: str, folder: Path) -> Path:
    """The interpreter of an environment, which is made if it is not there whole.

    Args:
        name: Of VENVS.
        folder: Where environments are kept.

    Raises:
        RuntimeUnavailable: Python has no venv, or pip can't install it.
    """
    wanted = list(requirements(name))
    place = folder / name
    interpreter, mark = place / "bin" / "python", place / _COMPLETE
    if mark.is_file() and interpreter.exists() and json.loads(mark.read_text(encoding="utf-8")) == wanted:
        return interpreter
    if not installed("ensurepip"):
        raise RuntimeUnavailable("this Python makes no environments", remedy="Install its venv package (python3-venv)")
    place.mkdir(parents=True, exist_ok=True)
    _run([sys.executable, "-m", "venv", "--clear", str(place)], name)
    _run([str(interpreter), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted], name)
    write_atomically(mark, json.dumps(wanted).encode())
    return interpreter


def _run(command: list[str], name: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=False)
    except subprocess.TimeoutExpired as error:
        raise _broken(name, f"no end after {_PATIENCE:.0f} s") from error
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise _broken(name, (lines or ["no output"])[-1])


def _broken(name: str, reason: str) -> RuntimeUnavailable:
    return RuntimeUnavailable(
        f"the environment {name} can't be made: {reason[:200]}", remedy="Let pip reach its package index"
    )
