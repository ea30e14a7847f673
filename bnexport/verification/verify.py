"""``verify``: one bundle in, one verdict out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnexport.bundle import GOLDEN, MODEL_ONNX, MODEL_TORCHSCRIPT, WEIGHTS, Bundle
from bnexport.environment import environment
from bnexport.errors import BnexportError, Unavailable
from bnexport.runtimes.base import plain_reason
from bnexport.runtimes.catalogue import RUNNERS, RunnerSpec, runner_spec
from bnexport.runtimes.onnx_file import multiplications, read_model
from bnexport.tensors import Array, check_feeds
from bnexport.verification.inputs import Batch, Suite, build_suite, other_sized_batches
from bnexport.verification.metrics import common_scales, count_flips
from bnexport.verification.reference import Reference, find_reference, is_known, not_rebuilt, takes_empty_batch
from bnexport.verification.stages import (
    Case,
    Plan,
    compare,
    failed,
    integrity_rows,
    proof_rows,
    runner_rows,
)
from bnexport.verification.tolerances import TOLERANCES
from bnexport.verification.verdict import Row, VerificationReport
from bnexport.verification.weights import weights_row

if TYPE_CHECKING:
    from torch import nn

#: Multiplications that a batch may cost. A BN-LeNet needs 2.8e5 per image, so all 10,000 test images fit the first and
#: 2,000 the second, which a numpy evaluator takes about a second for.
_RUNTIME_WORK = 5e9
_PROOF_WORK = 6e8
_MIN_RUNTIME_SAMPLES = 16
_MIN_PROOF_SAMPLES = 2


def verify(
    bundle: Bundle | str | Path,
    *,
    runtimes: Sequence[str] | None = None,
    data_dir: str | Path | None = None,
    module: nn.Module | None = None,
    seed: int = 0,
) -> VerificationReport:
    """Check that a bundle is as it was written and computes what the original network computes.

    Integrity, golden vectors, a float64 proof of the written file, then strict float32 on each runtime: on real test
    images when the data set is known and lies here, on synthetic inputs, and in several batch sizes. A fault is a row
    of the report, not an exception.

    Args:
        bundle: A bundle or its directory.
        runtimes: Names from RUNNERS. None: every one that works here; what does not is listed as skipped.
        data_dir: Where the data set lies. Nothing is downloaded.
        module: The original network, for a bundle whose network only its author has. Never changed.
        seed: Of the synthetic inputs.

    Raises:
        BundleError: Not a bundle, or its manifest is damaged.
        UsageError: An unknown runtime.
        Unavailable: A runtime asked for by name can't run here.
        DataError: ``data_dir`` does not hold the data set.
        ModelError: ``module`` can't be evaluated in float64.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    specs = RUNNERS if runtimes is None else tuple(runner_spec(name) for name in dict.fromkeys(runtimes))
    if runtimes is not None:
        for spec in specs:
            spec.require()
    work = _Work(opened, module, seed, named=runtimes is not None)
    work.rows += integrity_rows(opened, work.problems)
    plan = work.prepare(data_dir)
    for spec in specs:
        work.run(spec, plan)
    return VerificationReport(
        tuple(work.rows),
        skipped=work.skipped,
        runtimes=work.runtimes,
        reference=work.reference,
        inputs=work.inputs,
        accuracy=work.accuracy,
        seed=seed,
        environment=environment(),
        samples=work.samples,
    )


