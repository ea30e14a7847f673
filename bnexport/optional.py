"""Imports of packages that may be missing, and suppression of their output."""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import io
import logging
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType

from bnexport.errors import MissingDependency

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
#: Top-level import name -> requirement for pip, if it is not the name itself.
INSTALL: dict[str, str] = {
    "torch": "torch",
    "onnxruntime": "onnxruntime-gpu[cuda,cudnn]",
    "PIL": "pillow",
    "onnx_ir": "onnx-ir",
    "timm": "bnexport[timm]",
    "onnxslim": "bnexport[audit]",
    "openvino": "bnexport[openvino]",
    "google": "protobuf",
    "yaml": "bnexport[deploy]",
    "jsonschema": "bnexport[deploy]",
    "pyarrow": "bnexport[parquet]",
    "ray": "bnexport[ray]",
    "uvicorn": "bnexport[serve]",
    "httptools": "bnexport[serve]",
    "orjson": "bnexport[serve]",
    "prometheus_client": "bnexport[serve]",
    "grpc": "bnexport[grpc]",
    "tensorboard": "bnexport[tensorboard]",
}

#: Extras that bnexport-runtime has too.
RUNTIME_EXTRAS = ("bnexport[serve]", "bnexport[grpc]", "bnexport[deploy]", "bnexport[parquet]")


def installed(name: str) -> bool:
    """Return True if a package, by its top-level import name, is installed, without importing it.

    A folder of that name in the working directory, which Python would import as an empty package, does not count.
    """
    if name in sys.modules:
        return sys.modules[name] is not None
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return False
    return spec is not None and spec.origin is not None


def need_packages(purpose: str, *names: str) -> None:
    """Raise MissingDependency if packages are missing, by top-level import name, before any of them is imported.

    ``purpose`` is the feature that needs them, as the start of a sentence: "bnexport train". Serving machines
    (bnexport-runtime) lack most of them.
    """
    missing = [INSTALL.get(name, name) for name in names if not installed(name)]
    if not missing:
        return
    listed = ", ".join(missing[:-1]) + " and " + missing[-1] if len(missing) > 1 else missing[0]
    remedy = "Install the complete package: pip uninstall bnexport-runtime, then pip install bnexport"
    if installed("torch"):
        remedy = f"Install the missing packages: pip install {' '.join(missing)}"
    raise MissingDependency(
        f"{purpose} needs {listed}, which {'is' if len(missing) == 1 else 'are'} not installed", remedy=remedy
    )


def require(name: str, *, purpose: str) -> ModuleType:
    """Import a module by name; MissingDependency if it, or a library that it loads, is missing.

    ``purpose`` is the feature that needs it, as the start of a sentence: "the TorchScript runner".
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        package = INSTALL.get(package, package)
        if package in RUNTIME_EXTRAS and not installed("torch"):  # an extra of bnexport-runtime (pyproject.toml)
            package = package.replace("bnexport", "bnexport-runtime")
        raise MissingDependency(
            f"{purpose} needs {name}, which can't be imported ({one_line(error)})",
            remedy=f"Install it: pip install '{package}'",
        ) from error


def one_line(error: BaseException, limit: int = 300) -> str:
    """Return the text of an error as one line of at most ``limit`` characters, without colours of a terminal."""
    text = " ".join(_COLOUR.sub("", str(error)).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


class Shared:
    """A process-wide setting for several threads: the first thread to enter sets it, the last one to leave restores it.

    If each thread saved and restored the setting, the order could be wrong: ``warnings.catch_warnings`` of two threads leaves
    the process without warnings, ``contextlib.redirect_stdout`` without its output. ``make`` returns a context manager.
    """

    def __init__(self, make: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._inside = 0
        self._held = contextlib.ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._held.enter_context(self._make())
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._held.close()


@contextlib.contextmanager
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


#: ``with no_warnings:`` ignores Python's warnings.
no_warnings = Shared(_no_warnings)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        sink = io.StringIO()
        with no_warnings, contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            yield
    finally:
        logger.setLevel(level)


_silent = Shared(_silence)


def quiet() -> contextlib.AbstractContextManager[None]:
    """Keep torch's own warnings, log lines and prints off the user's terminal inside a block."""
    return _silent


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


#: ``with collection_paused:`` pauses Python's cyclic garbage collector. The imports and objects of a trace stay, so that
#: searching them for garbage again and again finds nothing: 15 % of the imports' time.
collection_paused = Shared(_no_collection)
