"""The results of the chapter's experiments: trainings made in parallel, each kept in a file, and means over seeds."""

from __future__ import annotations

import json
import multiprocessing
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.chapter.plan import EXPERIMENTS, FULL, ChapterPlan, RunSpec, settings_of, specs_of
from benchmarks.chapter.run import EpochResult, RunResult, measure
from bnexport.environment import available_cores
from bnexport.errors import DataError, RuntimeUnavailable, UsageError
from bnexport.files import write_atomically
from bnexport.optional import one_line

_OTHER = "Remove the file, or choose another --work"
#: Values of the last epoch that are averaged over seeds.
AVERAGED = ("train_loss", "train_accuracy", "test_loss", "test_accuracy", "exact_accuracy", "shift", "scale")


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

    def mean(self, of: Callable[[EpochResult], float | None], *, epoch: int = 0) -> Mean | None:
        """Return the mean over the runs that learned, after an epoch from 1; 0: after the last."""
        values = [of(run.history[epoch - 1]) for run in self.learned]
        return Mean.of([value for value in values if value is not None])

    def summary(self) -> dict[str, Any]:
        """Return counts and means as plain JSON values."""
        counts = {name: len(self.having(name)) for name in ("learned", "chance", "diverged")}
        means = {name: self.mean(lambda epoch, name=name: getattr(epoch, name)) for name in AVERAGED}  # type: ignore[misc]
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

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values, with gamma and beta of experiment e only."""
        shown = {
            run.spec for setting in (self.settings("e") if "e" in self.experiments else []) for run in setting.runs
        }
        conditions = self.conditions()
        runs = []
        for run in self.runs:
            value = run.to_json() | {"conditions": conditions.index(run.conditions)}
            runs.append(value if run.spec in shown else value | {"affine": {}})
        return {
            "plan": asdict(self.plan),
            "conditions": conditions,
            "experiments": {name: [s.summary() for s in self.settings(name)] for name in self.experiments},
            "runs": runs,
        }


def save_results(results: Results, path: Path) -> None:
    """Write results as JSON, one training a line, so that a changed training is one line of a diff."""
    value = results.to_json()
    runs = ",\n".join(json.dumps(run, allow_nan=False) for run in value.pop("runs"))
    head = json.dumps(value, allow_nan=False, indent=1).removesuffix("\n}")
    write_atomically(path, f'{head},\n "runs": [\n{runs}\n ]\n}}\n'.encode())


def load_results(path: Path) -> Results:
    """Read the file of ``save_results``; DataError for another file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        conditions = value["conditions"]
        runs = tuple(RunResult.from_json({**run, "conditions": conditions[run["conditions"]]}) for run in value["runs"])
        return Results(ChapterPlan(**value["plan"]), tuple(value["experiments"]), runs)
    except (OSError, ValueError, TypeError, KeyError, IndexError) as error:
        problem = f"{path} holds no results of the chapter's experiments: {one_line(error)}"
        raise DataError(problem, remedy="Make them with python -m benchmarks.chapter") from error


@dataclass(frozen=True)
class ChapterRun:
    """The settings of a run; ``jobs`` trainings at a time have their own process and an equal share of the cores."""

    work: Path  # the folder of finished trainings, one JSON file each, which are not made again
    plan: ChapterPlan = FULL
    experiments: tuple[str, ...] = tuple(EXPERIMENTS)
    jobs: int = 2

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise UsageError(f"{self.jobs} trainings at a time can't be made", remedy="Give at least 1")


def run_chapter(run: ChapterRun, *, tell: Callable[[str], None] = lambda _line: None) -> Results:
    """Make the missing trainings; returns every complete experiment, also those of earlier calls.

    Raises:
        UsageError: An experiment is unknown, or the data set is too small for the plan.
        DataError: A file of the folder has other content.
        RuntimeUnavailable: A process was killed.
    """
    todo = [spec for spec in specs_of(run.experiments, run.plan) if _kept(run.work, spec) is None]
    tell(f"{len(todo)} trainings to make, {run.jobs} at a time")
    if todo:
        _make(todo, run, tell)
    return gather(run.work, run.plan)


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


def _make(todo: list[RunSpec], run: ChapterRun, tell: Callable[[str], None]) -> None:
    context = multiprocessing.get_context("spawn")  # a fork of a process with torch's threads may hang
    threads = max(1, available_cores() // run.jobs)
    with ProcessPoolExecutor(min(run.jobs, len(todo)), context, _prepare_process, (threads,)) as pool:
        waiting = [pool.submit(measure, spec) for spec in todo]
        try:
            for number, done in enumerate(as_completed(waiting), 1):
                result = done.result()
                write_atomically(_path(run.work, result.spec), json.dumps(result.to_json(), allow_nan=False).encode())
                tell(f"{number}/{len(todo)} {result.spec.key}: {result.outcome}, {result.seconds:.1f} s")
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
    """The finished training of a specification; None if it is missing."""
    path = _path(work, spec)
    if not path.exists():
        return None
    try:
        result = RunResult.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, DataError) as error:
        raise DataError(f"{path} holds no result of a training", remedy=_OTHER) from error
    if result.spec != spec:
        raise DataError(f"{path} is the result of another training", remedy=_OTHER)
    return result
