"""Open a session of onnxruntime as RunSettings demand, and read back the settings in effect."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bnexport.errors import RuntimeUnavailable
from bnexport.optional import require
from bnexport.reproducibility import OVERRIDE
from bnexport.runtimes import cuda_libraries
from bnexport.runtimes.base import RunSettings
from bnexport.runtimes.node_placement import CPU, PlacedNode, counts, not_shape_arithmetic
from bnexport.tensors import Array

CUDA, TENSORRT = "CUDAExecutionProvider", "TensorrtExecutionProvider"
_CHANGED = "changed"
_NO_KERNEL = "Run this model on the CPU, or replace the operators that the GPU provider has no kernels for"
#: Variables that TensorRT's provider obeys before its options -> the value that leaves numbers and engines alone.
_TENSORRT_VARIABLES = {f"ORT_TENSORRT_{what}_ENABLE": "0" for what in ("FP16", "BF16", "INT8", "ENGINE_CACHE")}


#: Device of a runner -> the name of its first provider in sentences, and its providers in order of preference. The first one
#: has to take at least one node. onnxruntime adds the CPU's itself, so its nodes are read back and judged.
TARGETS: dict[str, tuple[str, tuple[str, ...]]] = {
    "cpu": ("the CPU", (CPU,)),
    "cuda": ("CUDA", (CUDA,)),
    # TensorRT leaves operators without an implementation to CUDA; the description has the number of nodes of each.
    "tensorrt": ("TensorRT", (TENSORRT, CUDA)),
}
#: RunSettings.optimisation -> onnxruntime's name.
LEVELS = {
    "all": "ORT_ENABLE_ALL", "extended": "ORT_ENABLE_EXTENDED", "basic": "ORT_ENABLE_BASIC", "none": "ORT_DISABLE_ALL",
}  # fmt: skip
#: Options of providers that affect the results; the others (memory, streams) are left out of a description.
_REPORTED_OPTIONS = (
    "device_id", "use_tf32", "cudnn_conv_algo_search", "cudnn_conv_use_max_workspace", "prefer_nhwc", "fuse_conv_bias",
    "enable_cuda_graph", "trt_fp16_enable", "trt_bf16_enable", "trt_int8_enable", "trt_engine_cache_enable",
    "trt_timing_cache_enable", "trt_builder_optimization_level",
)  # fmt: skip


def load_engine() -> Any:
    """Return onnxruntime, without its warnings on stderr; MissingDependency if it or one of its libraries is missing."""
    ort = require("onnxruntime", purpose="the onnxruntime runner")
    ort.set_default_logger_severity(4)
    return ort


def provider_options(provider: str, settings: RunSettings) -> dict[str, str]:
    """Return the options of a provider (onnxruntime, "CUDA Execution Provider", "TensorRT Execution Provider")."""
    if provider == CUDA:
        return {
            "device_id": "0",
            "use_tf32": "1" if settings.precision == "tf32" else "0",
            # Since 1.20 the names select cuDNN's heuristic modes: HEURISTIC is A, EXHAUSTIVE (the default) is B, DEFAULT is
            # FALLBACK. None of them measures times (onnxruntime issue 22705, pull request 19470).
            "cudnn_conv_algo_search": settings.conv_search.upper(),
        }
    if provider == TENSORRT:  # a cached engine may be one of another precision
        off = ("fp16", "bf16", "int8", "engine_cache", "timing_cache")
        return {"device_id": "0", **{f"trt_{what}_enable": "0" for what in off}}
    return {}


def open_session(ort: Any, model: bytes, device: str, settings: RunSettings) -> Any:
    """Open a session on the bytes of a file with the providers of a device (a key of TARGETS); onnxruntime's errors pass."""
    options = ort.SessionOptions()
    options.log_severity_level = 4  # errors are raised as exceptions, which bnexport converts
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, LEVELS[settings.optimisation])
    options.intra_op_num_threads = settings.threads or 0
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if settings.precise:
        options.add_session_config_entry("session.x64quantprecision", "1")
    if device != "cpu":
        options.use_deterministic_compute = settings.precision == "float32"
    providers = [(name, provider_options(name, settings)) for name in TARGETS[device][1]]
    return ort.InferenceSession(model, options, providers=providers, enable_fallback=0)


def direct_run(session: Any) -> Callable[..., list[Array]]:
    """Return the run of the compiled session (output names, feeds, run options), which InferenceSession.run wraps.

    The wrapper checks the names of the inputs again: 4 us of 54 us for one image of BN-LeNet (AMD EPYC, onnxruntime 1.31.1).
    A version without the private attribute gets the wrapper.
    """
    run: Callable[..., list[Array]] = getattr(session, "_sess", session).run
    return run


def prepare_device(ort: Any, name: str, device: str, settings: RunSettings) -> None:
    """Load a device's libraries for the runner called ``name``.

    RuntimeUnavailable if this onnxruntime is built without a provider, TensorRT's libraries are missing, or the environment
    forbids the precision.
    """
    if device == "cpu":
        return
    first, providers = TARGETS[device]
    if not set(providers) <= set(ort.get_available_providers()):
        raise RuntimeUnavailable(
            f"{name} can't run here: this onnxruntime ({ort.__version__}) is built without {first}",
            remedy="Replace it: pip uninstall onnxruntime, then pip install 'onnxruntime-gpu[cuda,cudnn]'",
        )
    cuda_libraries.preload(ort)
    if device == "tensorrt":
        cuda_libraries.preload_tensorrt()
        # Before the session, whose message for a missing library is a path in onnxruntime's source.
        if (problem := cuda_libraries.reason(ort, device)) is not None:
            raise RuntimeUnavailable(f"{name} can't run here: {problem}", remedy=cuda_libraries.REMEDIES[device])
    if (problem := environment_problem(device, settings.precision)) is not None:
        raise RuntimeUnavailable(
            f"{name} can't run here in {settings.precision}: {problem}",
            remedy="Run it in a separate process (RunSettings.isolated), as bnexport verify does",
        )


