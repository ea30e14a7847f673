"""The whole flow on one page: check, fold, export, verify, and only then publish the bundle."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from torch import nn

from bnexport.bundle import MODEL_ONNX, REPORT, WEIGHTS, Bundle, Manifest, seal
from bnexport.environment import environment
from bnexport.errors import OutputError, RefusedModel, UsageError
from bnexport.evaluating.network import Subject, stale_warning
from bnexport.exporting.dynamic_size import check_sizes_vary, larger_example, with_smallest_sizes
from bnexport.exporting.formats import FORMATS, ExportJob
from bnexport.exporting.half import in_precision
from bnexport.exporting.onnx_graph import stamp_metadata
from bnexport.exporting.request import (
    ExportRequest,
    example_inputs,
    fitted_preprocessing,
    model_and_version,
    parse_inputs,
)
from bnexport.exporting.signature import check_labels, signature_of
from bnexport.exporting.triton import check_triton_config, write_triton_config
from bnexport.files import refuse_existing, staged_directory, write_atomically
from bnexport.folding.fold import FoldResult, fold
from bnexport.folding.module_fold import ModuleFoldResult, fold_modules
from bnexport.folding.torch_backend.trace import size_shapes
from bnexport.loading.checkpoint import save_checkpoint, save_tensors
from bnexport.loading.sources import LoadedModel, checkpoint_of, load_source
from bnexport.loading.zoo import zoo_of
from bnexport.nn.folded import MARKER
from bnexport.nn.soundness import check_sound
from bnexport.reporting.html import render_report
from bnexport.reporting.results import ExportResult
from bnexport.verification.golden import write_golden_vectors
from bnexport.verification.scope import Scope
from bnexport.verification.verdict import VerificationReport
from bnexport.verification.verify import verify


class _Failed(Exception):
    """Leaves the staged directory, so that it is removed."""


def fold_and_export(
    source: str | nn.Module | LoadedModel,
    out: str | Path,
    *,
    weights: Path | None = None,
    request: ExportRequest | None = None,
) -> ExportResult:
    """Fold, export and verify a network, and write one bundle: all of it, or nothing.

    Args:
        source: A source as for ``loading.sources.load_source``, or a module.
        out: The bundle's directory, ``models/<name>/<version>``.
        weights: Weights for a source that has none.
        request: The options of the export; default: as in the checkpoint.

    Raises:
        BadInput: The source, the request or the output path is unusable; nothing was written.
        ProofError: A fold is not exact; nothing was written.
    """
    request, path = request or ExportRequest(), Path(out)
    name, version = model_and_version(path)
    refuse_existing(path, force=request.force)
    loaded = _loaded(source, weights, request)
    specs = parse_inputs(request.inputs, default_shape=loaded.input_shape)
    loaded = replace(loaded, preprocessing=request.preprocessing or fitted_preprocessing(loaded.preprocessing, specs))
    check_sound(loaded.module, allow_untrained=request.allow_untrained)
    inputs, sizes = example_inputs(specs), None
    if request.dynamic_size:
        check_sizes_vary(loaded.module, specs)
        inputs = example_inputs(larger_example(specs))
        sizes = size_shapes(loaded.module, inputs)
    result = fold(loaded.module, inputs, dynamic_shapes=sizes, max_growth=request.max_growth, clamps=request.clamps)
    result = _warned_of_stale_statistics(result, loaded, request)
    names = tuple(spec.name for spec in specs)
    signature = signature_of(result.model, inputs, input_names=names, dynamic_size=request.dynamic_size)
    if request.dynamic_size:
        signature = with_smallest_sizes(signature, loaded.module, result.model, specs)
    check_labels(signature, loaded.labels)
    check_triton_config(path, name, signature, force=request.force)
    manifest = Manifest(
        name, version, signature, loaded.network, loaded.dataset, loaded.preprocessing, loaded.labels,
        _onnx_facts(request), environment(), result.report.to_json(),
    )  # fmt: skip
    try:
        with staged_directory(path, force=request.force) as stage:
            shipped = in_precision(result.model, inputs, request.precision)
            _write_models(stage, ExportJob(shipped, inputs, signature, request.onnx), request)
            if MODEL_ONNX in {row.file for row in FORMATS if row.name in request.formats}:
                stamp_metadata(stage / MODEL_ONNX, manifest.model_facts())
            save_checkpoint(stage / WEIGHTS, checkpoint_of(loaded))
            shapes = {spec.name: spec.shape for spec in specs}
            write_golden_vectors(stage, manifest, loaded.module, shapes=shapes, data_dir=request.data_dir)
            report = verify(
                seal(stage, manifest),
                module=loaded.module,
                data_dir=request.images_at(loaded.dataset),
                scope=Scope(thorough=request.thorough),
            )
            if not report.passed:
                raise _Failed
            _finish(stage, manifest, result, report, path)
            write_triton_config(path, name, signature, force=request.force)  # before the bundle: all of it, or nothing
    except _Failed:
        return ExportResult(None, result.report, report)
    return ExportResult(Bundle.open(path), result.report, report)


def fold_weights(
    source: str | nn.Module | LoadedModel,
    out: str | Path,
    *,
    weights: Path | None = None,
    request: ExportRequest | None = None,
) -> ModuleFoldResult:
    """Fold BatchNorm inside a network and write its folded weights as safetensors, after the proof.

    The metadata of the file state the source and the outcome under ``bnexport_folded``.

    Args:
        source: As for ``fold_and_export``.
        out: The file to write, ``*.safetensors``.
        weights: Weights for a source that has none.
        request: ``model_options``, ``inputs``, ``allow_untrained`` and ``force``; the rest does not apply to weights.

    Raises:
        BadInput: The source, the request or the output path is unusable; nothing was written.
        ProofError: The fold is not exact; nothing was written.
    """
    request, path = request or ExportRequest(), Path(out)
    if path.suffix != ".safetensors":
        raise UsageError(f"{path} is not named .safetensors", remedy="Pass --out FILE.safetensors")
    if path.is_dir() or (path.exists() and not request.force):
        raise OutputError(f"{path} exists already", remedy="Choose another file, or pass --force to replace a file")
    given = [weights, *([Path(source)] if isinstance(source, str) else [])]
    if any(item is not None and item.exists() and path.exists() and item.samefile(path) for item in given):
        raise OutputError(f"{path} is the file that is read", remedy="Choose another file: a fold can't be undone")
    loaded = _loaded(source, weights, request)
    specs = parse_inputs(request.inputs, default_shape=loaded.input_shape)
    check_sound(loaded.module, allow_untrained=request.allow_untrained)
    result = fold_modules(loaded.module, example_inputs(specs))
    facts = {"network": dict(loaded.network), "fold": result.report.to_json()}
    save_tensors(path, result.model.state_dict(), {MARKER: json.dumps(facts, allow_nan=False)})
    return result


def _loaded(source: str | nn.Module | LoadedModel, weights: Path | None, request: ExportRequest) -> LoadedModel:
    if isinstance(source, nn.Module):
        source = LoadedModel(source, type(source).__name__, {"source": type(source).__qualname__, "options": {}})
    if isinstance(source, LoadedModel):
        if request.model_options:
            raise UsageError("the network is built already, so it takes no options", remedy="Leave model_options out")
        loaded = source
    else:
        loaded = load_source(source, weights=weights, options=request.model_options)
        if weights is None and zoo_of(source) is not None and not request.allow_untrained:
            raise RefusedModel(
                f"{source} has random weights",
                remedy="Pass --weights FILE, or --allow-untrained if that is what you want",
            )
    return replace(loaded, labels=request.labels or loaded.labels, dataset=request.dataset or loaded.dataset)


def _warned_of_stale_statistics(result: FoldResult, loaded: LoadedModel, request: ExportRequest) -> FoldResult:
    """Add a warning to the fold report if the moving statistics, which a fold puts into the weights, do not fit the network."""
    subject = Subject(loaded.module, loaded.dataset, loaded.preprocessing)
    warning = stale_warning(subject, data_dir=request.data_dir) if result.report.rows else ""
    warnings = (*result.report.warnings, *([warning] if warning else []))
    return replace(result, report=replace(result.report, warnings=warnings))


def _write_models(stage: Path, job: ExportJob, request: ExportRequest) -> None:
    for row in FORMATS:
        if row.name in request.formats:
            row.write(job, stage / row.file)


def _onnx_facts(request: ExportRequest) -> dict[str, str | int]:
    return {
        "opset": request.onnx.opset,
        "ir_version": request.onnx.resolved_ir_version(),
        "precision": request.precision,
    }


def _finish(stage: Path, manifest: Manifest, result: FoldResult, report: VerificationReport, path: Path) -> None:
    """Write the verdict into the page and the manifest; the model files stay as they were verified, byte for byte."""
    page = render_report(
        manifest,
        fold=result.report,
        verification=report,
        environment=manifest.environment,
        samples=report.samples or None,
        commands=[f"bnexport verify {path}", f"bnexport inspect {path}"],
    )
    write_atomically(stage / REPORT, page.encode())
    seal(stage, replace(manifest, verification=report.to_json()))
