"""The verdict as one self-contained page: no script, no request, readable on a phone, in the dark and on paper."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import jinja2

from bnexport.bundle import Bundle, Manifest
from bnexport.folding.report import GONE, OUTCOMES, FoldReport
from bnexport.reporting.figures import Samples, error_against_margin, error_histogram, error_overview
from bnexport.reporting.flips import SHOWN_FLIPS, class_name, flipped_rows
from bnexport.reporting.fold_summary import gain_of, growth_of, tallies, verdict_of
from bnexport.reporting.summary import (
    certified,
    flipped,
    groups,
    module_name,
    number,
    rate_bound,
    run_name,
    total_flips,
    word,
)
from bnexport.tensors import Signature
from bnexport.verification.tolerances import TOLERANCES
from bnexport.verification.verdict import VerificationReport

TEMPLATE = "report.html.jinja"

#: BatchNorm calls up to which the page shows its table open; a longer one unfolds on a click.
OPEN_CALLS = 40

#: Stage of a verification -> the question that it answers. Why its bound is what it is stands in TOLERANCES.
STAGES: dict[str, str] = {
    "integrity": "Is every file the one that was written?",
    "golden": "Do the stored inputs give the stored outputs on each runtime?",
    "golden-reference": "Are the stored outputs those of the unfolded network?",
    "declaration": "Does model.onnx declare the names, types, shapes and versions of the manifest?",
    "weights": "Do all formats hold the same weights, bit by bit?",
    "file-proof": "Is the fold exact? The written file, evaluated in float64, against the unfolded network in float64.",
    "strict": "Do the kernels compute it? Each runtime in strict float32 against the float64 reference.",
    "shipping": "Is the noise what this precision makes? Each runtime as it is served, against the float64 reference.",
    "precision": "Which precision does the error itself tell of, and was that asked for?",
    "batch-size": "Does the answer for a sample depend on how many others are fed with it?",
    "repeat": "Does the same input give the same answer twice?",
    "accuracy": "Is the reference the trained network?",
    "accuracy-change": "Does the runtime label worse than the reference, by McNemar's exact test?",
}


def render_report(
    manifest: Manifest,
    *,
    fold: FoldReport,
    verification: VerificationReport,
    environment: Mapping[str, Any],
    commands: Sequence[str],
    samples: Samples | None = None,
) -> str:
    """The page as text; the same arguments give the same bytes.

    Args:
        manifest: Name, signature, labels and so on; its ``fold``, ``verification`` and ``environment`` are not read.
        fold: What became of each BatchNorm.
        verification: The verdict.
        environment: As from ``bnexport.environment.environment``.
        commands: How to reproduce, one shell command each.
        samples: Error and margin per sample by runtime; with it the page shows their distribution.
    """
    gathered = groups(verification)
    changed = flipped_rows(verification)
    page = _environment().get_template(TEMPLATE)
    return page.render(
        manifest=manifest,
        inputs=_specs(manifest.signature)[0],
        outputs=_specs(manifest.signature)[1],
        fold=fold,
        outcomes=OUTCOMES,
        gone=GONE,
        tallies=tallies(fold),
        many=len(fold.rows) > OPEN_CALLS,
        verification=verification,
        groups=gathered,
        stages=_stages(verification),
        headline=_headline(verification),
        flips=total_flips(group.flips for group in gathered if group.flips is not None),
        rate_bound=rate_bound(verification),
        plots=_plots(verification, samples),
        flipped_rows=changed[:SHOWN_FLIPS],
        flipped_more=max(0, len(changed) - SHOWN_FLIPS),
        environment=environment,
        commands=list(commands),
    )


def verification_page(bundle: Bundle, report: VerificationReport, *, command: str) -> str:
    """The page of a later verification, made on whatever machine it ran on.

    Args:
        bundle: What was verified; its manifest tells the model and the account of the fold.
        report: The verdict.
        command: How to run it again.
    """
    fold = FoldReport.from_json(bundle.manifest.fold) if bundle.manifest.fold else FoldReport((), 0, None)
    return render_report(
        bundle.manifest,
        fold=fold,
        verification=report,
        environment=report.environment,
        commands=[command],
        samples=report.samples or None,
    )


def _environment() -> jinja2.Environment:
    """Autoescape is on for every template: labels and module paths come from other people's files."""
    source = resources.files("bnexport.reporting").joinpath("templates", TEMPLATE).read_text(encoding="utf-8")
    environment = jinja2.Environment(
        loader=jinja2.DictLoader({TEMPLATE: source}),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        number=number,
        word=word,
        flipped=flipped,
        certified=certified,
        module_name=module_name,
        gain=gain_of,
        fold_verdict=verdict_of,
        growth=growth_of,
        compact=_compact,
        run_name=run_name,
        class_name=class_name,
    )
    return environment


def _headline(verification: VerificationReport) -> list[tuple[str, str, str]]:
    """(stage, worst error, bound) of every stage that measures one, for the top of the page."""
    found: list[tuple[str, str, str]] = []
    for stage in dict.fromkeys(row.stage for row in verification.rows):
        worst = verification.worst(stage)
        if worst is not None and worst.bound is not None:
            found.append((stage, number(worst.error), number(worst.bound)))
    return found


def _stages(verification: VerificationReport) -> dict[str, str]:
    """What each stage of this report asks, and why its bound is what it is."""
    found: dict[str, str] = {}
    for stage in dict.fromkeys(row.stage for row in verification.rows):
        tolerance = TOLERANCES.get(stage)
        because = f"Bound {number(tolerance.bound)}: {tolerance.reason}." if tolerance else ""
        found[stage] = " ".join(part for part in (STAGES.get(stage, ""), because) if part)
    return found


def _plots(verification: VerificationReport, samples: Samples | None) -> list[tuple[str, str, str]]:
    """(data URI, alternative text, caption) of each picture; empty when nothing was measured."""
    strict = verification.worst("strict")
    found: list[tuple[str, str, str]] = []
    if any(row.error is not None for row in verification.rows):
        found.append(
            (
                _data_uri(error_overview(groups(verification))),
                "Error of every comparison beside its bound, by subject and stage",
                "Every comparison: largest |difference| / largest |reference|. "
                "Errors of 1e-10 and less are drawn at 1e-10.",
            )
        )
    if samples and strict is not None and strict.bound is not None:
        found.append(
            (
                _data_uri(error_histogram(samples, tolerance=strict.bound)),
                "Histogram of the error per sample for each runtime",
                "Error per sample, by runtime.",
            )
        )
        found.append(
            (
                _data_uri(error_against_margin(samples, tolerance=strict.bound)),
                "Error against margin of each sample, one panel per runtime",
                "Error against margin (the reference's largest logit less its second largest). "
                "Below the grey region no label can change.",
            )
        )
    return found


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _specs(signature: Signature) -> tuple[list[str], list[str]]:
    """Inputs and outputs as 'input: float32 (batch, 1, 28, 28)'."""
    texts = [
        [f"{spec.name}: {spec.dtype} ({', '.join(map(str, spec.shape))})" for spec in specs]
        for specs in (signature.inputs, signature.outputs)
    ]
    return texts[0], texts[1]


def _compact(value: Any) -> str:
    """JSON values as text a person reads: strings bare, the rest as JSON with sorted keys."""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
