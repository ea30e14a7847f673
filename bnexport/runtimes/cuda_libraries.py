"""Which CUDA library keeps onnxruntime from the GPU, in the loader's own words."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import io
import sys
from pathlib import Path
from typing import Any

from bnexport.optional import one_line

REMEDY = "Install an NVIDIA driver and pip install 'onnxruntime-gpu[cuda,cudnn]'; in a container hand the GPU through"


@functools.cache
def preload(ort: Any) -> str:
    """Load CUDA and cuDNN from the Python packages that carry them, so that the provider finds them.

    torch comes first: it brings most of the same libraries, and two copies in one process clash.

    Returns:
        What could not be loaded, as onnxruntime prints it; "" when all is there.
    """
    if importlib.util.find_spec("torch") is not None:
        import torch  # noqa: F401

    said = io.StringIO()
    with contextlib.redirect_stdout(said):  # preload_dlls prints its failures
        ort.preload_dlls()
    return said.getvalue()


def reason(ort: Any) -> str | None:
    """Every missing piece in one line: the driver, and the library that the CUDA provider lacks; None when all load."""
    preload(ort)
    capi = Path(ort.__file__).parent / "capi"
    prefix, suffix = ("", ".dll") if sys.platform == "win32" else ("lib", ".so")
    driver = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    missing = []
    if (problem := _load(driver)) is not None:
        missing.append(f"no NVIDIA driver ({problem})")
    # The provider takes symbols from the shared part, which therefore has to be loaded globally before it.
    _load(str(capi / f"{prefix}onnxruntime_providers_shared{suffix}"), globally=True)
    if (problem := _load(str(capi / f"{prefix}onnxruntime_providers_cuda{suffix}"))) is not None:
        missing.append(f"onnxruntime's CUDA provider can't be loaded ({problem})")
    return "; ".join(missing) or None


@functools.cache
def _load(library: str, *, globally: bool = False) -> str | None:
    try:
        ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL if globally else ctypes.DEFAULT_MODE)
    except OSError as error:
        return one_line(error)
    return None
