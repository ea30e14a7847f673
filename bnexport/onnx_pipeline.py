"""The flow for an existing ONNX file: fold it, and write one file, or one bundle after its verdict."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, ValueInfoProto

from bnexport.bundle import MODEL_ONNX, REPORT, Bundle, Manifest, seal, write_golden
from bnexport.environment import environment
from bnexport.errors import ExportError, OutputError, UsageError
from bnexport.exporting.request import ExportRequest, InputSpec, model_and_version, parse_inputs
from bnexport.exporting.signature import check_labels
from bnexport.exporting.triton_config import check_triton_config, write_triton_config
from bnexport.files import refuse_existing, staged_directory, write_atomically
from bnexport.folding.fold import DEFAULT_MAX_GROWTH
from bnexport.folding.onnx_backend.onnx_fold import OnnxFoldResult, fold_onnx
from bnexport.folding.onnx_backend.onnx_proof import NotEvaluated, evaluator, first_that_works, run
from bnexport.onnx_files.float64 import widen_array
from bnexport.onnx_files.models import opset_of
from bnexport.progress import Progress, part_of, silent
from bnexport.quantization.moments import seen_in_file
from bnexport.reporting.html import render_report
from bnexport.reporting.results import ExportResult
from bnexport.tensors import DTYPES, Array, Signature, TensorSpec
from bnexport.verification.golden import golden_inputs, real_images
from bnexport.verification.inputs import score_count
from bnexport.verification.int8 import with_int8, within_range
from bnexport.verification.scope import Scope
from bnexport.verification.verdict import VerificationReport
from bnexport.verification.verify import verify

_FILE_ALONE = "Pass --out FILE.onnx to write the folded file alone"
_HALVES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)


class _Failed(Exception):
    """Leaves the staged directory, so that it is removed."""


def fold_onnx_file(
    source: str | Path,
    out: str | Path,
    *,
    force: bool = False,
    max_growth: float = DEFAULT_MAX_GROWTH,
    clamps: bool = False,
    inputs: tuple[str, ...] = (),
) -> OnnxFoldResult:
    """Fold an ONNX file and write the result as one file, after its proof.

    Args:
        source: The file.
        out: The file to write, with weights inside.
        force: Replace ``out`` if it exists.
        max_growth: See ``fold_onnx``.
        clamps: See ``fold_onnx``.
        inputs: Texts as in ``ExportRequest.inputs``: numbers for sizes that the file leaves open, for shapes and the proof.

    Raises:
        UsageError: ``inputs`` does not fit the file.
        OutputError: ``out`` exists already, or can't be written.
        BadInput: See ``fold_onnx``; nothing was written.
        ProofError: See ``fold_onnx``; nothing was written.
    """
    path = Path(out)
    if path.is_dir():
        raise OutputError(f"{path} is a folder", remedy="Choose another file")
    if path.exists() and not force:
        raise OutputError(f"{path} exists already", remedy="Choose another file, or pass --force to replace it")
    result = fold_onnx(source, max_growth=max_growth, clamps=clamps, inputs=_requested(inputs))
    write_atomically(path, result.model.SerializeToString(deterministic=True))
    return result


def fold_and_export_onnx(
    source: str | Path,
    out: str | Path,
    *,
    request: ExportRequest | None = None,
    max_growth: float = DEFAULT_MAX_GROWTH,
    clamps: bool = False,
    progress: Progress = silent,
) -> ExportResult:
    """Fold an ONNX file and write a bundle of it: ``model.onnx`` alone, with golden vectors of the original in float64.

    Args:
        source: The file.
        out: The bundle's directory, ``models/<name>/<version>``.
        request: Labels, preprocessing, data set, sizes that vary, ``force``; the rest does not apply to a file.
        max_growth: See ``fold_onnx``.
        clamps: See ``fold_onnx``.
        progress: Called before each stage.

    Raises:
        ExportError: The file can't be verified: inputs or outputs without a batch or a shape, another precision than
            float32, an operator that can't be evaluated in float64.
        BadInput: Another fault of the source, the request or the output path; nothing was written.
        ProofError: A fold is not exact; nothing was written.
    """
    request, path = request or ExportRequest(), Path(out)
    name, version = model_and_version(path)
    refuse_existing(path, force=request.force)
    progress("folding and proving the fold", 0, 1)
    result = fold_onnx(source, max_growth=max_growth, clamps=clamps, inputs=_requested(request.inputs))
    signature = signature_of_file(result.model)
    check_labels(signature, request.labels)
    image = request.image(parse_inputs(request.inputs) if request.inputs else ())
    request.check_dataset(request.dataset, preprocessing=image, labels=request.labels, scores=score_count(signature))
    check_triton_config(path, name, signature, force=request.force)
    onnx_facts = {
        "opset": opset_of(result.model),
        "ir_version": result.model.ir_version,
        "precision": "float32",
    }
    manifest = Manifest(
        name, version, signature, {"source": Path(source).name, "options": {}}, request.dataset, image,
        request.labels, onnx_facts, environment(), result.report.to_json(), request.expected_accuracy(request.dataset),
    )  # fmt: skip
    try:
        with staged_directory(path, force=request.force) as stage:
            write_atomically(stage / MODEL_ONNX, _stamped(result.model, manifest))
            manifest = _int8(stage, manifest, result, request)
            progress("writing golden vectors", 0.3, 1)
            _write_golden(stage, manifest, result.original, request)
            report = verify(
                seal(stage, manifest), scope=Scope(thorough=request.thorough), progress=part_of(progress, 0.4, 1.0)
            )
            if not report.passed:
                raise _Failed
            _finish(stage, manifest, result, report, path)
            write_triton_config(path, name, signature, force=request.force)
    except _Failed:
        return ExportResult(None, result.report, report)
    return ExportResult(Bundle.open(path), result.report, report)


def _int8(stage: Path, manifest: Manifest, result: OnnxFoldResult, request: ExportRequest) -> Manifest:
    """Make model.onnx int8 where that is requested, and return the manifest with the record of it."""
    if request.precision != "int8":
        return manifest
    sizes = _requested(request.inputs)
    try:
        example, _ = first_that_works(evaluator(result.original), result.original, 0, sizes)
    except NotEvaluated as reason:
        raise ExportError(f"the file can't be evaluated in float64: {reason}", remedy=_FILE_ALONE) from reason
    return with_int8(stage, manifest, example, partial(seen_in_file, result.original), request)


def _requested(texts: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    return {spec.name: spec.shape for spec in parse_inputs(texts)} if texts else {}


def signature_of_file(model: ModelProto) -> Signature:
    """Return the declared names, element types and shapes of a file; open sizes without a name get one.

    Raises:
        ExportError: A shape that is not declared, no batch, or a precision that the strict float32 bounds do not fit.
    """
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for name, tensor in stored.items():
        if tensor.data_type in _HALVES:
            raise ExportError(f"{name!r} is in half precision; bundles are verified in float32", remedy=_FILE_ALONE)
    inputs = [_spec(value) for value in model.graph.input if value.name not in stored]
    if not inputs:
        raise ExportError("the file takes no input", remedy=_FILE_ALONE)
    return Signature(tuple(inputs), tuple(_spec(value) for value in model.graph.output))


def _spec(value: ValueInfoProto) -> TensorSpec:
    kind = value.type.tensor_type
    if value.type.WhichOneof("value") != "tensor_type" or not kind.HasField("shape") or not kind.shape.dim:
        raise ExportError(
            f"the file does not declare a shape with a batch for {value.name!r}, which a bundle must tell",
            remedy=f"Run onnx.shape_inference over it first. {_FILE_ALONE}",
        )
    dtype = str(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name)
    if dtype not in DTYPES or kind.elem_type in _HALVES:
        raise ExportError(f"{value.name!r} is {dtype}; bundles are verified in float32", remedy=_FILE_ALONE)
    shape = tuple(
        int(dim.dim_value)
        if dim.HasField("dim_value")
        else dim.dim_param or (f"{value.name}_{axis}" if axis else "batch")
        for axis, dim in enumerate(kind.shape.dim)
    )
    return TensorSpec(value.name, dtype, shape)


def _write_golden(stage: Path, manifest: Manifest, original: ModelProto, request: ExportRequest) -> None:
    """Write inputs, and the original file's outputs for them in float64."""
    signature = manifest.signature
    try:
        engine = evaluator(original)
        shapes = _sample_shapes(signature, request.inputs)
        if shapes is None:
            shapes = {name: array.shape[1:] for name, array in first_that_works(engine, original, 0)[0].items()}
        feeds = golden_inputs(
            signature, shapes=shapes, images=real_images(manifest, data_dir=request.images_at(request.dataset))
        )
        feeds = within_range(manifest, feeds)
        feeds = {spec.name: _of_fixed_batch(spec, feeds[spec.name]) for spec in signature.inputs}
        outputs = run(engine, {name: widen_array(array) for name, array in feeds.items()})
    except NotEvaluated as reason:
        raise ExportError(
            f"the file can't be evaluated in float64, so a bundle of it could not be verified: {reason}",
            remedy=_FILE_ALONE,
        ) from reason
    named = {spec.name: np.asarray(output) for spec, output in zip(signature.outputs, outputs, strict=True)}
    write_golden(stage, signature, feeds, named)


