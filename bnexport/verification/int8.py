"""The parts of a verification for int8 files alone: the file proof, inputs within the ranges, changed labels.

A float32 file has one right answer for each input, up to rounding. An int8 file has two: what the file states, which integer
kernels compute up to a last bit, and what the network computes, from which the file differs by noise. So the strict stage
compares a runtime with the emulated file, and the shipping stage with the network, by the noise that the emulated file makes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from bnexport.bundle import MODEL_FLOAT32, MODEL_ONNX, Bundle, Manifest
from bnexport.errors import BundleError
from bnexport.tensors import Array
from bnexport.verification.inputs import Batch
from bnexport.verification.metrics import has_labels
from bnexport.verification.stages import failed
from bnexport.verification.verdict import Int8Findings, Int8Range, LayerNoise, Row

if TYPE_CHECKING:
    from onnx import ModelProto

    from bnexport.quantization.integer_emulation import OneLayerEmulator


#: Multiplications of the evaluations with one layer in int8 (about three seconds).
_LAYER_WORK = 2e10
#: Most samples of these evaluations, and most elements of their inputs: every tensor is kept in float64.
_MOST_SAMPLES, _ELEMENTS = 64, 1 << 19
#: Fewest layers whose share is computed.
_LEAST_LAYERS = 4
#: A layer with this share of the noise, and this multiple of the mean share, is suggested for float.
_LARGE_SHARE, _TIMES_MEAN = 0.25, 3.0
#: Number of layers that a note names.
_SHOWN = 4
#: Draws of the noise by which the expected number of changed labels is estimated.
_DRAWS = 10
#: More changed labels than this multiple of the expected number fail, if the excess is statistically significant.
_TIMES, _SIGNIFICANT = 2.0, 0.01


def record_of(manifest: Manifest) -> Mapping[str, Any]:
    """Return the record of a quantisation (``quantize.Int8Result.record``); empty for other bundles."""
    found = manifest.onnx.get("quantization")
    return found if isinstance(found, dict) else {}


def int8_notes(record: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the notes for the report of an int8 bundle; an empty tuple for other bundles."""
    if not record:
        return ()
    kept = record.get("kept_in_float", {})
    notes = [
        f"int8 ({record.get('calibration')}): model.pt and model.pt2 are not written, since int8 is an ONNX format;"
        f" {record.get('pair_safe')}"
    ]
    if kept:
        shown = ", ".join(f"{name} ({why})" for name, why in list(kept.items())[:_SHOWN])
        notes.append(f"{len(kept)} layers stay in float: {shown}" + (", ..." if len(kept) > _SHOWN else ""))
    speed = record.get("speed")
    ratio = speed.get("of_float32") if isinstance(speed, dict) else None
    if isinstance(speed, dict) and isinstance(ratio, float) and ratio < 1:
        notes.append(f"int8 is slower than float32: {ratio:g} x its speed ({speed.get('conditions')})")
    return (*notes, *map(str, record.get("warnings", ())))


