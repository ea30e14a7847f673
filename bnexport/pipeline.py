"""The whole flow on one page: check, fold, export, verify, and only then publish the bundle.

``publish`` is the end of the flow for every kind of source; ``onnx_pipeline`` makes a ``Source`` of an ONNX file.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from onnx import ModelProto
from torch import Tensor, nn
from torch.fx import GraphModule

from bnexport.bundle import MODEL_FLOAT32, MODEL_ONNX, REPORT, WEIGHTS, Bundle, Manifest, seal
from bnexport.data.preprocessing import Preprocessing, original_feeds, preprocessing_of
from bnexport.environment import cpu_name, environment
from bnexport.errors import BnexportError, DataError, ModelError, RefusedModel, UsageError
from bnexport.evaluating.network import stale_warning
from bnexport.exporting.dynamic_size import check_sizes_vary, larger_example, with_smallest_sizes
from bnexport.exporting.export_onnx import stamp_metadata
from bnexport.exporting.export_request import (
    ExportRequest,
    InputSpec,
    example_inputs,
    model_and_version,
    parse_inputs,
    read_share,
)
from bnexport.exporting.formats import FORMATS
from bnexport.exporting.half import PRECISIONS, in_precision
from bnexport.exporting.signature import ExportJob, check_labels, of_dtype, signature_of
from bnexport.exporting.triton_config import check_triton_config, write_triton_config
from bnexport.files import refuse_existing, refuse_existing_file, staged_directory, write_atomically
from bnexport.folding.fold import FoldResult, fold
from bnexport.folding.fold_report import FoldReport
from bnexport.folding.module_fold import ModuleFoldResult, fold_modules
from bnexport.folding.pixel_input import pixel_module
from bnexport.folding.torch_backend.trace import size_shapes
from bnexport.loading.checkpoint import save_checkpoint, save_tensors
from bnexport.loading.sources import LoadedModel, checkpoint_of, load_source
from bnexport.loading.zoo import zoo_of
from bnexport.nn.batch_axis import check_batch
from bnexport.nn.folded import MARKER
from bnexport.nn.soundness import check_finite_output, check_sound
from bnexport.onnx_files.models import opset_of, read_model
from bnexport.onnx_files.packed_pools import pack_pools
from bnexport.optional import collection_paused, installed
from bnexport.progress import Progress, part_of, silent
from bnexport.quantization.moments import Seen, seen_in_module
from bnexport.quantization.quantize import Int8Options, Int8Result, calibration_of, quantise
from bnexport.reporting.html import render_report
from bnexport.reporting.results import ExportResult
from bnexport.runtimes.base import RunSettings
from bnexport.runtimes.onnxruntime import OnnxRuntimeRunner
from bnexport.tensors import Array
from bnexport.verification.full_check import verify_command
from bnexport.verification.golden import write_golden_vectors
from bnexport.verification.int8 import within_range_of
from bnexport.verification.scope import Scope
from bnexport.verification.verdict import VerificationReport
from bnexport.verification.verify import verify

#: Number of timed runs of an int8 file and its float32 original; the shortest times are compared.
_ROUNDS = 15


@dataclass(frozen=True)
class Source:
    """A folded network that can be written as a bundle."""

    manifest: Manifest
    #: The fold report.
    fold: FoldReport
    #: Writes the model files and the golden vectors into a folder, and returns the manifest with facts of what was written.
    write: Callable[[Path, Progress], Manifest]
    #: Adds checks that need the original to the report of the written bundle.
    judge: Callable[[Bundle, VerificationReport], VerificationReport] = lambda _bundle, report: report
    #: The original network in eval mode; None for an ONNX file, which golden vectors of its float64 evaluation represent.
    module: nn.Module | None = None
    #: Folder of the data set for the verification; None: not requested, or not usable.
    images: Path | None = None


class _Failed(Exception):
    """Leaves the staged directory, so that it is removed."""


def publish(make: Callable[[str, int], Source], path: Path, request: ExportRequest, progress: Progress) -> ExportResult:
    """Write the bundle of the source that ``make`` returns for a name and a version, and verify it.

    The bundle is at ``path`` only after a PASS, and otherwise nothing is.
    """
    name, version = model_and_version(path)
    refuse_existing(path, force=request.force)
    with collection_paused:
        source = make(name, version)
    check_triton_config(path, name, source.manifest.signature, force=request.force)
    try:
        with staged_directory(path, force=request.force) as stage:
            with collection_paused:
                manifest = source.write(stage, part_of(progress, 0.25, 0.6))
            sealed = seal(stage, manifest)
            report = verify(
                sealed,
                module=source.module,
                data_dir=source.images,
                scope=Scope(thorough=request.thorough, allow_low_accuracy=request.allow_low_accuracy),
                progress=part_of(progress, 0.6, 1.0),
            )
            report = source.judge(sealed, report)
            if not report.passed:
                raise _Failed
            _finish(stage, manifest, source, report, path, request.data_dir)
            # Before the bundle: all of it, or nothing.
            write_triton_config(path, name, manifest.signature, force=request.force)
    except _Failed:
        return ExportResult(None, source.fold, report)
    return ExportResult(Bundle.open(path), source.fold, report)


def fold_and_export(
    source: str | Path | nn.Module | LoadedModel,
    out: str | Path,
    *,
    weights: str | Path | None = None,
    request: ExportRequest | None = None,
    input: str | Sequence[int] | Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    labels: Sequence[str] | str | Path | None = None,
    dataset: str | None = None,
    data_dir: str | Path | None = None,
    model_options: Mapping[str, Any] | None = None,
    force: bool | None = None,
    progress: Progress = silent,
) -> ExportResult:
    """Fold, export and verify a network, and write one bundle: all of it, or nothing.

    Args:
        source: A source as for ``loading.sources.load_source``, or a module.
        out: The bundle's directory, ``models/<name>/<version>``.
        weights: A weights file, a bundle or a run directory, for a source without weights (docs/weights.md).
        request: All options of the export; default: as in the checkpoint. An argument below replaces the option of the same
            name.
        input: Shape of one sample, ``(3, 224, 224)`` or "3x224x224"; of several inputs one text each, "tokens=16:int64".
        mean: Per channel, of pixels from 0 to 1, with ``std``: how an image becomes the input.
        std: Per channel, of pixels from 0 to 1.
        labels: Class names in the order of the scores, or a text file with one per line.
        dataset: Data set whose test images the verification uses: a name, or ``folder:PATH``.
        data_dir: Folder of the data set.
        model_options: Named arguments of the network's constructor or factory.
        force: Replace an existing bundle.
        progress: Called before each stage.

    Raises:
        BadInput: The source, the request or the output path is unusable; nothing was written.
        ProofError: A fold is not exact; nothing was written.
    """
    request = (request or ExportRequest()).with_options(
        input=input, mean=mean, std=std, labels=labels, dataset=dataset, data_dir=data_dir, force=force,
        model_options=model_options,
    )  # fmt: skip

    def make(name: str, version: int) -> Source:
        return _network_source(_loaded(source, weights, request), name, version, request, progress)

    return publish(make, Path(out), request, progress)


def _network_source(loaded: LoadedModel, name: str, version: int, request: ExportRequest, progress: Progress) -> Source:
    """Check and fold a network."""
    specs = parse_inputs(request.inputs, default_shape=loaded.input_shape)
    image = request.image(specs, stated=loaded.preprocessing)
    request.check_pixels(specs, image)
    loaded = replace(loaded, preprocessing=image)
    request.check_dataset(loaded.dataset, preprocessing=image, labels=loaded.labels)
    inputs, sizes = _checked_example(loaded.module, specs, request), None
    if request.dynamic_size:
        check_sizes_vary(loaded.module, specs)
        inputs = example_inputs(larger_example(specs))
        sizes = size_shapes(loaded.module, inputs)
    progress("tracing, folding and proving the fold", 0, 1)
    result = fold(loaded.module, inputs, dynamic_shapes=sizes, max_growth=request.max_growth, clamps=request.clamps)
    result = _with_warnings(result, loaded, request)
    names = tuple(spec.name for spec in specs)
    signature = signature_of(result.model, inputs, input_names=names, dynamic_size=request.dynamic_size)
    if request.dynamic_size:
        signature = with_smallest_sizes(signature, loaded.module, result.model, specs)
    check_labels(signature, loaded.labels)
    signature = of_dtype(signature, "uint8") if request.input_type == "uint8" else signature
    manifest = Manifest(
        name, version, signature, loaded.network, loaded.dataset, loaded.preprocessing, loaded.labels,
        onnx_facts(request), environment(), result.report.to_json(), request.expected_accuracy(loaded.dataset),
    )  # fmt: skip

    def write(stage: Path, report: Progress) -> Manifest:
        shipped, given = _on_pixels(result.model, inputs, manifest)
        shipped = in_precision(shipped, given, request.precision)
        _write_models(stage, ExportJob(shipped, given, signature, request.onnx), request, part_of(report, 0, 0.9))
        written = manifest
        if request.precision == "int8":
            example = {spec.name: tensor.numpy() for spec, tensor in zip(signature.inputs, given, strict=True)}
            written = with_int8(stage, manifest, example, partial(seen_in_module, loaded.module), request)
        if request.pack_pools:
            model = read_model(stage / MODEL_ONNX)
            written = replace(manifest, onnx={**manifest.onnx, **pack_or_refuse(model)})
            write_atomically(stage / MODEL_ONNX, model.SerializeToString(deterministic=True))
        if (stage / MODEL_ONNX).is_file():
            stamp_metadata(stage / MODEL_ONNX, manifest.model_facts())
        save_checkpoint(stage / WEIGHTS, checkpoint_of(loaded))
        report("writing golden vectors", 0.9, 1)
        shapes = {spec.name: spec.shape for spec in specs}
        write_golden_vectors(stage, written, loaded.module, shapes=shapes, data_dir=request.data_dir)
        return written

    images = request.images_at(loaded.dataset, usable=image is not None)
    return Source(manifest, result.report, write, module=loaded.module, images=images)


def _on_pixels(
    folded: GraphModule, inputs: tuple[Tensor, ...], manifest: Manifest
) -> tuple[GraphModule, tuple[Tensor, ...]]:
    """Return a folded graph and its example inputs; of a manifest that states pixels, those that take and are pixels."""
    if not manifest.takes_pixels or manifest.preprocessing is None:
        return folded, inputs
    pixels = torch.randint(0, 256, inputs[0].shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    stored = PRECISIONS[str(manifest.onnx["precision"])]
    return pixel_module(folded, Preprocessing.from_json(manifest.preprocessing), stored), (pixels,)


def fold_weights(
    source: str | Path | nn.Module | LoadedModel,
    out: str | Path,
    *,
    weights: str | Path | None = None,
    request: ExportRequest | None = None,
) -> ModuleFoldResult:
    """Fold BatchNorm inside a network and write its folded weights as safetensors, after the proof.

    The metadata of the file holds the source and the fold report under ``bnexport_folded``.

    Args:
        source: As for ``fold_and_export``.
        out: The file to write, ``*.safetensors``.
        weights: Weights for a source that has none.
        request: ``weights_key``, ``model_options``, ``inputs``, ``allow_untrained``, ``allow_nonfinite`` and ``force``;
            the rest does not apply to weights.

    Raises:
        BadInput: The source, the request or the output path is unusable; nothing was written.
        ProofError: The fold is not exact; nothing was written.
    """
    request, path = request or ExportRequest(), Path(out)
    if path.suffix != ".safetensors":
        raise UsageError(f"{path} is not named .safetensors", remedy="Pass --out FILE.safetensors")
    given = [Path(item) for item in (weights, source) if isinstance(item, str | Path)]
    refuse_existing_file(path, force=request.force, read=given)
    loaded = _loaded(source, weights, request)
    specs = parse_inputs(request.inputs, default_shape=loaded.input_shape)
    result = fold_modules(loaded.module, _checked_example(loaded.module, specs, request))
    facts = {"network": dict(loaded.network), "fold": result.report.to_json()}
    save_tensors(path, result.model.state_dict(), {MARKER: json.dumps(facts, allow_nan=False)})
    return result


def _checked_example(module: nn.Module, specs: tuple[InputSpec, ...], request: ExportRequest) -> tuple[Tensor, ...]:
    """Return an example batch of a network that may be shipped: sound, finite on the example, right for every batch size."""
    for name, weight in module.named_parameters() if request.precision == "int8" else ():
        if weight.is_floating_point() and weight.dtype != torch.float32:
            raise RefusedModel(
                f"{name!r} is in {weight.dtype}; int8 is made from float32", remedy="Give the float32 network"
            )
    check_sound(module, allow_untrained=request.allow_untrained, allow_nonfinite=request.allow_nonfinite)
    inputs = example_inputs(specs)
    check_finite_output(module, inputs)
    check_batch(module, inputs)
    return inputs


def _loaded(
    source: str | Path | nn.Module | LoadedModel, weights: str | Path | None, request: ExportRequest
) -> LoadedModel:
    if weights is not None and isinstance(source, nn.Module | LoadedModel):
        raise UsageError(
            "the network is built already, so weights=... does not apply",
            remedy="Load the weights into the module with load_state_dict, or give its code: 'file.py:factory'",
        )
    if isinstance(source, nn.Module):
        source = LoadedModel(source, type(source).__name__, {"source": type(source).__qualname__, "options": {}})
    if isinstance(source, LoadedModel):
        if request.model_options:
            raise UsageError("the network is built already, so it takes no options", remedy="Leave model_options out")
        loaded = source
    else:
        loaded = load_source(source, weights=weights, weights_key=request.weights_key, options=request.model_options)
        if weights is None and zoo_of(str(source)) is not None and not request.allow_untrained:
            raise RefusedModel(
                f"{source} has random weights",
                remedy="Pass --weights FILE, or --allow-untrained if that is what you want",
            )
    return replace(loaded, labels=request.labels or loaded.labels, dataset=request.dataset or loaded.dataset)


def _with_warnings(result: FoldResult, loaded: LoadedModel, request: ExportRequest) -> FoldResult:
    """Add to the fold report: choices in the weights file, and moving statistics that do not fit the network."""
    warning = stale_warning(loaded, data_dir=request.data_dir) if result.report.rows else ""
    if warning and request.precision == "int8" and request.calibrate in (None, "none"):
        raise RefusedModel(
            f"int8 ranges come from BatchNorm, and {warning[:1].lower()}{warning[1:]}",
            remedy="Run bnexport recalibrate and export its result, or pass --calibrate with a data set or a folder",
        )
    warnings = (*loaded.notes, *result.report.warnings, *([warning] if warning else []))
    return replace(result, report=replace(result.report, warnings=warnings))


def _write_models(stage: Path, job: ExportJob, request: ExportRequest, progress: Progress) -> None:
    # int8 is an ONNX format, and packed weights are not those of the other formats.
    formats = ("onnx",) if request.precision == "int8" or request.pack_pools else request.formats
    rows = [row for row in FORMATS if row.name in formats]
    for number, row in enumerate(rows):
        progress(f"writing {row.file}", number, len(rows))
        row.write(job, stage / row.file)


def pack_or_refuse(model: ModelProto) -> dict[str, int]:
    """Pack the average pools of a model in place, and return the fact for the manifest; UsageError if there are none."""
    if not (count := pack_pools(model)):
        raise UsageError(
            "--pack-pools finds no average pooling that it can pack: without padding, with a window of 2, 4, 8, ... places,"
            " after a convolution of few channels and an activation of one operator",
            remedy="Leave it out",
        )
    return {"packed_pools": count}


def with_int8(
    stage: Path,
    manifest: Manifest,
    example: Mapping[str, Array],
    norms: Callable[[Mapping[str, Array]], Sequence[Seen]],
    request: ExportRequest,
) -> Manifest:
    """Make the model.onnx of a folder int8, keep its float32 original next to it, and return the manifest with the record.

    ``norms`` returns the original's BatchNorm outputs and inputs; it takes the original's inputs, not pixels. Ranges come from
    BatchNorm where the request names no calibration, and from the training images of the manifest's data set where BatchNorm
    does not give all ranges. If the model can't be quantised (BadInput), the folder is unchanged.
    """
    model = read_model(stage / MODEL_ONNX)
    options = Int8Options(request.target, request.float_layers, read_share(request.allow_flips, "--allow-flips"))
    image = preprocessing_of(manifest)

    def seen(feeds: Mapping[str, Array]) -> Sequence[Seen]:
        return norms(original_feeds(manifest, feeds))

    def made(named: str | None) -> Int8Result:
        folder = request.images_at(named) if named == manifest.dataset else request.data_dir
        calibration = calibration_of(named, manifest.signature, image, folder)
        return quantise(
            model, example, seen, options=options, preprocessing=manifest.preprocessing, calibration=calibration
        )

    try:
        result = made(request.calibrate)
    except ModelError as unknown:
        if request.calibrate is not None or manifest.dataset is None:
            raise
        try:
            result = made(manifest.dataset)
        except DataError:  # its images are not here
            raise unknown from None
    write_atomically(stage / MODEL_FLOAT32, (stage / MODEL_ONNX).read_bytes())
    write_atomically(stage / MODEL_ONNX, result.model.SerializeToString(deterministic=True))
    record = {**result.record, "speed": _int8_speed(stage, manifest, within_range_of(result.record, example))}
    return replace(manifest, onnx={**manifest.onnx, "precision": "int8", "quantization": record})


def _int8_speed(folder: Path, manifest: Manifest, feeds: Mapping[str, Array]) -> dict[str, Any]:
    """Return the speed of int8 as a multiple of float32's in ONNX Runtime, with the conditions; {} if it can't be measured."""
    if not installed("onnxruntime"):
        return {}
    settings, fixed = RunSettings(threads=1), isinstance(manifest.signature.inputs[0].shape[0], int)
    given = {name: array if fixed else array[:1] for name, array in feeds.items()}
    with contextlib.suppress(BnexportError), contextlib.ExitStack() as stack:  # the verdict reports what fails
        runners = [
            stack.enter_context(OnnxRuntimeRunner(folder / name, manifest.signature, settings=settings))
            for name in (MODEL_FLOAT32, MODEL_ONNX)
        ]
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(_ROUNDS):  # in turn, so that other load on the machine affects both
            for runner, taken in zip(runners, times, strict=True):
                start = time.perf_counter()
                runner.run(given)
                taken.append(time.perf_counter() - start)
        version = runners[0].description["version"]
        conditions = f"ONNX Runtime {version}, one thread, one sample, {cpu_name()}"
        return {"of_float32": float(f"{min(times[0]) / min(times[1]):.2g}"), "conditions": conditions}
    return {}


def onnx_facts(request: ExportRequest, model: ModelProto | None = None) -> dict[str, str | int]:
    """Return the facts of the model files for the manifest; ``model`` is the folded ONNX source, if it is one."""
    facts: dict[str, str | int] = {
        "opset": request.onnx.opset if model is None else opset_of(model),
        "ir_version": request.onnx.resolved_ir_version() if model is None else model.ir_version,
        "precision": request.precision if model is None else "float32",
    }
    return facts | ({"input_type": "uint8"} if request.input_type == "uint8" else {})


def _finish(
    stage: Path, manifest: Manifest, source: Source, report: VerificationReport, path: Path, data_dir: Path | None
) -> None:
    """Write the verdict into the page and the manifest; the model files stay as they were verified, byte for byte."""
    commands = [verify_command(manifest, path, report, data_dir=data_dir)]
    if source.module is not None:
        commands.append(shlex.join(["bnexport", "inspect", str(path)]))
    page = render_report(
        manifest,
        fold=source.fold,
        verification=report,
        environment=manifest.environment,
        samples=report.samples or None,
        commands=commands,
    )
    write_atomically(stage / REPORT, page.encode())
    facts = report.to_json()
    if not facts["accuracy"] and manifest.classes != manifest.labels:
        # No network labelled images, so the report does not state the renamed classes.
        facts["accuracy"] = {"classes": list(manifest.classes or ())}
    seal(stage, replace(manifest, verification=facts))
