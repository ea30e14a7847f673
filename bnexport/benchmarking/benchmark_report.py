"""The result of a benchmark as a value: rows, verdicts, the machine, and one recommendation per goal."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bnexport.benchmarking.benchmark_request import Subject, Variant
from bnexport.benchmarking.spread import Quantile, p99, quantile, ratio
from bnexport.bundle import Manifest
from bnexport.errors import BundleError
from bnexport.runtimes.replay import GOLDEN_BOUND, golden_bound
from bnexport.tuned import Choice, Goal
from bnexport.verification.verdict import VerificationReport, labels_right

#: Name and version of the JSON report: a new key needs no new version, a changed meaning does.
FORMAT = "bnexport-benchmark"
FORMAT_VERSION = 1
#: Largest share of the machine's CPU time that other processes may use during a measurement that names winners.
BUSY_LIMIT = 0.15
#: Largest load average per core before a measurement, where the system does not report the CPU time of all processes.
_LOAD_LIMIT = 0.5
#: Largest difference of the medians of two rows that are chosen by their cores.
SIMILAR = 0.05
#: Verdict without a verification: the file of ``--against``, or a runtime that could not be verified.
UNKNOWN = "-"


@dataclass(frozen=True)
class RuntimeVerdict:
    """The verdict of ``verify`` on one file in one runtime."""

    word: str  # "PASS", "FAIL", or UNKNOWN
    source: str = ""  # "at export" or "now"; for UNKNOWN the reason
    reason: str = ""  # The first cause of a FAIL
    bound: float = GOLDEN_BOUND  # The largest error of scale of an answer to the golden inputs
    accuracy: float | None = None  # Share of right labels on real images, if they were compared


def verdict_on(report: VerificationReport, runtime: str, manifest: Manifest, source: str) -> RuntimeVerdict:
    """Return a report's verdict on one runtime in strict float32, which is what a benchmark runs."""
    others = {name.partition(", ")[0] for name in report.runtimes} - {runtime}
    rows = [row for row in report.rows if row.subject not in others]
    own = [row for row in rows if row.subject == runtime and not row.settings]
    failures = [row for row in rows if not row.passed and not row.settings]
    bounds = [row.bound for row in own if row.stage == "golden" and row.bound is not None]
    try:
        bound = max(bounds) if bounds else golden_bound(manifest, runtime)
    except BundleError:  # a file in half precision that was not verified on this engine
        bound = GOLDEN_BOUND
    right = [(labels_right(row), row.n) for row in own if row.stage == "accuracy-change"]
    accuracy = next((found[1] / n for found, n in right if found is not None and n), None)
    if failures:
        return RuntimeVerdict("FAIL", source, f"{failures[0].stage}: {failures[0].reason}", bound, accuracy)
    if report.missing_stages or not own:
        missing = ", ".join(report.missing_stages) or runtime
        return RuntimeVerdict(UNKNOWN, f"nothing was checked in {missing}", "", bound, accuracy)
    return RuntimeVerdict("PASS", source, "", bound, accuracy)


@dataclass(frozen=True)
class Round:
    """One variant in one round."""

    times: tuple[float, ...]  # Seconds of each call
    elapsed: float  # Seconds from the first call to the last
    cpu: float  # Seconds of CPU time of the variant's process, in all threads
    error: float = 0.0  # Largest error of scale of an answer to the golden inputs


@dataclass(frozen=True)
class Loaded:
    """The process of a variant after its first batch."""

    imported: float  # Seconds of the engine's import
    load: float  # Seconds until the first session was open
    first: float  # Seconds of the first call with this batch size
    memory: int  # Largest resident memory of the process, in bytes; 0 if the system does not report it


