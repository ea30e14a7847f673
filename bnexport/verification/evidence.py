"""Collect all that a verification needs before any engine runs: files, the original's answers, inputs, predictions.

Only files whose hash holds are opened. The original is evaluated once for each input, and inputs of one size in one call.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bnexport.bundle import GOLDEN, MODEL_ONNX, WEIGHTS, Bundle
from bnexport.data.samples import Samples
from bnexport.errors import BnexportError, MissingDependency, Unavailable, UsageError
from bnexport.onnx_files.models import read_model, work_of
from bnexport.optional import require
from bnexport.tensors import check_feeds
from bnexport.verification.budget import Budget, Work, budget_of
from bnexport.verification.forecast import Forecast
from bnexport.verification.full_check import judge_accuracy
from bnexport.verification.inputs import (
    Batch,
    Case,
    Outputs,
    Suite,
    build_suite,
    each_once,
    other_sized_batches,
    smallest_batch,
)
from bnexport.verification.int8 import int8_file_rows, int8_notes, record_of, within_range
from bnexport.verification.metrics import common_scales, count_flips, has_labels
from bnexport.verification.reference import Reference, live_reference, not_rebuilt, rebuilt_reference, takes_empty_batch
from bnexport.verification.scope import Scope
from bnexport.verification.stages import TORCH_PROOFS, compare, failed, format_rows, proof_rows, proved_file
from bnexport.verification.tolerances import TOLERANCES
from bnexport.verification.verdict import REAL, Row

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch import nn

#: Description of a reference that is not the original itself.
GOLDEN_ALONE = "the bundle's golden vectors"
#: Largest relative difference of an image's mean and deviation: versions of pillow resize with other rounding.
_SAME_IMAGE = 0.01

#: Multiplications of a float64 proof that take about a second on two cores.
_SHORT_PROOF = 1e10


@dataclass(frozen=True)
class Evidence:
    """The inputs of a verification with their right answers, and the checks that were made while they were prepared."""

    bundle: Bundle
    module: nn.Module | None  # The live original network, if the caller gave it
    #: File of the bundle -> why it must not be opened; None for a file whose hash holds
    problems: Mapping[str, str | None]
    #: model.onnx as read, of an int8 bundle its float32 original; None when it can't be read here
    model: ModelProto | None
    int8: ModelProto | None  # model.onnx of an int8 bundle; None for others
    work: Work  # The work of one sample
    budget: Budget  # Number of samples of each kind
    golden: Case | None  # The golden vectors; None when they can't be read
    cases: tuple[Case, ...]  # The batches of stages 2 and 3, real images first
    #: The batch whose first samples are run in other batch sizes; None when the batch dimension is fixed
    sizes: Batch | None
    empty: bool  # Zero samples have to work
    labels: Any  # True classes of the first batch, int64 (n,); None without
    forecast: Forecast  # Predicts the noise of precisions
    rows: tuple[Row, ...]  # The checks so far
    skipped: Mapping[str, str]  # Part -> why it was not checked
    waived: Mapping[str, str]  # Required stage -> why it can't be run here, and what replaces it
    reference: str  # Description of the reference
    inputs: str  # Description of the real inputs, or the reason why there are none
    #: Accuracy of the reference on labelled samples, ``{"dataset", "n", "correct"}``, with mean and deviation of the
    #: "first_image" as an input; empty without
    accuracy: Mapping[str, Any]

    @property
    def precision(self) -> str:
        """Return the precision of the weights in the files."""
        return self.bundle.manifest.precision

    def changed(self, name: str) -> str | None:
        """Return the reason why a file must not be opened; None for a file whose hash holds."""
        return _changed(self.problems, name)

    def warnings(self) -> tuple[str, ...]:
        """Return the warnings for the reader that no row contains."""
        notes = int8_notes(record_of(self.bundle.manifest))
        synthetic = bool(self.cases) and self.cases[0].batch.name not in REAL
        if synthetic and any(map(has_labels, self.cases[0].expected.values())):
            notes += (
                "the inputs are synthetic: the number of labels that change on noise differs from that on real samples; "
                "give real ones with --dataset (and --source for your own network)",
            )
        return notes


def prepare(
    bundle: Bundle,
    module: nn.Module | None,
    *,
    seed: int,
    data_dir: str | Path | None = None,
    samples: Samples | None = None,
    scope: Scope,
) -> Evidence:
    """Read the files, evaluate the original on every input, and record what fails. Arguments: see ``verify``."""
    problems = {name: bundle.problem(name) for name in bundle.manifest.files}  # once: hashing a gigabyte takes seconds
    golden, rows = _golden(bundle, problems)
    model, model_rows, skipped, waived = _model(bundle, problems, proved_file(bundle))
    int8, int8_rows = _model(bundle, problems)[:2] if bundle.manifest.precision == "int8" else (None, [])
    reference, description, reference_rows = _find_reference(bundle, module, problems)
    rows += [*model_rows, *int8_rows, *reference_rows]
    if samples is not None and reference is None:
        require("torch", purpose="--samples, which needs the original network in float64,")
        raise UsageError(
            f"--samples needs the original network, which is missing here (reference: {description})",
            remedy="Give the original network with --source FILE.py:FACTORY",
        )
    work = _work(bundle, golden, model)
    budget = budget_of(work, thorough=scope.thorough, most=scope.max_samples, given=samples is not None)
    answered = _Answered()
    if golden is not None and reference is not None:
        given = golden.batch.feeds
        suite = build_suite(bundle.manifest, given, data_dir=data_dir, seed=seed, budget=budget, samples=samples)
        live, accept = module is not None, scope.allow_low_accuracy
        answered = _answers(bundle, reference, golden, suite, seed=seed, live=live, accept=accept)
    cases = answered.cases or (() if golden is None else (golden,))
    varies = all(isinstance(spec.shape[0], str) for spec in bundle.manifest.signature.inputs)
    sizes = next((case.batch for case in cases if case.batch.name in ("noise", "golden")), None)
    forecast = Forecast(
        model, cases=cases, budget=budget, varies=varies, stored=bundle.manifest.precision, recorded=_recorded(bundle),
        int8=int8, pixels=bundle.manifest.takes_pixels,
    )  # fmt: skip
    return Evidence(
        bundle=bundle,
        module=module,
        problems=problems,
        model=model,
        int8=int8,
        work=work,
        budget=budget,
        golden=golden,
        cases=cases,
        sizes=sizes if varies else None,
        empty=answered.empty and varies,
        labels=answered.labels,
        forecast=forecast,
        rows=(*rows, *answered.rows),
        skipped=skipped,
        waived=waived,
        reference=description,
        inputs=answered.inputs,
        accuracy=answered.accuracy,
    )


def file_checks(evidence: Evidence, *, read: Collection[str]) -> tuple[list[Row], dict[str, str]]:
    """Prove the written files in float64 (stage 1). Return the checks, and proof -> why it was not made.

    If a proof takes more than a second, then a file of torch that no runtime reads (``read``) has only its weights compared.
    """
    rows: list[Row] = []
    skipped: dict[str, str] = {}
    cases, forecast = evidence.cases, evidence.forecast
    if not cases:
        return rows, skipped
    fronts = [forecast.front(case) for case in cases]
    short = evidence.work.multiplications * sum(front.batch.n for front in fronts) <= _SHORT_PROOF
    if evidence.model is not None:
        rows += proof_rows(evidence.bundle, evidence.int8 or evidence.model, cases, forecast)
    if evidence.precision == "int8":
        rows += int8_file_rows(evidence.bundle, evidence.model, evidence.int8)
    for name in TORCH_PROOFS:
        if evidence.changed(name) is not None:
            continue  # it was not written, or the check of its runtime states the fault
        try:
            proved = name in read or short
            if not proved:
                skipped[f"proof of {name}"] = "none of the named runtimes reads this file; its weights are compared"
            given = fronts if proved else []
            rows += format_rows(evidence.bundle, name, given, model=evidence.model, rounding=forecast.rounding)
        except Unavailable as error:
            skipped[f"proof of {name}"] = error.message
        except BnexportError as error:
            rows.append(failed("weights", name, "bits", error.message))
    return rows, skipped


def coverage(evidence: Evidence, rows: Sequence[Row]) -> str:
    """Return how many samples were compared, and how many a thorough verification compares; ``rows`` are the runtimes'."""
    if not evidence.cases:
        return "nothing was compared: there are no inputs"
    kinds = ", ".join(f"{case.batch.n} {case.batch.name}" for case in evidence.cases)
    proof = sum(evidence.forecast.front(case).batch.n for case in evidence.cases)
    text = f"each runtime: {kinds}" if rows else f"inputs: {kinds}"
    if rows and evidence.sizes is not None:
        text += f"; batch sizes {', '.join(map(str, evidence.budget.batch_sizes))}"
    text += f"; float64 proofs: {proof}"
    more = budget_of(evidence.work, thorough=True, given=True)
    times = more.synthetic / evidence.budget.synthetic
    return text if times < 1.05 else f"{text}; --thorough compares {times:.1f} times as many synthetic samples"


