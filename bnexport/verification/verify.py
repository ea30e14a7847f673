"""``verify``: one bundle in, one verdict out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnexport.bundle import WEIGHTS, Bundle
from bnexport.data.preprocessing import Preprocessing
from bnexport.environment import environment
from bnexport.errors import BnexportError, MissingDependency, Unavailable
from bnexport.runtimes.base import RunSettings, plain_reason
from bnexport.runtimes.catalogue import RUNNERS, RunnerSpec, runner_spec
from bnexport.tensors import Array
from bnexport.verification.coverage import on_dataset
from bnexport.verification.drift import look_at_layers
from bnexport.verification.inputs import RunPlan
from bnexport.verification.reference import is_known
from bnexport.verification.runs import RuntimeRun, precision_row
from bnexport.verification.samples import Samples, load_samples
from bnexport.verification.scope import Scope
from bnexport.verification.stages import failed, integrity_rows
from bnexport.verification.verdict import Findings, FlippedSample, LayerDrift, VerificationReport, run_name
from bnexport.verification.work import Work

if TYPE_CHECKING:
    from torch import nn

#: Pictures of changed labels that the report keeps.
_PICTURES = 64


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
        module: The original network, for a bundle whose network only its author has. Never changed.
        seed: Random seed of the synthetic inputs.
        scope: Precisions, optimisation levels, ways of calling, number of samples.

    Raises:
        BundleError: Not a bundle, or its manifest is damaged.
        UsageError: An unknown runtime, one that has none of the precisions asked for, or images that can't be used.
        Unavailable: A named runtime can't run here, or refuses the file.
        DataError: ``dataset`` can't be read, ``data_dir`` does not hold it, or ``samples`` can't be used.
        ModelError: ``module`` can't be evaluated in float64.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    scope = scope or Scope()
    specs = _specs(runtimes, scope)
    opened, place = on_dataset(opened, dataset, data_dir, samples=samples, module=module)
    given = None if samples is None else _samples(opened, Path(samples), scope)
    work = Work(opened, module, seed, scope.max_samples, scope.allow_low_accuracy)
    work.rows += integrity_rows(opened, work.problems)
    runs = _Runs(work, work.prepare(place, given), scope, named=runtimes is not None)
    for spec in specs:
        runs.all_of(spec)
    return _report(work, runs)


def _report(work: Work, runs: _Runs) -> VerificationReport:
    return VerificationReport(
        tuple(work.rows),
        skipped=work.skipped,
        runtimes=runs.runtimes,
        reference=work.reference,
        inputs=work.inputs,
        accuracy=work.accuracy,
        seed=work.seed,
        environment=environment(),
        findings=Findings(
            work.predictions(runs.plan),
            runs.drift,
            runs.flipped,
            None,
            work.waived,
            tuple(work.warnings),
            work.coverage,
        ),
        samples=runs.samples,
        pictures=runs.pictures(),
    )


def _samples(bundle: Bundle, path: Path, scope: Scope) -> Samples:
    manifest = bundle.manifest
    preprocessing = None if manifest.preprocessing is None else Preprocessing.from_json(manifest.preprocessing)
    return load_samples(path, manifest.signature, preprocessing, labels=manifest.labels, limit=scope.max_samples)


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


@dataclass
class _Runs:
    """Every runtime in every setting."""

    work: Work
    plan: RunPlan
    scope: Scope
    named: bool
    runtimes: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    samples: dict[str, tuple[Array, Array]] = field(default_factory=dict)
    drift: dict[str, tuple[LayerDrift, ...]] = field(default_factory=dict)
    flipped: dict[str, tuple[FlippedSample, ...]] = field(default_factory=dict)

    def all_of(self, spec: RunnerSpec) -> None:
        """Run one runtime in all settings, or record why it was skipped."""
        work = self.work
        lives = spec.engine == "torch" and work.module is not None
        if not lives and not self.named and spec.file not in work.bundle.manifest.files:
            work.skipped[spec.name] = f"the bundle was written without {spec.file}"
            return
        if not lives and (problem := work.changed(spec.file)) is not None:
            work.rows.append(failed("strict", spec.name, "open", f"{problem}, so it was not opened"))
            return
        every = self.scope.settings_of(spec, precision=self._stored(spec))
        if not every:
            work.skipped[spec.name] = f"it has no {' or '.join(self.scope.precisions or ())} kernels"
        for settings in every:
            key = run_name(spec.name, settings.describe())
            if settings.precision != "float32" and not self._predictable(settings.precision):
                work.skipped[key] = "its noise can't be predicted here: model.onnx can't be evaluated"
                continue
            if not self._one(spec, settings):
                return

    def _one(self, spec: RunnerSpec, settings: RunSettings) -> bool:
        """Run one setting; False when the runtime can't be opened, so that its other settings are not tried."""
        work, key = self.work, run_name(spec.name, settings.describe())
        try:
            runner = spec.open(work.bundle, module=work.module, settings=settings)
        except BnexportError as error:
            unavailable = isinstance(error, Unavailable)
            if unavailable and self.named:
                raise
            if unavailable and self._is_missing(spec, error):
                work.skipped[spec.name] = plain_reason(spec.name, error)
            else:  # the runtime works here, so it refuses this file or these settings
                work.rows.append(failed("strict", spec.name, "open", error.message))
            return False
        with runner:
            run = RuntimeRun(runner, settings, self.plan, work.forecast, self._stored(spec))
            self.runtimes[key] = runner.description
            run.go()
        if layers := look_at_layers(spec, run, work, wanted=self.scope.drift):
            self.drift[key] = layers
        work.rows += run.rows
        if (row := precision_row(run, spec.file)) is not None:
            work.rows.append(row)
        if run.samples is not None:
            self.samples[key] = run.samples
        if run.flipped:
            self.flipped[key] = run.flipped
        return True

    def _is_missing(self, spec: RunnerSpec, error: BnexportError) -> bool:
        """Return whether a package, a device or the original network is missing, which leaves a runtime out."""
        rebuilds = spec.engine == "torch" and self.work.module is None
        if isinstance(error, MissingDependency) or (rebuilds and not is_known(self.work.bundle)):
            return True
        return spec.available() is not None

    def _predictable(self, precision: str) -> bool:
        cases = self.plan.cases
        return bool(cases) and self.work.forecast.noise(precision, cases[0]) is not None

    def _stored(self, spec: RunnerSpec) -> str:
        """Return the precision of a runtime's file; the original network computes in float32 whatever the files do."""
        return "float32" if spec.file == WEIGHTS else self.work.precision

    def pictures(self) -> dict[int, Array]:
        """Return the inputs whose label changed on any runtime, where they are pictures."""
        if not self.plan.cases or not self.flipped:
            return {}
        feeds = list(self.plan.cases[0].batch.feeds.values())
        if len(feeds) != 1 or feeds[0].ndim != 4:
            return {}
        wanted = sorted({item.index for items in self.flipped.values() for item in items})[:_PICTURES]
        return {index: feeds[0][index] for index in wanted}
