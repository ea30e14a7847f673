"""A runner in a child process with a clean environment, so that no global state leaks in or out.

A message between the two processes is one line of JSON, then the plain bytes of its arrays. Nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple, cast

import numpy as np

from bnexport import errors
from bnexport.bundle import Bundle
from bnexport.errors import REBUILD, BnexportError, BundleError, RuntimeUnavailable
from bnexport.optional import one_line
from bnexport.reproducibility import OVERRIDE
from bnexport.runtimes.base import Runner, RunSettings
from bnexport.tensors import DTYPES, Array

#: Largest number of bytes of a message's JSON: a request, a description or an error.
_MAX_HEAD = 2**26
_ARRAYS = "arrays"


def send(stream: BinaryIO, head: Mapping[str, Any], arrays: Mapping[str, Array] | None = None) -> None:
    """Write one message to a pipe: plain JSON values, and arrays by name, of an element type in DTYPES."""
    contiguous = {name: np.asarray(array, order="C") for name, array in (arrays or {}).items()}
    table = [[name, array.dtype.name, list(array.shape)] for name, array in contiguous.items()]
    text = json.dumps({**head, _ARRAYS: table}).encode()
    stream.write(len(text).to_bytes(8, "little") + text)
    for array in contiguous.values():
        stream.write(array.reshape(-1).view(np.uint8).data)
    stream.flush()


def receive(stream: BinaryIO) -> tuple[dict[str, Any], dict[str, Array]]:
    """Read one message, with arrays in separate memory; EOFError after the other process has ended."""
    size = int.from_bytes(_exactly(stream, 8), "little")
    if size > _MAX_HEAD:
        raise ValueError(f"a message has {size} bytes, more than {_MAX_HEAD}")
    head = json.loads(bytes(_exactly(stream, size)))
    arrays = {}
    for name, dtype, shape in head.pop(_ARRAYS):
        if dtype not in DTYPES:
            raise ValueError(f"an array has the unknown type {dtype!r}")
        content = _exactly(stream, math.prod(shape) * np.dtype(dtype).itemsize)
        arrays[str(name)] = np.frombuffer(content, dtype).reshape(shape)
    return head, arrays


def _exactly(stream: BinaryIO, size: int) -> bytearray:
    content = bytearray(size)
    view, at = memoryview(content), 0
    while at < size:
        count = stream.readinto(view[at:])  # type: ignore[attr-defined]
        if not count:
            raise EOFError
        at += count
    return content


#: Seconds for one answer, opening included: TensorRT may build an engine for minutes. A deadline, not a measurement.
DEADLINE = 1800.0
#: Seconds for a child to end by itself.
_GRACE = 5.0
_CHILD = "bnexport.runtimes.isolated_child"


class Variable(NamedTuple):
    """One row of ENVIRONMENT: a variable (a final * stands for any ending), its values, None for unset, and its effect."""

    name: str
    float32: str | None
    tf32: str | None
    reason: str


#: Variables that change numbers. Everything else (paths, devices, threads) is the user's and stays.
ENVIRONMENT: tuple[Variable, ...] = (
    Variable(OVERRIDE, "0", None, "cuBLAS and cuDNN obey it before any setting; TensorRT obeys it alone"),
    Variable("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", None, None, "torch starts with TF32 in products"),
    Variable("CUBLAS_WORKSPACE_CONFIG", ":4096:8", ":4096:8", "cuBLAS adds in the same order in every run"),
    Variable("CUBLAS_EMULATE_*", None, None, "cuBLAS emulates float32 and float64 by narrower numbers"),
    Variable("CUBLAS_EMULATION_STRATEGY", None, None, "when cuBLAS emulates"),
    Variable("ONEDNN_DEFAULT_FPMATH_MODE", None, None, "oneDNN rounds float32 factors to TF32 or bfloat16 on the CPU"),
    Variable("DNNL_DEFAULT_FPMATH_MODE", None, None, "older name of ONEDNN_DEFAULT_FPMATH_MODE"),
    Variable("ORT_TENSORRT_*", None, None, "ONNX Runtime's TensorRT provider takes precisions and caches from them"),
    Variable("ORT_CUDA_GEMM_OPTIONS", None, None, "ONNX Runtime's half-precision products add up in half precision"),
    Variable("PYTHONINSPECT", None, None, "Python would wait for a user at its end"),
    Variable("PYTHONSTARTUP", None, None, "Python would run a file of the user's"),
)


class IsolatedRunner(Runner):
    """Runs the row ``name`` of RUNNERS in a separate process, with ``deadline`` seconds for one answer.

    Device and description are those of the child's engine. Errors are raised as in the child. A child that dies or does not
    answer is an error of one sentence: a BundleError on the CPU, where the file is to blame, else RuntimeUnavailable. The child
    ends with ``close``, at an interrupt, or when the interpreter ends.
    """

    def __init__(self, name: str, bundle: Bundle, settings: RunSettings, *, deadline: float = DEADLINE) -> None:
        self.name = name
        self.signature = bundle.manifest.signature
        self.effective_device = name.rpartition("-")[2]
        self._deadline = deadline
        self.description: dict[str, Any] = {}
        self._dead: BnexportError | None = None
        self._turn = threading.Lock()
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 -- as long as the child
        self._child = start_child(_CHILD, self.name, self._stderr, settings.precision)
        self._stop = weakref.finalize(self, _stop, self._child, self._stderr)
        request = {
            "runtime": name,
            "bundle": str(Path(bundle.path).resolve()),
            "manifest": bundle.manifest.to_json(),
            "settings": asdict(replace(settings, isolated=False)),
        }
        try:
            self._exchange(request, {})
        except BaseException:
            self._stop()
            raise

    @property
    def process(self) -> int:
        """Return the child's process id."""
        return self._child.pid

    def _run(self, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        return self._exchange({}, feeds)

    def _exchange(self, head: Mapping[str, Any], arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Send a message, and return the answer."""
        with self._turn:  # two threads' messages must not mix
            if self._dead is not None:
                raise self._dead
            answer, outputs = self._answer_to(head, arrays)
        if "error" in answer:
            raise _raised(answer)
        self.effective_device = str(answer["device"])
        self.description = {**answer["description"], "process": "its own"}
        return outputs

    def _answer_to(
        self, head: Mapping[str, Any], arrays: Mapping[str, Array]
    ) -> tuple[dict[str, Any], dict[str, Array]]:
        requests, answers = cast(BinaryIO, self._child.stdin), cast(BinaryIO, self._child.stdout)
        late = threading.Event()
        try:
            with _killed_after(self._deadline, self._child, late):
                send(requests, head, arrays)
                return receive(answers)
        except (EOFError, OSError, ValueError) as error:
            self._child.kill()  # a child that sent garbage, or that closed its pipe and still runs
            self._dead = self._death(late=late.is_set())
            raise self._dead from error
        except BaseException:  # an interrupt in the middle of a message: the next one would be misread
            self._child.kill()
            self._dead = RuntimeUnavailable(f"{self.name} was interrupted", remedy="Open it again")
            raise

    def _death(self, *, late: bool) -> BnexportError:
        """Return the error for a missing answer, in one sentence."""
        code = self._child.wait()
        how = f"did not answer for {self._deadline:g} s and was stopped" if late else f"ended: {how_ended(code)}"
        words = "" if late else _last_line(self._stderr)
        message = f"the process of {self.name} {how}" + (f" ({words})" if words else "")
        if self.effective_device == "cpu" and not late:
            return BundleError(message, remedy=REBUILD)
        return RuntimeUnavailable(
            message, remedy="Check memory and drivers; bnexport doctor lists the runtimes that work here"
        )

    def close(self) -> None:
        """End the child."""
        super().close()
        self._stop()


def child_environment(precision: str) -> dict[str, str]:
    """Return this process's environment, changed for a precision as ENVIRONMENT states."""
    rest = {
        name: value for name, value in os.environ.items() if not any(fnmatchcase(name, row.name) for row in ENVIRONMENT)
    }
    wanted = {row.name: row.float32 if precision == "float32" else row.tf32 for row in ENVIRONMENT}
    return {**rest, **{name: value for name, value in wanted.items() if value is not None}, "PYTHONPATH": import_path()}


def import_path() -> str:
    """Return the PYTHONPATH with which a child finds the packages of this process."""
    here = str(Path(__file__).resolve().parents[2])
    return os.pathsep.join(dict.fromkeys([*(str(Path(path or ".").resolve()) for path in sys.path), here]))


def start_child(module: str, name: str, stderr: IO[bytes], precision: str = "float32") -> subprocess.Popen[bytes]:
    """Start a module as a child; fork would copy loaded libraries, and multiprocessing would import the user's script."""
    # -P: a file of the working directory must not replace a package.
    command = [sys.executable, "-P", "-m", module]
    try:
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, env=child_environment(precision)
        )
    except (OSError, ValueError) as error:
        stderr.close()
        raise RuntimeUnavailable(
            f"{name} can't start a separate process: {one_line(error)}",
            remedy="Free memory, or check that Python can be started",
        ) from error


def child_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Return the pipes of a child for messages; printed text goes to standard error from now on, and Ctrl-C is ignored.

    Ctrl-C reaches all processes of the terminal; the parent ends its children.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stdout.flush()
    private = os.dup(1)
    os.dup2(2, 1)
    return sys.stdin.buffer, os.fdopen(private, "wb")


def _stop(child: subprocess.Popen[bytes], stderr: IO[bytes]) -> None:
    """Close a child's input, which ends it, and kill a child that stays."""
    try:
        for pipe in (child.stdin, child.stdout):
            with contextlib.suppress(OSError):  # unsent data has no reader
                pipe.close()  # type: ignore[union-attr]
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_GRACE)
    finally:  # also when the wait was interrupted
        if child.poll() is None:
            child.kill()
            child.wait()
        stderr.close()


