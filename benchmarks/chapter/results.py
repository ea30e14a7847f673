"""The results of the chapter's experiments: trainings made in parallel, each kept in a file, and means over seeds."""

from __future__ import annotations

import json
import multiprocessing
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from benchmarks.chapter.plan import EXPERIMENTS, ChapterPlan, RunSpec, settings_of, specs_of
from benchmarks.chapter.run import EpochResult, RunResult, measure
from benchmarks.records import from_json
from bnexport.environment import available_cores
from bnexport.errors import DataError, RuntimeUnavailable, UsageError
from bnexport.files import write_atomically
from bnexport.optional import one_line

_OTHER = "Remove the file, or choose another --work"
_DAMAGED = (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError)


@dataclass(frozen=True)
class Mean:
    """A mean over n seeds with the sample standard deviation, which a single value lacks."""

    mean: float
    deviation: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean | None:
        """Return the mean; None without values."""
        if not values:
            return None
        return cls(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


@dataclass(frozen=True, eq=False)
class Setting:
    """The trainings of one specification, given with seed 0, with every seed in order."""

    spec: RunSpec
    runs: tuple[RunResult, ...]

    @property
    def learned(self) -> tuple[RunResult, ...]:
        """Runs that neither diverged nor stayed at chance: the others are counted, not averaged."""
        return self.having("learned")

    def having(self, outcome: str) -> tuple[RunResult, ...]:
        """Return the runs of one outcome."""
        return tuple(run for run in self.runs if run.outcome == outcome)

    def mean(self, of: str, *, epoch: int = 0) -> Mean | None:
        """Return the mean of a field of EpochResult over the runs that learned, after an epoch from 1; 0: after the last."""
        values = [getattr(run.history[epoch - 1], of) for run in self.learned]
        return Mean.of([value for value in values if value is not None])

    def summary(self) -> dict[str, Any]:
        """Return counts, and means of the last epoch, as plain JSON values."""
        counts = {name: len(self.having(name)) for name in ("learned", "chance", "diverged")}
        means = {field.name: self.mean(field.name) for field in fields(EpochResult)}
        spec = {key: value for key, value in asdict(self.spec).items() if key != "seed"}
        return {**spec, **counts, **{name: asdict(mean) for name, mean in means.items() if mean is not None}}


@dataclass(frozen=True)
class Results:
    """The data of the page: the plan, its complete experiments, and their trainings."""

    plan: ChapterPlan
    experiments: tuple[str, ...]
    runs: tuple[RunResult, ...]

    def settings(self, experiment: str) -> list[Setting]:
        """Return the settings of one complete experiment in the order of the plan."""
        by_spec = {run.spec: run for run in self.runs}
        return [
            Setting(spec, tuple(by_spec[replace(spec, seed=seed)] for seed in range(self.plan.seeds)))
            for spec in settings_of(experiment, self.plan)
        ]

    def conditions(self) -> list[Mapping[str, Any]]:
        """Return the different machines, versions and numbers of threads of the trainings."""
        return list({json.dumps(run.conditions, sort_keys=True): run.conditions for run in self.runs}.values())


def save_results(results: Results, path: Path) -> None:
    """Write results as JSON, one training a line, so that a changed training is one line of a diff.

    Gamma and beta are those of experiment e only.
    """
    conditions = results.conditions()
    shown = {setting.spec for setting in results.settings("e")} if "e" in results.experiments else set()
    lines = []
    for run in results.runs:
        value = asdict(run) | {"conditions": conditions.index(run.conditions)}
        value |= {} if replace(run.spec, seed=0) in shown else {"affine": {}}
        lines.append(json.dumps(value, allow_nan=False))
    experiments = {name: [each.summary() for each in results.settings(name)] for name in results.experiments}
    head = {"plan": asdict(results.plan), "conditions": conditions, "experiments": experiments}
    text, runs = json.dumps(head, allow_nan=False, indent=1).removesuffix("\n}"), ",\n".join(lines)
    write_atomically(path, f'{text},\n "runs": [\n{runs}\n ]\n}}\n'.encode())


def load_results(path: Path) -> Results:
    """Read the file of ``save_results``; DataError for another file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        runs = [run | {"conditions": value["conditions"][run["conditions"]]} for run in value["runs"]]
        plan, experiments = ChapterPlan(**value["plan"]), tuple(value["experiments"])
        return Results(plan, experiments, tuple(from_json(RunResult, run) for run in runs))
    except _DAMAGED as error:
        problem = f"{path} holds no results of the chapter's experiments: {one_line(error)}"
        raise DataError(problem, remedy="Make them with python -m benchmarks.chapter") from error


def run_chapter(
    work: Path, plan: ChapterPlan, experiments: Sequence[str], *, jobs: int = 2, on_line: Callable[[str], None]
) -> Results:
    """Make the trainings that the folder ``work`` lacks; return every complete experiment, also those of earlier calls.

    ``jobs`` trainings at a time have their own process and an equal share of the cores.

    Raises:
        UsageError: An experiment is unknown, or the data set is too small for the plan.
        DataError: A file of the folder has other content.
        RuntimeUnavailable: A process was killed.
    """
    if jobs < 1:
        raise UsageError(f"{jobs} trainings at a time can't be made", remedy="Give at least 1")
    todo = [spec for spec in specs_of(experiments, plan) if _kept(work, spec) is None]
    on_line(f"{len(todo)} trainings to make, {jobs} at a time")
    if todo:
        _make(todo, work, jobs, on_line)
    return gather(work, plan)


def gather(work: Path, plan: ChapterPlan) -> Results:
    """Return the complete experiments of a folder; DataError if a file has other content."""
    complete: dict[str, RunResult] = {}
    experiments = []
    for name in EXPERIMENTS:
        found = {spec.key: _kept(work, spec) for spec in specs_of([name], plan)}
        runs = {key: result for key, result in found.items() if result is not None}
        if len(runs) == len(found):
            experiments.append(name)
            complete |= runs
    return Results(plan, tuple(experiments), tuple(complete[key] for key in sorted(complete)))


def _make(todo: list[RunSpec], work: Path, jobs: int, on_line: Callable[[str], None]) -> None:
    context = multiprocessing.get_context("spawn")  # a fork of a process with torch's threads may hang
    threads = max(1, available_cores() // jobs)
    with ProcessPoolExecutor(min(jobs, len(todo)), context, _prepare_process, (threads,)) as pool:
        waiting = [pool.submit(measure, spec) for spec in todo]
        try:
            for number, done in enumerate(as_completed(waiting), 1):
                result = done.result()
                write_atomically(_path(work, result.spec), json.dumps(asdict(result), allow_nan=False).encode())
                on_line(f"{number}/{len(todo)} {result.spec.key}: {result.outcome}, {result.seconds:.1f} s")
        except BrokenProcessPool as error:
            problem = f"a training's process was ended from outside: {one_line(error)}"
            remedy = "Run the same command again, it resumes; with --jobs 1 it needs less memory"
            raise RuntimeUnavailable(problem, remedy=remedy) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _prepare_process(threads: int) -> None:
    import torch

    from bnexport.training.step import keep_freed_memory

    torch.set_num_threads(threads)
    keep_freed_memory()


def _path(work: Path, spec: RunSpec) -> Path:
    return work / f"{spec.key}.json"


def _kept(work: Path, spec: RunSpec) -> RunResult | None:
    """Return the finished training of a specification; None if it is missing."""
    path = _path(work, spec)
    if not path.exists():
        return None
    try:
        result: RunResult = from_json(RunResult, json.loads(path.read_text(encoding="utf-8")))
    except _DAMAGED as error:
        raise DataError(f"{path} holds no result of a training", remedy=_OTHER) from error
    if result.spec != spec:
        raise DataError(f"{path} is the result of another training", remedy=_OTHER)
    return result
