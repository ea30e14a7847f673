"""The account of a fold: one row per BatchNorm call, what became of it, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Outcome = Literal["folded", "affine", "kept"]


@dataclass(frozen=True)
class FoldRow:
    """One BatchNorm call.

    Attributes:
        module: Module path of the BatchNorm as in ``named_modules``; "" when it is called in the root's forward.
        kind: Class of that module: "BatchNorm2d".
        outcome: "folded" into a linear layer; "affine": left as one scale and shift; "kept" as it was.
        rule: The rule that was applied; "" for none.
        into: Module path of the layer that took it in; "" for none.
        reason: Why it was not folded; "" when it was.
        channels: Number of channels; 0 when unknown.
        max_scale: Largest |gamma / sqrt(moving_var + eps)| over the channels; None when it can't be read or is
            not finite.
    """

    module: str
    kind: str
    outcome: Outcome
    rule: str
    into: str
    reason: str
    channels: int
    max_scale: float | None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class FoldReport:
    """Every BatchNorm call of a model.

    Attributes:
        rows: One per call, in the order of the graph.
        remaining: batch_norm operators left in the folded graph.
        error: Largest difference between the folded and the original graph, both in float64, on random inputs, as a
            fraction of the output's largest value; None when the graph can't run in float64.
    """

    rows: tuple[FoldRow, ...]
    remaining: int
    error: float | None = None

    def count(self, outcome: Outcome) -> int:
        """Number of rows with this outcome."""
        return Counter(row.outcome for row in self.rows)[outcome]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, as in manifest.json."""
        return {"rows": [row.to_json() for row in self.rows], "remaining": self.remaining, "error": self.error}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> FoldReport:
        """Read what ``to_json`` wrote."""
        return cls(tuple(FoldRow(**row) for row in value["rows"]), value["remaining"], value["error"])