def _changed(problems: Mapping[str, str | None], name: str) -> str | None:
    return problems.get(name, f"{name} is not in the bundle")


def _golden(bundle: Bundle, problems: Mapping[str, str | None]) -> tuple[Case | None, list[Row]]:
    """Return the golden vectors, or a failed check with the reason why they can't be used."""
    found = [problem for name, problem in problems.items() if name.startswith(f"{GOLDEN}/") and problem is not None]
    if found:
        return None, [failed("golden", GOLDEN, "open", f"{found[0]}, so it was not opened")]
    try:
        inputs, outputs = bundle.golden()
        check_feeds(bundle.manifest.signature, inputs)
    except BnexportError as error:
        return None, [failed("golden", GOLDEN, "open", error.message)]
    return Case(Batch("golden", inputs), outputs), []


def _model(
    bundle: Bundle, problems: Mapping[str, str | None], name: str = MODEL_ONNX
) -> tuple[ModelProto | None, list[Row], dict[str, str], dict[str, str]]:
    """Return an ONNX file as read, failed rows, skipped parts and waived stages."""
    if (problem := _changed(problems, name)) is not None:
        return None, [failed("file-proof", name, "open", f"{problem}, so it was not opened")], {}, {}
    try:
        return read_model(bundle.file(name)), [], {}, {}
    except MissingDependency:
        rows, waived = _proof_at_export(bundle)
        return None, rows, {"weights": "the weights of the formats were not compared: onnx is not installed"}, waived
    except BnexportError as error:
        return None, [failed("file-proof", name, "open", error.message)], {}, {}


