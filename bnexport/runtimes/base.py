"""The common interface of every engine: a context manager with one verb, and the settings of a run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from bnexport.errors import REBUILD, BnexportError, BundleError, RuntimeUnavailable, UsageError
from bnexport.optional import one_line
from bnexport.tensors import Array, Declared, Dim, Signature, TensorSpec, check_feeds

#: Precisions to which float32 kernels may round. A file in float16 or bfloat16 keeps its own precision.
KERNEL_PRECISIONS = ("float32", "tf32", "bfloat16")
#: ONNX Runtime's levels of graph optimisation, the usual serving level first.
OPTIMISATIONS = ("all", "extended", "basic", "none")
#: Ways of choosing a convolution's algorithm. torch measures times for "exhaustive", so results may differ between sessions;
#: onnxruntime selects modes of cuDNN's heuristics (``onnxruntime_session.provider_options``).
CONV_SEARCHES = ("heuristic", "default", "exhaustive")


@dataclass(frozen=True)
class RunSettings:
    """Settings of a runner. An engine without such a setting ignores it; an engine that can't obey it refuses."""

    #: "float32": IEEE float32, TF32 off. "tf32": the engine's TF32 kernels, for convolutions and products. "bfloat16":
    #: what OpenVINO makes of a float32 file on CPUs that have it
    precision: str = "float32"
    optimisation: str = "all"  # Level of graph optimisation; one of OPTIMISATIONS
    conv_search: str = "heuristic"  # One of CONV_SEARCHES
    binding: bool = False  # Inputs and outputs are bound to the device's memory, instead of being copied by each call
    threads: int | None = None  # Threads inside one operator; None leaves it to the engine
    #: ONNX Runtime's slower int8 kernels, which add products in 32 bits (session.x64quantprecision)
    precise: bool = False
    #: Run in a child process, so that no global state (TF32 flags, environment variables) leaks in or out
    isolated: bool = False

    def __post_init__(self) -> None:
        for what, value, known in (
            ("precision", self.precision, KERNEL_PRECISIONS),
            ("optimisation", self.optimisation, OPTIMISATIONS),
            ("conv_search", self.conv_search, CONV_SEARCHES),
        ):
            if value not in known:
                raise UsageError(f"the {what} {value!r} is unknown", remedy=f"Choose from {', '.join(known)}")
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"the number of threads is {self.threads}", remedy="Give at least 1")

    def describe(self) -> str:
        """Return the differences from strict float32 as users serve it: "tf32, IO binding, optimisation basic"; "" if none."""
        parts = [
            "" if self.precision == "float32" else self.precision,
            "IO binding" if self.binding else "",
            "" if self.optimisation == "all" else f"optimisation {self.optimisation}",
            "" if self.conv_search == "heuristic" else f"{self.conv_search} search",
            "precise int8 kernels" if self.precise else "",
        ]
        return ", ".join(part for part in parts if part)


#: Words of CUDA, cuBLAS, cuDNN, torch and onnxruntime that a GPU fault contains, in lower case -> what to do. First match.
_DEVICE_REMEDIES: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("out of memory", "out_of_memory", "alloc_failed", "failed to allocate memory", "is smaller than requested bytes"),
        "Free the GPU's memory, use a smaller batch, or run on the CPU",
    ),
    (
        ("no kernel image", "nokernelimage", "invalid device function", "arch_mismatch"),
        "Install a build of the engine that has kernels for this GPU, or run on the CPU; bnexport doctor tests the engine",
    ),
    (
        ("driver version is insufficient", "insufficientdriver", "system_driver_mismatch", "driver on your system is too old"),
        "Update the NVIDIA driver; bnexport doctor tests the engine",
    ),
    (
        ("cublas_status_not_initialized", "cudnn_status_not_initialized"),
        "Free some of the GPU's memory, which cuBLAS and cuDNN need to start; if it is free, bnexport doctor tests them",
    ),
)  # fmt: skip
_OTHER_FAULT = (
    "Try again in a new process, since a CUDA fault can break the old one; bnexport doctor tests the engine on this GPU"
)
#: Name, shape, numpy's element type and declaration of an output.
_Output = tuple[str, tuple[int | str, ...], np.dtype[Any], TensorSpec]