def _of_fixed_batch(spec: TensorSpec, array: Array) -> Array:
    """Return as many samples as a fixed batch holds, repeated in turn."""
    n = spec.shape[0]
    return array if isinstance(n, str) else np.resize(array, (n, *array.shape[1:]))


def _sample_shapes(signature: Signature, texts: tuple[str, ...]) -> dict[str, tuple[int, ...]] | None:
    """Return the requested or declared shape of one sample of each input; None when sizes vary and none were requested.

    Raises:
        UsageError: --input does not fit the file's declaration.
    """
    if not texts:
        fixed = {spec.name: tuple(d for d in spec.sample_shape if isinstance(d, int)) for spec in signature.inputs}
        whole = all(len(fixed[spec.name]) == len(spec.sample_shape) for spec in signature.inputs)
        return fixed if whole else None
    given = _named(parse_inputs(texts), signature)
    for spec in signature.inputs:
        asked = given[spec.name]
        sizes = zip(spec.sample_shape, asked.shape, strict=False)
        wrong = len(asked.shape) != len(spec.sample_shape) or any(isinstance(d, int) and d != s for d, s in sizes)
        if wrong or asked.dtype != spec.dtype:
            declared = "x".join(map(str, spec.sample_shape)) or "scalar"
            raise UsageError(
                f"--input does not fit {spec.name!r}, which the file declares as {declared}:{spec.dtype}",
                remedy="Give numbers for the sizes that vary, and leave the rest as it is",
            )
    return {name: asked.shape for name, asked in given.items()}


