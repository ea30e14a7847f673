"""``benchmark``: load every variant, verify it, and let all of them measure in turn, round by round."""

from __future__ import annotations

import contextlib
import random
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bnexport.benchmarking.benchmark_report import (
    UNKNOWN,
    BenchmarkReport,
    Loaded,
    Round,
    RuntimeVerdict,
    results_of,
    verdict_on,
)
from bnexport.benchmarking.benchmark_request import BARE, BenchmarkRequest, Subject, Variant, subjects_of, variants_of
from bnexport.benchmarking.benchmark_worker import MOST_INPUTS, Worker, save_inputs
from bnexport.environment import available_memory, cpu_name, cpu_state, environment
from bnexport.errors import RuntimeUnavailable, Unavailable, UsageError
from bnexport.progress import Progress, part_of, silent
from bnexport.tuned import Tuning, write_tuning
from bnexport.verification.budget import Budget
from bnexport.verification.inputs import build_suite
from bnexport.verification.scope import Scope
from bnexport.verification.verdict import VerificationReport
from bnexport.verification.verify import verify

#: Samples of each kind that a verification with --quick compares.
_QUICK_SAMPLES = 64
#: Memory of a process before it opens a file, and of a session per byte of its file. Both are on the low side: the refusal
#: comes before the machine runs out of memory, not before each session that is large.
_PROCESS_BYTES, _COPIES = 100e6, 3
_NOT_VERIFIED = RuntimeVerdict(UNKNOWN, "the file of --against is not verified")
#: Shares of the work done after loading and after verifying.
_LOADED, _VERIFIED = 0.25, 0.35


def benchmark(request: BenchmarkRequest, *, progress: Progress = silent) -> BenchmarkReport:
    """Measure every variant of a request, and recommend the best ones whose answers are right.

    Each variant has a process. In each round all variants measure one after the other in a new random order, on inputs
    that change with each call, and a share of the calls gets the golden inputs, whose answers are compared. An interrupt
    during the rounds ends the measurement; the report contains the rounds so far.

    Args:
        request: The files, runtimes and sizes to measure.
        progress: Called before each step.

    Raises:
        BundleError: A folder is not a bundle, or no runtime can read its files.
        UsageError: A variant can't be measured here: too many threads or sessions for the cores or the memory, a batch size
            that the file does not have, a file of ``against`` that does not take the bundle's inputs.
        RuntimeUnavailable: A named runtime can't run here, or no variant could be loaded.
    """
    subjects = subjects_of(request)
    variants, left = variants_of(request, subjects, request.specs())
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        inputs = {
            subject.label: _save_inputs(subject, variants, Path(folder), request.seed)
            for subject in subjects
            if subject.file is None
        }
        workers = _load(variants, Path(folder), stack, left, part_of(progress, 0.0, _LOADED))
        variants = [variant for variant in variants if variant.process in workers]
        verdicts = _verdicts(request, variants, workers, part_of(progress, _LOADED, _VERIFIED))
        machine = cpu_state()
        rounds = request.rounds_for(max(max(worker.loaded["first"].values()) for worker in workers.values()))
        seconds = request.variant_seconds / rounds
        progressing = part_of(progress, _VERIFIED, 1.0)
        measured, facts, whole = _rounds(variants, workers, rounds, seconds, request.seed, progressing)
    results = results_of(
        [
            (
                variant,
                _loaded(workers[variant.process], variant),
                measured[variant],
                verdicts.get((variant.subject.label, variant.runtime), _NOT_VERIFIED),
            )
            for variant in variants
        ]
    )
    total = sum(item["total"] for item in facts)
    others = max(0.0, sum(item["busy"] - item["cpu"] for item in facts)) / total if total else None
    return BenchmarkReport(
        subjects,
        results,
        left,
        environment(),
        {**machine, "load_after": cpu_state()["load"], "others": others},
        inputs,
        request.variant_seconds,
        rounds,
        interrupted=not whole,
    )


