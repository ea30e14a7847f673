"""Verification rows gathered by stage and subject, as one line per run, and as samples whose label changed; numbers as text.

The terminal and the page share them. A run is a runtime in one setting.
"""

from __future__ import annotations

import base64
import io
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

import numpy as np

from bnexport.onnx_files.emulation import PRECISIONS
from bnexport.runtimes.base import CONV_SEARCHES, KERNEL_PRECISIONS, OPTIMISATIONS
from bnexport.runtimes.catalogue import RUNNERS
from bnexport.tensors import Array
from bnexport.verification.verdict import (
    NOTHING,
    REAL,
    FlippedSample,
    Flips,
    Group,
    Int8Findings,
    Int8Range,
    NoisePrediction,
    Row,
    VerificationReport,
    groups,
    labels_right,
    number,
    run_name,
    total_flips,
)

#: Number of layers in the sentence on an int8 file.
_NOISY = 5
#: Share of a range by which samples may exceed it without being listed.
_EXCESS = 0.1


def predicted_sentence(item: NoisePrediction) -> str:
    """Return the predicted effect of a precision on this model: "TF32 is predicted to move outputs by 0.0011 of scale ..."."""
    name = PRECISIONS[item.precision].words if item.precision in PRECISIONS else item.precision
    moves = f"{name} is predicted to move outputs by {number(item.error)} of scale"
    on = f" ({item.inputs})" if item.inputs else ""
    if item.flips is None:
        return f"{moves}{on}"
    return f"{moves} and to change {item.flips or 'none'} of {item.n} labels{on}"


def rate_bound(report: VerificationReport) -> float | None:
    """Return the 95 % upper bound of the flip rate on real images, the weakest over the runtimes; None unless each has one.

    Only runtimes count: the file proof and the repeats compare the same images, but fewer of them.
    """
    rows = [row for row in report.rows if row.stage == "strict" and row.case in REAL]
    counted = [row.flips for row in rows if row.flips is not None]
    bounds = [flips.rate_bound for flips in counted if flips.rate_bound is not None]
    return max(bounds) if bounds and len(bounds) == len(counted) else None


def every_flip(report: VerificationReport) -> Flips:
    """Return the counts of labels over all comparisons."""
    return total_flips(row.flips for row in report.rows if row.flips is not None)


def flipped(flips: Flips | None) -> str:
    """Return the number of changed labels: '0', '2', '2 (1 unexplained)'."""
    if flips is None:
        return NOTHING
    unexplained = f" ({flips.unexplained} unexplained)" if flips.unexplained else ""
    return f"{flips.explained + flips.unexplained}{unexplained}"


def certified(flips: Flips | None) -> str:
    """Return the share of the samples whose label provably can't change, rounded down so that 100 % means all."""
    if flips is None:
        return NOTHING
    n = flips.certified + flips.uncertain + flips.explained + flips.unexplained
    return f"{math.floor(1000 * flips.certified / n) / 10:g} %" if n else NOTHING


def module_name(path: str) -> str:
    """Return a module path, or a name for the root, whose path is empty."""
    return path or "(root)"


#: Texts on each stage of a verification, by kind of text.
_TEXTS = json.loads(resources.files("bnexport.reporting").joinpath("stages.json").read_text(encoding="utf-8"))


def _texts(kind: str) -> dict[str, str]:
    return {stage: texts[kind] for stage, texts in _TEXTS.items() if kind in texts}


#: Stage of a verification -> the question that it answers. TOLERANCES has the reasons for the bounds.
STAGES = _texts("question")
#: Stage of a run -> heading of its column, in the order of the table. The other stages check files.
RUN_STAGES = _texts("heading")
#: Stages whose error is that of the kernels, against the unfolded network -> the arithmetic of the stage.
KERNEL_STAGES = _texts("arithmetic")
#: Check of the files -> the condition under which it passes, for its first line.
FILE_CHECKS = _texts("passes_if")
#: Part of ``RunSettings.describe`` -> options of ``bnexport verify`` that select it.
OPTIONS: dict[str, tuple[str, ...]] = {
    "IO binding": ("--io-binding",),
    **{name: ("--precision", name) for name in KERNEL_PRECISIONS},
    **{f"optimisation {name}": ("--optimisation", name) for name in OPTIMISATIONS},
    **{f"{name} search": ("--conv-search", name) for name in CONV_SEARCHES},
}


