"""The table of tools that are audited; a tool is imported when it is used."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnexport.tensors import Array

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Job:
    """What a tool works on.

    Attributes:
        module: A copy of the network of its own, in eval mode.
        example: One batch of inputs, for tracing.
        folder: For its files; it vanishes afterwards.
    """

    module: nn.Module
    example: tuple[Tensor, ...]
    folder: Path


@dataclass(frozen=True)
class Product:
    """What a tool made.

    Attributes:
        run: Input batch -> outputs in order.
        batch_norms: BatchNorm operations left in what runs; None when they can't be counted.
    """

    run: Callable[[tuple[Tensor, ...]], Sequence[Array]]
    batch_norms: int | None


@dataclass(frozen=True)
class Tool:
    """One row of TOOLS.

    Attributes:
        name: As on the command line and in the report.
        open: Gives the product, and puts back on leaving whatever it changed. It raises ``Unavailable`` where the tool
            is not here.
        control: It folds nothing; its error is the noise of float32 that the others are allowed.
    """

    name: str
    open: Callable[[Job], AbstractContextManager[Product]]
    control: bool = False


def _later(function: str, **options: Any) -> Callable[[Job], AbstractContextManager[Product]]:
    """Return a function of ``auditing.tools`` that is imported when a job comes."""

    def open_tool(job: Job) -> AbstractContextManager[Product]:
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
