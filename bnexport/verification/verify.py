"""``verify``: one bundle in, one verdict out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from bnexport.bundle import WEIGHTS, Bundle
from bnexport.data.preprocessing import preprocessing_of
from bnexport.data.samples import load_samples
from bnexport.environment import environment
from bnexport.errors import BnexportError, MissingDependency, RuntimeUnavailable, Unavailable
from bnexport.optional import one_line
from bnexport.progress import Progress, part_of, silent
from bnexport.runtimes.base import RunSettings, plain_reason
from bnexport.runtimes.catalogue import RUNNERS, RunnerSpec, runner_spec
from bnexport.tensors import Array
from bnexport.verification.drift import diagnose
from bnexport.verification.evidence import GOLDEN_ALONE, Evidence, coverage, file_checks, prepare
from bnexport.verification.full_check import GOLDEN_ONLY, on_dataset
from bnexport.verification.int8 import layer_report, record_of
from bnexport.verification.reference import not_rebuilt
from bnexport.verification.runs import RuntimeRun, run_runtime
from bnexport.verification.scope import Scope
from bnexport.verification.stages import TORCH_PROOFS, failed, integrity_rows
from bnexport.verification.verdict import (
    Findings,
    FlippedSample,
    Int8Findings,
    NoisePrediction,
    Row,
    VerificationReport,
    run_name,
)

if TYPE_CHECKING:
    from torch import nn

#: Number of pictures of changed labels that the report keeps.
_PICTURES = 64
#: Shares of the work done after the reference and after the proofs, measured with a ResNet-50.
_REFERENCE, _PROOFS = 0.2, 0.4
#: Precisions that the report predicts; optional ones only where that is cheap.
_ALWAYS = ("float32", "tf32")
_WHERE_CHEAP = ("float16", "bfloat16")


def verify(
    bundle: Bundle | str | Path,
    *,
    runtimes: Sequence[str | RunnerSpec] | None = None,
    dataset: str | None = None,
    data_dir: str | Path | None = None,
    samples: str | Path | None = None,
    module: nn.Module | None = None,
    seed: int = 0,
    scope: Scope | None = None,
    progress: Progress = silent,
) -> VerificationReport:
    """Check that a bundle is as it was written and computes what the original network computes.

    Each of three stages isolates one cause: the written files in float64 (is the fold right?), strict float32 on each runtime
    (are the kernels right?), and the precision that a runtime is served with (is the noise what this precision makes on this
    model?). The inputs are real test images when the data set is known and present, or the caller's samples, and synthetic
    inputs, in several batch sizes. A fault is a row of the report, not an exception.

    Args:
        bundle: A bundle or its directory.
        runtimes: Names from RUNNERS, or rows of the same kind. None: all available ones; a missing one is listed as skipped.
        dataset: The data set to verify on: a name, or ``folder:PATH``. None: the one that the bundle names.
        data_dir: Folder of the data set. Nothing is downloaded.
        samples: A file or folder of inputs to use in place of the data set's images (``samples.load_samples``).
        module: The original network, for a bundle without its network's code. Never changed.
        seed: Random seed of the synthetic inputs.
        scope: Precisions, optimisation levels, ways of calling, number of samples.
        progress: Called before each step.

    Raises:
        BundleError: Not a bundle, or its manifest is damaged.
        UsageError: An unknown runtime, one without the requested precisions, or images that can't be used.
        Unavailable: A named runtime can't run here, or refuses the file.
        DataError: ``dataset`` can't be read, ``data_dir`` does not hold it, or ``samples`` can't be used.
        ModelError: ``module`` can't be evaluated in float64.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    scope = scope or Scope()
    specs = _specs(runtimes, scope)
    opened, place = on_dataset(opened, dataset, data_dir, samples=samples, module=module)
    manifest, given = opened.manifest, None
    if samples is not None:
        image, limit = preprocessing_of(manifest), scope.max_samples
        given = load_samples(Path(samples), manifest.signature, image, labels=manifest.labels, limit=limit)
    progress("float64 reference", 0.0, 1.0)
    evidence = prepare(opened, module, seed=seed, data_dir=place, samples=given, scope=scope)
    progress("float64 proofs", _REFERENCE, 1.0)
    read = TORCH_PROOFS if runtimes is None or scope.thorough or scope.all_files else [spec.file for spec in specs]
    file_rows, skipped = file_checks(evidence, read=read)
    found = []
    for number, spec in enumerate(specs):
        part_of(progress, _PROOFS, 1.0)(spec.name, number, len(specs))
        found.append(_runtime_checks(spec, evidence, scope, named=runtimes is not None))
    return _report(evidence, found, file_rows, skipped, seed, scope)


