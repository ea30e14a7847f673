"""The verdict as one self-contained page: no script, no request, readable on a phone, in the dark and on paper."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from bnexport.bundle import Bundle, Manifest
from bnexport.folding.fold_report import GONE, OUTCOMES, FoldReport
from bnexport.reporting import charts, summary, tables
from bnexport.tensors import TensorSpec
from bnexport.verification.tolerances import TOLERANCES
from bnexport.verification.verdict import Group, VerificationReport, number, word

#: Largest number of BatchNorm calls whose table is shown open; a longer table unfolds on a click.
OPEN_CALLS = 40
#: Largest number of self-test faults whose table is shown open; of more, only uncaught faults are shown.
OPEN_FAULTS = 12
#: Number of failed rows in the verdict: one fault fails every run on every input, so the first ones show the cause.
SHOWN_FAILURES = 12
#: Number of listed class names.
SHOWN_LABELS = 40
#: Stages in the verdict, if they were reached: one for each cause.
HEADLINE = ("file-proof", "strict", "shipping")


def render_report(
    manifest: Manifest,
    *,
    fold: FoldReport | None,
    verification: VerificationReport,
    environment: Mapping[str, Any],
    commands: Sequence[str],
    run_command: str = "",
    samples: charts.Samples | None = None,
) -> str:
    """Return the page as text; the same arguments give the same bytes.

    The manifest's ``fold``, ``verification`` and ``environment`` are not read. ``commands`` repeat the verification;
    ``run_command`` is the base of each run's command ("" is the first of ``commands``). ``samples`` has error and margin per
    sample by run, whose distribution the page shows.
    """
    lines, base = summary.runs(verification), run_command or next(iter(commands), "")
    commanded = [(run.name, summary.command_of(run, base, seed=verification.seed)) for run in lines]
    pixels = ["pixels, converted by the files"] if manifest.takes_pixels else []
    page = page_environment().get_template("report.html.jinja")
    return page.render(
        manifest=manifest,
        inputs=[*map(_spec, manifest.signature.inputs), *pixels],
        outputs=[*map(_spec, manifest.signature.outputs)],
        fold=fold or FoldReport((), 0),
        no_fold="The bundle contains no fold report." if fold is None else "The network has no BatchNorm.",
        verification=verification,
        runs=lines,
        files=summary.file_groups(verification),
        stages=_stages(verification),
        headline=_headline(verification),
        samples=samples or {},
        environment=environment,
        commands=commands,
        run_commands=[(name, command) for name, command in commanded if command],
    )


def verification_page(bundle: Bundle, report: VerificationReport, *, command: str, run_command: str = "") -> str:
    """Return the page of a later verification, which may have run on another machine; ``command`` repeats it.

    ``run_command`` is the command without the options of a run; "" is ``command``.
    """
    fold = bundle.manifest.fold
    return render_report(
        bundle.manifest,
        fold=FoldReport.from_json(fold) if fold else None,
        verification=report,
        environment=report.environment,
        commands=[command],
        run_command=run_command,
        samples=report.samples or None,
    )


def page_environment() -> jinja2.Environment:
    """Return the templates' environment, with autoescape: labels and module paths come from untrusted files."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("bnexport.reporting"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals.update(
        charts=charts,
        summary=summary,
        tables=tables,
        outcomes=OUTCOMES,
        gone=GONE,
        meaning={**summary.FILE_CHECKS, **summary.KERNEL_STAGES},
        shown_calls=OPEN_CALLS,
        shown_faults=OPEN_FAULTS,
        shown_failures=SHOWN_FAILURES,
        shown_labels=SHOWN_LABELS,
    )
    environment.filters.update(number=number, word=word, compact=_compact, short="{:.3g}".format)
    return environment


def _headline(verification: VerificationReport) -> list[tuple[str, str, str, str]]:
    """Return (stage, error nearest to its bound, bound, "1.3" x predicted or "") of each stage in HEADLINE."""
    found: list[tuple[str, str, str, str]] = []
    for stage in HEADLINE:
        whole = Group(stage, "", tuple(row for row in verification.rows if row.stage == stage))
        if whole.worst is not None and whole.worst.error is not None:
            ratio = whole.ratio if stage == "shipping" else None
            found.append((stage, *whole.worst_numbers, "" if ratio is None else number(ratio)))
    return found


def _stages(verification: VerificationReport) -> dict[str, str]:
    """Return each stage of this report with the reason for its bound."""
    found: dict[str, str] = {}
    for stage in dict.fromkeys(row.stage for row in verification.rows):
        tolerance = TOLERANCES.get(stage)
        because = f"Bound {number(tolerance.bound)}: {tolerance.reason}." if tolerance else ""
        found[stage] = " ".join(part for part in (summary.STAGES.get(stage, ""), because) if part)
    return found


def _spec(spec: TensorSpec) -> str:
    """Return an input or output as 'input: float32 (batch, 1, height, 28), height from 41'."""
    smallest = "".join(f", {dim} from {size}" for dim, size in spec.smallest.items())
    return f"{spec.name}: {spec.dtype} ({', '.join(map(str, spec.shape))}){smallest}"


def _compact(value: Any) -> str:
    """Return a JSON value as text: strings bare, the rest as JSON with sorted keys."""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