def _proof_at_export(bundle: Bundle) -> tuple[list[Row], dict[str, str]]:
    """Use the manifest, whose digest holds, in place of the proof without onnx.

    A bundle fails unless it was proved at export, and every row of that proof is within today's bound.
    """
    rows = bundle.manifest.verification.get("rows")
    errors = [
        row.get("error")
        for row in (rows if isinstance(rows, list) else ())
        if isinstance(row, dict) and row.get("stage") == "file-proof" and row.get("subject") == proved_file(bundle)
    ]
    known = [error for error in errors if isinstance(error, float)]
    worst = max(known, default=math.nan)
    bounds = {"float32": TOLERANCES["file-proof"].bound}  # in half precision the manifest states the bound
    text = "the float64 proof was not repeated here: onnx is not installed"
    if len(known) < len(errors) or not worst <= bounds.get(bundle.manifest.precision, worst):
        reason = f"{text}, and the manifest has no proof from export that passes"
        return [failed("file-proof", MODEL_ONNX, "open", reason)], {}
    return [], {"file-proof": f"{text}; at export it was {worst:.1e} of scale (manifest, whose digest holds)"}


def _find_reference(
    bundle: Bundle, module: nn.Module | None, problems: Mapping[str, str | None]
) -> tuple[Reference | None, str, list[Row]]:
    """Return the original in float64 if there is one, its description, and a failed row where it should be there and is not."""
    if module is not None:
        reference = live_reference(bundle, module)
        return reference, reference.description, []
    if (why_not := not_rebuilt(bundle)) is not None:
        return None, f"{GOLDEN_ALONE}, not the original network, {why_not}", []
    problem = _changed(problems, WEIGHTS)
    try:
        if problem is None:
            reference = rebuilt_reference(bundle)
            return reference, reference.description, []
    except BnexportError as error:
        problem = error.message
    return (
        None,
        GOLDEN_ALONE,
        [failed("golden-reference", "reference", "open", f"no reference could be built: {problem}")],
    )


def _work(bundle: Bundle, golden: Case | None, model: ModelProto | None) -> Work:
    """Return the work per sample; multiplications are estimated from the file's size where its content can't be read."""
    feeds = {} if golden is None else golden.batch.feeds
    kept = 0
    if golden is not None:
        kept = sum(array.nbytes for array in (*feeds.values(), *golden.expected.values())) // max(golden.batch.n, 1)
    if model is None:
        return Work(int(bundle.manifest.files.get(MODEL_ONNX, {}).get("size", 0)), kept, kept)
    cost, values = work_of(model, {name: array.shape[1:] for name, array in feeds.items()})
    return Work(cost, kept, max(values, kept))


def _recorded(bundle: Bundle) -> dict[str, float]:
    """Return precision -> error of scale, predicted when the bundle was made."""
    findings = bundle.manifest.verification.get("findings")
    listed = findings.get("predictions") if isinstance(findings, dict) else None
    return {
        str(item.get("precision")): item["error"]
        for item in (listed if isinstance(listed, list) else ())
        if isinstance(item, dict) and isinstance(item.get("error"), float)
    }


@dataclass(frozen=True)
class _Answered:
    """Inputs with the original's answers; the attributes are those of ``Evidence``."""

    cases: tuple[Case, ...] = ()
    inputs: str = "golden vectors alone: the original network is missing here"
    labels: Any = None
    empty: bool = False
    rows: Sequence[Row] = ()
    accuracy: Mapping[str, Any] = field(default_factory=dict)