@dataclass(frozen=True)
class ReportedRun:
    """One runtime in one setting."""

    subject: str  # The runtime's name
    settings: str  # Settings of its rows; "" for strict float32 as users serve it
    stages: Mapping[str, Group]  # Stage -> its rows of this run; no stage without a row

    @property
    def name(self) -> str:
        """Return the name that the findings use: "onnxruntime-cuda, tf32"."""
        return run_name(self.subject, self.settings)

    @property
    def rows(self) -> tuple[Row, ...]:
        """Return every comparison of this run."""
        return tuple(row for group in self.stages.values() for row in group.rows)

    @property
    def passed(self) -> bool:
        """Return True if every comparison passed."""
        return all(row.passed for row in self.rows)

    @property
    def kernels(self) -> Group | None:
        """Return the stage that judges its kernels; None if it was not reached."""
        return next((self.stages[name] for name in KERNEL_STAGES if name in self.stages), None)

    @property
    def first(self) -> Row | None:
        """Return the first comparison with an error: on real inputs, if there are some."""
        rows = self.kernels.rows if self.kernels else ()
        return next((row for row in rows if row.error is not None), None)


@dataclass(frozen=True)
class Cell:
    """The result of one stage for one run, as text."""

    passed: bool  # True if every comparison passed
    value: str  # The error nearest to its bound, the precision found, or ""
    note: str  # "1.3 x predicted", or ""


def runs(report: VerificationReport) -> tuple[ReportedRun, ...]:
    """Return the lines of the table, in the order of the runs."""
    gathered: dict[tuple[str, str], dict[str, Group]] = {}
    for group in groups(report):
        if group.stage in RUN_STAGES:
            row = group.rows[0]
            gathered.setdefault((row.subject, row.settings), {})[group.stage] = group
    return tuple(ReportedRun(subject, settings, stages) for (subject, settings), stages in gathered.items())


def columns(lines: tuple[ReportedRun, ...]) -> dict[str, str]:
    """Return stage -> heading for the stages that at least one run has."""
    return {stage: heading for stage, heading in RUN_STAGES.items() if any(stage in line.stages for line in lines)}


def file_groups(report: VerificationReport) -> tuple[Group, ...]:
    """Return the checks made without an engine: hashes, declarations, proofs, weights, the reference."""
    return tuple(group for group in groups(report) if group.stage not in RUN_STAGES)


def cell(group: Group) -> Cell:
    """Return the cell of one stage of one run."""
    if group.stage == "precision":
        return Cell(group.passed, next((row.detected for row in group.rows if row.detected), ""), "")
    if group.stage == "accuracy-change":
        return Cell(
            group.passed, next((f"{right[1]} right" for row in group.rows if (right := labels_right(row))), ""), ""
        )
    worst = group.worst
    value = number(worst.error) if worst is not None and worst.error is not None else ""
    ratio = group.ratio if group.stage in KERNEL_STAGES else None
    return Cell(group.passed, value, "" if ratio is None else f"{number(ratio)} x predicted")


def flips_on_real_inputs(run: ReportedRun) -> str:
    """Return the changed labels among the real inputs, "24 of 10000"; NOTHING if labels were not counted."""
    rows = run.kernels.rows if run.kernels else ()
    counted = [row for row in rows if row.flips is not None and row.case in REAL]
    if not counted:
        return NOTHING
    changed = sum(row.flips.explained + row.flips.unexplained for row in counted if row.flips)
    return f"{changed} of {sum(row.n for row in counted)}"


