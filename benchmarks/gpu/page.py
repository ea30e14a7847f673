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
    """Refuse to replace measurements of a GPU by a rehearsal.

    Raises:
        UsageError: The page holds measurements of a GPU, and ``real`` is false.
    """
    if not real and path.is_file() and NOT_MEASURED not in path.read_text(encoding="utf-8", errors="replace"):
        raise UsageError(
            f"{path} holds measurements of a GPU, which a rehearsal must not replace",
            remedy="RuntimeRun the lane on a machine with a GPU, or give another --out",
        )


def write_document(lane: Lane, path: Path) -> None:
    """Write the page; a reader finds the old page or the new.

    Raises:
        UsageError: The page there holds measurements of a GPU, and this lane has none.
        OutputError: The file can't be written.
    """
    refuse_replacing(path, real=lane.measured)
    write_page([page(lane)], path)


def page(lane: Lane) -> str:
    """Return the page."""
    runs: dict[str, list[list[str]]] = {}
    for run in lane.runs:
        runs.setdefault(run.runtime, []).append(_run(run))
    failures = [(f"{run.runtime}, {run.settings or 'float32'}", run.reason) for run in lane.runs if not run.passed]
    return render(
        "gpu/page.md.jinja",
        lane=lane,
        machine=", ".join(f"{name} {value}" for name, value in lane.machine.items()),
        environment=describe(dict(lane.environment)),
        not_measured=NOT_MEASURED,
        runs=runs,
        failures=[*failures, *lane.broken.items()],
        sessions=[[name, settings or "float32", _number(value)] for (name, settings), value in lane.sessions.items()],
        refusals=[_refusal(item) for item in lane.refused],
        not_requested=_not_requested(lane),
        training=[_speed(row) for row in lane.training] if lane.measured else [],
    )


def _run(run: RuntimeRun) -> list[str]:
    return [
        run.settings or "float32",
        run.stage,
        _number(run.error),
        _number(run.bound),
        f"{run.error / run.predicted:.1f}" if run.error is not None and run.predicted else _NOTHING,
        run.detected or _NOTHING,
        _number(run.repeat),
        _number(run.batches),
        str(run.changed),
        ", ".join(f"{n} {_provider(provider)}" for provider, n in (run.nodes or {}).items()) or _NOTHING,
        _verdict(run.passed),
    ]


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


def _not_requested(lane: Lane) -> list[str]:
    """Return the sweeps without a result, so that the page does not look complete where it is not."""
    known = [sweep.name for sweep in (tables.gpu_sweeps() if lane.real else tables.cpu_sweeps())]
    done = parts_of(lane) | set(lane.unreached)
    return [name for name in known if name not in done and runtime_of(name) not in lane.absent]


def _verdict(passed: bool) -> str:
    return "PASS" if passed else "**FAIL**"


def _number(value: float | None) -> str:
    if value is None:
        return _NOTHING
    return "0" if value == 0 else f"{value:.1e}"


def _provider(name: str) -> str:
    return name.removesuffix("ExecutionProvider").replace("Tensorrt", "TensorRT")