def _report(
    evidence: Evidence,
    found: Sequence[_RuntimeChecks],
    file_rows: Sequence[Row],
    skipped: Mapping[str, str],
    seed: int,
    scope: Scope,
) -> VerificationReport:
    """Return the sum of all checks; ``skipped`` are the proofs that were not made."""
    run_rows = [row for one in found for row in one.rows]
    runs = {name: run for one in found for name, run in one.runs.items()}
    left = {name: why for one in found for name, why in one.skipped.items()}
    flipped = {name: run.flipped for name, run in runs.items() if run.flipped}
    int8, more = _int8(evidence, scope)
    return VerificationReport(
        (*integrity_rows(evidence.bundle, evidence.problems), *evidence.rows, *file_rows, *run_rows),
        skipped={**evidence.skipped, **skipped, **more, **left},
        runtimes={name: run.description for name, run in runs.items()},
        reference=evidence.reference,
        inputs=evidence.inputs,
        accuracy=evidence.accuracy,
        seed=seed,
        environment=environment(),
        findings=Findings(
            _predictions(evidence),
            {name: run.drift for name, run in runs.items() if run.drift},
            flipped,
            waived=evidence.waived,
            warnings=evidence.warnings(),
            covers=GOLDEN_ONLY if evidence.reference.startswith(GOLDEN_ALONE) else "",
            int8=int8,
        ),
        coverage=coverage(evidence, run_rows),
        samples={name: run.samples for name, run in runs.items() if run.samples is not None},
        pictures=_pictures(evidence, flipped),
    )


def _specs(runtimes: Sequence[str | RunnerSpec] | None, scope: Scope) -> tuple[RunnerSpec, ...]:
    """Return the runtimes to try; those that were named must work."""
    if runtimes is None:
        return tuple(spec for spec in RUNNERS if spec.default)
    specs = tuple(runner_spec(row) if isinstance(row, str) else row for row in dict.fromkeys(runtimes))
    for spec in specs:
        scope.require(spec)
        spec.require()
    scope.check_used(specs)
    return specs


@dataclass(frozen=True)
class _RuntimeChecks:
    """Checks of one runtime in all its settings."""

    rows: Sequence[Row] = ()  # The checks, also of settings that could not be opened
    runs: Mapping[str, RuntimeRun] = field(default_factory=dict)  # "runtime" or "runtime, settings" -> its run
    skipped: Mapping[str, str] = field(default_factory=dict)  # Runtime or setting -> why it was not run


def _runtime_checks(spec: RunnerSpec, evidence: Evidence, scope: Scope, *, named: bool) -> _RuntimeChecks:
    """Run one runtime in all settings, or state why it was skipped; a ``named`` one must work (or Unavailable)."""
    lives = spec.engine == "torch" and evidence.module is not None
    if not named and (reason := _absent(spec, evidence, lives=lives)) is not None:
        return _RuntimeChecks(skipped={spec.name: reason})
    if not lives and (problem := evidence.changed(spec.file)) is not None:
        return _RuntimeChecks([failed("strict", spec.name, "open", f"{problem}, so it was not opened")])
    stored = "float32" if spec.file == WEIGHTS else evidence.precision
    every = scope.settings_of(spec, precision=stored)
    if not every:
        return _RuntimeChecks(skipped={spec.name: f"it has no {' or '.join(scope.precisions or ())} kernels"})
    rows: list[Row] = []
    runs: dict[str, RuntimeRun] = {}
    skipped: dict[str, str] = {}
    for settings in every:
        key = run_name(spec.name, settings.describe())
        if (reason := _left_out(spec, settings, every, evidence)) is not None:
            skipped[key] = reason
            continue
        try:
            runner = spec.open(evidence.bundle, module=evidence.module, settings=settings)
        except BnexportError as error:
            if isinstance(error, Unavailable) and named:
                raise
            if isinstance(error, Unavailable) and _is_missing(spec, error, evidence):
                skipped[spec.name] = plain_reason(spec.name, error)
            else:  # the runtime works here, so it refuses this file or these settings
                rows.append(failed("strict", spec.name, "open", error.message))
            break  # the other settings would fail as well
        with runner:
            run = run_runtime(runner, settings, evidence, file=spec.file)
        runs[key], why_not = diagnose(spec, settings, run, evidence, wanted=scope.drift)
        rows += runs[key].rows
        if why_not:
            skipped[f"drift of {spec.name}"] = why_not
    return _RuntimeChecks(rows, runs, skipped)


