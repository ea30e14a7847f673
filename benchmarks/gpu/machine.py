"""The first step of a GPU session: record the machine, its versions, and which dependencies are missing.

Use: python -m benchmarks.gpu.machine [--rehearse]. Exit code 3 where neither torch nor nvidia-smi finds a GPU, unless
the session is a rehearsal.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from benchmarks.gpu.measure import gpu_machine
from bnexport.environment import describe, environment
from bnexport.optional import one_line

ROOT = Path(__file__).parents[2]


def dependencies() -> dict[str, str]:
    """Return each dependency of pyproject.toml and its version; "missing" if it is not installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = dict.fromkeys(re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in project["dependencies"])
    return {name: _version(name) for name in [*names, "pytest", "pytest-timeout"]}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "missing"


def providers() -> str:
    """Return ONNX Runtime's version and execution providers, or why it can't be imported."""
    try:
        import onnxruntime
    except ImportError as error:
        return one_line(error)
    return f"{onnxruntime.__version__} in {Path(onnxruntime.__file__).parent}: {onnxruntime.get_available_providers()}"


def main(arguments: Sequence[str] = ()) -> int:
    """Print everything and return the exit code."""
    try:
        print(
            subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=30, check=False).stdout, flush=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        print(f"nvidia-smi: {one_line(error)}")
    found = gpu_machine()
    print(describe(environment()))
    print("python:", sys.version.replace("\n", " "), sys.executable)
    print("onnxruntime:", providers())
    for name, version in dependencies().items():
        print(f"{name}: {version}")
    print("GPU:", ", ".join(f"{name} {value}" for name, value in found.items()) or "none")
    return 0 if found or "--rehearse" in arguments else 3


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