def command_of(run: ReportedRun, verify: str, *, seed: int = 0) -> str:
    """Return the command that repeats this run alone; "" for a subject outside RUNNERS.

    ``verify`` is the command that verifies the whole bundle: "bnexport verify BUNDLE"; ``seed`` is that of synthetic inputs.
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


#: Number of changed samples on the page, unexplained ones first.
SHOWN_FLIPS = 24
#: Number of pairs of classes on the page, the most frequent first.
SHOWN_CONFUSIONS = 12
_SIZE = 56  # pixels on the page; twice as many in the file, for sharp screens
_COLOURS = 64


@dataclass(frozen=True)
class Flip:
    """One sample whose class changed in the same way on one or more runs."""

    sample: FlippedSample  # From the run where the change is hardest to explain
    runs: tuple[str, ...]  # Runs with the change: "runtime" or "runtime, settings"


@dataclass(frozen=True)
class Confusion:
    """The number of samples that changed from one class to another."""

    reference: int  # The reference's class
    candidate: int  # The runs' class
    samples: int  # Number of different samples
    unexplained: int  # Samples whose margin does not explain the change on some run
    runs: int  # Number of runs with the change


def flips(report: VerificationReport) -> list[Flip]:
    """Return the changed samples, unexplained ones first, then by largest margin."""
    found = [
        Flip(min((item for _, item in cases), key=_rank), tuple(name for name, _ in cases))
        for cases in _gathered(report, "index", "reference", "candidate").values()
    ]
    return sorted(found, key=lambda flip: _rank(flip.sample))


def _gathered(report: VerificationReport, *keys: str) -> dict[tuple[int, ...], list[tuple[str, FlippedSample]]]:
    """Return the changed samples of every run, with its name, by some of their attributes."""
    gathered: dict[tuple[int, ...], list[tuple[str, FlippedSample]]] = {}
    for name, items in report.findings.flipped.items():
        for item in items:
            gathered.setdefault(tuple(getattr(item, key) for key in keys), []).append((name, item))
    return gathered


def pictures(report: VerificationReport, shown: Sequence[Flip]) -> dict[int, str]:
    """Return index -> data URI of the input, for each sample with a picture."""
    indices = {flip.sample.index for flip in shown} & set(report.pictures)
    return {index: uri for index in sorted(indices) if (uri := picture(report.pictures[index]))}


def confusions(report: VerificationReport) -> list[Confusion]:
    """Return the pairs of classes, the most frequent first."""
    found = [
        Confusion(
            reference=before,
            candidate=after,
            samples=len({item.index for _, item in cases}),
            unexplained=len({item.index for _, item in cases if not item.explained}),
            runs=len({name for name, _ in cases}),
        )
        for (before, after), cases in _gathered(report, "reference", "candidate").items()
    ]
    return sorted(found, key=lambda row: (-row.samples, row.reference, row.candidate))


def class_name(index: int | None, labels: Sequence[str] | None) -> str:
    """Return a class as its label, or as its number without labels; "-" for None."""
    if index is None:
        return "-"
    return labels[index] if labels is not None and 0 <= index < len(labels) else str(index)


def picture(array: Array) -> str:
    """Return an input (channels, height, width) as a small PNG in a data URI, with its values stretched; "" if impossible.

    Three channels are shown in colour; of any other number, the first is shown.
    """
    from PIL import Image

    if array.ndim != 3 or not array.size or not np.isfinite(array).all():
        return ""
    values = array.astype(np.float64)
    low, high = float(values.min()), float(values.max())
    grey = ((values - low) / ((high - low) or 1.0) * 255).round().astype(np.uint8)
    image = Image.fromarray(np.moveaxis(grey, 0, -1) if len(grey) == 3 else grey[0])
    if max(image.size) > 2 * _SIZE:
        image.thumbnail((2 * _SIZE, 2 * _SIZE))
        image = image.quantize(_COLOURS) if image.mode == "RGB" else image  # photographs are 5 times as large otherwise
    content = io.BytesIO()
    image.save(content, "PNG")
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode("ascii")


def _rank(item: FlippedSample) -> tuple[bool, float, int]:
    """Return the sort key: unexplained samples first, then the largest margin."""
    return (item.explained, -item.margin, item.index)


def int8_sentence(found: Int8Findings) -> str:
    """Return which layers make the noise of an int8 file, and what --float-layers would change."""
    layers = sorted((item for item in found.layers if item.share is not None), key=lambda item: -(item.share or 0.0))
    if not layers:
        return "no layer makes noise"
    shown = ", ".join(f"{item.layer} {item.share:.0%}" for item in layers[:_NOISY])
    of = "" if len(layers) == len(found.layers) else f" of the {len(layers)} layers that were computed"
    text = f"largest shares of the noise{of}: {shown} ({found.n} {found.inputs})"
    if found.suggested:
        left = 1 - sum(item.share or 0.0 for item in layers if item.layer in found.suggested)
        gain = f", which leaves {max(left, 0.0):.0%} of the noise power" if left > 0.01 else ""
        text += f"; worth a try: {' '.join(f'--float-layers {name}' for name in found.suggested)}{gain}"
    return text


def int8_outside(found: Int8Findings) -> list[Int8Range]:
    """Return the ranges that the samples exceed by more than a tenth, the largest excess first."""

    def excess(item: Int8Range) -> float:
        if item.seen is None:
            return 0.0
        return max(item.low - item.seen[0], item.seen[1] - item.high) / ((item.high - item.low) or 1.0)

    return sorted((item for item in found.ranges if excess(item) > _EXCESS), key=excess, reverse=True)
