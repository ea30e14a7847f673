"""Libraries hidden from a child process: the runtime that needs them must refuse with exit code 3 and name them."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bnexport.runtimes.catalogue import runner_spec
from bnexport.runtimes.isolation import child_environment

#: Exit code of "this machine can't do it".
UNAVAILABLE = 3
#: A refusal takes seconds; a process that takes longer has not refused.
_DEADLINE = 120.0
#: A refusal of onnxruntime comes before anything needs torch, whose import takes seconds.
_WITHOUT_TORCH = """\
from bnexport.runtimes import cuda_libraries
cuda_libraries.leave_torch_out()
"""
#: bnexport's command line in a process that does not load the libraries of Python packages first.
_WITHOUT_PRELOAD = """\
from bnexport.runtimes import cuda_libraries
cuda_libraries.preload = lambda ort: ""
cuda_libraries.preload_tensorrt = lambda: None
"""
_COMMAND = "from bnexport.cli.main import main\nmain()\n"


@dataclass(frozen=True)
class HiddenLibrary:
    """One row of REFUSALS."""

    name: str  # The missing part, for a table
    runtime: str  # The runtime that needs it
    hidden: tuple[str, ...] = ()  # Libraries that the loader finds only as empty files
    preload: bool = True  # bnexport may load the libraries of Python packages first, past the loader's search
    environment: Mapping[str, str] = field(default_factory=dict, hash=False)  # Further environment variables

    @property
    def part(self) -> str:
        """Return the name of this part of the lane."""
        return f"refusal: {self.name}, {self.runtime}"


@dataclass(frozen=True)
class Refused:
    """The result of one refusal."""

    refusal: HiddenLibrary  # The row of REFUSALS
    passed: bool  # the process ended with exit code 3 and named the missing part in one sentence
    code: int | None  # The exit code; None if the process did not end
    said: str  # The text that it printed


REFUSALS: tuple[HiddenLibrary, ...] = (
    HiddenLibrary("no NVIDIA driver", "onnxruntime-cuda", ("libcuda.so.1",)),
    HiddenLibrary("no GPU in sight", "onnxruntime-cuda", environment={"CUDA_VISIBLE_DEVICES": ""}),
    HiddenLibrary("no GPU in sight", "torch-cuda", environment={"CUDA_VISIBLE_DEVICES": ""}),
    # An onnxruntime-gpu without its extras lacks it: the session runs on the CPU without a message.
    HiddenLibrary("no cuRAND", "onnxruntime-cuda", ("libcurand.so.10",), preload=False),
    HiddenLibrary("no TensorRT", "onnxruntime-tensorrt", ("libnvinfer.so.10",), preload=False),
)


def refuse(refusal: HiddenLibrary, bundle: Path) -> Refused:
    """Run ``bnexport verify BUNDLE --runtime NAME`` in a child process that lacks a library or a device."""
    alone = runner_spec(refusal.runtime).engine == "onnxruntime"
    code = (_WITHOUT_TORCH if alone else "") + ("" if refusal.preload else _WITHOUT_PRELOAD) + _COMMAND
    command = [sys.executable, "-P", "-c", code, "verify", str(Path(bundle).resolve()), "--runtime", refusal.runtime]
    with tempfile.TemporaryDirectory() as folder:
        for library in refusal.hidden:
            (Path(folder) / library).touch()  # the loader takes the first file of that name, and refuses it
        try:
            done = subprocess.run(
                command, env=_environment(refusal, folder), capture_output=True, text=True, errors="replace",
                timeout=_DEADLINE, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return Refused(refusal, passed=False, code=None, said=f"it did not end within {_DEADLINE:g} s")
    said = " ".join((done.stderr or done.stdout).replace(f"{folder}/", "").split())
    return Refused(refusal, refused_rightly(refusal, done.returncode, said), done.returncode, said)


def _environment(refusal: HiddenLibrary, folder: str) -> dict[str, str]:
    """Return the child's environment: the folder's libraries come first, and those of Python packages can be found."""
    environ = child_environment("float32") | dict(refusal.environment)
    if refusal.hidden:
        packages = [] if refusal.preload else _package_folders()
        before = environ.get("LD_LIBRARY_PATH", "")
        environ["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, (folder, *map(str, packages), before)))
    return environ


def _package_folders() -> list[Path]:
    """Return the folders in which Python packages keep the libraries of CUDA, cuDNN and TensorRT."""
    places, patterns = dict.fromkeys(map(Path, sys.path)), ("nvidia/*/lib", "tensorrt_libs")
    return [path for place in places for name in patterns for path in sorted(place.glob(name)) if path.is_dir()]


def refused_rightly(refusal: HiddenLibrary, code: int, said: str) -> bool:
    """Return True if a process ended with the right exit code, without a traceback, and named the missing part."""
    if code != UNAVAILABLE or "Traceback" in said or refusal.runtime not in said:
        return False
    return "is built without" in said or all(library in said for library in refusal.hidden)
