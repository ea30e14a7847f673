"""The page docs/gpu.md, written from the results of the GPU lane."""

from __future__ import annotations

from pathlib import Path

from benchmarks.gpu import sweeps as tables
from benchmarks.gpu.measure import RuntimeRun
from benchmarks.gpu.refusals import Refused
from benchmarks.gpu.results import GpuSpeed, Lane, parts_of, runtime_of
from benchmarks.pages import render, write_page
from bnexport.environment import describe
from bnexport.errors import UsageError

#: Stands in the page as long as no GPU was measured. A later call may replace such a page without loss.
NOT_MEASURED = "No GPU has been measured yet."
_NOTHING = "-"


def refuse_replacing(path: Path, *, real: bool) -> None:
    """Raise UsageError if a page holds measurements of a GPU, which a rehearsal must not replace."""
    if not real and path.is_file() and NOT_MEASURED not in path.read_text(encoding="utf-8", errors="replace"):
        problem = f"{path} holds measurements of a GPU, which a rehearsal must not replace"
        raise UsageError(problem, remedy="Run the lane on a machine with a GPU, or give another --out")


def write_document(lane: Lane, path: Path) -> None:
    """Write the page, unless ``refuse_replacing`` refuses; a reader finds the old page or the new."""
    refuse_replacing(path, real=lane.measured)
    write_page([page(lane)], path)


def page(lane: Lane) -> str:
    """Return the page."""
    runs: dict[str, list[list[str]]] = {}
    for run in lane.runs:
        runs.setdefault(run.runtime, []).append(_run(run))
    failures = [(f"{run.runtime}, {run.settings or 'float32'}", run.reason) for run in lane.runs if not run.passed]
    known = [sweep.name for sweep in (tables.gpu_sweeps() if lane.real else tables.cpu_sweeps())]
    done = parts_of(lane) | set(lane.unreached)
    return render(
        "gpu/page.md.jinja", lane=lane, not_measured=NOT_MEASURED, runs=runs, failures=[*failures, *lane.broken.items()],
        machine=", ".join(f"{name} {value}" for name, value in lane.machine.items()),
        environment=describe(dict(lane.environment)), refusals=[_refusal(item) for item in lane.refused],
        sessions=[[name, settings or "float32", _number(value)] for (name, settings), value in lane.sessions.items()],
        not_requested=[name for name in known if name not in done and runtime_of(name) not in lane.absent],
        training=[_speed(row) for row in lane.training] if lane.measured else [],
    )  # fmt: skip


def _run(run: RuntimeRun) -> list[str]:
    predicted = f"{run.error / run.predicted:.1f}" if run.error is not None and run.predicted else _NOTHING
    names = {name: name.removesuffix("ExecutionProvider").replace("Tensorrt", "TensorRT") for name in run.nodes or {}}
    nodes = ", ".join(f"{n} {names[provider]}" for provider, n in (run.nodes or {}).items()) or _NOTHING
    return [
        run.settings or "float32", run.stage, _number(run.error), _number(run.bound), predicted, run.detected or _NOTHING,
        _number(run.repeat), _number(run.batches), str(run.changed), nodes, _verdict(run.passed),
    ]  # fmt: skip


def _refusal(item: Refused) -> list[str]:
    refusal = item.refusal
    hidden = ", ".join(refusal.hidden) or ", ".join(f"{name}={value}" for name, value in refusal.environment.items())
    code = _NOTHING if item.code is None else str(item.code)
    message = item.said.removeprefix("Error: ")
    return [f"{refusal.name} (`{hidden}`)", refusal.runtime, code, message, _verdict(item.passed)]


def _speed(row: GpuSpeed) -> list[str]:
    step = "recorded as a CUDA graph" if row.captured else "one kernel at a time"
    speeds = [f"{value:,.0f}" for value in (row.images_per_s.low, row.images_per_s.middle, row.images_per_s.high)]
    return [row.norm, str(row.batch_size), f"{row.images:,}", step, *speeds, f"{row.total_s:.2f}"]


def _verdict(passed: bool) -> str:
    return "PASS" if passed else "**FAIL**"


def _number(value: float | None) -> str:
    if value is None:
        return _NOTHING
    return "0" if value == 0 else f"{value:.1e}"
