"""The table of runners as parameters of tests; a row that this machine may lack carries the capability that it needs."""

from __future__ import annotations

import pytest

from bnexport.bundle import WEIGHTS
from bnexport.runtimes.catalogue import RUNNERS, RunnerSpec

#: Capability of onnxruntime by its device; other engines need one by their own name or "cuda".
_ONNXRUNTIME = {"cpu": None, "cuda": "ort-cuda", "tensorrt": "tensorrt"}


def need(spec: RunnerSpec) -> str | None:
    """The capability of ``conftest.CAPABILITIES`` that a row needs; None when every machine has it."""
    if spec.engine == "onnxruntime":
        return _ONNXRUNTIME[spec.device]
    if spec.engine == "openvino":
        return "openvino"
    return "cuda" if spec.device == "cuda" else None


def parameter(spec: RunnerSpec) -> object:
    capability = need(spec)
    return pytest.param(spec.name, marks=pytest.mark.needs(capability) if capability else [])


RUNTIMES = [parameter(spec) for spec in RUNNERS]
#: Those that read an exported file, not the original network.
EXPORTED = [parameter(spec) for spec in RUNNERS if spec.file != WEIGHTS]
