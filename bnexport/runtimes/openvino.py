"""Run model.onnx in OpenVINO on the CPU, in a precision that is pinned and read back from every layer."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bnexport.environment import cpu_name
from bnexport.errors import REBUILD, BnexportError, BundleError, FeedError, RuntimeUnavailable
from bnexport.onnx_files.models import read_validated
from bnexport.optional import one_line, require
from bnexport.runtimes.base import Runner, RunSettings, check_declared
from bnexport.tensors import Array, Signature

_DEVICE = "CPU"
#: OpenVINO's names of precisions -> ours.
_PRECISIONS = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "float32": "float32", "float16": "float16"}
#: RunSettings.precision -> (inference precision, execution mode). Left alone, OpenVINO computes a float32 file in bfloat16 on
#: every CPU that has it (OpenVINO, "Precision Control", "CPU Device").
_HINTS = {"float32": ("f32", "ACCURACY"), "bfloat16": ("bf16", "PERFORMANCE")}
#: Starts of lines in OpenVINO's errors that do not describe the error.
_ASIDE = ("Exception from ", "Check '", "To facilitate ")
#: Layers that compute nothing.
_PASSIVE = frozenset({
    "Input", "Output", "Const", "Reorder", "Convert", "Reshape", "Flatten", "Subgraph", "ShapeOf", "Split", "Concatenation",
})  # fmt: skip


class OpenVinoRunner(Runner):
    """Runs an ONNX file.

    The settings of this engine are threads and the precision: "float32", or "bfloat16", which OpenVINO serves with where the
    CPU has it. RuntimeUnavailable if OpenVINO does not obey the precision.
    """

    def __init__(self, file: Path, signature: Signature, *, settings: RunSettings | None = None) -> None:
        self.name = "openvino-cpu"
        self.signature = signature
        self.effective_device = "cpu"
        self._file = file
        self._settings = settings or RunSettings()
        self._engine = require("openvino", purpose="the OpenVINO runner")
        self._compiled = self._opened()
        self._refuse_other_signature()
        self.effective_device = ", ".join(map(str.lower, self._compiled.get_property("EXECUTION_DEVICES")))
        self.description = self._described()
        self._refuse_coarser()
        self._request = self._compiled.create_infer_request()
        self.probe()

    def _opened(self) -> Any:
        # Bytes in place of the file's name, so that OpenVINO reads no external data next to the file.
        content = read_validated(self._file)
        precision, mode = _HINTS[self._settings.precision]
        hints: dict[str, Any] = {"INFERENCE_PRECISION_HINT": precision, "EXECUTION_MODE_HINT": mode}
        if self._settings.threads is not None:
            hints["INFERENCE_NUM_THREADS"] = self._settings.threads
        try:
            core = self._engine.Core()
            return core.compile_model(core.read_model(content), _DEVICE, hints)
        except Exception as error:  # RuntimeError, and classes of its frontends
            raise BundleError(
                f"{self._file} is not a model that OpenVINO can load: {own_reason(error)}", remedy=REBUILD
            ) from error

    def _refuse_other_signature(self) -> None:
        signature, compiled = self.signature, self._compiled
        inputs, outputs = (
            [_declared(port, {spec.name for spec in specs}) for port in ports]
            for specs, ports in ((signature.inputs, compiled.inputs), (signature.outputs, compiled.outputs))
        )
        check_declared(self._file, signature, inputs, outputs)

    def _described(self) -> dict[str, Any]:
        read = self._compiled.get_property
        precision = read("INFERENCE_PRECISION_HINT").get_type_name()
        return {
            "engine": "openvino",
            "version": str(self._engine.__version__).partition("-")[0],
            "device": self.effective_device,
            "processor": cpu_name(),
            "file": self._file.name,
            "precision": _PRECISIONS.get(precision, precision),
            "execution mode": str(read("EXECUTION_MODE_HINT")).rpartition(".")[2].lower(),
            "threads": int(read("INFERENCE_NUM_THREADS")),
            "layers": self._layers(),
        }

    def _layers(self) -> dict[str, int]:
        """Return precision -> number of layers that compute in it, from the compiled graph; {} without a record."""
        try:
            infos = [operation.get_rt_info() for operation in self._compiled.get_runtime_model().get_ops()]
            layers = [(str(info["layerType"].astype(str)), str(info["runtimePrecision"].astype(str))) for info in infos]
        except Exception:  # only a record for the report; other versions may lack it
            return {}
        counts = Counter(precision for kind, precision in layers if kind not in _PASSIVE)
        return {_PRECISIONS.get(precision, precision): n for precision, n in sorted(counts.items())}

    def _refuse_coarser(self) -> None:
        """Refuse a layer in half precision if float32 is requested and the file itself is float32."""
        if self._settings.precision != "float32" or any(spec.dtype != "float32" for spec in self.signature.inputs):
            return
        coarse = {name: n for name, n in self.description["layers"].items() if name in ("bfloat16", "float16")}
        if self.description["precision"] != "float32" or coarse:
            found = ", ".join(f"{n} layers in {name}" for name, n in coarse.items()) or self.description["precision"]
            raise RuntimeUnavailable(
                f"float32 was requested from openvino-cpu, but it reports {found}",
                remedy="Update openvino; this version ignores the setting",
            )

    def _run(self, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        if any(array.size == 0 for array in feeds.values()):
            # Some models raise an error; others return the answer to the previous batch.
            raise FeedError("the batch is empty, but OpenVINO needs at least one sample", remedy="Add a sample")
        try:
            outputs = self._request.infer(dict(feeds))
        except RuntimeError as error:
            raise BundleError(f"{self.name} can't run its file: {own_reason(error)}", remedy=REBUILD) from error
        return {spec.name: outputs[spec.name] for spec in self.signature.outputs}

    def close(self) -> None:
        """Free the compiled model."""
        super().close()
        del self._request, self._compiled


def _declared(port: Any, wanted: set[str]) -> tuple[str, str, list[int | None]]:
    """Return name, element type and shape of an input or output; of its several names a wanted one, if any."""
    names = port.get_names()
    shape = [None if dim.is_dynamic else dim.get_length() for dim in port.get_partial_shape()]
    name = min(names & wanted, default=None) or min(names, default="?")
    return name, np.dtype(port.get_element_type().to_dtype()).name, shape


def own_reason(error: Exception) -> str:
    """Return OpenVINO's own reason: the last sentence, without places in its source and links."""
    lines = [line.strip().removeprefix("-- ") for line in str(error).splitlines()]
    kept = [line for line in lines if line and not line.startswith(_ASIDE)]
    return one_line(Exception(kept[-1] if kept else str(error)), 200).rstrip(".")


@functools.cache
def problem(_device: str) -> str | None:
    """Return why OpenVINO can't run here, as one line; None when it can."""
    try:
        devices = require("openvino", purpose="the OpenVINO runner").Core().available_devices
    except BnexportError as error:
        return error.message
    except Exception as error:  # a plugin that can't be loaded
        return f"OpenVINO can't start: {own_reason(error)}"
    return None if _DEVICE in devices else f"OpenVINO finds no CPU, only {', '.join(devices) or 'nothing'}"


@functools.cache
def same_as_float32(precision: str) -> str | None:
    """Return why kernels of a precision are those of float32 here: a CPU without bfloat16; None where they differ."""
    if precision != "bfloat16" or problem(_DEVICE) is not None:
        return None
    core = require("openvino", purpose="the OpenVINO runner").Core()
    if "BF16" in core.get_property(_DEVICE, "OPTIMIZATION_CAPABILITIES"):
        return None
    return "this CPU has no bfloat16, so OpenVINO's bfloat16 kernels are its float32 kernels, which were run"
