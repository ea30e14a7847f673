"""The table of runners: the CLI's choices, the docs' table and the parametrised tests read it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bnexport.bundle import MODEL_EXPORTED, MODEL_ONNX, MODEL_TORCHSCRIPT, WEIGHTS, Bundle
from bnexport.errors import RuntimeUnavailable, UsageError
from bnexport.optional import installed
from bnexport.runtimes.base import Runner, RunSettings

if TYPE_CHECKING:
    from torch import nn


#: The runtime that serves and predicts unless another one is named.
DEFAULT_RUNTIME = "onnxruntime-cpu"


@dataclass(frozen=True)
class RunnerSpec:
    """One row of RUNNERS."""

    engine: str  # "torch", "torchscript", "torch-export", "onnxruntime", "openvino", "reference"
    device: str  # "cpu", "cuda", or "tensorrt": onnxruntime's provider of that name on the same GPU
    file: str  # The file of the bundle that it reads
    #: (bundle, device, module, settings) -> an open runner
    opener: Callable[[Bundle, str, nn.Module | None, RunSettings], Runner]
    prober: Callable[[str], str | None]  # device -> why it can't run here, or None
    served: str = "float32"  # Precision of its kernels by default, as users serve with it: TF32 on most GPU engines
    precisions: tuple[str, ...] = ("float32",)  # Values of ``RunSettings.precision`` that it accepts
    default: bool = True  # ``verify`` runs it by default
    #: Precision -> why its kernels are those of float32 on this machine, or None
    same_as_float32: Callable[[str], str | None] = lambda _precision: None
    #: The package, and extra of bnexport, that it needs in addition to every installation's; "" when it needs none
    extra: str = ""

    @property
    def name(self) -> str:
        """Return the name on the command line: "onnxruntime-cpu"."""
        return f"{self.engine}-{self.device}"

    def open(self, bundle: Bundle, *, module: nn.Module | None = None, settings: RunSettings | None = None) -> Runner:
        """Open a runner of a bundle's file; use it in a ``with`` block.

        Args:
            bundle: Its file is opened without a check of its hash, which ``Bundle.check`` does.
            module: The original network, for torch eager on a bundle without its network's code.
            settings: Settings of the run; default: strict float32 as users serve it.

        Raises:
            BundleError: The file is missing, damaged, or does not fit the manifest.
            Unavailable: The engine, the device or a library is missing.
            UsageError: The settings have a precision that this engine lacks.
        """
        settings = settings or RunSettings()
        if settings.precision not in self.precisions:
            raise UsageError(
                f"{self.name} has no {settings.precision} kernels", remedy=f"Choose from {', '.join(self.precisions)}"
            )
        if settings.isolated and module is None:
            from bnexport.runtimes.isolation import IsolatedRunner

            return IsolatedRunner(self.name, bundle, settings)
        runner = self.opener(bundle, self.device, module, settings)
        if settings.isolated:
            runner.description["process"] = "this one: a live module can't be sent to another"
        return runner

    def available(self) -> str | None:
        """Return the reason in one line why it can't run here; None when it can. A GPU has to run a batch first."""
        return self.prober(self.device)

    def require(self) -> None:
        """Raise RuntimeUnavailable, with the reason in one line, when it can't run here: before long work."""
        if (reason := self.available()) is not None:
            start = f"{self.name} can't run here: "
            raise RuntimeUnavailable(start + reason.removeprefix(start), remedy="bnexport doctor lists what to install")


def _open_torch(bundle: Bundle, device: str, module: nn.Module | None, settings: RunSettings) -> Runner:
    from bnexport.runtimes.torch_runners import open_bundle

    return open_bundle(bundle, device=device, module=module, settings=settings)


def _open_torchscript(bundle: Bundle, device: str, _module: nn.Module | None, settings: RunSettings) -> Runner:
    from bnexport.runtimes.torch_runners import TorchScriptRunner

    file = bundle.file(MODEL_TORCHSCRIPT)
    return TorchScriptRunner(file, bundle.manifest.signature, device=device, settings=settings)


