"""The flow for an existing ONNX file: fold it, and write one file, or one bundle after its verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from onnx import ModelProto

from bnexport.bundle import MODEL_ONNX, Bundle, Manifest, write_golden
from bnexport.data.preprocessing import Preprocessing, original_feeds
from bnexport.environment import environment
from bnexport.errors import ExportError, UsageError
from bnexport.exporting.export_onnx import stamp
from bnexport.exporting.export_request import ExportRequest, InputSpec, parse_inputs
from bnexport.exporting.signature import FILE_ALONE, check_labels, of_dtype, signature_of_file
from bnexport.files import refuse_existing_file, write_atomically
from bnexport.folding.fold import DEFAULT_MAX_GROWTH
from bnexport.folding.onnx_backend.onnx_fold import OnnxFoldResult, fold_onnx
from bnexport.folding.onnx_backend.onnx_proof import NotEvaluated, evaluator, first_that_works, run
from bnexport.folding.pixel_input import pixel_model
from bnexport.onnx_files.float64 import widen_array
from bnexport.onnx_files.models import work_of
from bnexport.onnx_files.normalisation import upgraded
from bnexport.pipeline import Source, onnx_facts, pack_or_refuse, publish, with_int8
from bnexport.progress import Progress, silent
from bnexport.quantization.int8_plan import OLDEST_OPSET
from bnexport.quantization.moments import seen_in_file
from bnexport.reporting.results import ExportResult
from bnexport.tensors import Array, Signature, TensorSpec
from bnexport.verification.budget import Work, budget_of
from bnexport.verification.full_check import judge_accuracy
from bnexport.verification.golden import golden_inputs, real_images
from bnexport.verification.inputs import Case, build_suite, score_count
from bnexport.verification.int8 import within_range
from bnexport.verification.verdict import VerificationReport

#: Largest number of images on which the original's accuracy is judged, and of those evaluated in one call.
_MOST_JUDGED, _CHUNK = 1000, 64


def fold_onnx_file(
    source: str | Path,
    out: str | Path,
    *,
    force: bool = False,
    max_growth: float = DEFAULT_MAX_GROWTH,
    clamps: bool = False,
    inputs: tuple[str, ...] = (),
) -> OnnxFoldResult:
    """Fold an ONNX file and write the result as one file with its weights inside, after its proof.

    ``max_growth`` and ``clamps`` are those of ``fold_onnx``. ``inputs`` are texts as in ``ExportRequest.inputs``: numbers
    for sizes that the file leaves open, for shapes and the proof.

    Raises:
        OutputError: ``out`` exists already without ``force``, or can't be written.
        BadInput: See ``fold_onnx``, or ``inputs`` does not fit the file; nothing was written.
        ProofError: See ``fold_onnx``; nothing was written.
    """
    path = Path(out)
    refuse_existing_file(path, force=force)
    result = fold_onnx(source, max_growth=max_growth, clamps=clamps, inputs=_requested(inputs))
    write_atomically(path, result.model.SerializeToString(deterministic=True), follow=True)
    return result


def fold_and_export_onnx(
    source: str | Path, out: str | Path, *, request: ExportRequest | None = None, progress: Progress = silent
) -> ExportResult:
    """Fold an ONNX file and write a bundle of it: ``model.onnx`` alone, with golden vectors of the original in float64.

    Of the request, labels, preprocessing, data set, sizes that vary, ``max_growth``, ``clamps`` and ``force`` apply to a file.

    Raises:
        ExportError: The file can't be verified: inputs or outputs without a batch or a shape, another precision than
            float32, an operator that can't be evaluated in float64.
        BadInput: Another fault of the source, the request or the output path; nothing was written.
        ProofError: A fold is not exact; nothing was written.
    """
    request = request or ExportRequest()
    return publish(partial(_file_source, Path(source), request, progress), Path(out), request, progress)


def _file_source(file: Path, request: ExportRequest, progress: Progress, name: str, version: int) -> Source:
    """Check and fold a file."""
    progress("folding and proving the fold", 0, 1)
    result = fold_onnx(file, max_growth=request.max_growth, clamps=request.clamps, inputs=_requested(request.inputs))
    if request.precision == "int8":
        result = replace(result, model=upgraded(result.model, file.name, OLDEST_OPSET))
    signature = signature_of_file(result.model)
    check_labels(signature, request.labels)
    image = request.image(parse_inputs(request.inputs) if request.inputs else ())
    request.check_dataset(request.dataset, preprocessing=image, labels=request.labels, scores=score_count(signature))
    request.check_pixels(signature.inputs, image)
    model = result.model
    if request.input_type == "uint8" and image is not None:
        model = pixel_model(model, Preprocessing.from_json(image), _requested(request.inputs))
        signature = of_dtype(signature, "uint8")
    packed = pack_or_refuse(model) if request.pack_pools else {}
    manifest = Manifest(
        name, version, signature, {"source": file.name, "options": {}}, request.dataset, image,
        request.labels, onnx_facts(request, model) | packed, environment(), result.report.to_json(),
        request.expected_accuracy(request.dataset),
    )  # fmt: skip

    def write(stage: Path, report: Progress) -> Manifest:
        stamp(model, {item.key: item.value for item in model.metadata_props} | manifest.model_facts())
        write_atomically(stage / MODEL_ONNX, model.SerializeToString(deterministic=True))
        written = _int8(stage, manifest, result, request)
        report("writing golden vectors", 0.2, 1)
        _write_golden(stage, written, result.original, request)
        return written

    def judge(bundle: Bundle, report: VerificationReport) -> VerificationReport:
        return _judged(report, bundle, result.original, request)

    return Source(manifest, result.report, write, judge)


def _int8(stage: Path, manifest: Manifest, result: OnnxFoldResult, request: ExportRequest) -> Manifest:
    """Make model.onnx int8 where that is requested, and return the manifest with the record of it."""
    if request.precision != "int8":
        return manifest
    sizes = _requested(request.inputs)
    try:
        example, _ = first_that_works(evaluator(result.original), result.original, 0, sizes)
    except NotEvaluated as reason:
        raise ExportError(f"the file can't be evaluated in float64: {reason}", remedy=FILE_ALONE) from reason
    if manifest.takes_pixels:
        rng = np.random.default_rng(0)
        example = {name: rng.integers(0, 256, array.shape, np.uint8) for name, array in example.items()}
    return with_int8(stage, manifest, example, partial(seen_in_file, result.original), request)


def _requested(texts: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    return {spec.name: spec.shape for spec in parse_inputs(texts)} if texts else {}


def _write_golden(stage: Path, manifest: Manifest, original: ModelProto, request: ExportRequest) -> None:
    """Write inputs, and the original file's outputs for them in float64."""
    signature = manifest.signature
    try:
        engine = evaluator(original)
        shapes = _sample_shapes(of_dtype(signature, "float32") if manifest.takes_pixels else signature, request.inputs)
        if shapes is None:
            shapes = {name: array.shape[1:] for name, array in first_that_works(engine, original, 0)[0].items()}
        images = real_images(manifest, data_dir=request.images_at(request.dataset))
        feeds = golden_inputs(signature, shapes=shapes, images=images, pixels=manifest.takes_pixels)
        feeds = within_range(manifest, feeds)
        feeds = {spec.name: _of_fixed_batch(spec, feeds[spec.name]) for spec in signature.inputs}
        outputs = run(engine, {name: widen_array(array) for name, array in original_feeds(manifest, feeds).items()})
    except NotEvaluated as reason:
        raise ExportError(
            f"the file can't be evaluated in float64, so a bundle of it could not be verified: {reason}",
            remedy=FILE_ALONE,
        ) from reason
    named = {spec.name: np.asarray(output) for spec, output in zip(signature.outputs, outputs, strict=True)}
    write_golden(stage, signature, feeds, named)