def save_tunings(report: BenchmarkReport) -> list[Path]:
    """Write tuned.json into each bundle with a right variant; RuntimeUnavailable if the machine was busy."""
    if report.busy:
        raise RuntimeUnavailable(f"tuned.json is not written: {report.busy}", remedy="Measure on an idle machine")
    written = []
    for subject in report.subjects:
        choices = {item.goal: item.best.choice for item in report.recommended_for(subject) if subject.file is None}
        if choices:
            written.append(write_tuning(subject.bundle.path, Tuning.here(subject.bundle, choices)))
    return written


def _save_inputs(subject: Subject, variants: Sequence[Variant], folder: Path, seed: int) -> str:
    """Write a bundle's inputs for its processes; return their description."""
    golden, answers = subject.bundle.golden()
    batches = [variant.batch for variant in variants if variant.subject.bundle is subject.bundle]
    n = max(batches, default=1) + MOST_INPUTS - 1
    manifest = subject.manifest
    budget = Budget(real=n, noise=n, one_hot=1, constant=1, proof=1, proof_other=1, batch_sizes=(), repeat=1)
    suite = build_suite(manifest, golden, data_dir=None, seed=seed, budget=budget)
    batch = suite.batches[0]
    samples = {name: np.resize(array, (max(n, len(array)), *array.shape[1:])) for name, array in batch.feeds.items()}
    (folder / subject.label).mkdir()
    save_inputs(folder / subject.label, samples, golden, answers)
    return suite.images if batch.name == "images" else f"{batch.n} samples of {batch.name} ({suite.images})"


def _load(
    variants: Sequence[Variant],
    folder: Path,
    stack: contextlib.ExitStack,
    left: dict[str, str],
    progress: Progress,
) -> dict[tuple[str, str, int, int], Worker]:
    """Start one process per runtime, threads and sessions; ``left`` gets those that can't open their file.

    BundleError if no process could be started and a bundle was changed; UsageError if the memory does not allow a process or
    the file of ``--against`` can't be run; RuntimeUnavailable if no process of a bundle could be started.
    """
    workers: dict[tuple[str, str, int, int], Worker] = {}
    keys = dict.fromkeys(variant.process for variant in variants)
    largest = 0
    for number, key in enumerate(keys):
        same = [variant for variant in variants if variant.process == key]
        runtime, subject = same[0].runtime, same[0].subject
        progress("loading", number, len(keys))
        if (name := f"{subject.label} {runtime}") in left:
            continue
        _need_memory(same[0], largest)
        try:
            workers[key] = worker = stack.enter_context(Worker(runtime, _request(same, folder)))
        except RuntimeUnavailable as error:
            if subject.file is not None:
                raise UsageError(
                    f"--against {subject.name} can't be run: {error.message}",
                    remedy="Give an ONNX file that takes the inputs of the first bundle",
                ) from error
            left[name] = error.message
            continue
        largest = max(largest, *worker.loaded["memory"].values())
    if not any(runtime != BARE for _, runtime, _, _ in workers):
        for subject in dict.fromkeys(variant.subject for variant in variants):
            subject.bundle.check()  # a changed file is the user's to mend, not the machine's
        reason = next(reversed(left.values()), "")
        raise RuntimeUnavailable(
            f"no runtime could load its file: {reason}", remedy="Run bnexport verify to see the causes"
        )
    return workers


def _request(same: Sequence[Variant], folder: Path) -> dict[str, Any]:
    """Return the first message to the process of variants that differ in their batch size only."""
    first, subject = same[0], same[0].subject
    own = {"file": str(subject.file)} if subject.file else {"bundle": str(subject.bundle.path.resolve())}
    inputs = next(path for path in (folder / subject.label, folder / "A") if path.is_dir())
    return {
        **own,
        "manifest": subject.manifest.to_json(),
        "runtime": "onnxruntime-cpu" if first.runtime == BARE else first.runtime,
        "threads": first.threads,
        "sessions": first.sessions,
        "batches": [variant.batch for variant in same],
        "inputs": str(inputs),
    }


