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
from benchmarks.gpu.lane import LaneInput, absent_runtimes, require, run_lane, table
from benchmarks.gpu.measure import MAX_SAMPLES
from benchmarks.gpu.page import refuse_replacing, write_document
from benchmarks.gpu.refusals import REFUSALS
from benchmarks.gpu.results import Lane, merge, parts_of, read_results, write_results
from benchmarks.gpu.sweeps import Sweep
from bnexport.bundle import Bundle
from bnexport.environment import available_cores
from bnexport.errors import RuntimeUnavailable, UsageError
from bnexport.runtimes.catalogue import runner_spec

ROOT = Path(__file__).parents[2]


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
