"""Try every runtime on this machine: each computes a small model, compared with numpy."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bnexport.bundle import Bundle
from bnexport.environment import environment, runtime_only
from bnexport.errors import BnexportError
from bnexport.optional import installed
from bnexport.runtimes.base import RunSettings, plain_reason
from bnexport.runtimes.catalogue import RUNNERS, RunnerSpec, runner_spec
from bnexport.runtimes.cuda_libraries import Conflict, conflicts
from bnexport.runtimes.small_model import expected, small_bundle, torch_module
from bnexport.runtimes.torch_outputs import REMEDY as TORCH_REMEDY

#: max |engine - numpy| / max |numpy|. Strict float32 stays near 1e-7 here, TF32 near 1e-3.
BOUND = 1e-5
#: Engines that bnexport-runtime brings, the distribution for serving machines.
_SERVING = ("onnxruntime",)


@dataclass(frozen=True)
class Health:
    """Result of one runtime."""

    runtime: str  # Its name in RUNNERS
    works: bool  # It ran on the requested device with right numbers
    device: str = ""  # Device of the run, read back from the engine; "" without a run
    error: float | None = None  # max |engine - numpy| / max |numpy|; None without a run
    reason: str = ""  # The fault in one line; "" when it works
    remedy: str = ""  # Instruction for the user
    details: dict[str, Any] = field(default_factory=dict)  # Engine, version, providers


@dataclass(frozen=True)
class Diagnosis:
    """The health of every runtime, and the machine."""

    runtimes: tuple[Health, ...]  # One row per row of RUNNERS
    environment: dict[str, Any]  # Hardware and versions
    conflicts: tuple[Conflict, ...] = ()  # Installed CUDA packages that do not fit together

    def broken(self, names: Sequence[str] = ()) -> tuple[Health, ...]:
        """Return the named runtimes that fail; without names, the failing CPU runtimes that this distribution brings."""
        wanted = [runner_spec(name).name for name in names] or [s.name for s in RUNNERS if _is_expected(s)]
        return tuple(health for health in self.runtimes if health.runtime in wanted and not health.works)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "runtimes": [asdict(health) for health in self.runtimes],
            "environment": self.environment,
            "conflicts": [asdict(conflict) for conflict in self.conflicts],
        }


def _is_expected(spec: RunnerSpec) -> bool:
    if spec.extra:
        return installed(spec.extra)
    return spec.device == "cpu" and (spec.engine in _SERVING or not runtime_only())


def diagnose() -> Diagnosis:
    """Open a real session on each runtime, run the small model, and compare the CUDA packages; takes seconds."""
    with tempfile.TemporaryDirectory() as folder:
        bundle = small_bundle(Path(folder))
        results = tuple(_examine(spec, bundle) for spec in RUNNERS)
    return Diagnosis(results, environment(), conflicts())


def _examine(spec: RunnerSpec, bundle: Bundle) -> Health:
    written = spec.file in bundle.manifest.files  # torch's formats are missing without torch
    if (spec.engine == "torch" or not written) and (missing := spec.available()) is not None:
        remedy = TORCH_REMEDY if installed("torch") else "Install it: pip install torch"
        return Health(spec.name, works=False, reason=missing, remedy=remedy)
    images = np.random.default_rng(1).standard_normal((4, 1, 8, 8)).astype(np.float32)
    # TensorRT is strict only in a process that was started for it; a missing TensorRT needs no process.
    settings = RunSettings(isolated=spec.device == "tensorrt" and spec.available() is None)
    try:
        module = torch_module() if spec.engine == "torch" else None
        with spec.open(bundle, module=module, settings=settings) as runner:
            answer = runner.run({"input": images})["logits"]
            device, details = runner.effective_device, runner.description
    except BnexportError as error:
        return Health(spec.name, works=False, reason=plain_reason(spec.name, error), remedy=error.remedy)
    truth = expected(images)
    difference = float(np.abs(answer - truth).max() / np.abs(truth).max())
    works = difference <= BOUND  # false for NaN
    wrong = f"its outputs are wrong: the error is {difference:.1e} of scale, but at most {BOUND:.0e} is allowed"
    reason = "" if works else wrong
    remedy = "" if works else "Check the driver's version, and the environment for settings of the precision"
    return Health(spec.name, works, device, difference if np.isfinite(difference) else None, reason, remedy, details)