def _named(specs: tuple[InputSpec, ...], signature: Signature) -> Mapping[str, InputSpec]:
    names = [spec.name for spec in signature.inputs]
    if len(specs) == len(names) == 1:
        return {names[0]: specs[0]}
    given = {spec.name: spec for spec in specs}
    if set(given) != set(names):
        raise UsageError(f"the file has the inputs {', '.join(names)}", remedy="Name each: --input NAME=3x224x224")
    return given


def _stamped(model: ModelProto, manifest: Manifest) -> bytes:
    """Return the file's bytes with a server's facts added to its metadata."""
    copy = ModelProto()
    copy.CopyFrom(model)
    entries = {item.key: item.value for item in copy.metadata_props} | manifest.model_facts()
    del copy.metadata_props[:]
    for key in sorted(entries):
        copy.metadata_props.add(key=key, value=entries[key])
    content: bytes = copy.SerializeToString(deterministic=True)
    return content


def _finish(stage: Path, manifest: Manifest, result: OnnxFoldResult, report: VerificationReport, path: Path) -> None:
    """Write the verdict into the page and the manifest; the model file stays as it was verified, byte for byte."""
    page = render_report(
        manifest,
        fold=result.report,
        verification=report,
        environment=manifest.environment,
        samples=report.samples or None,
        commands=[shlex.join(["bnexport", "verify", str(path)])],
    )
    write_atomically(stage / REPORT, page.encode())
    facts = report.to_json()
    if (
        manifest.classes != manifest.labels
    ):  # no network labelled images, so the report does not state the renamed classes
        facts["accuracy"] = {"classes": list(manifest.classes or ())}
    seal(stage, replace(manifest, verification=facts))
