"""A verification as one line per run: a runtime in one setting, what each stage says of it, how to do it again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from bnexport.reporting.summary import NOTHING, Group, groups, number
from bnexport.runtimes.base import CONV_SEARCHES, KERNEL_PRECISIONS, OPTIMISATIONS
from bnexport.runtimes.catalogue import RUNNERS
from bnexport.verification.inputs import REAL
from bnexport.verification.verdict import Row, VerificationReport, run_name

#: Stages that a run goes through -> heading of their column, in the order of the table. The others look at files.
RUN_STAGES: dict[str, str] = {
    "golden": "golden",
    "strict": "strict",
    "shipping": "as served",
    "batch-size": "batch size",
    "repeat": "repeat",
    "accuracy-change": "accuracy",
    "precision": "precision",
}
#: Stages whose error is that of the kernels, against the unfolded network.
KERNEL_STAGES = ("strict", "shipping")
#: Part of ``RunSettings.describe`` -> options of ``bnexport verify`` that ask for it.
OPTIONS: dict[str, tuple[str, ...]] = {
    "IO binding": ("--io-binding",),
    **{name: ("--precision", name) for name in KERNEL_PRECISIONS},
    **{f"optimisation {name}": ("--optimisation", name) for name in OPTIMISATIONS},
    **{f"{name} search": ("--conv-search", name) for name in CONV_SEARCHES},
}


@dataclass(frozen=True)
class ReportedRun:
    """One runtime in one setting.

    Attributes:
        subject: The runtime's name.
        settings: As in its rows; "" for strict float32 as users serve it.
        stages: Stage -> what it says of this run; a stage without a row is not there.
    """

    subject: str
    settings: str
    stages: Mapping[str, Group]

    @property
    def name(self) -> str:
        """As in the findings: "onnxruntime-cuda, tf32"."""
        return run_name(self.subject, self.settings)

    @property
    def rows(self) -> tuple[Row, ...]:
        """Every comparison of this run."""
        return tuple(row for group in self.stages.values() for row in group.rows)

    @property
    def passed(self) -> bool:
        """True when every comparison passed."""
        return all(row.passed for row in self.rows)

    @property
    def kernels(self) -> Group | None:
        """The stage that judges its kernels; None when it was not reached."""
        return next((self.stages[name] for name in KERNEL_STAGES if name in self.stages), None)

    @property
    def first(self) -> Row | None:
        """The comparison on the first batch that has a number: real inputs, where there are some."""
        rows = self.kernels.rows if self.kernels else ()
        return next((row for row in rows if row.error is not None), None)

    @property
    def detected(self) -> str:
        """The precision that its error tells of; "" where nobody looked."""
        return next((row.detected for row in self.rows if row.detected), "")


@dataclass(frozen=True)
class Cell:
    """What one stage says of one run, as text.

    Attributes:
        passed: Whether every comparison did.
        value: The error nearest to its bound, the precision found, or "".
        note: "1.3 x predicted", or "".
    """

    passed: bool
    value: str
    note: str


def runs(report: VerificationReport) -> tuple[ReportedRun, ...]:
    """The lines of the table, in the order in which they were run."""
    gathered: dict[tuple[str, str], dict[str, Group]] = {}
    for group in groups(report):
        if group.stage in RUN_STAGES:
            row = group.rows[0]
            gathered.setdefault((row.subject, row.settings), {})[group.stage] = group
    return tuple(ReportedRun(subject, settings, stages) for (subject, settings), stages in gathered.items())


def columns(lines: tuple[ReportedRun, ...]) -> dict[str, str]:
    """Stage -> heading of those stages that at least one run has."""
    return {stage: heading for stage, heading in RUN_STAGES.items() if any(stage in line.stages for line in lines)}


def file_groups(report: VerificationReport) -> tuple[Group, ...]:
    """What was checked without an engine: hashes, declarations, proofs, weights, the reference."""
    return tuple(group for group in groups(report) if group.stage not in RUN_STAGES)


def cell(group: Group) -> Cell:
    """One stage of one run in two words."""
    if group.stage == "precision":
        return Cell(group.passed, next((row.detected for row in group.rows if row.detected), ""), "")
    worst = group.worst
    value = number(worst.error) if worst is not None and worst.error is not None else ""
    ratio = group.ratio if group.stage in KERNEL_STAGES else None
    return Cell(group.passed, value, "" if ratio is None else f"{number(ratio)} x predicted")


def flips_on_real_inputs(run: ReportedRun) -> str:
    """Labels that changed among the real inputs, "24 of 10000"; NOTHING where none were counted."""
    rows = run.kernels.rows if run.kernels else ()
    counted = [row for row in rows if row.flips is not None and row.case in REAL]
    if not counted:
        return NOTHING
    changed = sum(row.flips.explained + row.flips.unexplained for row in counted if row.flips)
    return f"{changed} of {sum(row.n for row in counted)}"


def command_of(run: ReportedRun, verify: str, *, seed: int = 0) -> str:
    """The command that does this run alone; "" for what no option asks for.

    Args:
        run: Its subject is looked up among the runtimes.
        verify: The command that verifies the whole bundle: "bnexport verify BUNDLE".
        seed: Of the synthetic inputs.
    """
    spec = next((spec for spec in RUNNERS if spec.name == run.subject), None)
    if spec is None or not verify:
        return ""
    words: list[str] = ["--runtime", run.subject]
    parts = [part for part in run.settings.split(", ") if part]
    if len(spec.precisions) > 1 and not any(part in KERNEL_PRECISIONS for part in parts):
        words += ["--precision", "float32"]
    for part in parts:
        words += OPTIONS.get(part, ())
    if seed:
        words += ["--seed", str(seed)]
    return f"{verify} {shlex.join(words)}"
