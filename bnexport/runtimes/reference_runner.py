"""Run model.onnx in onnx's reference implementation: in float64, or with the roundings of an emulated precision."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from bnexport.bundle import MODEL_ONNX, Bundle
from bnexport.errors import REBUILD, BundleError
from bnexport.onnx_files.emulation import Emulator
from bnexport.onnx_files.float64 import Float64Evaluator
from bnexport.optional import require
from bnexport.runtimes.base import Runner
from bnexport.tensors import Array


class ReferenceRunner(Runner):
    """Evaluates a bundle's model.onnx with every float in float64; outputs are rounded once, to the signature's types."""

    def __init__(self, bundle: Bundle) -> None:
        self.name = "reference-cpu"
        self.signature = bundle.manifest.signature
        self.effective_device = "cpu"
        onnx = require("onnx", purpose="the reference runner")
        file = bundle.file(MODEL_ONNX)
        self._evaluator: Float64Evaluator | None = Float64Evaluator(file)
        expected = tuple(spec.name for spec in self.signature.inputs)
        if self._evaluator.inputs != expected:
            raise BundleError(
                f"{file} has the inputs {list(self._evaluator.inputs)}, but the manifest states {list(expected)}",
                remedy=REBUILD,
            )
        self.description = {
            "engine": "onnx.reference",
            "version": str(onnx.__version__),
            "device": self.effective_device,
            "file": MODEL_ONNX,
            "precision": "float64, outputs rounded once",
        }
        self.probe()

    def _run(self, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        assert self._evaluator is not None, "a closed runner does not run"
        found = self._evaluator.evaluate(feeds)
        with np.errstate(over="ignore"):  # infinity is what an engine of the narrow type would give
            return {
                spec.name: found[spec.name].astype(spec.dtype) for spec in self.signature.outputs if spec.name in found
            }

    def close(self) -> None:
        """Free the model."""
        super().close()
        self._evaluator = None


class EmulatedRunner(Runner):
    """Runs a bundle's model.onnx under an emulated precision (a key of ``emulation.PRECISIONS``), as a real engine would.

    It replaces a missing GPU, and reports the CPU as its device. It proves nothing about any engine.
    """

    def __init__(self, bundle: Bundle, precision: str) -> None:
        self.name = f"emulated-{precision}"
        self.signature = bundle.manifest.signature
        self.effective_device = "cpu"
        self._emulator = Emulator(bundle.file(MODEL_ONNX), precision)
        self.description = {
            "engine": "emulation in numpy, not a real engine",
            "device": self.effective_device,
            "file": MODEL_ONNX,
            "precision": f"{self._emulator.precision.words}, emulated",
        }

    def _run(self, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        found = self._emulator.evaluate(feeds)
        with np.errstate(over="ignore"):  # infinity is what such an engine would give
            return {spec.name: found[spec.name].astype(spec.dtype) for spec in self.signature.outputs}
