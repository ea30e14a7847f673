"""Reasons why onnxruntime or torch can't use the GPU: missing libraries, and CUDA packages that do not fit together.

The reasons about libraries are the loader's own words. Conflicts of packages are found without a GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import sys
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Any

from bnexport.environment import versions_of
from bnexport.errors import MissingDependency
from bnexport.optional import installed, one_line, require

#: Device -> remedy if onnxruntime can't use it.
REMEDIES = {
    "cuda": "Install an NVIDIA driver and pip install 'onnxruntime-gpu[cuda,cudnn]'; in a container, pass the GPU through",
    "tensorrt": "Make onnxruntime-cuda work, then install the TensorRT that this onnxruntime was built for: "
    "pip install 'tensorrt-cu13<11' brings libnvinfer.so.10 for CUDA 13",
}
#: Device -> required providers: name in onnxruntime's libraries, and name in messages.
_PROVIDERS = {
    "cuda": (("cuda", "CUDA"),),
    "tensorrt": (("cuda", "CUDA"), ("tensorrt", "TensorRT")),
}
#: The libraries of TensorRT that onnxruntime's provider needs, in the order in which they need each other.
_TENSORRT_LIBRARIES = ("libnvinfer.so.*", "libnvinfer_plugin.so.*", "libnvonnxparser.so.*")


#: True if ``preload`` imports torch before it loads a library.
_torch_first = True


def leave_torch_out() -> None:
    """Declare that this process needs onnxruntime alone: importing torch takes seconds in each child process."""
    global _torch_first
    _torch_first = False


@functools.cache
def preload(ort: Any) -> str:
    """Load CUDA and cuDNN from the Python packages that contain them, so that the provider finds them.

    torch is imported first: it brings most of the same libraries, and two copies in one process clash. After
    ``leave_torch_out`` it is imported only if the libraries are not found without it. The result is onnxruntime's text on
    failures, "" if every library is loaded.
    """
    if not _torch_first and "torch" not in sys.modules:
        for folder in package_folders(ort):
            _preloaded(ort, str(folder))
        if not (failures := _preloaded(ort)):
            return failures
    if installed("torch"):
        import torch  # noqa: F401
    return _preloaded(ort)


def _preloaded(ort: Any, folder: str | None = None) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):  # preload_dlls prints its failures
        ort.preload_dlls(directory=folder)
    return printed.getvalue()


def package_folders(ort: Any) -> list[Path]:
    """Return the folders of NVIDIA's Python packages: one for each package, those next to onnxruntime first."""
    places = dict.fromkeys([Path(ort.__file__).resolve().parents[1], *map(Path, sys.path)])
    found: dict[str, Path] = {}
    for place in places:
        for folder in sorted(place.glob("nvidia/*/lib")):
            found.setdefault(folder.parent.name, folder)
    return list(found.values())


def preload_tensorrt() -> None:
    """Load TensorRT from its Python package; the system's loader finds an installation elsewhere."""
    spec = util.find_spec("tensorrt_libs")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        for pattern in _TENSORRT_LIBRARIES:
            for library in sorted(Path(folder).glob(pattern)):
                _load(str(library), globally=True)


def reason(ort: Any, device: str = "cuda") -> str | None:
    """Return every missing piece in one line: the driver, and the library that each provider lacks; None when all load."""
    preload(ort)
    if device == "tensorrt":
        preload_tensorrt()
    capi = Path(ort.__file__).parent / "capi"
    prefix, suffix = ("", ".dll") if sys.platform == "win32" else ("lib", ".so")
    driver = _load("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    missing = [] if driver is None else [f"no NVIDIA driver ({driver})"]
    # A provider takes symbols from the shared part, which therefore has to be loaded globally before it.
    _load(str(capi / f"{prefix}onnxruntime_providers_shared{suffix}"), globally=True)
    for name, words in _PROVIDERS[device]:
        problem = _load(str(capi / f"{prefix}onnxruntime_providers_{name}{suffix}"))
        if problem is not None and problem != driver:
            missing.append(f"onnxruntime's {words} provider can't be loaded ({problem})")
    return "; ".join(missing) or None


@functools.cache
def _load(library: str, *, globally: bool = False) -> str | None:
    try:
        ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL if globally else ctypes.DEFAULT_MODE)
    except OSError as error:
        return one_line(error)
    return None


#: Distributions of cuDNN by the CUDA version that they are for. All of them write the same files.
_CUDNN = ("nvidia-cudnn-cu11", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "nvidia-cudnn-cu14")


@dataclass(frozen=True)
class Conflict:
    """Packages that do not fit together."""

    reason: str  # The packages and the consequence; one line
    remedy: str  # Packages to install instead


def conflicts() -> tuple[Conflict, ...]:
    """Return the conflicts among torch, onnxruntime and cuDNN; packages that are not installed are left out."""
    torch, onnxruntime = _imported("torch"), _imported("onnxruntime")
    built = {
        "torch": getattr(getattr(torch, "version", None), "cuda", None),
        "onnxruntime": getattr(onnxruntime, "cuda_version", None),
    }
    engines = {name: str(version) for name, version in built.items() if version}  # not those built without CUDA
    found = []
    if len({_major(version) for version in engines.values()}) > 1:
        names = " and ".join(f"{name} for CUDA {version}" for name, version in engines.items())
        found.append(
            Conflict(
                f"the installed {names} need different CUDA libraries, of which one process can load only one set",
                "Install both for one CUDA version: onnxruntime-gpu is built for CUDA 13 since 1.28, "
                "pip install -U 'onnxruntime-gpu[cuda,cudnn]' torch",
            )
        )
    cudnn = versions_of(*_CUDNN)
    if len(cudnn) > 1:
        fitting = f"nvidia-cudnn-cu{_major(next(iter(engines.values())))}" if engines else max(cudnn)
        named = " and ".join(f"{name} {version}" for name, version in cudnn.items())
        found.append(
            Conflict(
                f"{named} are installed together: they write the same files, so one has overwritten the other",
                f"pip uninstall -y {' '.join(cudnn)}, then pip install {fitting}",
            )
        )
    return tuple(found)


def _major(version: str) -> str:
    return version.partition(".")[0]


def _imported(name: str) -> ModuleType | None:
    """Return a package, or None where it is missing or can't be imported."""
    with contextlib.suppress(MissingDependency):
        return require(name, purpose="the comparison of CUDA versions") if installed(name) else None
    return None
