"""One sweep of the GPU lane: a verification, and each session opened a second time."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from benchmarks.gpu.sweeps import Sweep
from bnexport.bundle import Bundle
from bnexport.errors import BnexportError
from bnexport.optional import installed
from bnexport.runtimes.base import RunSettings
from bnexport.runtimes.catalogue import RunnerSpec
from bnexport.verification.verdict import Row, VerificationReport, run_name
from bnexport.verification.verify import verify

#: Samples of each kind. 48 settings of one runtime must take minutes.
MAX_SAMPLES = 2000
#: Samples that are run in two sessions.
_REPEATED = 64


@dataclass(frozen=True)
class RuntimeRun:
    """The results of one runtime in one setting."""

    runtime: str  # "onnxruntime-cuda"
    settings: str  # ``RunSettings.describe``; "" for strict float32 as users serve it
    stage: str  # "strict" or "shipping"
    passed: bool  # every check passed
    reason: str = ""  # The reason of the first check that failed
    n: int = 0  # Number of samples compared
    error: float | None = None  # Largest error of scale of the stage; None if no finite values were compared
    bound: float | None = None  # The bound of that error
    predicted: float | None = None  # Predicted noise; None without a prediction
    detected: str = ""  # The precision that the error indicates
    repeat: float | None = None  # Largest difference of scale between two runs in one session
    batches: float | None = None  # Largest difference of scale between batch sizes
    # Provider, or precision where the engine reports precisions -> number of nodes; None without either
    nodes: Mapping[str, int] | None = None
    changed: int = 0  # Number of labels that changed


@dataclass(frozen=True)
class SweepResult:
    """The results of one sweep."""

    runtime: str  # The runtime
    runs: tuple[RuntimeRun, ...] = ()  # One value for each setting
    # Settings -> largest difference of scale between two sessions
    sessions: Mapping[str, float] = field(default_factory=dict)
    # Runtime and settings -> the first layer that leaves its prediction; None if every layer keeps it
    drift: Mapping[str, str | None] = field(default_factory=dict)
    broken: Mapping[str, str] = field(default_factory=dict)  # Runtime or file -> why it could not be measured
    reference: str = ""  # The reference and the inputs of the comparison

    @property
    def passed(self) -> bool:
        """Return True if there is a run and every run passed."""
        return bool(self.runs) and not self.broken and all(run.passed for run in self.runs)


def measure(sweep: Sweep, bundle: Bundle, *, data_dir: Path | None, max_samples: int) -> SweepResult:
    """Run one sweep in this process; a fault of the runtime is a part of the result, not an exception."""
    scope = replace(sweep.scope, max_samples=sweep.scope.max_samples or max_samples)
    found = SweepResult(sweep.spec.name)
    try:
        found = _result(sweep.spec.name, verify(bundle, runtimes=[sweep.spec], data_dir=data_dir, scope=scope))
        for settings in scope.settings_of(sweep.spec):
            # The optimiser and the binding change no algorithm, and verification compares each with float64 already.
            if settings.optimisation == "all" and not settings.binding:
                difference = between_sessions(sweep.spec, bundle, settings)
                found = replace(found, sessions={**found.sessions, settings.describe(): difference})
    except BnexportError as error:
        return replace(found, broken={**found.broken, sweep.spec.name: error.message})
    return found


def _result(runtime: str, report: VerificationReport) -> SweepResult:
    runs = runs_of(report)
    named = {run.runtime for run in runs}
    drift = {
        key: next((layer.layer for layer in layers if layer.left), None)
        for key, layers in report.findings.drift.items()
    }
    # A failed check of another subject than a runtime is about the bundle.
    broken = {row.subject: f"{row.stage}: {row.reason}" for row in report.failures if row.subject not in named}
    return SweepResult(runtime, runs, {}, drift, broken, f"{report.reference}; {report.inputs}")


def runs_of(report: VerificationReport) -> tuple[RuntimeRun, ...]:
    """Return one value for each setting of each runtime of a report, in order."""
    groups: dict[tuple[str, str], list[Row]] = {}
    names = {key.partition(",")[0] for key in report.runtimes}
    for row in report.rows:
        if row.subject in names:
            groups.setdefault((row.subject, row.settings), []).append(row)
    return tuple(_run_of(name, settings, rows, report) for (name, settings), rows in groups.items())


def _run_of(name: str, settings: str, rows: Sequence[Row], report: VerificationReport) -> RuntimeRun:
    compared = [row for row in rows if row.stage in ("strict", "shipping")]
    measured = [row for row in compared if row.error is not None]
    worst = max(measured, key=lambda row: (row.error or 0.0) / (row.bound or 1.0), default=None)
    failed = next((row for row in rows if not row.passed), None)
    described = report.runtimes.get(run_name(name, settings), {})
    flips = [row.flips for row in compared if row.flips is not None]
    reason = "" if failed is None else f"{failed.stage}, {failed.case}: {failed.reason}"
    errors = (None, None, None) if worst is None else (worst.error, worst.bound, worst.predicted)
    detected = next((row.detected for row in rows if row.stage == "precision"), "")
    return RuntimeRun(
        name, settings, (compared or rows)[0].stage, failed is None, reason, sum(row.n for row in measured), *errors, detected,
        _largest(rows, "repeat"), _largest(rows, "batch-size"), described.get("nodes") or described.get("layers"),
        sum(item.explained + item.unexplained for item in flips),
    )  # fmt: skip


def _largest(rows: Iterable[Row], stage: str) -> float | None:
    return max((row.error for row in rows if row.stage == stage and row.error is not None), default=None)


def between_sessions(spec: RunnerSpec, bundle: Bundle, settings: RunSettings) -> float:
    """Return the largest difference of the golden inputs' outputs between two sessions, as a share of max |output|."""
    feeds, _ = bundle.golden()
    varies = all(isinstance(item.shape[0], str) for item in bundle.manifest.signature.inputs)
    if varies:
        times = -(-_REPEATED // max(1, min(len(array) for array in feeds.values())))
        feeds = {name: np.tile(array, (times, *[1] * (array.ndim - 1))) for name, array in feeds.items()}
    answers = []
    for _ in range(2):
        with spec.open(bundle, settings=settings) as runner:
            answers.append(runner.run(feeds))
    first, second = answers
    return max(
        float(np.abs(second[name].astype(np.float64) - first[name]).max() / (np.abs(first[name]).max() or 1.0))
        for name in first
    )


def gpu_machine() -> dict[str, str]:
    """Return name, driver and libraries of the GPU, as far as the system and torch report them."""
    found: dict[str, str] = {}
    query = ["nvidia-smi", "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader"]
    # In a container without nvidia-smi, torch may still report the name.
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)
        parts = [part.strip() for part in done.stdout.split("\n")[0].split(",")]
        found |= dict(zip(("GPU", "driver", "compute capability"), parts, strict=False)) if len(parts) == 3 else {}
    if installed("torch"):
        import torch

        if torch.cuda.is_available():
            found.setdefault("GPU", torch.cuda.get_device_name(0))
            found |= {"CUDA": str(torch.version.cuda), "cuDNN": str(torch.backends.cudnn.version())}  # type: ignore[no-untyped-call]
    return found