def _absent(spec: RunnerSpec, evidence: Evidence, *, lives: bool) -> str | None:
    """Return why an unnamed runtime is skipped before it is opened: its file or its GPU is missing."""
    if not lives and spec.file not in evidence.bundle.manifest.files:
        return f"the bundle was written without {spec.file}"
    # The child process of a GPU runtime imports torch before it finds no GPU, which takes seconds.
    if spec.device != "cpu" and (reason := spec.available()) is not None:
        return plain_reason(spec.name, RuntimeUnavailable(reason, remedy=""))
    return None


def _left_out(spec: RunnerSpec, settings: RunSettings, every: Sequence[RunSettings], evidence: Evidence) -> str | None:
    """Return why a setting is not run: its noise is unknown here, or another setting has the same kernels."""
    if settings.precision == "float32":
        return None
    if any(other.precision == "float32" for other in every) and (same := spec.same_as_float32(settings.precision)):
        return same
    cases = evidence.cases
    if not cases or evidence.forecast.noise(settings.precision, cases[0]) is None:
        return "its noise can't be predicted here: model.onnx can't be evaluated"
    return None


def _is_missing(spec: RunnerSpec, error: BnexportError, evidence: Evidence) -> bool:
    """Return whether a package, a device or the original network is missing, which leaves a runtime out."""
    rebuilds = spec.engine == "torch" and evidence.module is None
    unknown = rebuilds and not_rebuilt(evidence.bundle) is not None
    return isinstance(error, MissingDependency) or unknown or spec.available() is not None


def _int8(evidence: Evidence, scope: Scope) -> tuple[Int8Findings | None, dict[str, str]]:
    """Return the layers and ranges of an int8 file, if they are to be compared, and part -> why it could not be done."""
    if evidence.model is None or evidence.int8 is None or not evidence.cases or scope.drift is False:
        return None, {}
    record, cost = record_of(evidence.bundle.manifest), evidence.work.multiplications
    batch = evidence.cases[0].batch
    try:
        found = layer_report(evidence.model, evidence.int8, record, batch, cost=cost, thorough=scope.thorough)
    except Exception as error:  # numpy raises any class inside an operator
        return None, {"noise of int8 by layer": f"it can't be evaluated: {one_line(error, 120)}"}
    return found, {}


def _predictions(evidence: Evidence) -> tuple[NoisePrediction, ...]:
    """Return each precision's effect on the first batch; optional precisions only if their emulation is cheap."""
    if not evidence.cases:
        return ()
    stored = (evidence.precision,) if evidence.precision == "int8" else ()
    names = stored + _ALWAYS + (_WHERE_CHEAP if evidence.forecast.cheap else ())
    found = [evidence.forecast.prediction(name, evidence.cases[0]) for name in names]
    return tuple(item for item in found if item is not None)


def _pictures(evidence: Evidence, flipped: Mapping[str, Sequence[FlippedSample]]) -> dict[int, Array]:
    """Return the inputs whose label changed on any runtime, where they are pictures."""
    if not evidence.cases or not flipped:
        return {}
    feeds = list(evidence.cases[0].batch.feeds.values())
    if len(feeds) != 1 or feeds[0].ndim != 4:
        return {}
    wanted = sorted({item.index for items in flipped.values() for item in items})[:_PICTURES]
    return {index: feeds[0][index] for index in wanted}
