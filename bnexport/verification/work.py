"""Prepare a verification before any engine runs: files, the reference, inputs, predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnexport.bundle import GOLDEN, MODEL_ONNX, WEIGHTS, Bundle
from bnexport.errors import BnexportError, MissingDependency, Unavailable, UsageError
from bnexport.onnx_files.models import multiplications, read_model
from bnexport.optional import require
from bnexport.tensors import check_feeds
from bnexport.verification.coverage import GOLDEN_ONLY, judge_accuracy
from bnexport.verification.forecast import Forecast
from bnexport.verification.format_proof import TENSORS, format_rows
from bnexport.verification.inputs import (
    REAL,
    Batch,
    Case,
    RunPlan,
    Suite,
    build_suite,
    other_sized_batches,
    smallest_batch,
)
from bnexport.verification.metrics import common_scales, has_labels
from bnexport.verification.reference import Reference, find_reference, not_rebuilt, takes_empty_batch
from bnexport.verification.samples import Samples
from bnexport.verification.stages import compare, failed, proof_rows
from bnexport.verification.tolerances import TOLERANCES
from bnexport.verification.verdict import Prediction, Row

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch import nn

#: Multiplications that a batch may cost. A BN-LeNet needs 2.8e5 per image, so all 10,000 test images fit the first and
#: 2,000 the second, which a numpy evaluator takes about a second for.
_RUNTIME_WORK = 5e9
_PROOF_WORK = 6e8
_MIN_RUNTIME_SAMPLES = 16
_MIN_PROOF_SAMPLES = 2
#: Precisions that the report predicts; optional ones only where the proof is cheap.
_ALWAYS = ("float32", "tf32")
_WHERE_CHEAP = ("float16", "bfloat16")


@dataclass
class Work:
    """One verification while it is prepared; only files whose hash holds are opened.

    Attributes:
        module: The live original network, if its author gave it.
        max_samples: Maximum number of samples of each kind; None: by their cost alone.
        allow_low_accuracy: Accept a reference whose accuracy on labelled samples is at or below chance.
        waived: Required stage -> why it can't be run here, and what replaces it.
        warnings: Warnings for the reader that no row contains.
        reference: Description of the reference.
        inputs: Description of the real inputs, or the reason why there are none.
        accuracy: Accuracy of the reference on labelled samples.
        coverage: The part of the proof that is covered; "" for all of it.
        forecast: Predicts the noise of precisions; set by ``prepare``.
    """

    bundle: Bundle
    module: nn.Module | None
    seed: int
    max_samples: int | None = None
    allow_low_accuracy: bool = False
    rows: list[Row] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    waived: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    reference: str = ""
    inputs: str = ""
    coverage: str = ""
    accuracy: Mapping[str, Any] = field(default_factory=dict)
    forecast: Forecast = field(init=False)
    problems: dict[str, str | None] = field(init=False)

    def __post_init__(self) -> None:
        # Once: a model of a gigabyte takes seconds to hash, and every stage asks.
        self.problems = {name: self.bundle.problem(name) for name in self.bundle.manifest.files}

    @property
    def precision(self) -> str:
        """Return the precision of the files: "float32", "float16", "bfloat16"."""
        return str(self.bundle.manifest.onnx.get("precision", "float32"))

    def changed(self, name: str) -> str | None:
        """Return the reason why a file must not be opened."""
        return self.problems.get(name, f"{name} is not in the bundle")

    def prepare(self, data_dir: str | Path | None, samples: Samples | None) -> RunPlan:
        """Prepare the reference, the inputs, and the rows that need no runtime."""
        golden, model = self._golden(), self._model()
        reference = self._find_reference()
        self.coverage = GOLDEN_ONLY if reference is None else ""
        if samples is not None and reference is None:
            self._refuse_samples()
        cost = self._cost(golden, model)
        limit = self._at_most(max(_MIN_PROOF_SAMPLES, int(_PROOF_WORK // cost)))
        self.forecast = Forecast(model, limit=limit, stored=self.precision, recorded=self._recorded())
        if golden is None:
            return RunPlan(None, (), None, empty=False)
        cases: tuple[Case, ...] = (golden,)
        sizes, empty, labels = golden.batch, False, None
        self.inputs = "golden vectors alone: they are all that is known here of the original network"
        if reference is not None:
            limit = self._at_most(max(_MIN_RUNTIME_SAMPLES, int(_RUNTIME_WORK // cost)))
            suite = build_suite(
                self.bundle.manifest,
                golden.batch.feeds,
                data_dir=data_dir,
                seed=self.seed,
                limit=limit,
                samples=samples,
            )
            suite = replace(suite, batches=(*suite.batches, *self._other_sized(reference, golden)))
            answered = self._answers(reference, suite)
            if answered:
                cases, labels = answered, suite.labels
                self._reference_rows(reference, golden, suite, cases)
                sizes = next(case.batch for case in cases if case.batch.name == "noise")
                empty = takes_empty_batch(reference, sizes.feeds)
        self.forecast.lead = cases[0]
        self._file_rows(cases, model)
        self._warn_of_synthetic(cases)
        varies = all(isinstance(spec.shape[0], str) for spec in self.bundle.manifest.signature.inputs)
        return RunPlan(golden, cases, sizes if varies else None, empty=empty and varies, labels=labels)

    def _refuse_samples(self) -> None:
        """Refuse samples without a reference.

        Raises:
            MissingDependency: The original network needs torch.
            UsageError: Only its author has its code.
        """
        require("torch", purpose="--samples, which needs the original network in float64,")
        raise UsageError(
            f"--samples has nothing to be compared with: the bundle speaks for itself ({self.reference})",
            remedy="Give the original network with --source FILE.py:FACTORY",
        )

    def predictions(self, plan: RunPlan) -> tuple[Prediction, ...]:
        """Return each precision's effect on the first batch; precisions that were not asked for only where that is cheap."""
        if not plan.cases:
            return ()
        names = _ALWAYS + (_WHERE_CHEAP if self.forecast.cheap else ())
        found = [self.forecast.prediction(name, plan.cases[0]) for name in names]
        return tuple(item for item in found if item is not None)

    def _at_most(self, n: int) -> int:
        return n if self.max_samples is None else min(n, self.max_samples)

    def _recorded(self) -> dict[str, float]:
        """Return precision -> error of scale, predicted when the bundle was made."""
        findings = self.bundle.manifest.verification.get("findings")
        listed = findings.get("predictions") if isinstance(findings, dict) else None
        found = {}
        for item in listed if isinstance(listed, list) else ():
            if isinstance(item, dict) and isinstance(item.get("error"), float):
                found[str(item.get("precision"))] = item["error"]
        return found

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

    def _model(self) -> ModelProto | None:
        """Return model.onnx as read; None, with a row or a note about its replacement, when it can't be read."""
        if (problem := self.changed(MODEL_ONNX)) is not None:
            self.rows.append(failed("file-proof", MODEL_ONNX, "open", f"{problem}, so it was not opened"))
            return None
        try:
            return read_model(self.bundle.file(MODEL_ONNX))
        except MissingDependency:
            self._stand_in_for_proof()
        except BnexportError as error:
            self.rows.append(failed("file-proof", MODEL_ONNX, "open", error.message))
        return None

    def _answers(self, reference: Reference, suite: Suite) -> tuple[Case, ...]:
        """Return the original's outputs for each batch; empty, with a failed row, when the rebuilt network does not fit."""
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
        """Return batches in another and the smallest size, where sizes vary; a failed row where the original takes no other."""
        signature, refused = self.bundle.manifest.signature, ""
        for batch in other_sized_batches(signature, golden.batch.feeds, seed=self.seed):
            try:
                reference.evaluate(batch.feeds)
            except BnexportError as error:
                refused = refused or error.message
            else:
                return [batch, *self._smallest(reference, golden)]
        if refused:
            self.rows.append(failed("strict", "reference", "another size", f"no other size could be tried: {refused}"))
        return []

    def _smallest(self, reference: Reference, golden: Case) -> list[Batch]:
        """Return the batch in the smallest sizes that the bundle names; a failed row where the original does not take them."""
        batch = smallest_batch(self.bundle.manifest.signature, golden.batch.feeds, seed=self.seed)
        if batch is None:
            return []
        try:
            reference.evaluate(batch.feeds)
        except BnexportError as error:
            self.rows.append(failed("strict", "reference", "the smallest size", error.message))
            return []
        return [batch]

    def _find_reference(self) -> Reference | None:
        why_not = not_rebuilt(self.bundle) if self.module is None else None
        rebuilt = self.module is None and why_not is None
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
        if reference is None and problem is None and why_not is not None:
            self.reference += f", not the original network, {why_not}"
        return reference

    def _cost(self, golden: Case | None, model: ModelProto | None) -> int:
        """Return the multiplications per sample; estimated from the file's size where its content does not give them."""
        if model is not None:
            sizes = {} if golden is None else {name: x.shape[1:] for name, x in golden.batch.feeds.items()}
            return max(1, multiplications(model, sizes))
        return max(1, int(self.bundle.manifest.files.get(MODEL_ONNX, {}).get("size", 0)))

    def _reference_rows(self, reference: Reference, golden: Case, suite: Suite, cases: Sequence[Case]) -> None:
        try:
            outputs = reference.evaluate(golden.batch.feeds)
        except BnexportError as error:
            self.rows.append(failed("golden-reference", "reference", "golden", error.message))
        else:
            self.rows.append(compare("golden-reference", "reference", "golden", outputs, golden.expected))
        self.inputs = suite.images
        if suite.labels is not None:
            self.accuracy, rows = judge_accuracy(
                self.bundle.manifest, cases[0], suite.labels, suite.dataset, accept=self.allow_low_accuracy
            )
            self.rows += rows

    def _file_rows(self, cases: Sequence[Case], model: ModelProto | None) -> None:
        if model is not None:
            self.rows += proof_rows(self.bundle, model, cases, self.forecast)
        for name in TENSORS:
            if self.changed(name) is None:  # else it was not written, or its runtime's row says what is wrong
                self._format_rows(name, cases, model)

    def _format_rows(self, name: str, cases: Sequence[Case], model: ModelProto | None) -> None:
        forecast = self.forecast
        try:
            self.rows += format_rows(
                self.bundle, name, cases, model=model, limit=forecast.limit, rounding=forecast.rounding
            )
        except Unavailable as error:
            self.skipped[f"proof of {name}"] = error.message
        except BnexportError as error:
            self.rows.append(failed("weights", name, "bits", error.message))

    def _stand_in_for_proof(self) -> None:
        """Use the manifest, whose digest holds, in place of the proof without onnx; a bundle that was never proved fails."""
        told = "the float64 proof was not repeated here: onnx is not installed"
        self.skipped["weights"] = "whether all formats hold the same weights: onnx is not installed"
        error = self._proof_at_export()
        if error is None:
            reason = f"{told}; the manifest holds no proof from export that passes"
            self.rows.append(failed("file-proof", MODEL_ONNX, "open", reason))
        else:
            self.waived["file-proof"] = f"{told}; at export it was {error:.1e} of scale (manifest, whose digest holds)"

    def _proof_at_export(self) -> float | None:
        """Return the largest error of this file's proof at export; None unless every row is within today's bound."""
        rows = self.bundle.manifest.verification.get("rows")
        errors = [
            row.get("error")
            for row in (rows if isinstance(rows, list) else ())
            if isinstance(row, dict) and row.get("stage") == "file-proof" and row.get("subject") == MODEL_ONNX
        ]
        bounds = {"float32": TOLERANCES["file-proof"].bound}  # in half precision the bound is the manifest's own word
        known = [error for error in errors if isinstance(error, float)]
        if not known or len(known) < len(errors):
            return None
        worst = max(known)
        return worst if worst <= bounds.get(self.precision, worst) else None

    def _warn_of_synthetic(self, cases: Sequence[Case]) -> None:
        if cases[0].batch.name not in REAL and any(map(has_labels, cases[0].expected.values())):
            self.warnings.append(
                "the inputs are synthetic: how many labels change on noise says little of real samples; "
                "give real ones with --dataset"
            )
