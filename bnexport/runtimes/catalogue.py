"""The table of runners: the CLI's choices, the docs' table and the parametrised tests read it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bnexport.bundle import MODEL_EXPORTED, MODEL_ONNX, MODEL_TORCHSCRIPT, WEIGHTS, Bundle
from bnexport.errors import RuntimeUnavailable, UsageError
from bnexport.optional import installed
from bnexport.runtimes import onnxruntime, openvino, torch_outputs, torch_runners
from bnexport.runtimes.base import Runner, RunSettings

if TYPE_CHECKING:
    from torch import nn


#: (bundle, device, module, settings) -> an open runner.
Opener = Callable[[Bundle, str, "nn.Module | None", RunSettings], Runner]
#: The runtime that serves and predicts unless another one is named.
DEFAULT_RUNTIME = "onnxruntime-cpu"


@dataclass(frozen=True)
class RunnerSpec:
    """One row of RUNNERS."""

    engine: str  # "torch", "torchscript", "torch-export", "onnxruntime", "openvino", "reference"
    device: str  # "cpu", "cuda", or "tensorrt": onnxruntime's provider of that name on the same GPU
    file: str  # The file of the bundle that it reads
    opener: Opener
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

        The file's hash is not checked here; ``Bundle.check`` does. ``module`` is the original network, for torch eager on a
        bundle without its network's code; ``settings`` defaults to strict float32.

        Raises:
            BundleError: The file is missing, damaged or unfit.
            Unavailable: The engine, the device or a library is missing.
            UsageError: The engine lacks the precision.
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


def _file_opener(kind: Callable[..., Runner], name: str) -> Opener:
    """Return the function that opens a runner of one file of a bundle."""

    def opener(bundle: Bundle, device: str, _module: nn.Module | None, settings: RunSettings) -> Runner:
        return kind(bundle.file(name), bundle.manifest.signature, device=device, settings=settings)

    return opener


def _open_openvino(bundle: Bundle, _device: str, _module: nn.Module | None, settings: RunSettings) -> Runner:
    return openvino.OpenVinoRunner(bundle.file(MODEL_ONNX), bundle.manifest.signature, settings=settings)


def _open_reference(bundle: Bundle, _device: str, _module: nn.Module | None, _settings: RunSettings) -> Runner:
    from bnexport.runtimes.reference_runner import ReferenceRunner

    return ReferenceRunner(bundle)


def _reference_problem(_device: str) -> str | None:
    return None if installed("onnx") else "onnx is not installed"


#: IEEE float32, and kernels that round the inputs of convolutions and products to TF32.
_GPU_PRECISIONS = ("float32", "tf32")
_SCRIPT = _file_opener(torch_runners.TorchScriptRunner, MODEL_TORCHSCRIPT)
_PROGRAM = _file_opener(torch_runners.ExportedProgramRunner, MODEL_EXPORTED)
_ONNX = _file_opener(onnxruntime.OnnxRuntimeRunner, MODEL_ONNX)

RUNNERS: tuple[RunnerSpec, ...] = (
    RunnerSpec("torch", "cpu", WEIGHTS, torch_runners.open_bundle, torch_outputs.problem),
    RunnerSpec("torch", "cuda", WEIGHTS, torch_runners.open_bundle, torch_outputs.problem, "tf32", _GPU_PRECISIONS),
    RunnerSpec("torchscript", "cpu", MODEL_TORCHSCRIPT, _SCRIPT, torch_outputs.problem),
    RunnerSpec("torchscript", "cuda", MODEL_TORCHSCRIPT, _SCRIPT, torch_outputs.problem, "tf32", _GPU_PRECISIONS),
    RunnerSpec("torch-export", "cpu", MODEL_EXPORTED, _PROGRAM, torch_outputs.problem),
    RunnerSpec("torch-export", "cuda", MODEL_EXPORTED, _PROGRAM, torch_outputs.problem, "tf32", _GPU_PRECISIONS),
    RunnerSpec("onnxruntime", "cpu", MODEL_ONNX, _ONNX, onnxruntime.problem),
    RunnerSpec("onnxruntime", "cuda", MODEL_ONNX, _ONNX, onnxruntime.problem, "tf32", _GPU_PRECISIONS),
    RunnerSpec("onnxruntime", "tensorrt", MODEL_ONNX, _ONNX, onnxruntime.problem, "tf32", _GPU_PRECISIONS),
    RunnerSpec(
        "openvino", "cpu", MODEL_ONNX, _open_openvino, openvino.problem, "bfloat16", ("float32", "bfloat16"),
        same_as_float32=openvino.same_as_float32, extra="openvino",
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
