"""The GPU lane: every GPU runtime in every way in which people call it, judged by the stages of verification.

One verification for each row of a table of sweeps, with what a verification does not do beside it: the same session opened
twice, and libraries hidden from a child process, which has to refuse by name. Where no GPU is, the same code runs an
emulated engine and the CPU's own, so that it is known to work when a GPU comes.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.gpu.refusals import REFUSALS, Refusal, Refused, refuse
from benchmarks.gpu.training import GpuSpeed, gpu_speeds
from bnexport.bundle import MODEL_ONNX, Bundle
from bnexport.environment import environment
from bnexport.errors import BnexportError, RuntimeUnavailable
from bnexport.optional import installed
from bnexport.runtimes.base import Runner, plain_reason
from bnexport.runtimes.catalogue import RUNNERS, RunnerSpec, runner_spec
from bnexport.runtimes.emulation import open_emulated
from bnexport.runtimes.settings import CONV_SEARCHES, OPTIMISATIONS, RunSettings
from bnexport.verification.scope import Scope
from bnexport.verification.verdict import Row, VerificationReport, run_name
from bnexport.verification.verify import verify

if TYPE_CHECKING:
    from torch import nn

#: Samples of each kind: 48 settings of one runtime must fit into minutes.
MAX_SAMPLES = 2000
#: Samples that are run in two sessions.
_REPEATED = 64
_BOTH = ("float32", "tf32")
#: A capability of the tests -> the runtime that shows it.
REQUIRED = {"cuda": "torch-cuda", "ort-cuda": "onnxruntime-cuda", "tensorrt": "onnxruntime-tensorrt"}


@dataclass(frozen=True)
class Sweep:
    """One verification of one runtime in many settings.

    Attributes:
        spec: The runtime.
        scope: Its settings.
    """

    spec: RunnerSpec
    scope: Scope


@dataclass(frozen=True)
class Run:
    """What one runtime in one setting did.

    Attributes:
        runtime: "onnxruntime-cuda".
        settings: ``RunSettings.describe``; "" for strict float32 as users serve it.
        stage: "strict" or "shipping".
        passed: Whether every row of it passed.
        reason: Of the first row that failed.
        n: Samples compared.
        error: Largest error of scale of the stage; None when nothing could be compared.
        bound: Its bound.
        predicted: Its predicted noise; None without.
        detected: The precision that the error tells of.
        repeat: Largest difference of scale between two runs in one session.
        batches: The same between batch sizes.
        nodes: Provider, or precision where the engine tells that, -> how many nodes; None when it tells neither.
        changed: Labels that changed.
    """

    runtime: str
    settings: str
    stage: str
    passed: bool
    reason: str = ""
    n: int = 0
    error: float | None = None
    bound: float | None = None
    predicted: float | None = None
    detected: str = ""
    repeat: float | None = None
    batches: float | None = None
    nodes: Mapping[str, int] | None = None
    changed: int = 0


@dataclass(frozen=True)
class Lane:
    """Everything that the lane found.

    Attributes:
        real: Whether a GPU was measured.
        runs: One per runtime and setting.
        sessions: (runtime, settings) -> largest difference of scale between two sessions.
        drift: (runtime, settings) -> the layer that first leaves its prediction; None where none does.
        refused: What hidden libraries came to.
        absent: GPU runtime -> why it is not here.
        broken: Runtime -> why it could not be measured although it is here.
        machine: GPU, driver, CUDA; empty without a GPU.
        environment: Hardware and versions.
        reference: What the candidates were compared with, and on which inputs.
        training: How fast the GPU trains; empty without one.
    """

    real: bool
    runs: tuple[Run, ...]
    sessions: Mapping[tuple[str, str], float]
    drift: Mapping[str, str | None]
    refused: tuple[Refused, ...]
    absent: Mapping[str, str]
    broken: Mapping[str, str]
    machine: Mapping[str, str]
    environment: Mapping[str, Any]
    reference: str
    training: tuple[GpuSpeed, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every run and every refusal is as it should be, and there was at least one run."""
        every = [*(run.passed for run in self.runs), *(item.passed for item in self.refused)]
        return bool(self.runs) and not self.broken and all(every)


def emulated_spec() -> RunnerSpec:
    """An engine that rounds as it is told to, in numpy: it stands in for a GPU, and measures nothing of one."""
    return RunnerSpec(
        "emulated",
        "cpu",
        MODEL_ONNX,
        _open_emulated,
        lambda _device: None if installed("onnx") else "onnx is not installed",
        "tf32",
        ("float32", "tf32", "bfloat16"),
    )


def _open_emulated(bundle: Bundle, device: str, module: nn.Module | None, settings: RunSettings) -> Runner:
    runner = open_emulated(bundle, device, module, settings)
    runner.name = "emulated-cpu"
    return runner


