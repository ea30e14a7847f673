"""The one interface of every engine: a context manager with one verb."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from bnexport.errors import BnexportError, BundleError, RuntimeUnavailable, UsageError
from bnexport.optional import one_line
from bnexport.tensors import Array, Signature, TensorSpec, check_feeds, declared_problem

REBUILD = "Write the bundle again with bnexport fold-and-export, or copy it again from its source"
#: Words of CUDA, cuBLAS, cuDNN, torch and onnxruntime that a GPU fault contains, in lower case -> what to do. First match.
_DEVICE_REMEDIES: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        (
            "out of memory",
            "out_of_memory",
            "alloc_failed",
            "failed to allocate memory",
            "is smaller than requested bytes",
        ),
        "Free the GPU's memory, use a smaller batch, or run on the CPU",
    ),
    (
        ("no kernel image", "nokernelimage", "invalid device function", "arch_mismatch"),
        "Install a build of the engine that has kernels for this GPU, or run on the CPU; bnexport doctor tests the engine",
    ),
    (
        (
            "driver version is insufficient",
            "insufficientdriver",
            "system_driver_mismatch",
            "driver on your system is too old",
        ),
        "Update the NVIDIA driver; bnexport doctor tests the engine",
    ),
    (
        ("cublas_status_not_initialized", "cudnn_status_not_initialized"),
        "Free some of the GPU's memory, which cuBLAS and cuDNN need to start; if it is free, bnexport doctor tests them",
    ),
)
_OTHER_FAULT = (
    "Try again in a new process, since a CUDA fault can break the old one; bnexport doctor tests the engine on this GPU"
)


class Runner(ABC):
    """Runs one file on one engine. Open with ``with``; outputs belong to the caller.

    A subclass sets the attributes in its ``__init__``, which leaves the engine ready to run, and writes ``_run`` and
    ``close``. What every engine must promise is checked here, once: inputs that fit, every output there, with the
    signature's element type and shape, in memory of its own. Whether values are right is the verifier's question.

    Attributes:
        name: As in ``catalogue.RUNNERS``: "onnxruntime-cpu".
        signature: Inputs and outputs, in order.
        effective_device: Read back from the engine, never copied from the request: "cpu", "cuda:0".
        description: What really runs: engine, version, file, providers of the nodes. Plain JSON values.
    """

    name: str
    signature: Signature
    effective_device: str
    description: dict[str, Any]
    _closed: bool = False

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run one batch.

        Args:
            feeds: Input name -> array of the signature's element type and shape.

        Returns:
            Output name -> array; the caller may keep and change it.

        Raises:
            FeedError: The feeds do not fit the signature.
            BundleError: The file can't be run, or its outputs do not fit the signature.
            RuntimeUnavailable: The device failed (out of memory, a library that is missing).
            UsageError: The runner was closed.
        """
        self._refuse_closed()
        check_feeds(self.signature, feeds)
        return self.run_fitting(feeds)

    def run_fitting(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """As ``run``, for feeds that are known to fit the signature: a server has checked them when it decoded them.

        Raises:
            BundleError: As in ``run``.
            RuntimeUnavailable: As in ``run``.
            UsageError: As in ``run``.
        """
        self._refuse_closed()
        contiguous = {spec.name: np.ascontiguousarray(feeds[spec.name]) for spec in self.signature.inputs}
        try:
            outputs = self._run(contiguous)
        except BnexportError:
            raise
        except Exception as error:  # engines raise classes of their own without a common base
            raise self._translated(error) from error
        return self._checked(outputs, named_sizes(self.signature, feeds))

    def _refuse_closed(self) -> None:
        if self._closed:
            raise UsageError(f"the runner {self.name} is closed", remedy="Run inside its with block")

    @abstractmethod
    def _run(self, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        """Run feeds that were checked and are contiguous; foreign exceptions may pass."""

    def close(self) -> None:
        """Free what the engine holds; the runner can't run afterwards."""
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def probe(self) -> None:
        """Run two samples of zeros, so that libraries loaded on first use and the outputs are known to be there.

        Skipped when a dimension other than the first varies: no size is known to be valid for it.
        """
        specs = self.signature.inputs
        if all(isinstance(dim, int) for spec in specs for dim in spec.shape[1:]):
            self.run({s.name: np.zeros([d if isinstance(d, int) else 2 for d in s.shape], s.dtype) for s in specs})

    def _translated(self, error: Exception) -> BnexportError:
        """A foreign exception of the engine as one of the tree."""
        if self.effective_device.startswith("cuda"):
            return RuntimeUnavailable(
                f"{self.name} failed on {self.effective_device}: {one_line(error)}",
                remedy=device_remedy(str(error)),
            )
        return BundleError(f"{self.name} can't run its file: {one_line(error)}", remedy=REBUILD)

    def _checked(self, outputs: Mapping[str, Array], sizes: Mapping[str, int]) -> dict[str, Array]:
        checked = {}
        for spec in self.signature.outputs:
            if spec.name not in outputs:
                have = ", ".join(map(repr, outputs)) or "none"
                raise BundleError(f"{self.name} gave no output {spec.name!r}, only {have}", remedy=REBUILD)
            array = np.array(outputs[spec.name], copy=True, order="C")
            shape = tuple(sizes.get(dim, dim) if isinstance(dim, str) else dim for dim in spec.shape)
            if array.shape != shape or spec.problem(array) is not None:
                problem = TensorSpec(spec.name, spec.dtype, shape).problem(array)
                if problem is not None:  # a dimension may have a name that no input has
                    raise BundleError(f"{self.name}: output {problem}", remedy=REBUILD)
            checked[spec.name] = array
        return checked


def check_declared(
    file: Path, kind: str, specs: Sequence[TensorSpec], declared: Sequence[tuple[str, str, Sequence[int | str | None]]]
) -> None:
    """Refuse a file whose inputs or outputs are not the manifest's.

    Args:
        file: For the sentence.
        kind: "input" or "output".
        specs: What the manifest says, in order.
        declared: (name, numpy's element type, shape) as the engine read them from the file.

    Raises:
        BundleError: Naming the first difference.
    """
    names, expected = [name for name, _, _ in declared], [spec.name for spec in specs]
    if names != expected:
        raise BundleError(f"{file} has the {kind}s {names or 'none'}, the manifest says {expected}", remedy=REBUILD)
    for spec, (_, dtype, shape) in zip(specs, declared, strict=True):
        if (problem := declared_problem(spec, dtype, shape, strict=kind == "input")) is not None:
            raise BundleError(f"{file}: {kind} {problem}", remedy=REBUILD)


def device_remedy(text: str) -> str:
    """Return what to do about a fault on a GPU.

    Args:
        text: Message of the engine's exception. A full GPU, a GPU that the engine has no kernels for, and an old driver are
            recognised.
    """
    lowered = text.lower()
    for words, remedy in _DEVICE_REMEDIES:
        if any(word in lowered for word in words):
            return remedy
    return _OTHER_FAULT


def plain_reason(name: str, error: BnexportError) -> str:
    """Why a runner is not here, without its name, for a list that names it already."""
    return error.message.removeprefix(f"{name} can't run here: ")


def named_sizes(signature: Signature, feeds: Mapping[str, Array]) -> dict[str, int]:
    """Size of each named dimension in feeds that fit the signature: ``{"batch": 64}``."""
    return {
        dim: size
        for spec in signature.inputs
        for dim, size in zip(spec.shape, feeds[spec.name].shape, strict=True)
        if isinstance(dim, str)
    }