@dataclass(frozen=True, eq=False)
class Result:
    """One row of the table."""

    variant: Variant
    loaded: Loaded
    rounds: tuple[Round, ...]
    verdict: RuntimeVerdict
    #: Time per image over that of the first row of this batch size, in the same rounds; of the first row 1
    ratio: Quantile

    @property
    def times(self) -> list[float]:
        """Return the seconds of every call."""
        return [time for part in self.rounds for time in part.times]

    @property
    def p50(self) -> Quantile:
        """Return the median time of a call, in seconds."""
        return quantile(self.times, 0.5)

    @property
    def p99(self) -> Quantile | None:
        """Return the 99th percentile of the time of a call, in seconds; None for less than 300 calls."""
        return p99(self.times)

    @property
    def images_per_second(self) -> float:
        """Return the median of the rounds."""
        return -statistics.median(per_round(self, "throughput"))

    @property
    def cpu_per_image(self) -> float:
        """Return the seconds of CPU time per image, the median of the rounds."""
        return statistics.median(per_round(self, "cpu"))

    @property
    def error(self) -> float:
        """Return the largest error of scale of an answer to the golden inputs."""
        return max(part.error for part in self.rounds)

    @property
    def wrong(self) -> bool:
        """Return True if an answer to the golden inputs was wrong, so that the variant is disqualified."""
        return not self.error <= self.verdict.bound  # NaN is wrong

    @property
    def word(self) -> str:
        """Return "PASS", "FAIL", "WRONG" or UNKNOWN."""
        return "WRONG" if self.wrong else self.verdict.word

    @property
    def choice(self) -> Choice:
        """Return the settings with their measurements, as tuned.json keeps them."""
        settings = self.variant
        return Choice(
            settings.runtime,
            settings.batch,
            settings.threads,
            settings.sessions,
            self.p50.value * 1e3,
            self.images_per_second,
            self.cpu_per_image * 1e6,
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        variant, tail = self.variant, self.p99
        return {
            "bundle": variant.subject.label,
            "precision": variant.subject.precision,
            "runtime": variant.runtime,
            "batch": variant.batch,
            "threads": variant.threads,
            "sessions": variant.sessions,
            "calls": len(self.times),
            "p50_ms": _in_ms(self.p50),
            "p99_ms": None if tail is None else _in_ms(tail),
            "images_per_second": self.images_per_second,
            "cpu_us_per_image": self.cpu_per_image * 1e6,
            "ratio": asdict(self.ratio),
            "no_difference": self.ratio.holds_one,
            "import_ms": self.loaded.imported * 1e3,
            "load_ms": self.loaded.load * 1e3,
            "first_call_ms": self.loaded.first * 1e3,
            "peak_memory_bytes": self.loaded.memory or None,
            "file_bytes": variant.subject.size(variant.runtime),
            "verdict": self.word,
            "verified": self.verdict.source,
            "reason": self.verdict.reason,
            "golden_error": self.error,
            "golden_bound": self.verdict.bound,
            "accuracy": self.verdict.accuracy,
            "rounds": [
                {"p50_ms": quantile(part.times, 0.5).value * 1e3, "elapsed_s": part.elapsed, "cpu_s": part.cpu}
                for part in self.rounds
            ],
        }


def _in_ms(found: Quantile) -> dict[str, float]:
    return {"value": found.value * 1e3, "low": found.low * 1e3, "high": found.high * 1e3, "n": found.n}


#: Goal -> (its words, a round's figure that is smallest at the best: seconds, or images per second with a minus).
GOALS: dict[Goal, tuple[str, Callable[[Round, Variant], float]]] = {
    "latency": ("lowest latency", lambda part, _: statistics.median(part.times)),
    "throughput": ("highest throughput", lambda part, variant: -len(part.times) * variant.batch / part.elapsed),
    "cpu": ("least CPU", lambda part, variant: part.cpu / (len(part.times) * variant.batch)),
}


def per_round(result: Result, goal: Goal) -> list[float]:
    """Return the figure of a goal in each round."""
    return [GOALS[goal][1](part, result.variant) for part in result.rounds]


def results_of(measured: Sequence[tuple[Variant, Loaded, Sequence[Round], RuntimeVerdict]]) -> tuple[Result, ...]:
    """Return the rows, each compared with the first row of its batch size. Variants without a round are left out."""
    base: dict[int, list[float]] = {}
    found = []
    for variant, loaded, rounds, verdict in measured:
        if rounds:
            # The median call, which a short disturbance does not change
            per_image = [statistics.median(part.times) / (variant.batch * variant.sessions) for part in rounds]
            compared = ratio(per_image, base.setdefault(variant.batch, per_image))
            found.append(Result(variant, loaded, tuple(rounds), verdict, compared))
    return tuple(found)


@dataclass(frozen=True)
class Recommendation:
    """The best variant for one goal."""

    goal: Goal
    best: Result
    ties: tuple[Result, ...]  # Variants whose ratio to the best has an interval that holds 1

    @property
    def sentence(self) -> str:
        """Return "lowest latency: A onnxruntime-cpu, batch 1, 1 thread, 1 session (0.026 ms)"."""
        figure = {
            "latency": f"p50 {self.best.p50.value * 1e3:.3g} ms",
            "throughput": f"{self.best.images_per_second:,.0f} images/s",
            "cpu": f"{self.best.cpu_per_image * 1e6:.3g} us CPU per image",
        }[self.goal]
        tied = self.ties[0].variant.name if len(self.ties) == 1 else f"{len(self.ties)} other rows"
        others = f"; no difference to {tied}" if self.ties else ""
        return f"{GOALS[self.goal][0]}: {self.best.variant.name} ({figure}{others})"


def recommendations(results: Sequence[Result]) -> tuple[Recommendation, ...]:
    """Return the best row for each goal among those whose verdict is PASS and whose answers were right.

    Of rows without a measured difference, whose medians are within SIMILAR, the one on the fewest cores is the best: threads of
    an engine that wait for work are fast on an idle machine only.
    """
    allowed = [result for result in results if result.word == "PASS"]
    found = []
    for goal in GOALS if allowed else ():
        figures = {id(result): per_round(result, goal) for result in allowed}
        first = min(allowed, key=lambda result: statistics.median(figures[id(result)]))
        base = figures[id(first)]
        others = [result for result in allowed if result is not first]
        same = [first, *(result for result in others if ratio(figures[id(result)], base).holds_one)]
        near = [result for result in same if abs(ratio(figures[id(result)], base).value - 1) <= SIMILAR]
        best = min(near, key=lambda result: (result.variant.cores, statistics.median(figures[id(result)])))
        found.append(Recommendation(goal, best, tuple(result for result in same if result is not best)))
    return tuple(found)


@dataclass(frozen=True)
class BenchmarkReport:
    """Everything that a benchmark measured."""

    subjects: tuple[Subject, ...]
    results: tuple[Result, ...]  # In the order of the table; empty only if nothing could be measured
    left: Mapping[str, str]  # Runtime or variant -> why it was not measured
    environment: Mapping[str, Any]
    machine: Mapping[str, Any]  # ``environment.cpu_state``, "load_after", "others"
    inputs: Mapping[str, str]  # Label of a bundle -> its inputs: "1024 test images of fashion-mnist"
    seconds: float  # Seconds of measurement per variant
    rounds: int  # Requested rounds
    interrupted: bool = False
    busy_limit: float = BUSY_LIMIT

    @property
    def busy(self) -> str:
        """Return why the machine was too busy to name winners, as a sentence without its full stop; "" if it was not."""
        others, load, cores = self.machine["others"], self.machine["load"], self.environment["cores"]
        if others is not None:
            if others <= self.busy_limit:
                return ""
            return (
                f"other processes used {others:.0%} of this machine's CPU time during the measurement, "
                f"more than {self.busy_limit:.0%}"
            )
        if load is not None and load > _LOAD_LIMIT * cores:
            return f"the load average was {load:.1f} on {cores} cores, more than {_LOAD_LIMIT} per core"
        return ""

    @property
    def no_winner(self) -> str:
        """Return why no winner is named; "" if winners are named."""
        if self.interrupted:
            return "the measurement was interrupted"
        return self.busy or ("" if self.right else "no measured variant has the verdict PASS and right answers")

    @property
    def right(self) -> bool:
        """Return True if a row has the verdict PASS and right answers."""
        return any(result.word == "PASS" for result in self.results)

    @property
    def recommended(self) -> tuple[Recommendation, ...]:
        """Return one recommendation per goal over all bundles; none if ``no_winner``."""
        return () if self.no_winner else recommendations(self.results)

    def recommended_for(self, subject: Subject) -> tuple[Recommendation, ...]:
        """Return one recommendation per goal among one bundle's rows; none if ``no_winner``."""
        own = [result for result in self.results if result.variant.subject is subject]
        return () if self.no_winner else recommendations(own)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        numbers = {id(result): number for number, result in enumerate(self.results)}
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "bundles": [
                {"label": subject.label, "path": subject.name, "inputs": self.inputs.get(subject.label, "")}
                for subject in self.subjects
            ],
            "seconds": self.seconds,
            "rounds": self.rounds,
            "interrupted": self.interrupted,
            "busy": self.busy,
            "no_winner": self.no_winner,
            "recommendations": [
                {"goal": item.goal, "row": numbers[id(item.best)], "ties": [numbers[id(tie)] for tie in item.ties]}
                for item in self.recommended
            ],
            "results": [result.to_json() for result in self.results],
            "not_measured": dict(self.left),
            "machine": dict(self.machine),
            "environment": dict(self.environment),
        }
