"""The fold report: one row per BatchNorm call, with its outcome and the reason."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from html import escape
from typing import Any, Literal

from bnexport.plain_table import html_table, printable, text_table

FoldOutcome = Literal["backward", "forward", "through", "merged", "affine", "kept"]

#: Outcome -> its meaning. In the first four cases nothing of the BatchNorm remains to be computed.
OUTCOMES: dict[FoldOutcome, str] = {
    "backward": "gone: its scale and shift are part of the weights of the layer before it",
    "forward": "gone: its scale and shift are part of the weights of the layer after it",
    "through": "gone: moved across other operations into the weights of layers farther away",
    "merged": "gone: part of another BatchNorm's affine, or of a parallel convolution",
    "affine": "left as one scale and one shift per channel",
    "kept": "left as it was",
}
GONE: tuple[FoldOutcome, ...] = ("backward", "forward", "through", "merged")
#: Width of a printed report, of a module path in its table, and of a reason in its table and in its first line.
_WIDTH, _PATH, _CELL = 80, 26, 42
#: Largest number of rows that a printed report lists one by one; of more, folded ones are counted by outcome and rule.
_LISTED = 30


@dataclass(frozen=True)
class FoldRow:
    """One BatchNorm call.

    Attributes:
        module: Module path of the BatchNorm as in ``named_modules``; "" if it is called in the root's forward. In an ONNX
            file: the node's name, or the name of its output.
        kind: Class of that module: "BatchNorm2d"; in an ONNX file the operator.
        outcome: A key of OUTCOMES.
        rule: The rule that was applied; "" for none.
        into: The present place of the scale and shift, module paths joined by ", "; "" for nowhere.
        equation: The computation, with W, b of the layer and s, t of the affine; "" for none.
        reason: The reason why the BatchNorm is not gone; "" if it is.
        hint: A change by the network's author that would let it be folded; "" if it is gone or nothing would help. In JSON
            the key is "unlock".
        channels: Number of channels; 0 when unknown.
        gain: Smallest and largest |gamma / sqrt(moving_var + eps)|; None if unknown or not finite.
        dead: Number of channels with scale 0, whose output does not depend on the input.
        error: Largest difference of this fold alone, against the untouched part of the graph, both in float64, as a share
            of that part's largest output; None if nothing was folded.
    """

    module: str
    kind: str
    outcome: FoldOutcome
    rule: str = ""
    into: str = ""
    equation: str = ""
    reason: str = ""
    hint: str = ""
    channels: int = 0
    gain: tuple[float, float] | None = None
    dead: int = 0
    error: float | None = None

    @property
    def gone(self) -> bool:
        """True if nothing of the BatchNorm remains to be computed."""
        return self.outcome in GONE

    @property
    def place(self) -> str:
        """The module path in texts."""
        return self.module or "(root)"

    @property
    def unlock(self) -> str:
        """The former name of ``hint``."""
        return self.hint

    @property
    def short_reason(self) -> str:
        """The reason with each side ("before: ...; after: ...") cut at its first comma."""
        return "; ".join(re.split(r", | \(docs", side, maxsplit=1)[0] for side in self.reason.split("; "))

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        value = {"unlock" if name == "hint" else name: item for name, item in asdict(self).items()}
        value["gain"] = None if self.gain is None else list(self.gain)
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> FoldRow:
        """Read what ``to_json`` wrote."""
        gain, fields = value["gain"], {"hint" if name == "unlock" else name: item for name, item in value.items()}
        return cls(**{**fields, "gain": None if gain is None else (float(gain[0]), float(gain[1]))})


@dataclass(frozen=True)
class FoldReport:
    """The outcome of every BatchNorm call of a network. ``print(report)`` shows it as a table of 80 columns.

    Attributes:
        rows: One per call, in the order of the graph.
        remaining: Number of batch_norm operators in the folded graph: standalone affines, and BatchNorms kept as they were.
        error: Largest difference between the folded and the original graph, both in float64, on random inputs, as a
            fraction of the output's largest value; None if the graph can't run in float64.
        growth: Elements of the folded graph's parameters and buffers, as a multiple of the original's: below 1 if
            statistics are gone, above 1 if shared weights had to be copied. The scales and shifts that stay do not count.
        warnings: Folds that failed their proof and were rolled back; a network not compared as a whole, or with a large bound.
    """

    rows: tuple[FoldRow, ...]
    remaining: int
    error: float | None = None
    growth: float = 1.0
    warnings: tuple[str, ...] = ()

    @property
    def folded(self) -> int:
        """Number of BatchNorm calls that are gone."""
        return sum(row.gone for row in self.rows)

    def count(self, outcome: FoldOutcome) -> int:
        """Return the number of rows with this outcome."""
        return Counter(row.outcome for row in self.rows)[outcome]

    def summary(self, *, why: bool = True) -> str:
        """Return the outcome in one line: "10 of 12 BatchNorm calls folded, 2 became affine layers (after: it feeds tanh)".

        ``why`` adds the reasons in parentheses.
        """
        if not self.rows:
            return "no BatchNorm call found, nothing to fold"
        parts = [f"{self.folded} of {len(self.rows)} BatchNorm call{'s' * (len(self.rows) != 1)} folded"]
        for outcome, ruled, one, many in (
            ("affine", True, "became an addition", "became additions"),
            ("affine", False, "became an affine layer", "became affine layers"),
            ("kept", None, "was kept unchanged", "were kept unchanged"),
        ):
            if rows := [row for row in self.rows if row.outcome == outcome and ruled in (None, bool(row.rule))]:
                parts.append(f"{len(rows)} {one if len(rows) == 1 else many}{_why(rows) if why else ''}")
        return printable(", ".join(parts))

    def __str__(self) -> str:
        """Return the summary, a table of the calls, their reasons in full, and the proof as text of 80 columns."""
        rows, counted = list(self.rows), ""
        if len(rows) > _LISTED:
            counts = Counter((row.outcome, row.rule) for row in rows if row.gone).most_common()
            cells = [(str(count), outcome, rule) for (outcome, rule), count in counts]
            counted = f"{text_table(('calls', 'outcome', 'rule'), cells, numbers=('calls',))}\n\n" if cells else ""
            rows = [row for row in rows if not row.gone]
        shown = [(row.outcome, _end(row.place, _PATH), _start(row.into or row.short_reason, _CELL)) for row in rows]
        table = text_table(("outcome", "BatchNorm", "folded into, or why not"), shown) if shown else ""
        notes = "\n".join(textwrap.fill(printable(note), _WIDTH, subsequent_indent="  ") for note in self._notes())
        return "\n\n".join(part for part in (self.summary(), counted + table, notes) if part.strip())

    def _repr_html_(self) -> str:
        """Return the same content as HTML, which notebooks show, with every reason in full."""
        heads = ("outcome", "BatchNorm", "channels", "folded into, or why not", "hint")
        rows = [
            (row.outcome, row.place, str(row.channels or "-"), row.into or row.reason, row.hint) for row in self.rows
        ]
        notes = "".join(f"<p>{escape(note)}</p>" for note in self._facts())
        return f"<p><b>{escape(self.summary())}</b></p>{html_table(heads, rows, numbers=('channels',))}{notes}"

    def _notes(self) -> Iterator[str]:
        """Yield the whole reason and the hint of the calls that are not gone, once each, then the facts about the whole."""
        names: dict[tuple[str, str], list[str]] = {}
        for row in self.rows:
            if row.reason:
                names.setdefault((row.reason, row.hint), []).append(row.place)
        for (reason, hint), modules in names.items():
            yield f"{', '.join(modules)}: {reason}" + (f". To fold it: {hint}" if hint else "")
        yield from self._facts()

    def _facts(self) -> Iterator[str]:
        """Yield warnings, the error of the whole, and the growth of the weights."""
        yield from (f"WARNING: {warning}" for warning in self.warnings)
        if self.error is not None:
            yield f"largest difference from the original in float64: {self.error:.1e} of scale"
        if self.growth > 1.005:
            yield f"the weights have {self.growth:.2f} times as many elements: shared ones had to be copied"

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values, as in manifest.json."""
        return {
            "rows": [row.to_json() for row in self.rows],
            "remaining": self.remaining,
            "error": self.error,
            "growth": self.growth,
            "warnings": list(self.warnings),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> FoldReport:
        """Read what ``to_json`` wrote."""
        rows = tuple(FoldRow.from_json(row) for row in value["rows"])
        return cls(rows, value["remaining"], value["error"], value["growth"], tuple(value["warnings"]))


class Reported:
    """The text of a fold's result: that of its fold report."""

    report: FoldReport

    def summary(self) -> str:
        """Return the outcome of the fold in one line."""
        return self.report.summary()

    def __str__(self) -> str:
        """Return the fold report as text of 80 columns."""
        return str(self.report)

    def _repr_html_(self) -> str:
        """Return the fold report as HTML, which notebooks show."""
        return self.report._repr_html_()


def _why(rows: list[FoldRow]) -> str:
    reasons = {row.short_reason for row in rows if row.reason}
    if len(reasons) > 1:
        return f" ({len(reasons)} different reasons)"
    return f" ({_start(reasons.pop(), _WIDTH)})" if reasons else ""


def _start(text: str, size: int) -> str:
    return text if len(text) <= size else f"{text[: size - 3].rstrip()}..."


def _end(text: str, size: int) -> str:
    return text if len(text) <= size else f"...{text[3 - size :]}"
