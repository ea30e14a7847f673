"""The table of audited tools, which are imported on use, and the report of an audit."""

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
    folder: Path  # Folder for its files, deleted afterwards


@dataclass(frozen=True)
class Product:
    """The result of a tool."""

    run: Callable[[tuple[Tensor, ...]], Sequence[Array]]  # Input batch -> outputs in order
    batch_norms: int | None  # Remaining BatchNorm operations; None if they can't be counted


@dataclass(frozen=True)
class Tool:
    """One row of TOOLS."""

    name: str  # Name on the command line and in the report
    # Returns a context manager of the product, which restores global state at its end; ``Unavailable`` if the tool is missing
    open: Callable[[ToolInput], AbstractContextManager[Product]]
    control: bool = False  # It folds nothing; its error is the float32 noise from which the bound is computed


def _later(function: str, **options: Any) -> Callable[[ToolInput], AbstractContextManager[Product]]:
    """Return a function of ``auditing.tools``, which is imported at the first call."""

    def open_tool(job: ToolInput) -> AbstractContextManager[Product]:
        tool: Callable[..., AbstractContextManager[Product]]
        tool = getattr(importlib.import_module(f"{__package__}.tools"), function)
        return tool(job, **options)

    return open_tool


#: The control is the first row. A new tool is a new row.
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

#: Verdict -> its meaning.
VERDICTS: dict[Verdict, str] = {
    "right": "its outputs match the network within the bound",
    "wrong": "its outputs differ from the network",
    "failed": "it ended with an error on this network",
    "not run": "it is not installed on this machine",
}


@dataclass(frozen=True)
class AuditRow:
    """The finding on one tool."""

    tool: str  # Name in TOOLS
    verdict: Verdict  # A key of VERDICTS
    control: bool = False  # The network itself in float32, which can't be wrong
    batch_norms: int | None = None  # Remaining BatchNorm operations; None if they can't be counted
    # max |output - reference| / max |reference|, worst output over all inputs; infinite if they can't be compared (None in
    # JSON), None without an output
    error: float | None = None
    output: str = ""  # If wrong: the output with the largest error; "" if the outputs can't be compared
    # If wrong: the index on axis 1 of that output's worst element; None without such an axis
    channel: int | None = None
    # If wrong: path of the first BatchNorm, in the order of the calls, whose fold makes it wrong; "" if none is found
    batch_norm: str = ""
    reason: str = ""  # One line: reason of the verdict, or a note; else ""
    batches: tuple[int, ...] = ()  # Batch sizes that were compared

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        error = self.error if self.error is not None and math.isfinite(self.error) else None
        return {**asdict(self), "error": error, "batches": list(self.batches)}


@dataclass(frozen=True)
class AuditReport:
    """The findings on all tools for one network."""

    rows: tuple[AuditRow, ...]  # In the order of TOOLS, the control first
    bound: float  # Largest error of a right tool
    rule: str  # Rule of the bound
    seed: int  # Random seed of the inputs
    batches: tuple[int, ...]  # Batch size of each input
    notes: tuple[str, ...]  # Notes on the network
    environment: Mapping[str, Any]  # Hardware and versions

    @property
    def wrong(self) -> tuple[AuditRow, ...]:
        """Tools with wrong outputs."""
        return tuple(row for row in self.rows if row.verdict == "wrong")

    def summary(self) -> str:
        """Return the result in one line."""
        judged = [row for row in self.rows if not row.control and row.verdict in ("right", "wrong")]
        tools = "1 tool" if len(judged) == 1 else f"{len(judged)} tools"
        if not judged:
            return "no tool could be compared"
        if not self.wrong:
            return f"right: {tools}"
        names = ", ".join(row.tool for row in self.wrong)
        return f"wrong: {len(self.wrong)} of {tools}: {names}"

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
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
