"""A real Triton Inference Server from the wheel of nvidia-pytriton: its core and Python backend, without ONNX Runtime."""

import contextlib
import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from support.serving import PATIENCE

from benchmarks.serving.process import free_ports

#: What a venv needs for it; the Python backend of this wheel was built for numpy 1.
REQUIREMENTS = ("nvidia-pytriton==0.7.0", "onnxruntime>=1.24", "numpy<2", "protobuf>=6.33.5,<7")
_ASK = (
    "import importlib.util, json, pathlib, sysconfig;"
    "package = pathlib.Path(importlib.util.find_spec('pytriton').origin).parent;"
    "print(json.dumps([str(package), sysconfig.get_config_var('LIBDIR')]))"
)


@dataclass(frozen=True)
class Installation:
    """The places of Triton in a Python environment."""

    python: Path  # its Python, which has Triton's client too
    packages: Path  # its folder of packages
    libpython: str  # folder of that Python's library, which the Python backend loads

    @property
    def root(self) -> Path:
        return self.packages / "pytriton" / "tritonserver"


def installation(python: Path) -> Installation:
    done = subprocess.run([str(python), "-c", _ASK], capture_output=True, text=True, timeout=240, check=True)
    package, libpython = json.loads(done.stdout)
    return Installation(python, Path(package).parent, libpython)


@dataclass
class Triton:
    """A running server."""

    process: subprocess.Popen[bytes]
    repository: Path
    http: int
    grpc: int
    log: Path

    def log_text(self, start: int = 0) -> str:
        return self.log.read_bytes()[start:].decode(errors="replace")

    def load(self, name: str) -> tuple[str, str]:
        """Load a model of the repository; return the reason of a failure or "", and what it wrote to the log."""
        start = self.log.stat().st_size
        client = http.client.HTTPConnection("127.0.0.1", self.http, timeout=PATIENCE)
        with contextlib.closing(client):
            client.request("POST", f"/v2/repository/models/{name}/load", "{}")
            content = client.getresponse().read()
        return json.loads(content)["error"] if content else "", self.log_text(start)


@contextlib.contextmanager
def triton(found: Installation, folder: Path, *, mode: str = "explicit") -> Iterator[Triton]:
    """A server that completes no configuration; it is killed at the end.

    A ``repository`` is made in the folder if it is missing. Model control by ``mode``: "none" loads all models at
    the start, "explicit" none.
    """
    (folder / "repository").mkdir(parents=True, exist_ok=True)
    shutil.copytree(found.root / "backends" / "python", folder / "backends" / "python")
    stub = "triton_python_backend_stub"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    shutil.copy2(found.root / "python_backend_stubs" / version / stub, folder / "backends" / "python" / stub)
    ports = free_ports()
    shared = f"bnexport_triton_{os.getpid()}_{ports.http}_"
    words = [
        str(found.root / "bin" / "tritonserver"),
        f"--model-repository={folder / 'repository'}",
        f"--backend-directory={folder / 'backends'}",
        f"--backend-config=python,shm-region-prefix-name={shared}",
        f"--model-control-mode={mode}",
        "--disable-auto-complete-config",
        "--http-address=127.0.0.1",
        f"--http-port={ports.http}",
        "--http-thread-count=2",
        "--grpc-address=127.0.0.1",
        f"--grpc-port={ports.grpc}",
        "--allow-metrics=false",
        "--log-verbose=1",
    ]
    libraries = os.pathsep.join([str(found.packages / "nvidia_pytriton.libs"), found.libpython])
    own = {"LD_LIBRARY_PATH": libraries, "MODEL_PACKAGES": str(found.packages), "OMP_NUM_THREADS": "1"}
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(words, stdout=output, stderr=output, env=os.environ | own, start_new_session=True)
    running = Triton(process, folder / "repository", ports.http, ports.grpc, log)
    try:
        deadline = time.monotonic() + PATIENCE
        while "Started HTTPService" not in running.log_text():
            assert process.poll() is None, running.log_text()[-3000:]
            assert time.monotonic() < deadline, running.log_text()[-3000:]
            time.sleep(0.05)
        yield running
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(PATIENCE)
        for region in Path("/dev/shm").glob(f"{shared}*"):
            region.unlink()
