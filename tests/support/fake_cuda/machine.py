"""A machine with the fake CUDA: child processes in which onnxruntime finds a GPU, and torch is missing as on a server."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from support.fake_cuda.build import build

from bnexport.reproducibility import OVERRIDE
from bnexport.runtimes.base import RunSettings
from bnexport.runtimes.isolation import import_path

_CHILD = Path(__file__).with_name("child.py")
#: Read by Python at the start of every process of the machine. torch would load NVIDIA's own libraries before the stubs.
_AT_START = """
import sys

sys.modules["torch"] = None
from bnexport.runtimes import cuda_libraries

cuda_libraries.preload = lambda ort: ""
"""
_DEADLINE = 240


@dataclass(frozen=True)
class Job:
    """One bundle to open on onnxruntime-cuda."""

    bundle: str  # Its folder
    settings: RunSettings = field(default_factory=RunSettings)  # How to open it
    shapes: tuple[tuple[int, ...], ...] = ()  # Shapes of the first input to run, in order


@dataclass(frozen=True)
class Opened:
    """The result of a job."""

    error: str = ""  # Message of the exception; "" when the bundle opened
    kind: str = ""  # Its class
    remedy: str = ""  # Its remedy
    description: dict[str, Any] = field(default_factory=dict)  # Of the runner, after the runs
    nodes: tuple[tuple[str, str, str], ...] = ()  # Name, operator and provider of each node
    outputs: tuple[dict[str, list[int]], ...] = ()  # Per run, the shape of every output

    def on(self, provider: str) -> list[tuple[str, str]]:
        """Name and operator of the nodes of a provider."""
        return [(name, operator) for name, operator, found in self.nodes if found == provider]


class Machine:
    """The stub libraries in a separate folder, and processes that find them."""

    def __init__(self, folder: Path) -> None:
        self._libraries, self._site = folder / "libraries", folder / "site"
        self._libraries.mkdir(parents=True)
        self._site.mkdir()
        build(self._libraries)
        (self._site / "sitecustomize.py").write_text(_AT_START)

    def open(self, *jobs: Job, **variables: str) -> list[Opened]:
        """Open bundles one after the other in one process with more environment variables."""
        done = self.run([str(_CHILD)], text=json.dumps([asdict(job) for job in jobs]), **variables)
        assert done.returncode == 0, done.stderr[-2000:]
        results = json.loads(done.stdout.splitlines()[-1])
        return [Opened(**{**result, "nodes": tuple(map(tuple, result.get("nodes", ())))}) for result in results]

    def bnexport(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the command line."""
        return self.run(["-m", "bnexport", *arguments])

    def run(self, arguments: Sequence[str], *, text: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
        """Run Python."""
        kept = {name: value for name, value in os.environ.items() if name != OVERRIDE}
        environment = {
            **kept,
            "LD_LIBRARY_PATH": str(self._libraries),
            "PYTHONPATH": os.pathsep.join([str(self._site), import_path()]),
            **variables,
        }
        return subprocess.run(
            [sys.executable, *arguments], input=text, capture_output=True, text=True, env=environment, timeout=_DEADLINE
        )
