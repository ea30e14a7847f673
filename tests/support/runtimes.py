"""The table of runners as parameters of tests; a row that this machine may lack carries the capability that it needs."""

from collections.abc import Callable, Iterable

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


def marks(spec: RunnerSpec) -> list[pytest.MarkDecorator]:
    capability = need(spec)
    return [pytest.mark.needs(capability)] if capability else []


def parameter(spec: RunnerSpec) -> object:
    return pytest.param(spec.name, marks=marks(spec))


def pairs(
    faults: Iterable[object], specs: Iterable[RunnerSpec] = RUNNERS, *, name: Callable[..., str] = str
) -> list[object]:
    """Return the parameters (fault, runtime): every fault with every runtime.

    All faults on ONNX Runtime and the first two faults on all runtimes are fast. The rest of the product is slow.

    Args:
        faults: The first two should differ in kind.
        specs: Rows of RUNNERS.
        name: Return the name of a fault for the test's id.
    """
    specs = tuple(specs)
    return [
        pytest.param(
            fault,
            spec.name,
            marks=[*marks(spec), *([] if index < 2 or spec.name == "onnxruntime-cpu" else [pytest.mark.slow])],
            id=f"{name(fault)}-{spec.name}",
        )
        for index, fault in enumerate(faults)
        for spec in specs
    ]


#: Runtimes that read an exported file, not the original network.
READS_EXPORTED = tuple(spec for spec in RUNNERS if spec.file != WEIGHTS)
RUNTIMES = [parameter(spec) for spec in RUNNERS]
