"""The table of file formats in a bundle; an exporter is imported when it is first used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from bnexport.bundle import MODEL_EXPORTED, MODEL_ONNX, MODEL_TORCHSCRIPT
from bnexport.tensors import Signature

if TYPE_CHECKING:
    from torch import Tensor
    from torch.export import ExportedProgram
    from torch.fx import GraphModule

    from bnexport.exporting.request import OnnxTarget


@dataclass(frozen=True)
class ExportJob:
    """The inputs of every format: the folded network in eval mode, example inputs (at least 2 samples), signature, target."""

    folded: GraphModule
    inputs: tuple[Tensor, ...]
    signature: Signature
    onnx: OnnxTarget

    @cached_property
    def program(self) -> ExportedProgram:
        """Return ``torch.export`` of the flat graph, made once; the format that changes it is the last one of FORMATS."""
        from bnexport.exporting.signature import export_flat, varying_axes

        return export_flat(self.folded, self.inputs, varying_axes(self.signature))


@dataclass(frozen=True)
class ExportFormat:
    """One kind of file: its name on the command line, its name in the bundle, and its writer."""

    name: str
    file: str
    write: Callable[[ExportJob, Path], None]


def _write_onnx(job: ExportJob, path: Path) -> None:
    from bnexport.exporting.export_onnx import export_onnx

    export_onnx(job.folded, job.inputs, path, signature=job.signature, target=job.onnx, exported=lambda: job.program)


def _write_torchscript(job: ExportJob, path: Path) -> None:
    from bnexport.exporting.export_torchscript import export_torchscript

    export_torchscript(job.folded, path)


def _write_exported(job: ExportJob, path: Path) -> None:
    from bnexport.exporting.export_program import export_program

    export_program(job.folded, job.inputs, path, signature=job.signature, exported=lambda: job.program)


#: Every format. A new one is a new row.
FORMATS: tuple[ExportFormat, ...] = (
    ExportFormat("onnx", MODEL_ONNX, _write_onnx),
    ExportFormat("torchscript", MODEL_TORCHSCRIPT, _write_torchscript),
    ExportFormat("exported-program", MODEL_EXPORTED, _write_exported),
)