def _answers(
    bundle: Bundle, reference: Reference, golden: Case, suite: Suite, *, seed: int, live: bool, accept: bool
) -> _Answered:
    """Evaluate the original on every batch, and compare it with the golden vectors and the accuracy at export."""
    batches = [replace(batch, feeds=within_range(bundle.manifest, batch.feeds)) for batch in suite.batches]
    answers = each_once([golden.batch, *batches], reference.evaluate)
    if (problem := next((item for item in answers[1:] if isinstance(item, BnexportError)), None)) is not None:
        if live:
            raise problem  # the caller's own module can't be used: no verdict on the bundle
        return _Answered(rows=[failed("golden-reference", "reference", "open", problem.message)])
    on_golden, *others = answers
    more, rows = _other_sizes(bundle, reference, golden, seed)
    pairs = zip(batches, others, strict=True)
    answered = [(batch, item) for batch, item in pairs if not isinstance(item, BnexportError)] + more
    scales = common_scales([item for _, item in answered])
    cases = tuple(Case(batch, item, scales) for batch, item in answered)
    if isinstance(on_golden, BnexportError):
        rows.append(failed("golden-reference", "reference", "golden", on_golden.message))
    else:
        rows.append(compare("golden-reference", "reference", "golden", on_golden, golden.expected))
    accuracy = _accuracy(cases[0], suite)
    if accuracy and suite.labels is not None:
        rows += _accuracy_rows(bundle, cases[0], accuracy)
        facts, judged = judge_accuracy(bundle.manifest, cases[0], suite.labels, accept=accept)
        accuracy |= facts
        rows += judged
    noise = next(case.batch for case in cases if case.batch.name == "noise")
    return _Answered(cases, suite.images, suite.labels, takes_empty_batch(reference, noise.feeds), rows, accuracy)


def _other_sizes(
    bundle: Bundle, reference: Reference, golden: Case, seed: int
) -> tuple[list[tuple[Batch, Outputs]], list[Row]]:
    """Return batches in another and the smallest size, where sizes vary, or a failed row where the original takes none."""
    signature, refused = bundle.manifest.signature, ""
    for batch in other_sized_batches(signature, golden.batch.feeds, seed=seed):
        (found,) = each_once([batch], reference.evaluate)
        if isinstance(found, BnexportError):
            refused = found.message
            continue
        smallest = smallest_batch(signature, golden.batch.feeds, seed=seed)
        if smallest is None:
            return [(batch, found)], []
        (least,) = each_once([smallest], reference.evaluate)
        if isinstance(least, BnexportError):
            return [(batch, found)], [failed("strict", "reference", "the smallest size", least.message)]
        return [(batch, found), (smallest, least)], []
    if refused:
        return [], [
            failed("strict", "reference", "another size", f"the original network fails in every other size: {refused}")
        ]
    return [], []


def _accuracy(images: Case, suite: Suite) -> dict[str, Any]:
    """Return how many labels the reference gets right; {} without labels, or when the output is not one score per class."""
    scores = next(iter(images.expected.values()))
    if suite.labels is None or scores.ndim != 2:
        return {}
    correct = int((scores.argmax(axis=1) == suite.labels).sum())
    first = next(iter(images.batch.feeds.values()))[0].astype(np.float64)
    facts = [float(first.mean()), float(first.std())]
    return {"dataset": suite.dataset, "n": images.batch.n, "correct": correct, "first_image": facts}


def _accuracy_rows(bundle: Bundle, images: Case, now: Mapping[str, Any]) -> list[Row]:
    """Compare accuracy, and mean and deviation of the first image as an input, with those at export.

    They differ when the preprocessing, the images or the weights do.
    """
    before = bundle.manifest.verification.get("accuracy")
    if not isinstance(before, dict) or not isinstance(before.get("correct"), int):
        return []  # made without images, or by another version
    if before.get("dataset") != now["dataset"]:
        return []
    rows: list[Row] = []
    first = before.get("first_image")
    if isinstance(first, list) and len(first) == 2 and all(isinstance(value, float) for value in first):
        error = max(abs(one - other) for one, other in zip(first, now["first_image"], strict=True))
        same = error <= _SAME_IMAGE * (abs(first[0]) + first[1])
        reason = (
            ""
            if same
            else "the first image as an input differs from that at export: the preprocessing or the images changed"
        )
        rows.append(Row("accuracy", "reference", "first image", same, reason, n=1))
    if before.get("n") != now["n"]:
        return rows
    scores = next(iter(images.expected.values()))
    unsure = count_flips(scores, scores, bound=TOLERANCES["golden-reference"].bound).uncertain
    passed = abs(before["correct"] - now["correct"]) <= unsure
    reason = f"{now['correct']} of {now['n']} images right, {before['correct']} at export"
    if not passed:
        reason += ": the preprocessing, the images or the weights changed"
    return [*rows, Row("accuracy", "reference", "images", passed, reason, n=now["n"])]
