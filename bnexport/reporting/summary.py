"""Verification rows gathered by stage and subject, and numbers as text: what the terminal and the page share."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from bnexport.onnx_files.emulation import PRECISIONS
from bnexport.verification.inputs import REAL
from bnexport.verification.verdict import Flips, Prediction, Row, VerificationReport

#: Shown where there is no number.
NOTHING = "-"

#: Stages whose rows are one per file: gathered under one subject, because only a failure needs the file's name.
FILE_STAGES: dict[str, str] = {"integrity": "files"}

#: Stands for infinity in reports, which are JSON.
_INFINITE = 1e300


@dataclass(frozen=True)
class Group:
    """All comparisons of one subject in one stage.

    Attributes:
        stage: As in the rows.
        subject: As in the rows, with the settings where there are some.
        rows: In the report's order; never empty.
    """

    stage: str
    subject: str
    rows: tuple[Row, ...]

    @property
    def passed(self) -> bool:
        """True when every row passed."""
        return all(row.passed for row in self.rows)

    @property
    def devices(self) -> str:
        """Where the candidates ran."""
        return ", ".join(dict.fromkeys(row.device for row in self.rows if row.device))

    @property
    def n(self) -> int:
        """Samples (or tensors, or files) over all rows."""
        return sum(row.n for row in self.rows)

    @property
    def worst(self) -> Row | None:
        """The row nearest to, or farthest over, its bound: a failed one without a finite error before all others."""
        judged = [row for row in self.rows if row.bound is not None]
        return max(judged, key=_pressure, default=None)

    @property
    def ratio(self) -> float | None:
        """The largest error in units of the noise predicted for the same inputs; None without a prediction."""
        return max((row.ratio for row in self.rows if row.ratio is not None), default=None)

    @property
    def flips(self) -> Flips | None:
        """Top-1 labels over all rows; None where no row counts them."""
        counted = [row.flips for row in self.rows if row.flips is not None]
        return total_flips(counted) if counted else None


def groups(report: VerificationReport) -> tuple[Group, ...]:
    """The report's rows by stage, subject and settings, in the order of first appearance."""
    gathered: dict[tuple[str, str], list[Row]] = {}
    for row in report.rows:
        gathered.setdefault((row.stage, FILE_STAGES.get(row.stage, row.run)), []).append(row)
    return tuple(Group(stage, subject, tuple(rows)) for (stage, subject), rows in gathered.items())


def predicted_sentence(item: Prediction) -> str:
    """What a precision is predicted to do to this model: "TF32 is predicted to move outputs by 0.0011 of scale ..."."""
    name = PRECISIONS[item.precision].words if item.precision in PRECISIONS else item.precision
    moves = f"{name} is predicted to move outputs by {number(item.error)} of scale"
    on = f" ({item.inputs})" if item.inputs else ""
    if item.flips is None:
        return f"{moves}{on}"
    return f"{moves} and to change {item.flips or 'none'} of {item.n} labels{on}"


def total_flips(flips: Iterable[Flips]) -> Flips:
    """The sum of several counts, without a bound of the rate: the same sample may be in several of them."""
    every = list(flips)
    return Flips(
        certified=sum(item.certified for item in every),
        uncertain=sum(item.uncertain for item in every),
        explained=sum(item.explained for item in every),
        unexplained=sum(item.unexplained for item in every),
        rate_bound=None,
    )


def rate_bound(report: VerificationReport) -> float | None:
    """95 % upper bound of the flip rate on real images, the weakest over the runtimes; None unless each has one.

    Of the runtimes alone: the proof of the file and the repeats look at the same images, but at fewer of them.
    """
    rows = [row for row in report.rows if row.stage == "strict" and row.case in REAL]
    counted = [row.flips for row in rows if row.flips is not None]
    bounds = [flips.rate_bound for flips in counted if flips.rate_bound is not None]
    return max(bounds) if bounds and len(bounds) == len(counted) else None


def number(value: float | None) -> str:
    """A measured size in two significant digits: '3.8e-07', '12', 'infinite', or NOTHING for what is no number."""
    if value is None or not math.isfinite(value):
        return NOTHING
    return "infinite" if abs(value) >= _INFINITE else f"{value:.2g}"


def flipped(flips: Flips | None) -> str:
    """Labels that changed: '0', '2', '2 (1 unexplained)'."""
    if flips is None:
        return NOTHING
    unexplained = f" ({flips.unexplained} unexplained)" if flips.unexplained else ""
    return f"{flips.explained + flips.unexplained}{unexplained}"


def certified(flips: Flips | None) -> str:
    """Share of the samples whose label provably can't change, rounded down so that 100 % means all."""
    if flips is None:
        return NOTHING
    n = flips.certified + flips.uncertain + flips.explained + flips.unexplained
    return f"{math.floor(1000 * flips.certified / n) / 10:g} %" if n else NOTHING


def module_name(path: str) -> str:
    """A module path, or what to call the root, whose path is empty."""
    return path or "(root)"


def word(passed: bool) -> str:
    """The verdict as a word: no reader has to see colours."""
    return "PASS" if passed else "FAIL"


def _pressure(row: Row) -> float:
    if row.error is None or row.bound is None:
        return math.inf if not row.passed else -1.0
    return row.error / row.bound if row.bound else (math.inf if row.error else 0.0)
