"""The table of audited tools, imported when they are used, and the findings of an audit, tool by tool."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bnexport.tensors import Array

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class ToolInput:
    """The input of a tool."""

    module: nn.Module  # A separate copy of the network, in eval mode
    example: tuple[Tensor, ...]  # One batch of inputs, for tracing
    folder: Path  # For its files; it vanishes afterwards


@dataclass(frozen=True)
class Product:
    """The result of a tool."""

    run: Callable[[tuple[Tensor, ...]], Sequence[Array]]  # Input batch -> outputs in order
    batch_norms: int | None  # BatchNorm operations left in what runs; None when they can't be counted


@dataclass(frozen=True)
class Tool:
    """One row of TOOLS."""

    name: str  # Name on the command line and in the report
    # Gives the product, and puts back on leaving whatever it changed. It raises ``Unavailable`` where the tool is not
    # here.
    open: Callable[[ToolInput], AbstractContextManager[Product]]
    control: bool = False  # It folds nothing; its error is the noise of float32 that the others are allowed


def _later(function: str, **options: Any) -> Callable[[ToolInput], AbstractContextManager[Product]]:
    """Return a function of ``auditing.tools`` that is imported when a job comes."""

    def open_tool(job: ToolInput) -> AbstractContextManager[Product]:
        opened: AbstractContextManager[Product] = getattr(importlib.import_module(f"{__package__}.tools"), function)(
            job, **options
        )
        return opened

    return open_tool


#: The control comes first. A new tool is a new row.
TOOLS: tuple[Tool, ...] = (
    Tool("torch.eager", _later("eager"), control=True),
    Tool("torch.jit.freeze", _later("jit_freeze")),
    Tool("torch.jit.optimize_for_inference", _later("jit_optimize")),
    Tool("torch.fx.fuse", _later("fx_fuse")),
    Tool("torch.compile-freezing", _later("compile_freezing")),
    Tool("torch.onnx.export", _later("torch_export")),
    Tool("onnxruntime-disable", _later("onnxruntime_level", level="ORT_DISABLE_ALL")),
    Tool("onnxruntime-basic", _later("onnxruntime_level", level="ORT_ENABLE_BASIC")),
    Tool("onnxruntime-extended", _later("onnxruntime_level", level="ORT_ENABLE_EXTENDED")),
    Tool("onnxruntime-all", _later("onnxruntime_level", level="ORT_ENABLE_ALL")),
    Tool("onnxslim", _later("onnxslim")),
    Tool("onnxsim", _later("onnxsim")),
    Tool("bnexport", _later("bnexport_fold")),
)


Verdict = Literal["right", "wrong", "failed", "not run"]

#: Verdict -> what it means.
VERDICTS: dict[Verdict, str] = {
    "right": "its answers are those of the network, within the bound",
    "wrong": "it gave an answer, and it is not the network's",
    "failed": "it gave no answer for this network",
    "not run": "it is not on this machine",
}


@dataclass(frozen=True)
class AuditRow:
    """One tool."""

    tool: str  # Its name in TOOLS
    verdict: Verdict  # A key of VERDICTS
    control: bool = False  # It is the network itself in float32; it can't be wrong
    batch_norms: int | None = None  # BatchNorm operations left in what it runs; None when they can't be counted
    # max |answer - reference| / max |reference|, worst output over all probes; infinite when they can't be compared
    # (None in JSON), None without an answer
    error: float | None = None
    output: str = ""  # If wrong: the output with the largest error; "" if the answers can't be compared at all
    # If wrong: the index on axis 1 of that output's worst element; None without such an axis
    channel: int | None = None
    # If wrong: path of the first BatchNorm, in the order of the calls, whose fold makes it wrong: with that
    # BatchNorm and all later ones hidden from the tool it is right. "" when there is none.
    batch_norm: str = ""
    reason: str = ""  # One line: how a wrong one is wrong, why it failed or was not run, or what else to know; else ""
    batches: tuple[int, ...] = ()  # Batch sizes that were compared

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        error = self.error if self.error is not None and math.isfinite(self.error) else None
        return {**asdict(self), "error": error, "batches": list(self.batches)}


@dataclass(frozen=True)
class AuditReport:
    """All tools on one network."""

    rows: tuple[AuditRow, ...]  # In the order of TOOLS, the control first
    bound: float  # Largest error that is right
    rule: str  # Where the bound comes from
    seed: int  # Seed of the probes
    batches: tuple[int, ...]  # Batch size of each probe
    notes: tuple[str, ...]  # Facts about the network for the reader
    environment: Mapping[str, Any]  # Hardware and versions

    @property
    def wrong(self) -> tuple[AuditRow, ...]:
        """Tools that gave a wrong answer without saying so."""
        return tuple(row for row in self.rows if row.verdict == "wrong")

    def summary(self) -> str:
        """One line."""
        judged = [row for row in self.rows if not row.control and row.verdict in ("right", "wrong")]
        tools = "1 tool" if len(judged) == 1 else f"{len(judged)} tools"
        if not judged:
            return "no tool gave an answer"
        if not self.wrong:
            return f"right: {tools}"
        names = ", ".join(row.tool for row in self.wrong)
        return f"wrong: {len(self.wrong)} of {tools}: {names}"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "passed": not self.wrong,
            "summary": self.summary(),
            "bound": self.bound,
            "rule": self.rule,
            "seed": self.seed,
            "batches": list(self.batches),
            "notes": list(self.notes),
            "tools": [row.to_json() for row in self.rows],
            "environment": dict(self.environment),
        }