def gpu_sweeps() -> tuple[Sweep, ...]:
    """What is run on a GPU: first as ``bnexport verify`` does, then every combination."""
    return (
        Sweep(runner_spec("torch-cuda"), Scope(_BOTH)),
        Sweep(runner_spec("torchscript-cuda"), Scope(_BOTH)),
        Sweep(runner_spec("torch-export-cuda"), Scope(_BOTH)),
        Sweep(runner_spec("onnxruntime-cuda"), Scope(_BOTH, drift=True)),
        Sweep(runner_spec("onnxruntime-cuda"), Scope(_BOTH, OPTIMISATIONS, (False, True), CONV_SEARCHES, drift=False)),
        # Each session builds an engine, which takes long, and cuDNN's search is not TensorRT's.
        Sweep(runner_spec("onnxruntime-tensorrt"), Scope(_BOTH, ("all", "none"), (False, True), drift=False)),
    )


def cpu_sweeps() -> tuple[Sweep, ...]:
    """The same lane where there is no GPU."""
    return (
        Sweep(emulated_spec(), Scope(("float32", "tf32", "bfloat16"), drift=False)),
        Sweep(runner_spec("onnxruntime-cpu"), Scope(("float32",), drift=True)),
        Sweep(runner_spec("onnxruntime-cpu"), Scope(("float32",), OPTIMISATIONS, (False, True), drift=False)),
        Sweep(runner_spec("openvino-cpu"), Scope(drift=True)),
    )


def run_lane(
    bundle: Bundle,
    *,
    sweeps: Sequence[Sweep] | None = None,
    refusals: Iterable[Refusal] = REFUSALS,
    only: Sequence[str] = (),
    data_dir: Path | None = None,
    max_samples: int = MAX_SAMPLES,
    tell: Callable[[str], None] = lambda _line: None,
) -> Lane:
    """Run every sweep whose runtime is here.

    Args:
        bundle: What is verified.
        sweeps: None: those of the GPU, or of the CPU where no GPU runtime works.
        refusals: Libraries to hide; only Linux's loader can be made to miss them.
        only: Names of runtimes; none: all.
        data_dir: Where the data set lies.
        max_samples: At most so many of each kind.
        tell: Called with one line before each part.

    Raises:
        UsageError: ``only`` names no runtime.
    """
    only = [runner_spec(name).name for name in only]
    absent = {spec.name: plain_reason_of(spec) for spec in RUNNERS if spec.device != "cpu"}
    absent = {name: reason for name, reason in absent.items() if reason}
    chosen = _here(gpu_sweeps() if sweeps is None else sweeps, only)
    if sweeps is None and not chosen:
        chosen = _here(cpu_sweeps(), ())
    state = _State(bundle, data_dir, max_samples, tell)
    for sweep in chosen:
        state.sweep(sweep)
    refused = []
    for refusal in refusals if sys.platform.startswith("linux") else ():
        tell(f"refusal: {refusal.name}")
        refused.append(refuse(refusal, bundle.path))
    real = any(sweep.spec.device != "cpu" for sweep in chosen)
    return Lane(
        real, state.every_run(), state.sessions, state.drift, tuple(refused), absent, state.broken,
        gpu_machine() if real else {}, environment(), state.reference, _training(tell),
    )  # fmt: skip


def _training(tell: Callable[[str], None]) -> tuple[GpuSpeed, ...]:
    import torch

    if not torch.cuda.is_available():
        return ()
    tell("training")
    return gpu_speeds(torch.device("cuda"))


def require(names: str) -> None:
    """Refuse a machine that lacks what must be measured.

    Args:
        names: Capabilities with commas between, as in BNEXPORT_REQUIRE; others than those of REQUIRED are the tests' own.

    Raises:
        RuntimeUnavailable: One is not here.
    """
    for name in (part.strip() for part in names.split(",")):
        if name in REQUIRED:
            runner_spec(REQUIRED[name]).require()


def plain_reason_of(spec: RunnerSpec) -> str:
    """Why a runtime is not here, without its name; "" when it is."""
    reason = spec.available()
    return "" if reason is None else plain_reason(spec.name, RuntimeUnavailable(reason, remedy=""))


def _here(sweeps: Sequence[Sweep], only: Sequence[str]) -> list[Sweep]:
    wanted = [sweep for sweep in sweeps if not only or sweep.spec.name in only]
    return [sweep for sweep in wanted if sweep.spec.available() is None]