class Runner(ABC):
    """Runs one file on one engine. Open with ``with``; outputs belong to the caller.

    A subclass sets the attributes in its ``__init__``, which leaves the engine ready to run, and writes ``_run`` and
    ``close``. This class checks what every engine must guarantee: inputs that fit, every output present, with the
    signature's element type and shape, in separate memory. The verifier checks the values.

    Attributes:
        name: As in ``catalogue.RUNNERS``: "onnxruntime-cpu".
        signature: Inputs and outputs, in order.
        effective_device: Read back from the engine, never copied from the request: "cpu", "cuda:0".
        description: Engine, version, file, providers of the nodes that really run. Plain JSON values.
    """

    name: str
    signature: Signature
    effective_device: str
    description: dict[str, Any]
    _closed: bool = False
    #: True where the engine gives every call contiguous outputs in new memory, so that no copy is needed.
    _new_outputs: bool = False
    #: Shapes of the inputs of the last call, and the outputs that fit them.
    _expected: tuple[object, list[_Output]] = ((), [])

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run one batch.

        Args:
            feeds: Input name -> array of the signature's element type and shape.

        Returns:
            Output name -> array; the caller may keep and change it.

        Raises:
            FeedError: The feeds do not fit the signature.
            BundleError: The file can't be run, or its outputs do not fit the signature.
            RuntimeUnavailable: The device failed (out of memory, a missing library).
            UsageError: The runner was closed.
        """
        self._refuse_closed()
        check_feeds(self.signature, feeds)
        return self.run_fitting(feeds)

    def run_fitting(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run feeds that a server has checked at decoding; the other errors are those of ``run``."""
        if self._closed:  # saves a call in each run
            self._refuse_closed()
        contiguous, shapes = {}, []
        for spec in self.signature.inputs:
            contiguous[spec.name] = array = np.ascontiguousarray(feeds[spec.name])
            shapes.append(array.shape)
        try:
            outputs = self._run(contiguous)
        except BnexportError:
            raise
        except Exception as error:  # engines raise various classes without a common base
            raise self._translated(error) from error
        if shapes != self._expected[0]:
            self._expected = shapes, self._outputs_for(feeds)
        return self._checked(outputs)

    def _outputs_for(self, feeds: Mapping[str, Array]) -> list[_Output]:
        """Return the outputs for the sizes of the inputs' named dimensions; a name that the inputs lack stays."""
        sizes: dict[Dim, int] = {}
        for spec in self.signature.inputs:
            sizes |= {dim: n for dim, n in zip(spec.shape, feeds[spec.name].shape, strict=True) if isinstance(dim, str)}
        sized = [(spec, tuple(sizes.get(dim, dim) for dim in spec.shape)) for spec in self.signature.outputs]
        return [(s.name, shape, np.dtype(s.dtype), TensorSpec(s.name, s.dtype, shape)) for s, shape in sized]

    def _refuse_closed(self) -> None:
        if self._closed:
            raise UsageError(f"the runner {self.name} is closed", remedy="Use it inside its with block")

    @abstractmethod
    def _run(self, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        """Run feeds that were checked and are contiguous; foreign exceptions may pass."""

    def close(self) -> None:
        """Free the engine's resources; the runner is unusable afterwards."""
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def probe(self) -> None:
        """Run two samples of zeros, to load libraries that load on first use and to check the outputs.

        Skipped when a dimension other than the first varies: no size is known to be valid for it.
        """
        specs = self.signature.inputs
        if all(isinstance(dim, int) for spec in specs for dim in spec.shape[1:]):
            self.run({s.name: np.zeros([d if isinstance(d, int) else 2 for d in s.shape], s.dtype) for s in specs})

    def _translated(self, error: Exception) -> BnexportError:
        """Convert a foreign exception of the engine to one of bnexport's."""
        if self.effective_device.startswith("cuda"):
            return RuntimeUnavailable(
                f"{self.name} failed on {self.effective_device}: {one_line(error)}",
                remedy=device_remedy(str(error)),
            )
        return BundleError(f"{self.name} can't run its file: {one_line(error)}", remedy=REBUILD)

    def _checked(self, outputs: Mapping[str, Array]) -> dict[str, Array]:
        checked = {}
        for name, shape, dtype, spec in self._expected[1]:
            if name not in outputs:
                have = ", ".join(map(repr, outputs)) or "none"
                raise BundleError(f"{self.name} returned no output {name!r}, only {have}", remedy=REBUILD)
            array = outputs[name] if self._new_outputs else np.array(outputs[name], copy=True, order="C")
            if array.shape != shape or array.dtype != dtype:
                problem = spec.problem(array)
                if problem is not None:  # a dimension's name may be missing in the inputs
                    raise BundleError(f"{self.name}: output {problem}", remedy=REBUILD)
            checked[name] = array
        return checked


def check_declared(file: Path, signature: Signature, inputs: Sequence[Declared], outputs: Sequence[Declared]) -> None:
    """Refuse a file whose inputs or outputs, as the engine read them, are not the manifest's; the error names the fault."""
    if (problem := signature.declaration_problem(inputs, outputs)) is not None:
        raise BundleError(f"{file}: {problem}", remedy=REBUILD)


def device_remedy(text: str) -> str:
    """Return what to do about a fault on a GPU, by the engine's message."""
    found = (remedy for words, remedy in _DEVICE_REMEDIES if any(word in text.lower() for word in words))
    return next(found, _OTHER_FAULT)


def plain_reason(name: str, error: BnexportError) -> str:
    """Return why a runner is unavailable, without its name, for a list that contains the name already."""
    return error.message.removeprefix(f"{name} can't run here: ")