def environment_problem(device: str, precision: str) -> str | None:
    """Return which variable of this process's environment keeps a GPU from a precision; None when none does."""
    override = tf32_override()
    if override == _CHANGED:
        return f"{OVERRIDE} was changed after this process had started, so the value that its libraries read is unknown"
    if precision == "tf32" and override == "0":
        return f"{OVERRIDE}=0 in the environment forbids TF32"
    if precision == "float32" and override == "1":
        return f"{OVERRIDE}=1 in the environment forces TF32"
    if device != "tensorrt":
        return None
    if precision == "float32" and override != "0":
        return f"TensorRT rounds to TF32 unless {OVERRIDE}=0 is in the environment when its process starts"
    for name, harmless in _TENSORRT_VARIABLES.items():
        if (value := os.environ.get(name, harmless)) != harmless:
            return f"{name}={value} in the environment overrides TensorRT's options"
    return None


def tf32_override() -> str | None:
    """Return NVIDIA_OVERRIDE as the libraries of this process read it; None when it is not set.

    The libraries may have read it long ago, so a value other than the one at the start of the process is "changed". Where the
    system does not record the value at the start (only Linux does), the present value is returned.
    """
    now = os.environ.get(OVERRIDE)
    if not sys.platform.startswith("linux"):
        return now
    try:
        entries = Path("/proc/self/environ").read_bytes().split(b"\0")
    except OSError:
        return now
    start = os.fsencode(OVERRIDE) + b"="
    before = next((os.fsdecode(entry[len(start) :]) for entry in entries if entry.startswith(start)), None)
    return now if now == before else _CHANGED


def check_placement(ort: Any, session: Any, nodes: Sequence[PlacedNode], name: str, device: str, model: bytes) -> str:
    """Return where the nodes of a session run ("cpu" or "cuda:0"), or refuse a session that fell back to another device.

    ``name`` is the runner's, and ``model`` holds the bytes that the session was opened from. RuntimeUnavailable if a node is on
    another device, except shape arithmetic on the CPU, or if the requested provider took none.
    """
    (first, providers), remedy = TARGETS[device], cuda_libraries.REMEDIES.get(device, "")
    if providers[0] not in session.get_providers():
        reason = cuda_libraries.reason(ort, device) or f"onnxruntime opened no {first} provider"
        raise RuntimeUnavailable(f"{name} can't run here: {reason}", remedy=remedy)
    # A graph of constants has no nodes left.
    used = dict.fromkeys(node.provider for node in nodes) or [session.get_providers()[0]]
    if strange := [provider for provider in used if provider not in (*providers, CPU)]:
        raise RuntimeUnavailable(f"{name} fell back: nodes run on {', '.join(strange)}", remedy=remedy)
    if providers[0] not in used:
        raise RuntimeUnavailable(
            f"{name} fell back: no node runs on {first}, all run on {', '.join(used)}",
            remedy=_NO_KERNEL,
        )
    if device != "cpu":
        level = session.get_session_options().graph_optimization_level
        before = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC  # nodes are assigned after the basic optimisation
        level = level if level == ort.GraphOptimizationLevel.ORT_DISABLE_ALL else before
        if (found := not_shape_arithmetic(ort, model, nodes, level)) is not None:
            raise RuntimeUnavailable(f"{name} fell back: {found}", remedy=_NO_KERNEL)
    return "cpu" if device == "cpu" else "cuda:0"


def placement_note(device: str, nodes: Sequence[PlacedNode]) -> dict[str, str]:
    """Return {"placement": "3 shape nodes on the CPU"} for a GPU session that keeps nodes there, else nothing."""
    number = 0 if device == "cpu" else counts(nodes).get(CPU, 0)
    return {"placement": f"{number} shape node{'s' if number > 1 else ''} on the CPU"} if number else {}


def in_effect(ort: Any, session: Any, device: str) -> dict[str, Any]:
    """Return the settings in effect, as the session reports them: plain JSON values.

    The keys are "optimisation", "threads", "deterministic", "options" (provider -> option -> value); on a GPU "environment".
    """
    options = session.get_session_options()
    level = options.graph_optimization_level
    reported = {
        provider: {key: str(value) for key, value in given.items() if key in _REPORTED_OPTIONS}
        for provider, given in session.get_provider_options().items()
    }
    found: dict[str, Any] = {
        "optimisation": next(
            (ours for ours, name in LEVELS.items() if getattr(ort.GraphOptimizationLevel, name) == level), str(level)
        ),
        "threads": options.intra_op_num_threads or "one per core",
        "deterministic": bool(options.use_deterministic_compute),
        "options": {provider: given for provider, given in reported.items() if given},
    }
    if device != "cpu":
        found["environment"] = {OVERRIDE: tf32_override() or "not set"}
    return found


def precision_of(device: str, effect: Mapping[str, Any]) -> str:
    """Return the precision of float32 kernels by ``in_effect``, which includes the environment: "float32" or "tf32"."""
    if device == "cpu" or effect["environment"][OVERRIDE] == "0":
        return "float32"
    if device == "tensorrt":
        return "tf32"
    options = effect["options"].get(CUDA, {})
    return "float32" if options.get("use_tf32") == "0" else "tf32"  # the provider's default is TF32