def _need_memory(variant: Variant, largest: int) -> None:
    """Refuse a process that needs more memory than is free; it may need as much as the ``largest`` process so far."""
    need = max(largest, _PROCESS_BYTES + _COPIES * variant.sessions * variant.subject.size(variant.runtime))
    if (free := available_memory()) is not None and need > free:
        raise UsageError(
            f"{variant.name} needs about {need / 1e6:.0f} MB of memory, but {free / 1e6:.0f} MB are free",
            remedy="Give fewer sessions, thread counts, runtimes or bundles",
        )


def _loaded(worker: Worker, variant: Variant) -> Loaded:
    facts, batch = worker.loaded, str(variant.batch)
    return Loaded(facts["import"], facts["load"], facts["first"][batch], facts["memory"][batch])


def _verdicts(
    request: BenchmarkRequest, variants: Sequence[Variant], workers: Mapping[Any, Worker], progress: Progress
) -> dict[tuple[str, str], RuntimeVerdict]:
    """Return (label, runtime) -> the verdict: the one at export if it is on this file, engine and processor, else a new one."""
    found: dict[tuple[str, str], RuntimeVerdict] = {}
    subjects = list(dict.fromkeys(variant.subject for variant in variants if variant.subject.file is None))
    for number, subject in enumerate(subjects):
        own = {variant.runtime: workers[variant.process].loaded for variant in variants if variant.subject is subject}
        recorded = _recorded(subject)
        for runtime, loaded in own.items():
            version = loaded["description"].get("version")
            if recorded is not None and recorded.runtimes.get(runtime, {}).get("version") == version:
                found[subject.label, runtime] = verdict_on(recorded, runtime, subject.manifest, "at export")
        if new := [runtime for runtime in own if (subject.label, runtime) not in found]:
            scope = Scope(max_samples=_QUICK_SAMPLES if request.quick else None, drift=False)
            part = part_of(progress, number / len(subjects), (number + 1) / len(subjects))
            try:
                report = verify(subject.bundle, runtimes=new, scope=scope, progress=_named(part))
            except Unavailable as error:
                found |= {(subject.label, runtime): RuntimeVerdict(UNKNOWN, error.message) for runtime in new}
                continue
            for runtime in new:
                found[subject.label, runtime] = verdict_on(report, runtime, subject.manifest, "now")
    return found


def _named(progress: Progress) -> Progress:
    """Return a function that reports the stages of a verification as one."""
    return lambda _stage, done, total: progress("verifying", done, total)


def _recorded(subject: Subject) -> VerificationReport | None:
    """Return the manifest's verdict if it was measured with these files on this processor, else None."""
    value = subject.manifest.verification
    if not value or subject.bundle.problems():
        return None
    try:
        report = VerificationReport.from_json(value)
    except (KeyError, TypeError, ValueError, AttributeError):  # another version's
        return None
    return report if report.environment.get("cpu") == cpu_name() else None


def _rounds(
    variants: Sequence[Variant],
    workers: Mapping[Any, Worker],
    rounds: int,
    seconds: float,
    seed: int,
    progress: Progress,
) -> tuple[dict[Variant, list[Round]], list[dict[str, float]], bool]:
    """Let every variant measure in each round, in a random order; every second round has the reversed order of the last.

    So a machine that slows down or speeds up over two rounds favours no variant. The result has the rounds of each variant, the
    facts of each measurement, and False if an interrupt ended the measurement.
    """
    measured: dict[Variant, list[Round]] = {variant: [] for variant in variants}
    facts: list[dict[str, float]] = []
    shuffled, order = random.Random(seed), list(variants)
    try:
        for number in range(rounds):
            order = order[::-1] if number % 2 else shuffled.sample(variants, len(variants))
            for place, variant in enumerate(order):
                progress("measuring", number * len(variants) + place, rounds * len(variants))
                found, times = workers[variant.process].measure(variant.batch, seconds)
                facts.append(found)
                measured[variant].append(Round(tuple(times), found["elapsed"], found["cpu"], found["golden"]))
    except KeyboardInterrupt:
        if not facts:
            raise
        return measured, facts, False
    return measured, facts, True