@dataclass
class _Work:
    """One verification while it goes on; only files whose hash holds are opened."""

    bundle: Bundle
    module: nn.Module | None
    seed: int
    named: bool
    rows: list[Row] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    runtimes: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    reference: str = ""
    inputs: str = ""
    accuracy: Mapping[str, Any] = field(default_factory=dict)
    samples: dict[str, tuple[Array, Array]] = field(default_factory=dict)
    problems: dict[str, str | None] = field(init=False)

    def __post_init__(self) -> None:
        # Once: a model of a gigabyte takes seconds to hash, and every stage asks.
        self.problems = {name: self.bundle.problem(name) for name in self.bundle.manifest.files}

    def changed(self, name: str) -> str | None:
        """Why a file must not be opened."""
        return self.problems.get(name, f"{name} is not in the bundle")

    def prepare(self, data_dir: str | Path | None) -> Plan:
        """Reference, inputs, and the rows that need no runtime."""
        golden = self._golden()
        reference = self._find_reference()
        cost = self._cost(golden)
        if golden is None:
            return Plan(None, (), None, empty=False)
        cases: tuple[Case, ...] = (golden,)
        sizes, empty = golden.batch, False
        self.inputs = "golden vectors alone: they are all that this bundle tells of the original network"
        if reference is not None:
            limit = max(_MIN_RUNTIME_SAMPLES, int(_RUNTIME_WORK // cost))
            suite = build_suite(
                self.bundle.manifest, golden.batch.feeds, data_dir=data_dir, seed=self.seed, limit=limit
            )
            suite = replace(suite, batches=(*suite.batches, *self._other_sized(reference, golden)))
            answered = self._answers(reference, suite)
            if answered:
                cases = answered
                self._reference_rows(reference, golden, suite, cases)
                sizes = next(case.batch for case in cases if case.batch.name == "noise")
                empty = takes_empty_batch(reference, sizes.feeds)
        self._file_rows(cases, max(_MIN_PROOF_SAMPLES, int(_PROOF_WORK // cost)))
        varies = all(isinstance(spec.shape[0], str) for spec in self.bundle.manifest.signature.inputs)
        return Plan(golden, cases, sizes if varies else None, empty=empty and varies)

    def run(self, spec: RunnerSpec, plan: Plan) -> None:
        """The rows of one runtime, or why it was skipped."""
        lives = spec.engine == "torch" and self.module is not None
        if not lives and not self.named and spec.file not in self.bundle.manifest.files:
            self.skipped[spec.name] = f"the bundle was written without {spec.file}"
            return
        if not lives and (problem := self.changed(spec.file)) is not None:
            self.rows.append(failed("strict", spec.name, "open", f"{problem}, so it was not opened"))
            return
        try:
            runner = spec.open(self.bundle, module=self.module)
        except Unavailable as error:
            if self.named:
                raise
            self.skipped[spec.name] = plain_reason(spec.name, error)
            return
        except BnexportError as error:
            self.rows.append(failed("strict", spec.name, "open", error.message))
            return
        with runner:
            self.runtimes[spec.name] = runner.description
            rows, samples = runner_rows(runner, plan)
        self.rows += rows
        if samples is not None:
            self.samples[spec.name] = samples

    def _golden(self) -> Case | None:
        files = [name for name in self.bundle.manifest.files if name.startswith(f"{GOLDEN}/")]
        problems = [problem for name in files if (problem := self.changed(name)) is not None]
        try:
            if problems:
                self.rows.append(failed("golden", GOLDEN, "open", f"{problems[0]}, so it was not opened"))
                return None
            inputs, outputs = self.bundle.golden()
            check_feeds(self.bundle.manifest.signature, inputs)
        except BnexportError as error:
            self.rows.append(failed("golden", GOLDEN, "open", error.message))
            return None
        return Case(Batch("golden", inputs), outputs)

    def _answers(self, reference: Reference, suite: Suite) -> tuple[Case, ...]:
        """What the original says to each batch; empty, with a failed row, when the rebuilt one does not fit."""
        try:
            answers = [reference.evaluate(batch.feeds) for batch in suite.batches]
            scales = common_scales(answers)
            return tuple(Case(batch, answer, scales) for batch, answer in zip(suite.batches, answers, strict=True))
        except BnexportError as error:
            if self.module is not None:
                raise  # the caller's own module can't be used: no verdict on the bundle
            self.rows.append(failed("golden-reference", "reference", "open", error.message))
            return ()

    def _other_sized(self, reference: Reference, golden: Case) -> list[Batch]:
        """A batch in another size, where sizes vary; a failed row where the original takes none of those tried."""
        signature, refused = self.bundle.manifest.signature, ""
        for batch in other_sized_batches(signature, golden.batch.feeds, seed=self.seed):
            try:
                reference.evaluate(batch.feeds)
            except BnexportError as error:
                refused = refused or error.message
            else:
                return [batch]
        if refused:
            self.rows.append(failed("strict", "reference", "another size", f"no other size could be tried: {refused}"))
        return []

    def _find_reference(self) -> Reference | None:
        rebuilt = self.module is None and is_known(self.bundle)
        problem = self.changed(WEIGHTS) if rebuilt else None
        reference = None
        try:
            reference = find_reference(self.bundle, self.module) if problem is None else None
        except BnexportError as error:
            if self.module is not None:
                raise
            problem = error.message
        if problem is not None:
            self.rows.append(failed("golden-reference", "reference", "open", f"no reference could be built: {problem}"))
        self.reference = reference.description if reference else "the bundle's golden vectors"
        if reference is None and problem is None and (reason := not_rebuilt(self.bundle)) is not None:
            self.reference += f", not the original network, {reason}"
        return reference

    def _cost(self, golden: Case | None) -> int:
        """Multiplications per sample; where the file can't say, its size stands in."""
        size = int(self.bundle.manifest.files.get(MODEL_ONNX, {}).get("size", 0))
        try:
            if self.changed(MODEL_ONNX) is None:
                sizes = {} if golden is None else {name: x.shape[1:] for name, x in golden.batch.feeds.items()}
                return multiplications(read_model(self.bundle.file(MODEL_ONNX)), sizes)
        except BnexportError:
            pass  # the file's own rows say what is wrong with it
        return max(size, 1)

    def _reference_rows(self, reference: Reference, golden: Case, suite: Suite, cases: Sequence[Case]) -> None:
        try:
            outputs = reference.evaluate(golden.batch.feeds)
        except BnexportError as error:
            self.rows.append(failed("golden-reference", "reference", "golden", error.message))
        else:
            self.rows.append(compare("golden-reference", "reference", "golden", outputs, golden.expected))
        self.inputs = suite.images
        if suite.labels is not None and (correct := _correct(cases[0], suite)) is not None:
            self.accuracy = {"dataset": self.bundle.manifest.dataset, "n": cases[0].batch.n, "correct": correct}
            self._accuracy_row(cases[0])

    def _accuracy_row(self, images: Case) -> None:
        """The original on these images must be as right as it was at export: else the preprocessing is another one."""
        before = self.bundle.manifest.verification.get("accuracy")
        now = self.accuracy
        if not isinstance(before, dict) or not isinstance(before.get("correct"), int):
            return  # made without images, or by another version
        if before.get("dataset") != now["dataset"] or before.get("n") != now["n"]:
            return
        scores = next(iter(images.expected.values()))
        unsure = count_flips(scores, scores, bound=TOLERANCES["golden-reference"].bound).uncertain
        passed = abs(before["correct"] - now["correct"]) <= unsure
        reason = f"{now['correct']} of {now['n']} images right, {before['correct']} at export"
        if not passed:
            reason += ": other preprocessing, images or weights"
        self.rows.append(Row("accuracy", "reference", "images", passed, reason, n=now["n"]))

    def _file_rows(self, cases: Sequence[Case], limit: int) -> None:
        if (problem := self.changed(MODEL_ONNX)) is not None:
            self.rows.append(failed("file-proof", MODEL_ONNX, "open", f"{problem}, so it was not opened"))
            return
        self.rows += proof_rows(self.bundle, cases, limit=limit)
        if self.changed(MODEL_TORCHSCRIPT) is not None:
            return  # not written, or its runtime's row says what is wrong
        try:
            self.rows.append(weights_row(self.bundle.file(MODEL_ONNX), self.bundle.file(MODEL_TORCHSCRIPT)))
        except Unavailable as error:
            self.skipped["weights"] = error.message
        except BnexportError as error:
            self.rows.append(failed("weights", MODEL_TORCHSCRIPT, "bits", error.message))


def _correct(images: Case, suite: Suite) -> int | None:
    """How many labels the reference gets right; None when the output is not one score per class."""
    scores = next(iter(images.expected.values()))
    if suite.labels is None or scores.ndim != 2:
        return None
    return int((scores.argmax(axis=1) == suite.labels).sum())
