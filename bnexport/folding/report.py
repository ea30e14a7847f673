"""The fold report: one row per BatchNorm call, with its outcome and the reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

FoldOutcome = Literal["backward", "forward", "through", "merged", "affine", "kept"]

#: Outcome -> what it means. In the first four the BatchNorm is gone and costs nothing any more.
OUTCOMES: dict[FoldOutcome, str] = {
    "backward": "gone: its scale and shift are part of the weights of the layer before it",
    "forward": "gone: its scale and shift are part of the weights of the layer after it",
    "through": "gone: moved across other operations into the weights of layers farther away",
    "merged": "gone: part of another BatchNorm's affine, or of a parallel convolution",
    "affine": "left as one scale and one shift per channel",
    "kept": "left as it was",
}
GONE: tuple[FoldOutcome, ...] = ("backward", "forward", "through", "merged")


@dataclass(frozen=True)
class FoldRow:
    """One BatchNorm call.

    Attributes:
        module: Module path of the BatchNorm as in ``named_modules``; "" when it is called in the root's forward. In an
            ONNX file: the node's name, or the name of its output.
        kind: Class of that module: "BatchNorm2d"; in an ONNX file the operator.
        outcome: A key of OUTCOMES.
        rule: The rule that was applied; "" for none.
        into: The present place of its numbers, module paths joined by ", "; "" for nowhere.
        equation: The computation, with W, b of the layer and s, t of the affine; "" for none.
        reason: The reason why it is not gone; "" when it is.
        hint: A change by the network's author that would let it be folded; "" if it is gone or nothing would help. In JSON
            the key is "unlock".
        channels: Number of channels; 0 when unknown.
        gain: Smallest and largest |gamma / sqrt(moving_var + eps)|; None when it can't be read or is not finite.
        dead: Number of channels with scale 0, whose output does not depend on the input.
        error: Largest difference of this fold alone, against the untouched part of the graph, both in float64, as a share
            of that part's largest output; None when nothing was folded.
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
    def unlock(self) -> str:
        """The former name of ``hint``."""
        return self.hint

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
    """Every BatchNorm call of a model.

    Attributes:
        rows: One per call, in the order of the graph.
        remaining: batch_norm operators in the folded graph: standalone affines, and BatchNorms kept as they were.
        error: Largest difference between the folded and the original graph, both in float64, on random inputs, as a
            fraction of the output's largest value; None when the graph can't run in float64.
        growth: Elements of the folded graph's parameters and buffers, as a multiple of the original's: below 1 where
            statistics are gone, above 1 where shared weights had to be copied. The scales and shifts that stay do not count.
        warnings: Folds that failed their proof and were rolled back; a whole that can't be compared.
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
        """Number of rows with this outcome."""
        return Counter(row.outcome for row in self.rows)[outcome]

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
