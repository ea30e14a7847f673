"""The table of tools that are audited; it loads none of them before it is used."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from bnexport.auditing.tool import Job, Product, Tool


def _later(place: str, **options: Any) -> Callable[[Job], AbstractContextManager[Product]]:
    """A function of this package, "module:function", that is imported when a job comes."""
    module, _, function = place.partition(":")

    def open_tool(job: Job) -> AbstractContextManager[Product]:
        opened: AbstractContextManager[Product] = getattr(importlib.import_module(f"{__package__}.{module}"), function)(
            job, **options
        )
        return opened

    return open_tool


#: The control comes first. A new tool is a new row.
TOOLS: tuple[Tool, ...] = (
    Tool("torch.eager", _later("torch_tools:eager"), control=True),
    Tool("torch.jit.freeze", _later("torch_tools:jit_freeze")),
    Tool("torch.jit.optimize_for_inference", _later("torch_tools:jit_optimize")),
    Tool("torch.fx.fuse", _later("torch_tools:fx_fuse")),
    Tool("torch.compile-freezing", _later("inductor:compile_freezing")),
    Tool("torch.onnx.export", _later("onnx_tools:torch_export")),
    Tool("onnxruntime-disable", _later("onnx_tools:onnxruntime_level", level="ORT_DISABLE_ALL")),
    Tool("onnxruntime-basic", _later("onnx_tools:onnxruntime_level", level="ORT_ENABLE_BASIC")),
    Tool("onnxruntime-extended", _later("onnx_tools:onnxruntime_level", level="ORT_ENABLE_EXTENDED")),
    Tool("onnxruntime-all", _later("onnx_tools:onnxruntime_level", level="ORT_ENABLE_ALL")),
    Tool("onnxslim", _later("onnx_tools:onnxslim")),
    Tool("onnxsim", _later("onnx_tools:onnxsim")),
    Tool("bnexport", _later("torch_tools:bnexport_fold")),
)
