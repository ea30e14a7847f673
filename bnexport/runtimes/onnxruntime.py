"""Run model.onnx in onnxruntime, on the CPU, CUDA or TensorRT execution provider, and refuse a fallback to another provider."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bnexport.errors import REBUILD, BnexportError, BundleError, RuntimeUnavailable
from bnexport.onnx_files.models import read_validated
from bnexport.optional import one_line
from bnexport.runtimes import cuda_libraries, small_model
from bnexport.runtimes.base import Runner, RunSettings, check_declared, device_remedy
from bnexport.runtimes.node_placement import counts, placed_nodes, with_unique_names
from bnexport.runtimes.onnxruntime_session import (
    check_placement,
    direct_run,
    in_effect,
    load_engine,
    open_session,
    placement_note,
    precision_of,
    prepare_device,
    tf32_override,
)
from bnexport.tensors import ELEMENT_TYPES, Array, Signature

#: onnxruntime's names of element types -> numpy's.
ELEMENTS = {row.onnxruntime: name for name, row in ELEMENT_TYPES.items()}


class OnnxRuntimeRunner(Runner):
    """Runs an ONNX file on the device "cpu", "cuda" or "tensorrt"; default settings: strict float32 as users serve it.

    On a GPU the provider of every node is read back after opening, since onnxruntime runs nodes and whole models on the CPU
    without an error. Only shape arithmetic (integers or bools of rank 0 or 1) may be on the CPU, where onnxruntime puts it
    on purpose. RuntimeUnavailable reports a missing device or library, a node elsewhere, or another precision in effect.
    """

    def __init__(
        self, file: Path, signature: Signature, *, device: str = "cpu", settings: RunSettings | None = None
    ) -> None:
        self.name = f"onnxruntime-{device}"
        self.signature = signature
        self.effective_device = "cpu" if device == "cpu" else "cuda:0"
        self._file, self._device = file, device
        self._outputs = [spec.name for spec in signature.outputs]
        self._settings = settings or RunSettings()
        self._new_outputs = device == "cpu" and not self._settings.binding
        self._ort = load_engine()
        self._session, model = self._opened()
        self._direct_run = direct_run(self._session)
        self._refuse_other_signature()
        nodes = placed_nodes(self._session)
        self.effective_device = check_placement(self._ort, self._session, nodes, self.name, device, model)
        effect = in_effect(self._ort, self._session, device)
        self.description = {
            "engine": "onnxruntime",
            "version": str(self._ort.__version__),
            "device": self.effective_device,
            "file": file.name,
            "providers": list(self._session.get_providers()),
            "nodes": counts(nodes),
            **placement_note(device, nodes),
            "precision": precision_of(device, effect),
            **effect,
            "memory": "bound, not run yet" if self._settings.binding else "copied by each call",
        }
        self._refuse_other_settings()
        self.probe()  # the first batch loads cuDNN, so only a run shows that the GPU works

    def _opened(self) -> tuple[Any, bytes]:
        """Return the session, and the bytes that it was opened from."""
        # Bytes in place of the file's name, so that onnxruntime reads no external data next to the file.
        model = read_validated(self._file)
        if self._device != "cpu":
            model = with_unique_names(model)
        prepare_device(self._ort, self.name, self._device, self._settings)
        try:
            return open_session(self._ort, model, self._device, self._settings), model
        except Exception as error:  # onnxruntime's classes derive from Exception alone
            raise self._opening_error(model, error) from error

    def _opening_error(self, model: bytes, error: Exception) -> BnexportError:
        """Blame the file when it does not open on the CPU either, else the machine."""
        text = one_line(error, 200)
        unfit = BundleError(f"{self._file} is not a model that onnxruntime can load: {text}", remedy=REBUILD)
        if self._device == "cpu":
            return unfit
        try:
            open_session(self._ort, model, "cpu", RunSettings())
        except Exception:  # as above
            return unfit
        missing = cuda_libraries.reason(self._ort, self._device)
        remedy = device_remedy(str(error)) if missing is None else cuda_libraries.REMEDIES[self._device]
        return RuntimeUnavailable(f"{self.name} can't run here: {missing or text}", remedy=remedy)

    def _refuse_other_signature(self) -> None:
        inputs, outputs = (
            [(item.name, ELEMENTS.get(item.type, item.type), item.shape) for item in found]
            for found in (self._session.get_inputs(), self._session.get_outputs())
        )
        check_declared(self._file, self.signature, inputs, outputs)

    def _refuse_other_settings(self) -> None:
        """Refuse a session whose settings in effect are not the requested ones."""
        found = self.description
        for what in ("precision", "optimisation"):
            if found[what] != (wanted := getattr(self._settings, what)):
                raise RuntimeUnavailable(
                    f"{self.name}: the {what} {wanted} was requested, but {found[what]} is in effect",
                    remedy="Update onnxruntime; this version ignores the setting",
                )

    def _run(self, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        if self._settings.binding:
            return self._run_bound(feeds)
        return dict(zip(self._outputs, self._direct_run(self._outputs, feeds, None), strict=True))

    def _run_bound(self, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        """Put inputs into the device's memory, and fetch the outputs that the engine left there."""
        where = self.effective_device.partition(":")[0]
        binding = self._session.io_binding()  # a new binding for each call: an old one keeps the last batch's sizes
        inputs = {name: self._ort.OrtValue.ortvalue_from_numpy(array, where, 0) for name, array in feeds.items()}
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        for spec in self.signature.outputs:
            binding.bind_output(spec.name, where, 0)
        binding.synchronize_inputs()
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        outputs = binding.get_outputs()
        self._refuse_other_memory([*inputs.values(), *outputs], where)
        return {spec.name: value.numpy() for spec, value in zip(self.signature.outputs, outputs, strict=True)}

    def _refuse_other_memory(self, values: list[Any], where: str) -> None:
        lie = sorted({str(value.device_name()).lower() for value in values})
        if lie != [where]:
            raise RuntimeUnavailable(
                f"{self.name} bound its values to {where}, but they are on {', '.join(lie)}",
                remedy="Run it without IO binding",
            )
        self.description["memory"] = f"bound on {where}"

    def close(self) -> None:
        """Free the session."""
        super().close()
        del self._session, self._direct_run


@functools.cache
def problem(device: str) -> str | None:
    """Return why onnxruntime can't run on a device ("cpu", "cuda", "tensorrt") here, as one line; None when it can.

    A GPU has to run a small model first.
    """
    try:
        load_engine()
        if device != "cpu":
            # This tests whether the device works, in the precision that this process's environment allows.
            settings = RunSettings("float32" if device == "cuda" or tf32_override() == "0" else "tf32")
            with tempfile.TemporaryDirectory() as folder:
                small_model.write_onnx(file := Path(folder) / "small.onnx")
                OnnxRuntimeRunner(file, small_model.SIGNATURE, device=device, settings=settings).close()
    except BnexportError as error:  # also a BundleError: an onnxruntime that can't load even the small model
        return error.message
    return None
