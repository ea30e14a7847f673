"""BatchNorms of one network that common exporters and optimisers leave, which fold as well."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxscript.optimizer
import torch
from onnx_ir.passes import common
from torch import Tensor

from benchmarks.zoo.network import EXAMPLE, make_subject
from bnexport.auditing.tool_table import ToolInput
from bnexport.auditing.tools import batch_norms, jit_freeze
from bnexport.optional import one_line, quiet, require
from bnexport.runtimes.onnxruntime_session import load_engine

_FILE = "model.onnx"


def measure_tools(source: str, *, seed: int = 0) -> dict[str, Any]:
    """Return the number of BatchNorms that each tool leaves, and the message of each tool that fails, as plain JSON values."""
    subject = make_subject(source, seed=seed)
    found: dict[str, Any] = {"shape": list(subject.shape), "norms": subject.norms}
    found |= {"left": {}, "failed": {}, "seconds": {}}
    if not subject.norms:
        return found
    example = subject.batch(EXAMPLE, seed + 1)
    with tempfile.TemporaryDirectory() as folder:
        tools = Tools(subject.module, example, Path(folder))
        for name, run in tools.table().items():
            started = time.perf_counter()
            try:
                with quiet(), torch.no_grad():
                    found["left"][name] = run()
            except Exception as error:  # the tools raise errors of all kinds
                found["failed"][name] = f"{type(error).__name__}: {one_line(error, 200)}"
            found["seconds"][name] = round(time.perf_counter() - started, 3)
    return found


class Tools:
    """The tools on one network in eval mode. The first of the ONNX tools exports; the others read its file."""

    def __init__(self, module: torch.nn.Module, example: Tensor, folder: Path) -> None:
        self._module, self._example, self._folder = module, example, folder
        self._program: Any = None

    def table(self) -> dict[str, Callable[[], int]]:
        """Return name -> count of the remaining BatchNorms, in the order in which they must run."""
        return {
            "before": self._plain_export,
            "torch.jit.freeze": self._jit,
            "onnxruntime": self._onnxruntime,
            "onnxslim": self._onnxslim,
            "torch.onnx.export": self._optimised_export,
        }

    def _plain_export(self) -> int:
        """Write the input of the tools that read ONNX: nothing is fused in it, but its constants are computed.

        Otherwise the exporter writes the missing bias of a convolution as operations, and no tool folds there.
        """
        self._program = torch.onnx.export(
            self._module, (self._example,), dynamo=True, optimize=False, external_data=False, verbose=False
        )
        common.InlinePass()(self._program.model)
        onnxscript.optimizer.fold_constants(self._program.model)
        common.RemoveUnusedNodesPass()(self._program.model)
        self._program.save(self._folder / _FILE, external_data=True)
        return batch_norms(onnx.load(self._folder / _FILE, load_external_data=False))

    def _optimised_export(self) -> int:
        """The default of ``torch.onnx.export``: the same export, after its own optimiser."""
        self._exported().optimize()
        written = self._folder / "optimised.onnx"
        self._program.save(written, external_data=True)
        return batch_norms(onnx.load(written, load_external_data=False))

    def _jit(self) -> int:
        with jit_freeze(ToolInput(self._module, (self._example,), self._folder)) as product:
            return product.batch_norms or 0

    def _onnxruntime(self) -> int:
        """ONNX Runtime's extended level: the highest that does not change the layout for one kind of processor."""
        self._exported()
        ort = load_engine()
        options = ort.SessionOptions()
        options.log_severity_level = 4  # it warns that every optimised file is for this machine alone
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        written = self._folder / "session.onnx"
        options.optimized_model_filepath = str(written)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "session.data")
        ort.InferenceSession(str(self._folder / _FILE), options, providers=["CPUExecutionProvider"])
        return batch_norms(onnx.load(written, load_external_data=False))

    def _onnxslim(self) -> int:
        slim = require("onnxslim", purpose="its column")
        self._exported()
        return batch_norms(slim.slim(onnx.load(self._folder / _FILE)))

    def _exported(self) -> Any:
        if self._program is None:
            raise RuntimeError("torch.onnx.export failed, so there is no file")
        return self._program
