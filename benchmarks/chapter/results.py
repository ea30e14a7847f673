"""The results of the chapter's experiments: what is saved beside the page, and means over seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.chapter.plan import Plan, RunSpec, settings_of
from benchmarks.chapter.run import EpochResult, RunResult
from bnexport.errors import DataError
from bnexport.files import write_atomically
from bnexport.optional import one_line

#: Values of the last epoch that are averaged over seeds.
AVERAGED = ("train_loss", "train_accuracy", "test_loss", "test_accuracy", "exact_accuracy", "shift", "scale")


@dataclass(frozen=True)
class Mean:
    """A mean over seeds.

    Attributes:
        mean: Of the values.
        deviation: Their sample standard deviation; None of a single value.
        n: How many.
    """

    mean: float
    deviation: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean | None:
        """None of no values."""
        if not values:
            return None
        return cls(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


@dataclass(frozen=True, eq=False)
class Setting:
    """The trainings of one specification with every seed.

    Attributes:
        spec: With seed 0.
        runs: One for each seed, in their order.
    """

    spec: RunSpec
    runs: tuple[RunResult, ...]

    @property
    def learned(self) -> tuple[RunResult, ...]:
        """Those that neither diverged nor stayed at chance: the others are counted, not averaged away."""
        return self.having("learned")

    def having(self, outcome: str) -> tuple[RunResult, ...]:
        """Those of one outcome."""
        return tuple(run for run in self.runs if run.outcome == outcome)

    def mean(self, of: Callable[[EpochResult], float | None], *, epoch: int = 0) -> Mean | None:
        """Over the runs that learned, after an epoch from 1; 0: after the last."""
        values = [of(run.history[epoch - 1]) for run in self.learned]
        return Mean.of([value for value in values if value is not None])

    def summary(self) -> dict[str, Any]:
        """Counts and means as plain JSON values."""
        counts = {name: len(self.having(name)) for name in ("learned", "chance", "diverged")}
        means = {name: self.mean(lambda epoch, name=name: getattr(epoch, name)) for name in AVERAGED}  # type: ignore[misc]
        spec = {key: value for key, value in self.spec.to_json().items() if key != "seed"}
        return {**spec, **counts, **{name: asdict(mean) for name, mean in means.items() if mean is not None}}


@dataclass(frozen=True)
class Results:
    """Everything that the page is made of.

    Attributes:
        plan: How large the experiments were.
        experiments: Those that are complete.
        runs: Their trainings.
    """

    plan: Plan
    experiments: tuple[str, ...]
    runs: tuple[RunResult, ...]

    def settings(self, experiment: str) -> list[Setting]:
        """One experiment, which must be complete, setting by setting in the order of the plan."""
        by_spec = {run.spec: run for run in self.runs}
        return [
            Setting(spec, tuple(by_spec[replace(spec, seed=seed)] for seed in range(self.plan.seeds)))
            for spec in settings_of(experiment, self.plan)
        ]

    def conditions(self) -> list[Mapping[str, Any]]:
        """The different machines, versions and numbers of threads that the trainings were made with."""
        return list({json.dumps(run.conditions, sort_keys=True): run.conditions for run in self.runs}.values())

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; gamma and beta of experiment e's trainings only."""
        shown = {run.spec for setting in self._settings(("e",)) for run in setting.runs}
        conditions = self.conditions()
        runs = []
        for run in self.runs:
            value = run.to_json() | {"conditions": conditions.index(run.conditions)}
            runs.append(value if run.spec in shown else value | {"affine": {}})
        return {
            "plan": self.plan.to_json(),
            "conditions": conditions,
            "experiments": {name: [s.summary() for s in self.settings(name)] for name in self.experiments},
            "runs": runs,
        }

    def _settings(self, experiments: Iterable[str]) -> Iterable[Setting]:
        return (setting for name in experiments if name in self.experiments for setting in self.settings(name))


def save_results(results: Results, path: Path) -> None:
    """Write results as JSON, one training a line, so that a changed one shows in a diff.

    Raises:
        OutputError: The file can't be written.
    """
    value = results.to_json()
    runs = ",\n".join(json.dumps(run, allow_nan=False) for run in value.pop("runs"))
    head = json.dumps(value, allow_nan=False, indent=1).removesuffix("\n}")
    write_atomically(path, f'{head},\n "runs": [\n{runs}\n ]\n}}\n'.encode())


def load_results(path: Path) -> Results:
    """Read what ``save_results`` wrote.

    Raises:
        DataError: It can't be read, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        conditions = value["conditions"]
        runs = tuple(RunResult.from_json({**run, "conditions": conditions[run["conditions"]]}) for run in value["runs"])
        return Results(Plan(**value["plan"]), tuple(value["experiments"]), runs)
    except (OSError, ValueError, TypeError, KeyError, IndexError) as error:
        raise DataError(
            f"{path} holds no results of the chapter's experiments: {one_line(error)}",
            remedy="Make them with python scripts/chapter.py",
        ) from error
