"""Results of the GPU lane: the value, its JSON file, and the merger of several calls."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.clock import Spread
from benchmarks.gpu.measure import RuntimeRun, SweepResult
from benchmarks.gpu.refusals import Refused
from benchmarks.records import from_json
from bnexport.errors import DataError, UsageError
from bnexport.files import write_atomically

FORMAT = "bnexport-gpu-lane/1"
TRAINING = "training"
_T = TypeVar("_T")


@dataclass(frozen=True)
class GpuSpeed:
    """Training speed of one combination."""

    norm: str  # Kind of BatchNorm
    captured: bool  # the step was recorded as a CUDA graph
    batch_size: int  # Images per step
    images: int  # Images per epoch
    images_per_s: Spread  # Speed of each measured epoch, its evaluation included
    total_s: float  # Duration of all measured epochs


@dataclass(frozen=True)
class Lane:
    """The results of one or several calls of the lane."""

    real: bool  # the measured device is a GPU
    bundle: str = ""  # SHA-256 of the bundle's manifest; "" if no part needed a bundle
    sweeps: Mapping[str, SweepResult] = field(default_factory=dict)  # Name of a sweep -> its result
    refused: tuple[Refused, ...] = ()  # The results of hiding libraries
    training: tuple[GpuSpeed, ...] = ()  # Training speed on the GPU, row by row
    unreached: tuple[str, ...] = ()  # Names of the parts that were requested and not measured, because the time was up
    absent: Mapping[str, str] = field(default_factory=dict)  # Runtime -> why it can't run on this machine
    failed: Mapping[str, str] = field(default_factory=dict)  # Part -> why it ended without a result
    machine: Mapping[str, str] = field(default_factory=dict)  # GPU, driver and CUDA; empty without a GPU
    environment: Mapping[str, Any] = field(default_factory=dict)  # Hardware and versions

    @property
    def measured(self) -> bool:
        """Return True if a GPU was measured."""
        return self.real and bool(self.machine)

    @property
    def runs(self) -> tuple[RuntimeRun, ...]:
        """Return each setting of each runtime once, in order; where a setting ran twice, the failed run if there is one."""
        found: dict[tuple[str, str], RuntimeRun] = {}
        for run in (run for result in self.sweeps.values() for run in result.runs):
            key = (run.runtime, run.settings)
            if key not in found or found[key].passed:
                found[key] = run
        return tuple(found.values())

    @property
    def sessions(self) -> dict[tuple[str, str], float]:
        """Return (runtime, settings) -> the largest difference of scale between two sessions."""
        found: dict[tuple[str, str], float] = {}
        for result in self.sweeps.values():
            for settings, value in result.sessions.items():
                key = (result.runtime, settings)
                found[key] = max(value, found.get(key, 0.0))
        return found

    @property
    def drift(self) -> dict[str, str | None]:
        """Return runtime and settings -> the first layer that leaves its prediction."""
        return {key: layer for result in self.sweeps.values() for key, layer in result.drift.items()}

    @property
    def broken(self) -> dict[str, str]:
        """Return runtime, file or part -> why it could not be measured although the machine has it."""
        return {key: why for result in self.sweeps.values() for key, why in result.broken.items()} | dict(self.failed)

    @property
    def reference(self) -> str:
        """Return the reference and the inputs of the comparison."""
        return next((result.reference for result in self.sweeps.values() if result.reference), "nothing")

    @property
    def verdict(self) -> str:
        """Return "FAIL", "INCOMPLETE" (nothing failed, and a requested part was not reached), or "PASS"."""
        results = [*(result.passed for result in self.sweeps.values()), *(item.passed for item in self.refused)]
        if self.broken or not all(results) or not (results or self.training or self.unreached):
            return "FAIL"
        return "INCOMPLETE" if self.unreached else "PASS"

    @property
    def passed(self) -> bool:
        """Return True if every requested part was measured and passed."""
        return self.verdict == "PASS"


def parts_of(lane: Lane) -> set[str]:
    """Return the names of the parts that have a result."""
    done = {*lane.sweeps, *lane.failed, *(item.refusal.part for item in lane.refused)}
    return done | ({TRAINING} if lane.training else set())


def runtime_of(part: str) -> str:
    """Return the runtime of a sweep's name; of "training" the same."""
    return part.partition(",")[0]


def merge(lanes: Sequence[Lane]) -> Lane:
    """Merge the results of several calls into one.

    The order of the calls does not change the verdict: of two results of one part, a failed one stays.
    UsageError: the calls measured different bundles, machines or versions.
    """
    first = lanes[0]
    machine = _common("machine", [dict(lane.machine) for lane in lanes])
    environment = _common("versions", [dict(lane.environment) | {"gpu": None} for lane in lanes if lane.environment])
    bundle = _common("bundle", [lane.bundle for lane in lanes])
    if any(lane.real is not first.real for lane in lanes):
        raise UsageError("results of a GPU and of a rehearsal can't be merged", remedy="Merge results of one kind")
    sweeps = _union((lane.sweeps for lane in lanes), lambda result: result.passed)
    refused = _union(({item.refusal.part: item for item in lane.refused} for lane in lanes), lambda item: item.passed)
    training = {(row.norm, row.batch_size, row.captured): row for lane in lanes for row in lane.training}
    failed = {part: why for lane in lanes for part, why in lane.failed.items()}
    found = Lane(
        first.real, bundle or "", sweeps, tuple(refused.values()), tuple(training.values()), (),
        {name: why for lane in lanes for name, why in lane.absent.items()}, failed, machine or {}, environment or {},
    )  # fmt: skip
    here, done = {run.runtime for run in found.runs}, parts_of(found)
    absent = {name: why for name, why in found.absent.items() if name not in here}
    requested = dict.fromkeys(part for lane in lanes for part in lane.unreached)
    unreached = (part for part in requested if part not in done and runtime_of(part) not in absent)
    return replace(found, unreached=tuple(unreached), absent=absent)


def _common(what: str, values: Iterable[_T]) -> _T | None:
    """Return the value that all calls share, leaving out those that have none."""
    given = [value for value in values if value]
    if any(value != given[0] for value in given):
        raise UsageError(f"the results are of different {what}: {given}", remedy="Merge the calls of one machine only")
    return given[0] if given else None


def _union(groups: Iterable[Mapping[str, _T]], passed: Callable[[_T], bool]) -> dict[str, _T]:
    found: dict[str, _T] = {}
    for group in groups:
        for name, value in group.items():
            if name not in found or passed(found[name]):
                found[name] = value
    return found


def write_results(lane: Lane, path: Path) -> None:
    """Write the results as JSON; a reader finds the old content or the new.

    A number that is not finite becomes null, and its run has failed with the reason.
    """
    plain = json.loads(json.dumps({"format": FORMAT, **asdict(lane)}), parse_constant=lambda _name: None)
    write_atomically(path, (json.dumps(plain, indent=1) + "\n").encode())


def read_results(path: Path) -> Lane:
    """Read a file that ``write_results`` wrote; DataError: it can't be read, or is not such a file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("format") != FORMAT:
            raise ValueError("another format")
        lane: Lane = from_json(Lane, content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"{path} does not hold results of the GPU lane ({error})"
        raise DataError(problem, remedy="Name a file that --json wrote") from error
    return lane