def within_range(manifest: Manifest, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Return inputs cut to the ranges that an int8 file represents; other bundles' inputs are unchanged.

    Noise beyond the pixels' range would measure the file's clipping and hide other errors.
    """
    return within_range_of(record_of(manifest), feeds)


def within_range_of(record: Mapping[str, Any], feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Return inputs cut to the ranges of a record of a quantisation."""
    ranges = record.get("ranges", {})
    return {
        name: np.clip(array, ranges[name]["low"], ranges[name]["high"]).astype(array.dtype) if name in ranges else array
        for name, array in feeds.items()
    }


def int8_file_rows(bundle: Bundle, float_model: ModelProto | None, int8_model: ModelProto | None) -> list[Row]:
    """Return the file proof: one row of the stage "quantization" for each kind of number."""
    if int8_model is None:
        return []  # another check states why
    if float_model is None:
        reason = f"{MODEL_FLOAT32} can't be read, so nothing was compared"
        return [failed("quantization", MODEL_ONNX, "structure", reason)]
    from bnexport.quantization.file_proof import Int8File, findings

    record = record_of(bundle.manifest)
    if not record:
        return [failed("quantization", MODEL_ONNX, "ranges", "the manifest has no record of the quantisation")]
    found = findings(Int8File(float_model, int8_model, record))
    return [Row("quantization", MODEL_ONNX, item.check, item.passed, item.reason, n=item.n) for item in found]


def layer_report(
    model: ModelProto, int8: ModelProto, record: Mapping[str, Any], batch: Batch, *, cost: int, thorough: bool
) -> Int8Findings:
    """Return the share of each layer in the noise of the outputs, and the range of each tensor with codes.

    A few samples are enough, since each has many outputs. Where the work for all layers is too much for one sample, the layers
    with the largest noise in their own output are computed. ``model`` is the float32 model, and ``cost`` its multiplications
    per sample; ``thorough`` allows ten times the work.
    """
    from bnexport.quantization.int8_plan import layer_name
    from bnexport.quantization.integer_emulation import IntegerEmulator, OneLayerEmulator, int8_layers

    work, count = _LAYER_WORK * (10 if thorough else 1), len(int8_layers(int8))
    dims = model.graph.input[0].type.tensor_type.shape.dim
    fixed = bool(dims) and dims[0].HasField("dim_value")
    most = min(_MOST_SAMPLES, _ELEMENTS // max(sum(array[0].size for array in batch.feeds.values()), 1))
    few = batch if fixed else batch.head(int(min(work / max(cost * count / 2, 1), most)) or 1)
    emulator = OneLayerEmulator(model, int8, few.feeds)
    own = {name: emulator.own(name) for name in emulator.layers}
    affordable = max(_LEAST_LAYERS, int(work / max(few.n * cost / 2, 1)))
    chosen = sorted(own, key=lambda name: -own[name])[:affordable]
    everything = emulator.power(IntegerEmulator(int8).evaluate(few.feeds))
    shares = {name: emulator.noise(name) / max(everything, np.finfo(np.float64).tiny) for name in chosen}
    layers = tuple(
        LayerNoise(layer_name(node), node.op_type, own[name], shares.get(name))
        for name, node in emulator.layers.items()
    )
    least = max(_LARGE_SHARE, _TIMES_MEAN / max(count, 1))
    suggested = tuple(layer.layer for layer in layers if layer.share is not None and layer.share >= least)
    ranges = tuple(_range(name, found, emulator, record) for name, found in record.get("ranges", {}).items())
    numbers = [*own.values(), *shares.values(), *(value for item in ranges for value in item.seen or ())]
    if not np.isfinite(numbers).all():  # JSON has no such numbers
        raise BundleError("the network computes values that are not finite", remedy="Look for the check that fails")
    return Int8Findings(layers, ranges, few.n, batch.name, suggested)


def _range(name: str, found: Mapping[str, Any], emulator: OneLayerEmulator, record: Mapping[str, Any]) -> Int8Range:
    low, high, source = float(found["low"]), float(found["high"]), str(found["source"])
    trained = record.get("trained", {}).get(name) or ((low, high) if "BatchNorm" in source else None)
    value = emulator.values.get(name)
    seen = None if value is None else (float(value.min()), float(value.max()))
    return Int8Range(name, low, high, source, None if trained is None else (trained[0], trained[1]), seen)


def labels_row(
    subject: str, case: str, scores: Array, expected: Array, errors: Array, *, allowed: float | None
) -> Row | None:
    """Compare the number of changed labels with the number that the margins and the predicted noise explain.

    The noise of other samples (``errors``: emulated, (m, classes)) is added to each sample's expected scores (n, classes), in
    several draws, and the changed labels are counted. ``allowed`` is the largest share of labels that may change; None: at
    most twice the expected number. The result is None where there is not one score per class, or too little noise to draw from.
    """
    if not has_labels(expected) or len(errors) < 2 or not np.isfinite(scores).all():
        return None
    labels, n = expected.argmax(axis=1), len(expected)
    flips = int((scores.argmax(axis=1) != labels).sum())
    rng = np.random.default_rng(0)
    drawn = [(expected + errors[rng.integers(0, len(errors), n)]).argmax(axis=1) != labels for _ in range(_DRAWS)]
    likely = float(np.mean(drawn)) * n
    reason = f"{flips} of {n} labels changed, {likely:.3g} expected from the margins"
    if allowed is not None:
        passed, reason = flips <= allowed * n, f"{reason}, {allowed:.3g} of all allowed (--allow-flips)"
    else:
        passed = flips <= _TIMES * likely or _at_least(flips, _TIMES * likely) >= _SIGNIFICANT
        reason += "" if passed else f": more than {_TIMES:g} times the expected number"
    return Row("labels", subject, case, passed, reason, n=n)


def _at_least(count: int, mean: float) -> float:
    """Return the probability of ``count`` or more events of a Poisson distribution."""
    if mean <= 0:
        return float(count == 0)
    return max(0.0, 1.0 - sum(math.exp(k * math.log(mean) - mean - math.lgamma(k + 1)) for k in range(count)))