def _open_exported(bundle: Bundle, device: str, _module: nn.Module | None, settings: RunSettings) -> Runner:
    from bnexport.runtimes.torch_runners import ExportedProgramRunner

    file = bundle.file(MODEL_EXPORTED)
    return ExportedProgramRunner(file, bundle.manifest.signature, device=device, settings=settings)


def _open_reference(bundle: Bundle, _device: str, _module: nn.Module | None, _settings: RunSettings) -> Runner:
    from bnexport.runtimes.reference import ReferenceRunner

    return ReferenceRunner(bundle)


def _open_onnxruntime(bundle: Bundle, device: str, _module: nn.Module | None, settings: RunSettings) -> Runner:
    from bnexport.runtimes.onnxruntime import OnnxRuntimeRunner

    return OnnxRuntimeRunner(bundle.file(MODEL_ONNX), bundle.manifest.signature, device=device, settings=settings)


def _open_openvino(bundle: Bundle, _device: str, _module: nn.Module | None, settings: RunSettings) -> Runner:
    from bnexport.runtimes.openvino import OpenVinoRunner

    return OpenVinoRunner(bundle.file(MODEL_ONNX), bundle.manifest.signature, settings=settings)


def _torch_problem(device: str) -> str | None:
    from bnexport.runtimes.torch_outputs import problem

    return problem(device)


def _reference_problem(_device: str) -> str | None:
    return None if installed("onnx") else "onnx is not installed"


def _onnxruntime_problem(device: str) -> str | None:
    from bnexport.runtimes.onnxruntime import problem

    return problem(device)


def _openvino_problem(device: str) -> str | None:
    from bnexport.runtimes.openvino import problem

    return problem(device)


def _openvino_same(precision: str) -> str | None:
    from bnexport.runtimes.openvino import same_as_float32

    return same_as_float32(precision)


#: IEEE float32, and kernels that round the inputs of convolutions and products to TF32.
_GPU_PRECISIONS = ("float32", "tf32")

RUNNERS: tuple[RunnerSpec, ...] = (
    RunnerSpec("torch", "cpu", WEIGHTS, _open_torch, _torch_problem),
    RunnerSpec("torch", "cuda", WEIGHTS, _open_torch, _torch_problem, "tf32", _GPU_PRECISIONS),
    RunnerSpec("torchscript", "cpu", MODEL_TORCHSCRIPT, _open_torchscript, _torch_problem),
    RunnerSpec("torchscript", "cuda", MODEL_TORCHSCRIPT, _open_torchscript, _torch_problem, "tf32", _GPU_PRECISIONS),
    RunnerSpec("torch-export", "cpu", MODEL_EXPORTED, _open_exported, _torch_problem),
    RunnerSpec("torch-export", "cuda", MODEL_EXPORTED, _open_exported, _torch_problem, "tf32", _GPU_PRECISIONS),
    RunnerSpec("onnxruntime", "cpu", MODEL_ONNX, _open_onnxruntime, _onnxruntime_problem),
    RunnerSpec("onnxruntime", "cuda", MODEL_ONNX, _open_onnxruntime, _onnxruntime_problem, "tf32", _GPU_PRECISIONS),
    RunnerSpec("onnxruntime", "tensorrt", MODEL_ONNX, _open_onnxruntime, _onnxruntime_problem, "tf32", _GPU_PRECISIONS),
    RunnerSpec(
        "openvino", "cpu", MODEL_ONNX, _open_openvino, _openvino_problem, "bfloat16", ("float32", "bfloat16"),
        same_as_float32=_openvino_same, extra="openvino",
    ),
    # Off by default: the file proof already evaluates it.
    RunnerSpec("reference", "cpu", MODEL_ONNX, _open_reference, _reference_problem, default=False),
)  # fmt: skip


def runner_spec(name: str) -> RunnerSpec:
    """Return the row of a name, or raise a UsageError."""
    for spec in RUNNERS:
        if spec.name == name:
            return spec
    raise UsageError(
        f"the runtime {name!r} is unknown", remedy=f"Choose from {', '.join(spec.name for spec in RUNNERS)}"
    )