class _State:
    """A lane while it goes on."""

    def __init__(self, bundle: Bundle, data_dir: Path | None, max_samples: int, tell: Callable[[str], None]) -> None:
        self._bundle, self._data_dir, self._max_samples, self._tell = bundle, data_dir, max_samples, tell
        self._runs: dict[tuple[str, str], Run] = {}
        self.sessions: dict[tuple[str, str], float] = {}
        self.drift: dict[str, str | None] = {}
        self.broken: dict[str, str] = {}
        self.reference = ""

    def every_run(self) -> tuple[Run, ...]:
        """In order, each setting once."""
        return tuple(self._runs.values())

    def sweep(self, sweep: Sweep) -> None:
        """One verification, and each of its sessions twice."""
        scope = replace(sweep.scope, max_samples=sweep.scope.max_samples or self._max_samples)
        every = scope.settings_of(sweep.spec)
        self._tell(f"{sweep.spec.name}: {len(every)} settings")
        try:
            report = verify(self._bundle, runtimes=[sweep.spec], data_dir=self._data_dir, scope=scope)
            self._take(report)
            for settings in every:
                # What the optimiser and the binding do is compared with float64 already; a search goes by the stopwatch.
                key = (sweep.spec.name, settings.describe())
                if settings.optimisation == "all" and not settings.binding and key not in self.sessions:
                    self.sessions[key] = between_sessions(sweep.spec, self._bundle, settings)
        except BnexportError as error:
            self.broken[sweep.spec.name] = error.message

    def _take(self, report: VerificationReport) -> None:
        runs = runs_of(report)
        self._runs |= {(run.runtime, run.settings): run for run in runs}
        for key, layers in report.findings.drift.items():
            self.drift[key] = next((layer.layer for layer in layers if layer.left), None)
        # A report that fails before any runtime does is about the bundle.
        for row in report.failures:
            if row.subject not in {run.runtime for run in runs}:
                self.broken[row.subject] = f"{row.stage}: {row.reason}"
        self.reference = f"{report.reference}; {report.inputs}"


def runs_of(report: VerificationReport) -> tuple[Run, ...]:
    """The runtimes of a report, one value for each setting, in order."""
    groups: dict[tuple[str, str], list[Row]] = {}
    names = {key.partition(",")[0] for key in report.runtimes}
    for row in report.rows:
        if row.subject in names:
            groups.setdefault((row.subject, row.settings), []).append(row)
    return tuple(_run_of(name, settings, rows, report) for (name, settings), rows in groups.items())


def _run_of(name: str, settings: str, rows: Sequence[Row], report: VerificationReport) -> Run:
    compared = [row for row in rows if row.stage in ("strict", "shipping")]
    measured = [row for row in compared if row.error is not None]
    worst = max(measured, key=lambda row: (row.error or 0.0) / (row.bound or 1.0), default=None)
    failed = next((row for row in rows if not row.passed), None)
    told = report.runtimes.get(run_name(name, settings), {})
    flips = [row.flips for row in compared if row.flips is not None]
    return Run(
        name,
        settings,
        compared[0].stage if compared else rows[0].stage,
        failed is None,
        "" if failed is None else f"{failed.stage}, {failed.case}: {failed.reason}",
        sum(row.n for row in measured),
        None if worst is None else worst.error,
        None if worst is None else worst.bound,
        None if worst is None else worst.predicted,
        next((row.detected for row in rows if row.stage == "precision"), ""),
        _largest(rows, "repeat"),
        _largest(rows, "batch-size"),
        told.get("nodes") or told.get("layers"),
        sum(item.explained + item.unexplained for item in flips),
    )


def _largest(rows: Iterable[Row], stage: str) -> float | None:
    return max((row.error for row in rows if row.stage == stage and row.error is not None), default=None)


def between_sessions(spec: RunnerSpec, bundle: Bundle, settings: RunSettings) -> float:
    """Largest difference of the same inputs between two sessions, as a share of the largest |output| of the first.

    Args:
        spec: The runtime.
        bundle: Its golden inputs are repeated until there are enough.
        settings: How to run.

    Raises:
        BnexportError: The runtime can't be opened or run.
    """
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
    """Name, driver and libraries of the GPU, as far as the system and torch tell them."""
    found: dict[str, str] = {}
    query = ["nvidia-smi", "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)
        parts = [part.strip() for part in done.stdout.split("\n")[0].split(",")]
        found |= dict(zip(("GPU", "driver", "compute capability"), parts, strict=False)) if len(parts) == 3 else {}
    except (OSError, subprocess.SubprocessError):
        pass  # a container without it; torch may tell the name
    if installed("torch"):
        import torch

        if torch.cuda.is_available():
            found.setdefault("GPU", torch.cuda.get_device_name(0))
            found |= {"CUDA": str(torch.version.cuda), "cuDNN": str(torch.backends.cudnn.version())}  # type: ignore[no-untyped-call]
    return found
