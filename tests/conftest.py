"""Capabilities: what this machine can run, and what a missing one means.

``@pytest.mark.needs("cuda")`` skips a test where the capability is missing; ``BNEXPORT_REQUIRE=cuda,ort-cuda`` turns that
skip into a failure, so that a GPU lane can't pass by skipping everything.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


def _cuda() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "torch sees no CUDA device"


def _ort_cuda() -> str | None:
    if (reason := _cuda()) is not None:
        return reason
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return "this onnxruntime has no CUDA execution provider"
    return None


def _fake_cuda() -> str | None:
    from support.fake_cuda.build import missing

    return missing()


def _tensorrt() -> str | None:
    from bnexport.runtimes.catalogue import runner_spec

    return runner_spec("onnxruntime-tensorrt").available()


def _openvino() -> str | None:
    from bnexport.runtimes.catalogue import runner_spec

    return runner_spec("openvino-cpu").available()


def _data() -> str | None:
    root = os.environ.get("BNEXPORT_DATA")
    found = root and (Path(root) / "FashionMNIST" / "raw" / "t10k-images-idx3-ubyte.gz").is_file()
    return None if found else "BNEXPORT_DATA names no folder with Fashion-MNIST"


def _chromium() -> str | None:
    return None if shutil.which("chromium") else "chromium is not installed"


def _tritonclient() -> str | None:
    from bnexport.optional import installed

    return None if installed("tritonclient") and installed("grpc") else "tritonclient[grpc] is not installed"


def _triton() -> str | None:
    named = os.environ.get("BNEXPORT_TRITON")
    return None if named else "BNEXPORT_TRITON names no Python with nvidia-pytriton ('install' makes one, 405 MB)"


def _ray() -> str | None:
    from bnexport.optional import installed

    return None if installed("ray") else "ray is not installed"


def _wrk() -> str | None:
    return None if shutil.which("wrk") and shutil.which("h2load") else "wrk or h2load is not installed"


CAPABILITIES: dict[str, Callable[[], str | None]] = {
    "cuda": functools.cache(_cuda),
    "ort-cuda": functools.cache(_ort_cuda),
    "fake-cuda": functools.cache(_fake_cuda),
    "tensorrt": functools.cache(_tensorrt),
    "openvino": functools.cache(_openvino),
    "data": functools.cache(_data),
    "tritonclient": functools.cache(_tritonclient),
    "triton": functools.cache(_triton),
    "ray": functools.cache(_ray),
    "chromium": functools.cache(_chromium),
    "wrk": functools.cache(_wrk),
}


def required() -> set[str]:
    names = {name.strip() for name in os.environ.get("BNEXPORT_REQUIRE", "").split(",") if name.strip()}
    if unknown := names - set(CAPABILITIES):
        raise pytest.UsageError(
            f"BNEXPORT_REQUIRE names unknown capabilities {sorted(unknown)}; known: {sorted(CAPABILITIES)}"
        )
    return names


def pytest_configure(config: pytest.Config) -> None:
    required()


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("needs"):
        for name in mark.args:
            if name not in CAPABILITIES:
                raise pytest.UsageError(f"{item.nodeid} needs the unknown capability {name!r}")
            if (reason := CAPABILITIES[name]()) is None:
                continue
            if name in required():
                pytest.fail(f"BNEXPORT_REQUIRE names {name}, but {reason}", pytrace=False)
            pytest.skip(f"needs {name}: {reason}")