def _judged(
    report: VerificationReport, bundle: Bundle, original: ModelProto, request: ExportRequest
) -> VerificationReport:
    """Return the report with a check of the original's accuracy on the data set's images, if it is at or below chance."""
    manifest = bundle.manifest
    if request.dataset is None or len(manifest.signature.inputs) != 1:
        return report
    golden, expected = bundle.golden()
    engine = evaluator(original)
    cost, values = work_of(original, {name: array.shape[1:] for name, array in golden.items()})
    kept = sum(array.nbytes // len(array) for array in (*golden.values(), *expected.values()))
    budget = budget_of(Work(cost, kept, values), thorough=request.thorough, most=_MOST_JUDGED)
    place = request.images_at(request.dataset)
    suite = build_suite(manifest, golden, data_dir=place, seed=0, budget=budget)
    if suite.labels is None:
        return report
    batch, (spec,) = suite.batches[0], manifest.signature.inputs
    step = _CHUNK if isinstance(spec.shape[0], str) else batch.n
    images = widen_array(original_feeds(manifest, batch.feeds)[spec.name])
    scores = np.concatenate(
        [np.asarray(run(engine, {spec.name: images[at : at + step]})[0]) for at in range(0, batch.n, step)]
    )
    case = Case(batch, {manifest.signature.outputs[0].name: scores})
    facts, rows = judge_accuracy(manifest, case, suite.labels, accept=request.allow_low_accuracy)
    return replace(report, rows=(*report.rows, *rows), accuracy={**report.accuracy, **facts})


def _of_fixed_batch(spec: TensorSpec, array: Array) -> Array:
    """Return as many samples as a fixed batch holds, repeated in turn."""
    n = spec.shape[0]
    return array if isinstance(n, str) else np.resize(array, (n, *array.shape[1:]))


def _sample_shapes(signature: Signature, texts: tuple[str, ...]) -> dict[str, tuple[int, ...]] | None:
    """Return the requested or declared shape of one sample of each input; None when sizes vary and none were requested."""
    if not texts:
        fixed = {spec.name: tuple(d for d in spec.sample_shape if isinstance(d, int)) for spec in signature.inputs}
        whole = all(len(fixed[spec.name]) == len(spec.sample_shape) for spec in signature.inputs)
        return fixed if whole else None
    given = _named(parse_inputs(texts), signature)
    for spec in signature.inputs:
        wanted = given[spec.name]
        sizes = zip(spec.sample_shape, wanted.shape, strict=False)
        wrong = len(wanted.shape) != len(spec.sample_shape) or any(isinstance(d, int) and d != s for d, s in sizes)
        if wrong or wanted.dtype != spec.dtype:
            declared = "x".join(map(str, spec.sample_shape)) or "scalar"
            raise UsageError(
                f"--input does not fit {spec.name!r}, which the file declares as {declared}:{spec.dtype}",
                remedy="Give numbers for the sizes that vary, and leave the rest as it is",
            )
    return {name: wanted.shape for name, wanted in given.items()}


def _named(specs: tuple[InputSpec, ...], signature: Signature) -> Mapping[str, InputSpec]:
    names = [spec.name for spec in signature.inputs]
    if len(specs) == len(names) == 1:
        return {names[0]: specs[0]}
    given = {spec.name: spec for spec in specs}
    if set(given) != set(names):
        raise UsageError(f"the file has the inputs {', '.join(names)}", remedy="Name each: --input NAME=3x224x224")
    return given
