"""model.onnx in onnxruntime, on the CPU or on the CUDA execution provider, never on one in the other's name."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bnexport.errors import BnexportError, BundleError, RuntimeUnavailable
from bnexport.optional import one_line, require
from bnexport.runtimes import cuda_libraries, small_model
from bnexport.runtimes.base import REBUILD, Runner, declared_problem
from bnexport.tensors import Array, Signature

#: onnxruntime's names of element types -> numpy's.
ELEMENTS = {
    "tensor(float16)": "float16",
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(uint8)": "uint8",
    "tensor(int8)": "int8",
    "tensor(int16)": "int16",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}
PROVIDERS = {"CPUExecutionProvider": "cpu", "CUDAExecutionProvider": "cuda:0"}
#: For parity: no TF32, and no algorithm search by stopwatch (EXHAUSTIVE makes results jitter between runs).
CUDA_OPTIONS = {"device_id": "0", "use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
_PROTOBUF_LIMIT = 2**31 - 1


class OnnxRuntimeRunner(Runner):
    """Runs an ONNX file.

    On CUDA the session holds no CPU provider and forbids falling back to one, since nothing else stops onnxruntime
    from silently running a model on the CPU (onnxruntime, "session.disable_cpu_ep_fallback").

    Args:
        file: model.onnx.
        signature: What the file must declare.
        device: "cpu" or "cuda".
        threads: Threads inside one operator; None leaves it to onnxruntime (one per core).

    Raises:
        BundleError: Not an ONNX model, a damaged one, or one with another signature.
        RuntimeUnavailable: The device or a library is not here, or a node would run elsewhere.
        MissingDependency: onnxruntime is not installed.
    """

    def __init__(self, file: Path, signature: Signature, *, device: str = "cpu", threads: int | None = None) -> None:
        self.name = f"onnxruntime-{device}"
        self.signature = signature
        self.effective_device = device
        self._file = file
        ort = load_engine()
        self._session = self._open_session(ort, device, threads)
        self._refuse_other_signature()
        nodes = node_providers(self._session)
        self.effective_device = self._device_of(nodes, device)
        self.description = {
            "engine": "onnxruntime",
            "version": str(ort.__version__),
            "device": self.effective_device,
            "file": file.name,
            "providers": list(self._session.get_providers()),
            "nodes": nodes,
            "precision": "strict float32",
        }
        self.probe()  # cuDNN is loaded by the first batch: before it, a GPU is only a promise

    def _open_session(self, ort: Any, device: str, threads: int | None) -> Any:
        options = ort.SessionOptions()
        options.log_severity_level = 4  # what goes wrong comes as an exception, in our words
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.intra_op_num_threads = threads or 0
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        providers: list[Any] = ["CPUExecutionProvider"]
        if device == "cuda":
            self._need_cuda_build(ort)
            cuda_libraries.preload(ort)
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
            providers = [("CUDAExecutionProvider", CUDA_OPTIONS)]
        try:
            return ort.InferenceSession(_model(self._file), options, providers=providers, enable_fallback=0)
        except Exception as error:  # onnxruntime's classes derive from Exception alone
            raise self._opening_error(ort, device, error) from error

    def _need_cuda_build(self, ort: Any) -> None:
        if "CUDAExecutionProvider" not in ort.get_available_providers():
            raise RuntimeUnavailable(
                f"{self.name} can't run here: this onnxruntime ({ort.__version__}) is built without CUDA",
                remedy="Replace it: pip uninstall onnxruntime, then pip install 'onnxruntime-gpu[cuda,cudnn]'",
            )

    def _opening_error(self, ort: Any, device: str, error: Exception) -> BnexportError:
        """Whether the file or the machine is at fault: the file is, when it does not open on the CPU either."""
        text = one_line(error, 200)
        if device == "cuda" and self._opens_on_cpu(ort):
            reason = cuda_libraries.reason(ort) or text
            return RuntimeUnavailable(f"{self.name} can't run here: {reason}", remedy=cuda_libraries.REMEDY)
        return BundleError(f"{self._file} is not a model that onnxruntime can load: {text}", remedy=REBUILD)

    def _opens_on_cpu(self, ort: Any) -> bool:
        try:
            self._open_session(ort, "cpu", None)
        except BnexportError:
            return False
        return True

    def _refuse_other_signature(self) -> None:
        for kind, specs, declared in (
            ("input", self.signature.inputs, self._session.get_inputs()),
            ("output", self.signature.outputs, self._session.get_outputs()),
        ):
            names, expected = [item.name for item in declared], [spec.name for spec in specs]
            if names != expected:
                raise BundleError(
                    f"{self._file} has the {kind}s {names or 'none'}, the manifest says {expected}", remedy=REBUILD
                )
            for spec, item in zip(specs, declared, strict=True):
                dtype = ELEMENTS.get(item.type, item.type)
                if (problem := declared_problem(spec, dtype, item.shape, strict=kind == "input")) is not None:
                    raise BundleError(f"{self._file}: {kind} {problem}", remedy=REBUILD)

    def _device_of(self, nodes: Mapping[str, int], device: str) -> str:
        """Where the nodes were put, or where the first provider is when onnxruntime does not tell (before 1.23)."""
        used = list(nodes) or [self._session.get_providers()[0]]
        devices = sorted({PROVIDERS.get(provider, provider) for provider in used})
        if device == "cuda" and devices != ["cuda:0"]:
            raise RuntimeUnavailable(
                f"{self.name} fell back: nodes run on {', '.join(devices)}", remedy=cuda_libraries.REMEDY
            )
        return "+".join(devices)

    def _run(self, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        names = [spec.name for spec in self.signature.outputs]
        return dict(zip(names, self._session.run(names, dict(feeds)), strict=True))

    def close(self) -> None:
        """Free the session."""
        super().close()
        del self._session


def load_engine() -> Any:
    """onnxruntime, without its warnings on stderr.

    Raises:
        MissingDependency: It is not installed, or a library of its own is missing.
    """
    ort = require("onnxruntime", purpose="the onnxruntime runner")
    ort.set_default_logger_severity(4)
    return ort


def node_providers(session: Any) -> dict[str, int]:
    """Provider -> how many nodes it was given; empty where this onnxruntime does not record it."""
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return {}
    counts: dict[str, int] = {}
    for part in session.get_provider_graph_assignment_info():
        counts[part.ep_name] = counts.get(part.ep_name, 0) + len(part.get_nodes())
    return counts


@functools.cache
def problem(device: str) -> str | None:
    """Why onnxruntime can't run on a device here, one line; None when it can. A GPU has to run a small model first."""
    try:
        load_engine()
        if device == "cuda":
            with tempfile.TemporaryDirectory() as folder:
                small_model.write_onnx(file := Path(folder) / "small.onnx")
                OnnxRuntimeRunner(file, small_model.SIGNATURE, device=device).close()
    except BnexportError as error:  # also a BundleError: an onnxruntime that can't load even the small model
        return error.message
    return None


def _model(file: Path) -> bytes | str:
    """The file's bytes, so that no external data beside it is followed; a path where protobuf needs one."""
    try:
        return file.read_bytes() if file.stat().st_size <= _PROTOBUF_LIMIT else str(file)
    except OSError as error:
        raise BundleError(f"{file} can't be read: {one_line(error)}", remedy=REBUILD) from error
