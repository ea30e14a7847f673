"""BatchNorms of one network that remain after the folds of common exporters and optimisers."""

from __future__ import annotations

import contextlib
import functools
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from benchmarks.zoo.network import EXAMPLE, make_zoo_network
from bnexport.auditing.tool_table import Product, ToolInput
from bnexport.auditing.tools import batch_norms, export, jit_freeze, onnxruntime_level, onnxslim, torch_export
from bnexport.optional import one_line, quiet


@contextlib.contextmanager
def _plain_export(job: ToolInput) -> Iterator[Product]:
    """Export without an optimiser; the ONNX tools start from this file."""
    yield Product(lambda _batch: [], batch_norms(export(job, optimize=False)))


#: Key in the lines -> tool. ONNX Runtime's extended level is the highest that does not change the layout for one processor.
TOOLS: dict[str, Callable[[ToolInput], AbstractContextManager[Product]]] = {
    "before": _plain_export,
    "torch.jit.freeze": jit_freeze,
    "onnxruntime": functools.partial(onnxruntime_level, level="ORT_ENABLE_EXTENDED"),
    "onnxslim": onnxslim,
    "torch.onnx.export": torch_export,
}


def measure_tools(source: str, *, seed: int = 0) -> dict[str, Any]:
    """Return the remaining BatchNorms of each tool, and the message of each tool that fails, as plain JSON values."""
    subject = make_zoo_network(source, seed=seed)
    found: dict[str, Any] = {"shape": list(subject.shape), "norms": subject.norms}
    found |= {"left": {}, "failed": {}, "seconds": {}}
    for name, open_tool in TOOLS.items() if subject.norms else ():
        started = time.perf_counter()
        try:
            with tempfile.TemporaryDirectory() as folder, quiet(), torch.no_grad():
                job = ToolInput(subject.module, (subject.batch(EXAMPLE, seed + 1),), Path(folder))
                with open_tool(job) as product:
                    found["left"][name] = product.batch_norms or 0
        except Exception as error:  # the tools raise errors of all kinds
            found["failed"][name] = f"{type(error).__name__}: {one_line(error, 200)}"
        found["seconds"][name] = round(time.perf_counter() - started, 3)
    return found