@contextlib.contextmanager
def _killed_after(seconds: float, child: subprocess.Popen[bytes], late: threading.Event) -> Iterator[None]:
    """Kill a child that does not answer in time, which ends the wait for it on every system."""

    def kill() -> None:
        late.set()
        child.kill()

    timer = threading.Timer(seconds, kill)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _raised(answer: Mapping[str, Any]) -> BnexportError:
    """Return the child's error as the same class."""
    found = getattr(errors, str(answer["error"]), None)
    kind = found if isinstance(found, type) and issubclass(found, BnexportError) else RuntimeUnavailable
    return kind(str(answer["message"]), remedy=str(answer["remedy"]))


def how_ended(code: int) -> str:
    """Return the meaning of a process's return code, as the end of a sentence."""
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        name = signal.Signals(-code).name
        return f"killed by {name}" + (", perhaps because memory was full" if name == "SIGKILL" else "")
    return f"killed by signal {-code}"


def _last_line(stderr: IO[bytes]) -> str:
    """Return the last line that the child wrote to standard error."""
    stderr.seek(max(0, stderr.seek(0, os.SEEK_END) - 4096))
    lines = [line.strip() for line in stderr.read().decode(errors="replace").split("\n")]
    return next((one_line(Exception(line), 200) for line in reversed(lines) if line), "")
