"""CUDA packages of one Python environment that do not fit together; found without a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

from bnexport.environment import versions_of
from bnexport.errors import MissingDependency
from bnexport.optional import installed, require

#: Distributions of cuDNN by the CUDA version that they are for. All of them write the same files.
_CUDNN = ("nvidia-cudnn-cu11", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "nvidia-cudnn-cu14")


@dataclass(frozen=True)
class Conflict:
    """Packages that do not fit together.

    Attributes:
        reason: Which packages, and what follows; one line.
        remedy: What to install instead.
    """

    reason: str
    remedy: str


def conflicts() -> tuple[Conflict, ...]:
    """Return what does not fit together among torch, onnxruntime and cuDNN. Packages that are not installed are left out."""
    engines = {name: version for name, version in (("torch", _torch()), ("onnxruntime", _onnxruntime())) if version}
    found = []
    if len({_major(version) for version in engines.values()}) > 1:
        built = " and ".join(f"{name} for CUDA {version}" for name, version in engines.items())
        found.append(
            Conflict(
                f"the installed {built} need different CUDA libraries, of which one process can load only one set",
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


def _torch() -> str:
    """Return the CUDA version that torch is built for; "" for a build without CUDA, or without torch."""
    return str(getattr(getattr(_imported("torch"), "version", None), "cuda", None) or "")


def _onnxruntime() -> str:
    """Return the CUDA version that onnxruntime is built for, from its own record; "" for a build without CUDA."""
    return str(getattr(_imported("onnxruntime"), "cuda_version", None) or "")


def _imported(name: str) -> ModuleType | None:
    """Return a package, or None where it is missing or can't be imported."""
    if not installed(name):
        return None
    try:
        return require(name, purpose="the comparison of CUDA versions")
    except MissingDependency:
        return None
