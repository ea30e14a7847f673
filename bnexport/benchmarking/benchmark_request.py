"""A benchmark's request, and its variants: file x runtime x batch x threads x sessions, or why they can't be measured."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bnexport.benchmarking.spread import LEAST_ROUNDS, ROUNDS
from bnexport.bundle import Bundle, Manifest
from bnexport.environment import available_cores
from bnexport.errors import BundleError, UsageError
from bnexport.runtimes.catalogue import RUNNERS, RunnerSpec, runner_spec
from bnexport.tuned import LARGEST_BATCH

#: The word for every core that this process may use.
ALL = "all"
#: Runtime of ``--against``: onnxruntime's own session, without bnexport.
BARE = "bare session"
BATCHES, QUICK_BATCHES = (1, 8, 32, 256), (1, 32)
SECONDS, QUICK_SECONDS = 2.0, 0.5
#: Engines of --quick. Each process of torch's imports torch, which takes seconds.
_QUICK_ENGINES = ("onnxruntime", "openvino")


@dataclass(frozen=True)
class BenchmarkRequest:
    """The files, runtimes and sizes to measure. An empty or None field has its default, which depends on ``quick``.

    A value that can't be measured, or two names for one bundle, raises UsageError.
    """

    bundles: tuple[Path, ...]
    against: Path | None = None  # An ONNX file to run in onnxruntime's own session, as the first rows
    runtimes: tuple[str, ...] = ()  # Names from RUNNERS; default: every CPU runtime that works here
    batches: tuple[int, ...] = ()  # Images per call
    threads: tuple[int | str, ...] = (1, ALL)  # Threads inside one call
    sessions: tuple[int | str, ...] = (1, ALL)  # Sessions that call at the same time
    seconds: float | None = None  # Seconds of measurement per variant, over all rounds
    rounds: int | None = None  # Default: ROUNDS; fewer, but LEAST_ROUNDS at least, if a call takes longer than a round
    quick: bool = False  # Two batch sizes, fewer runtimes, shorter rounds, a verification of fewer samples
    seed: int = 0  # Random seed of the inputs and of the order in each round

    def __post_init__(self) -> None:
        if not self.bundles:
            raise UsageError("no bundle is given", remedy="Give at least one")
        for first, second in itertools.combinations(self.bundles, 2):
            if first.resolve() == second.resolve():
                raise UsageError(f"{first} and {second} are the same bundle", remedy="Give each bundle once")
        if self.against is not None and not self.against.is_file():
            raise UsageError(f"--against {self.against} is not a file", remedy="Give an ONNX file")
        if self.rounds is not None and self.rounds < LEAST_ROUNDS:
            raise UsageError(
                f"--rounds is {self.rounds}, but the interval of a ratio needs at least {LEAST_ROUNDS} rounds",
                remedy=f"Give --rounds {LEAST_ROUNDS} or more",
            )
        if not 0 < self.variant_seconds < 1e6:
            raise UsageError(f"--seconds is {self.seconds}", remedy="Give more than 0 and less than 1,000,000 seconds")
        for flag, counts in (("batch", self.batches), ("threads", self.threads), ("sessions", self.sessions)):
            for count in counts:
                if isinstance(count, int) and count < 1:
                    raise UsageError(f"--{flag} is {count}", remedy="Give at least 1")
        if max(self.batches, default=0) > LARGEST_BATCH:
            raise UsageError(f"--batch is {max(self.batches)}", remedy=f"Give at most {LARGEST_BATCH}")
        for name in self.runtimes:
            runner_spec(name)

    @property
    def variant_seconds(self) -> float:
        """Return the seconds of measurement per variant, over all rounds."""
        return (QUICK_SECONDS if self.quick else SECONDS) if self.seconds is None else self.seconds

    def rounds_for(self, slowest: float) -> int:
        """Return the number of rounds if the slowest call takes ``slowest`` seconds."""
        if self.rounds is not None:
            return self.rounds
        return max(LEAST_ROUNDS, min(ROUNDS, int(self.variant_seconds / slowest)))

    def specs(self) -> tuple[RunnerSpec, ...]:
        """Return the runtimes to measure; RuntimeUnavailable if a named one can't run here."""
        if self.runtimes:
            named = tuple(runner_spec(name) for name in dict.fromkeys(self.runtimes))
            for spec in named:
                spec.require()
            return named
        kept = [spec for spec in RUNNERS if spec.default and spec.device == "cpu"]
        return tuple(
            spec for spec in kept if (not self.quick or spec.engine in _QUICK_ENGINES) and spec.available() is None
        )

    def batches_of(self, subject: Subject) -> tuple[int, ...]:
        """Return the batch sizes of a bundle, in rising order; UsageError if another one than its fixed size was requested."""
        wanted = self.batches or (QUICK_BATCHES if self.quick else BATCHES)
        if (fixed := subject.fixed_batch) is None:
            return tuple(sorted(set(wanted)))
        if other := [batch for batch in self.batches if batch != fixed]:
            raise UsageError(
                f"--batch {other[0]} does not fit {subject.bundle.path}, whose batch size is {fixed}",
                remedy=f"Give --batch {fixed}, or export with a batch axis that varies",
            )
        return (fixed,)

    def ways(self) -> tuple[tuple[int, int], ...]:
        """Return the pairs of threads and sessions that the cores allow; UsageError if there are too few cores."""
        cores = available_cores()
        threads, sessions = (
            sorted({cores if count == ALL else int(count) for count in counts})
            for counts in (self.threads, self.sessions)
        )
        for flag, counts in (("threads", threads), ("sessions", sessions)):
            if counts[-1] > cores:
                raise UsageError(
                    f"--{flag} is {counts[-1]}, but this process has {cores} core{'' if cores == 1 else 's'}",
                    remedy=f"Give at most {cores}",
                )
        pairs = tuple((count, number) for number in sessions for count in threads if count * number <= cores)
        if not pairs:
            raise UsageError(
                f"{sessions[0]} sessions of {threads[0]} threads need {sessions[0] * threads[0]} cores, "
                f"but this process has {cores}",
                remedy="Give fewer threads or sessions",
            )
        return pairs


