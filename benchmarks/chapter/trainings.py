"""Make the trainings of the chapter's experiments, each kept in a file as it ends, so that an interrupted run goes on."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from benchmarks.chapter.plan import EXPERIMENTS, FULL, Plan, RunSpec, specs_of
from benchmarks.chapter.results import Results
from benchmarks.chapter.run import RunResult, measure
from bnexport.environment import available_cores
from bnexport.errors import DataError, RuntimeUnavailable, UsageError
from bnexport.files import write_atomically
from bnexport.optional import one_line


@dataclass(frozen=True)
class ChapterRun:
    """How to measure.

    Attributes:
        work: The folder of finished trainings, one JSON file each; what is there is not made again.
        plan: How large the experiments are.
        experiments: Keys of EXPERIMENTS.
        jobs: Trainings at a time, each in a process of its own with an equal share of the cores.
    """

    work: Path
    plan: Plan = FULL
    experiments: tuple[str, ...] = tuple(EXPERIMENTS)
    jobs: int = 2

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise UsageError(f"{self.jobs} trainings at a time can't be made", remedy="Give at least 1")


def run_chapter(run: ChapterRun, *, tell: Callable[[str], None] = lambda _line: None) -> Results:
    """Make the trainings that are not there yet.

    Args:
        run: Which, and where.
        tell: Gets a line for each finished training.

    Returns:
        Every experiment whose trainings are all there, also those of earlier calls.

    Raises:
        UsageError: There is no such experiment, or the data set is too small for the plan.
        DataError, NetworkError: As ``data.datasets.load_dataset``; or a file of the folder holds something else.
        OutputError: The folder can't be written.
        RuntimeUnavailable: A process was killed.
    """
    todo = [spec for spec in specs_of(run.experiments, run.plan) if _kept(run.work, spec) is None]
    tell(f"{len(todo)} trainings to make, {run.jobs} at a time")
    if todo:
        _make(todo, run, tell)
    return gather(run.work, run.plan)


def gather(work: Path, plan: Plan) -> Results:
    """The finished experiments of a folder.

    Raises:
        DataError: A file holds something else.
    """
    complete: dict[str, RunResult] = {}
    experiments = []
    for name in EXPERIMENTS:
        found = {spec.key: _kept(work, spec) for spec in specs_of([name], plan)}
        runs = {key: result for key, result in found.items() if result is not None}
        if len(runs) == len(found):
            experiments.append(name)
            complete |= runs
    return Results(plan, tuple(experiments), tuple(complete[key] for key in sorted(complete)))


def _make(todo: list[RunSpec], run: ChapterRun, tell: Callable[[str], None]) -> None:
    context = multiprocessing.get_context("spawn")  # a process that was forked from one with torch's threads may hang
    threads = max(1, available_cores() // run.jobs)
    with ProcessPoolExecutor(min(run.jobs, len(todo)), context, _prepare_process, (threads,)) as pool:
        waiting = [pool.submit(measure, spec) for spec in todo]
        try:
            for number, done in enumerate(as_completed(waiting), 1):
                result = done.result()
                write_atomically(_path(run.work, result.spec), json.dumps(result.to_json(), allow_nan=False).encode())
                tell(f"{number}/{len(todo)} {result.spec.key}: {result.outcome}, {result.seconds:.1f} s")
        except BrokenProcessPool as error:
            raise RuntimeUnavailable(
                f"a training's process was ended from outside: {one_line(error)}",
                remedy="Run the same command again, it goes on from here; with --jobs 1 it needs less memory",
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _prepare_process(threads: int) -> None:
    import torch

    from bnexport.training.cpu_kernels import keep_freed_memory

    torch.set_num_threads(threads)
    keep_freed_memory()


def _path(work: Path, spec: RunSpec) -> Path:
    return work / f"{spec.key}.json"


def _kept(work: Path, spec: RunSpec) -> RunResult | None:
    """The finished training of a specification; None when there is none."""
    path = _path(work, spec)
    if not path.exists():
        return None
    try:
        result = RunResult.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, DataError) as error:
        raise DataError(
            f"{path} holds no result of a training", remedy="Remove the file, or choose another --work"
        ) from error
    if result.spec != spec:
        raise DataError(f"{path} is the result of another training", remedy="Remove the file, or choose another --work")
    return result
