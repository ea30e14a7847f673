"""Fold BatchNorm exactly, export to ONNX and TorchScript, and prove that the outputs match.

The public functions are loaded on first use, so that ``import bnexport`` costs no torch import.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bnexport.bundle import Bundle
    from bnexport.data.preprocessing import Preprocessing
    from bnexport.errors import BnexportError
    from bnexport.evaluating.evaluate import Evaluation, evaluate
    from bnexport.evaluating.network_options import EvaluationRequest, RecalibrationRequest
    from bnexport.evaluating.recalibration import Recalibration
    from bnexport.evaluating.recalibration import recalibrate_path as recalibrate
    from bnexport.exporting.export_request import ExportRequest
    from bnexport.folding.fold import FoldResult, fold
    from bnexport.folding.fold_report import FoldReport
    from bnexport.folding.module_fold import ModuleFoldResult, fold_modules, load_folded
    from bnexport.folding.onnx_backend.onnx_fold import OnnxFoldResult, fold_onnx
    from bnexport.nn.folded import is_folded
    from bnexport.nn.lenet import bn_lenet
    from bnexport.pipeline import fold_and_export
    from bnexport.reporting.results import ExportResult
    from bnexport.serving.predictor import predict_images as predict
    from bnexport.verification.verdict import VerificationReport
    from bnexport.verification.verify import verify

__all__ = [
    "BnexportError",
    "Bundle",
    "Evaluation",
    "EvaluationRequest",
    "ExportRequest",
    "ExportResult",
    "FoldReport",
    "FoldResult",
    "ModuleFoldResult",
    "OnnxFoldResult",
    "Preprocessing",
    "Recalibration",
    "RecalibrationRequest",
    "VerificationReport",
    "__version__",
    "bn_lenet",
    "evaluate",
    "fold",
    "fold_and_export",
    "fold_modules",
    "fold_onnx",
    "is_folded",
    "load_folded",
    "predict",
    "recalibrate",
    "verify",
]

__version__ = "0.1.0"

_HOME: dict[str, tuple[str, str]] = {
    "BnexportError": ("bnexport.errors", "BnexportError"),
    "Bundle": ("bnexport.bundle", "Bundle"),
    "Evaluation": ("bnexport.evaluating.evaluate", "Evaluation"),
    "EvaluationRequest": ("bnexport.evaluating.network_options", "EvaluationRequest"),
    "ExportRequest": ("bnexport.exporting.export_request", "ExportRequest"),
    "ExportResult": ("bnexport.reporting.results", "ExportResult"),
    "FoldReport": ("bnexport.folding.fold_report", "FoldReport"),
    "FoldResult": ("bnexport.folding.fold", "FoldResult"),
    "ModuleFoldResult": ("bnexport.folding.module_fold", "ModuleFoldResult"),
    "OnnxFoldResult": ("bnexport.folding.onnx_backend.onnx_fold", "OnnxFoldResult"),
    "Preprocessing": ("bnexport.data.preprocessing", "Preprocessing"),
    "Recalibration": ("bnexport.evaluating.recalibration", "Recalibration"),
    "RecalibrationRequest": ("bnexport.evaluating.network_options", "RecalibrationRequest"),
    "VerificationReport": ("bnexport.verification.verdict", "VerificationReport"),
    "bn_lenet": ("bnexport.nn.lenet", "bn_lenet"),
    "evaluate": ("bnexport.evaluating.evaluate", "evaluate"),
    "fold": ("bnexport.folding.fold", "fold"),
    "fold_and_export": ("bnexport.pipeline", "fold_and_export"),
    "fold_modules": ("bnexport.folding.module_fold", "fold_modules"),
    "fold_onnx": ("bnexport.folding.onnx_backend.onnx_fold", "fold_onnx"),
    "is_folded": ("bnexport.nn.folded", "is_folded"),
    "load_folded": ("bnexport.folding.module_fold", "load_folded"),
    "predict": ("bnexport.serving.predictor", "predict_images"),
    "recalibrate": ("bnexport.evaluating.recalibration", "recalibrate_path"),
    "verify": ("bnexport.verification.verify", "verify"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOME[name]
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