@dataclass(frozen=True, eq=False)
class Subject:
    """One bundle, or the file of ``--against``."""

    label: str  # "A", "B", ... in the order of the command line; "-" for the file
    name: str  # As the user gave it
    bundle: Bundle  # For the file: the first bundle, whose inputs it gets
    file: Path | None = None  # The file of ``--against``

    @property
    def precision(self) -> str:
        """Return the precision of the stored weights: "float32", "int8"."""
        return "as in the file" if self.file else self.manifest.precision

    @property
    def manifest(self) -> Manifest:
        """Return the bundle's manifest."""
        return self.bundle.manifest

    @property
    def fixed_batch(self) -> int | None:
        """Return the only possible batch size; None if the batch axis varies."""
        first = self.manifest.signature.inputs[0].shape[:1]
        if self.manifest.signature.batched:
            return None
        return first[0] if first and isinstance(first[0], int) else len(next(iter(self.bundle.golden()[0].values())))

    def size(self, runtime: str) -> int:
        """Return the bytes of the file that a runtime reads."""
        if self.file is not None:
            return self.file.stat().st_size
        return int(self.manifest.files[runner_spec(runtime).file]["size"])


@dataclass(frozen=True)
class Variant:
    """One row of the table."""

    subject: Subject = field(repr=False)
    runtime: str  # A name from RUNNERS, or BARE
    batch: int
    threads: int
    sessions: int

    @property
    def process(self) -> tuple[str, str, int, int]:
        """Return the key of the process that measures it; batch sizes share one."""
        return self.subject.label, self.runtime, self.threads, self.sessions

    @property
    def cores(self) -> int:
        """Return the number of threads of all sessions."""
        return self.threads * self.sessions

    @property
    def name(self) -> str:
        """Return "A onnxruntime-cpu, batch 32, 1 thread, 2 sessions"."""
        threads, sessions = (
            f"{count} {word}{'' if count == 1 else 's'}"
            for count, word in ((self.threads, "thread"), (self.sessions, "session"))
        )
        return f"{self.subject.label} {self.runtime}, batch {self.batch}, {threads}, {sessions}"


def subjects_of(request: BenchmarkRequest) -> tuple[Subject, ...]:
    """Open the bundles (BundleError), and put the file of ``--against`` before them."""
    labels = (chr(ord("A") + number) if number < 26 else f"A{number}" for number in itertools.count())
    found = [Subject(label, str(path), Bundle.open(path)) for label, path in zip(labels, request.bundles, strict=False)]
    bare = [] if request.against is None else [Subject("-", str(request.against), found[0].bundle, request.against)]
    return (*bare, *found)


def variants_of(
    request: BenchmarkRequest, subjects: Sequence[Subject], specs: Sequence[RunnerSpec]
) -> tuple[list[Variant], dict[str, str]]:
    """Return the variants in the order of the table, and runtime -> why it is left out.

    BundleError if no runtime can read a file of the bundles; UsageError as in ``batches_of`` and ``ways``.
    """
    found, left = [], {}
    for subject in subjects:
        for spec in specs if subject.file is None else (None,):
            if spec is not None and spec.file not in subject.manifest.files:
                left[f"{subject.label} {spec.name}"] = f"the bundle was written without {spec.file}"
                continue
            runtime = BARE if spec is None else spec.name
            found += [
                Variant(subject, runtime, batch, threads, sessions)
                for threads, sessions in request.ways()
                for batch in request.batches_of(subject)
            ]
    if not any(variant.subject.file is None for variant in found):
        why = next(iter(left.values()), "no runtime works here")
        files = {name for subject in subjects for name in subject.manifest.files}
        fitting = ", ".join(
            spec.name for spec in RUNNERS if spec.file in files and spec.device == "cpu" and spec.default
        )
        raise BundleError(
            f"nothing can be measured: {why}",
            remedy=f"CPU runtimes for the files: {fitting or 'none'}. bnexport doctor lists those that work here",
        )
    # One batch size after the other: their rows are compared.
    return sorted(found, key=lambda variant: variant.batch), left
