"""Run every GPU runtime in every setting, judge it, hide libraries from it, and write docs/gpu.md.

Use: scripts/gpu_lane [OPTIONS], or python -m benchmarks.gpu in a checkout. Without a GPU the same lane runs with an emulated
engine and the CPU's engines. The page and the JSON file are written after each part.
Exit codes: 0 everything requested was measured and passed; 1 something failed, or was not reached within --seconds; 2 bad
input; 3 BNEXPORT_REQUIRE (cuda, ort-cuda, tensorrt) names a missing device, or nothing requested can run here.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from benchmarks.command import finish, options, progress
from benchmarks.gpu import sweeps as tables
from benchmarks.gpu.lane import LaneInput, absent_runtimes, require, run_lane, table
from benchmarks.gpu.measure import MAX_SAMPLES, RuntimeRun
from benchmarks.gpu.refusals import REFUSALS, Refused
from benchmarks.gpu.results import GpuSpeed, Lane, merge, parts_of, read_results, runtime_of, write_results
from benchmarks.gpu.sweeps import Sweep
from benchmarks.pages import render, write_page
from bnexport.bundle import Bundle
from bnexport.environment import available_cores, describe
from bnexport.errors import RuntimeUnavailable, UsageError
from bnexport.runtimes.catalogue import runner_spec

ROOT = Path(__file__).parents[2]
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
        runs.setdefault(run.runtime, []).append(_cells(run))
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


def _cells(run: RuntimeRun) -> list[str]:
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


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the lane and end the process with its exit code."""
    parser = options("gpu", __doc__)
    parser.add_argument("--bundle", type=Path, default=ROOT / "models" / "bn_lenet" / "1")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "gpu.md", help="the page")
    parser.add_argument("--json", type=Path, help="the results as JSON; default: runs/gpu_lane.json")
    parser.add_argument("--data-dir", type=Path, help="folder of the data set; default: BNEXPORT_DATA, then the cache")
    parser.add_argument("--max-samples", type=int, default=MAX_SAMPLES, help="upper bound on the samples of each kind")
    parser.add_argument("--only", action="append", default=[], metavar="RUNTIME", help="this runtime; can be repeated")
    parser.add_argument("--sweep", action="append", default=[], metavar="NAME", help="this sweep; can be repeated")
    parser.add_argument("--no-sweeps", action="store_true")
    parser.add_argument("--no-training", action="store_true", help="leave out the training speed")
    parser.add_argument("--no-refusals", action="store_true", help="leave out the missing libraries")
    parser.add_argument("--seconds", type=float, help="no new part starts after that time")
    parser.add_argument(
        "--jobs", type=int, help="sweeps side by side; 0: in this process; default: by the cores, at most 4"
    )
    parser.add_argument("--rehearse", action="store_true", help="measure the CPU even where a GPU works")
    parser.add_argument("--add", action="store_true", help="add to the results that the JSON file already holds")
    parser.add_argument(
        "--merge", type=Path, nargs="+", metavar="FILE", help="measure nothing: merge JSON files into one page"
    )
    given = parser.parse_args(arguments)
    finish("gpu_lane", lambda: _run(given, given.json or ROOT / "runs" / "gpu_lane.json"))


def _run(given: argparse.Namespace, results: Path) -> int:
    """Measure or merge, print the verdict, and return the exit code; both files are written after each part."""

    def write(lane: Lane) -> None:
        write_results(lane, results)  # first, because the page can be made again from them
        if lane.sweeps or lane.refused or lane.training or lane.failed:
            write_document(lane, given.out)

    if given.merge:
        write(lane := merge([read_results(path) for path in given.merge]))
    else:
        before = [read_results(results)] if given.add and results.is_file() else []
        lane = _measured(given, lambda found: write(merge([*before, found])))
    if lane.absent and not parts_of(lane) | set(lane.unreached):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in lane.absent.items())
        raise RuntimeUnavailable(reasons, remedy="Run bnexport doctor, which lists the missing packages")
    counts = {"settings": lane.runs, "speeds of training": lane.training, "refusals": lane.refused,
              "parts not reached": lane.unreached, "failures": lane.failed}  # fmt: skip
    found = ", ".join(f"{len(values)} {name}" for name, values in counts.items() if values)
    print(f"{lane.verdict}: {found}; {given.out}, {results}")
    return 0 if lane.passed else 1


def _measured(given: argparse.Namespace, keep: Callable[[Lane], None]) -> Lane:
    require(os.environ.get("BNEXPORT_REQUIRE", ""))
    only = [runner_spec(name).name for name in given.only]
    job = LaneInput(Bundle.open(given.bundle), given.data_dir, given.max_samples, not given.rehearse)
    if job.real and not (only or given.sweep or given.no_sweeps):
        absent = absent_runtimes()
        job = replace(job, real=any(sweep.spec.name not in absent for sweep in table(job)))
    refuse_replacing(given.out, real=job.real)
    return run_lane(
        job, () if given.no_sweeps else _chosen(job, only, given.sweep),
        training=(job.real or given.rehearse) and not given.no_training, refusals=() if given.no_refusals else REFUSALS,
        seconds=given.seconds, jobs=min(4, max(1, available_cores() // 2)) if given.jobs is None else given.jobs,
        on_line=progress, keep=keep,
    )  # fmt: skip


def _chosen(job: LaneInput, only: Sequence[str], names: Sequence[str]) -> tuple[Sweep, ...]:
    known = {sweep.name: sweep for sweep in table(job)}
    if unknown := [name for name in names if name not in known]:
        raise UsageError(f"there is no sweep {unknown[0]!r}", remedy=f"Known: {'; '.join(known)}")
    if odd := [name for name in only if name not in {sweep.spec.name for sweep in known.values()}]:
        raise UsageError(f"the lane does not measure {odd[0]}", remedy="Choose a GPU runtime, or pass --rehearse")
    wanted = [sweep for sweep in known.values() if not only or sweep.spec.name in only]
    return tuple(sweep for sweep in wanted if not names or sweep.name in names)


if __name__ == "__main__":
    main()
