"""The tables of sweeps: every runtime in every setting, for a GPU, and for a CPU that stands in for one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bnexport.bundle import MODEL_ONNX, Bundle
from bnexport.optional import installed
from bnexport.runtimes.base import CONV_SEARCHES, OPTIMISATIONS, Runner, RunSettings
from bnexport.runtimes.catalogue import RunnerSpec, runner_spec
from bnexport.runtimes.reference_runner import EmulatedRunner
from bnexport.verification.scope import Scope

if TYPE_CHECKING:
    from torch import nn

_BOTH = ("float32", "tf32")


@dataclass(frozen=True)
class Sweep:
    """One verification of one runtime in several settings, in a separate process."""

    spec: RunnerSpec  # The runtime
    scope: Scope  # The settings
    label: str = ""  # Distinguishes the sweeps of one runtime

    @property
    def name(self) -> str:
        """Return the name on the command line: "onnxruntime-cuda, tf32, optimisation none"."""
        return ", ".join(filter(None, (self.spec.name, self.label)))


def gpu_sweeps() -> tuple[Sweep, ...]:
    """Return the sweeps of a GPU in the order of their value: first what ``bnexport verify`` runs, then combinations."""
    cuda = runner_spec("onnxruntime-cuda")
    return (
        Sweep(cuda, Scope(_BOTH, drift=True)),
        Sweep(runner_spec("torch-cuda"), Scope(_BOTH)),
        Sweep(runner_spec("torchscript-cuda"), Scope(_BOTH)),
        Sweep(runner_spec("torch-export-cuda"), Scope(_BOTH)),
        # Small sweeps: a session of minutes keeps each that it finishes.
        *(
            Sweep(
                cuda,
                Scope((kind,), (level,), (False, True), CONV_SEARCHES, drift=False),
                f"{kind}, optimisation {level}",
            )
            for level in OPTIMISATIONS
            for kind in _BOTH
        ),
        # Each session builds an engine, which takes long, and cuDNN's heuristics are not TensorRT's.
        Sweep(runner_spec("onnxruntime-tensorrt"), Scope(_BOTH, ("all", "none"), (False, True), drift=False)),
    )


def cpu_sweeps() -> tuple[Sweep, ...]:
    """Return the sweeps that rehearse the lane without a GPU."""
    cpu = runner_spec("onnxruntime-cpu")
    return (
        Sweep(cpu, Scope(("float32",), drift=True)),
        Sweep(runner_spec("torch-cpu"), Scope(("float32",))),
        Sweep(runner_spec("torchscript-cpu"), Scope(("float32",))),
        Sweep(runner_spec("torch-export-cpu"), Scope(("float32",))),
        Sweep(emulated_spec(), Scope(("float32", "tf32", "bfloat16"), drift=False)),
        *(
            Sweep(cpu, Scope(("float32",), (level,), (False, True), drift=False), f"optimisation {level}")
            for level in OPTIMISATIONS
        ),
        Sweep(runner_spec("openvino-cpu"), Scope(drift=True)),
    )


def emulated_spec() -> RunnerSpec:
    """Return an engine in numpy that rounds as each precision does: it stands in for a GPU and measures none."""

    def opener(bundle: Bundle, _device: str, _module: nn.Module | None, settings: RunSettings) -> Runner:
        runner = EmulatedRunner(bundle, settings.precision)
        runner.name = "emulated-cpu"
        return runner

    kinds = ("float32", "tf32", "bfloat16")
    missing = None if installed("onnx") else "onnx is not installed"
    return RunnerSpec("emulated", "cpu", MODEL_ONNX, opener, lambda _device: missing, "tf32", kinds)
