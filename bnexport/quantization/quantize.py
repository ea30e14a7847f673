"""From a folded float32 model to an int8 model, with the record that a verification repeats it from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto

from bnexport.bundle import INT8_TARGETS
from bnexport.data.dataset_table import is_dataset
from bnexport.data.datasets import load_train_images
from bnexport.data.images import prepared
from bnexport.data.preprocessing import Preprocessing
from bnexport.data.samples import load_samples
from bnexport.errors import DataError, ModelError, UsageError
from bnexport.onnx_files.float64 import Float64Evaluator
from bnexport.quantization.codes import Range
from bnexport.quantization.int8_plan import QuantizationPlan
from bnexport.quantization.moments import Seen, Spread, TrainedMoments, known_moments, refined_means, spreads
from bnexport.quantization.writer import quantised_model
from bnexport.tensors import Array, Signature

#: Largest number of calibration samples: the ranges of a BN-LeNet do not change beyond.
_MOST = 1000
#: Smallest number of calibration samples: a few images do not show the smallest and largest values of others.
_FEWEST = 16
#: Samples that are evaluated at once, with every tensor in float64.
_CHUNK = 8
#: A calibrated range beyond this many standard deviations of the trained one means other images than those of the training.
_FAR = 8.0
#: Share of the trained range by which a calibrated one may exceed it: ranges are kept with six digits.
_SLACK = 1e-3
_UNKNOWN = (
    "Pass --calibrate with a data set, a folder of images or an .npy file, or keep its layer in float: --float-layers"
)


@dataclass(frozen=True)
class Int8Options:
    """Options of a quantisation."""

    target: str = "cpu"  # One of ``bundle.INT8_TARGETS``
    float_layers: tuple[str, ...] = ()  # Layers that stay in float
    #: Largest share of labels that may change; None: judged by what the margins predict
    allow_flips: float | None = None

    def __post_init__(self) -> None:
        if self.target not in INT8_TARGETS:
            raise UsageError(
                f"the target {self.target!r} is not known", remedy=f"Choose one of: {', '.join(INT8_TARGETS)}"
            )
        if self.allow_flips is not None and not 0 <= self.allow_flips <= 1:
            raise UsageError(f"--allow-flips is {self.allow_flips:g}", remedy="Give a share from 0% to 100%")


@dataclass(frozen=True)
class Calibration:
    """Inputs of a calibration, name -> (n, ...), and their description for the manifest."""

    feeds: Mapping[str, Array]
    described: str


def calibration_of(
    named: str | None, signature: Signature, image: Preprocessing | None, data_dir: Path | None
) -> Calibration | None:
    """Return the samples of a data set, a folder or a file for a calibration; None for "none", and where nothing is named.

    Raises:
        DataError: They can't be read, are not finite, or have another shape.
        UsageError: A data set without a preprocessing.
    """
    if named is None or named == "none":
        return None
    if not is_dataset(named):
        samples = load_samples(named, signature, image, limit=_MOST)
        return Calibration(samples.feeds, samples.described)
    if image is None or len(signature.inputs) != 1:
        raise UsageError(
            f"--calibrate {named} needs a network that takes one image", remedy="Pass --mean and --std, or an .npz file"
        )
    pixels, _ = load_train_images(named, data_dir=data_dir, preprocessing=image)
    chosen = np.linspace(0, len(pixels) - 1, min(_MOST, len(pixels))).round().astype(int)
    images = image.apply(prepared(pixels[chosen], image))
    return Calibration({signature.inputs[0].name: images}, f"{len(chosen)} training images of {named}")


@dataclass(frozen=True)
class Int8Result:
    """The int8 model, and the record of its making: plain JSON values for the manifest."""

    model: ModelProto
    record: dict[str, Any]


def quantise(
    folded: ModelProto,
    example: Mapping[str, Array],
    norms: Callable[[Mapping[str, Array]], Sequence[Seen]],
    *,
    options: Int8Options | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    calibration: Calibration | None = None,
) -> Int8Result:
    """Quantise a folded model.

    Args:
        folded: The folded float32 model; not changed.
        example: A few samples, by which BatchNorms are found again in the folded model.
        norms: Samples -> the original's BatchNorm outputs and inputs for them (``moments.known_moments``).
        options: Target, layers in float, allowed flips.
        preprocessing: JSON of the image preprocessing, which gives the range of the input.
        calibration: Samples whose smallest and largest values are the ranges; None: ranges from BatchNorm.

    Raises:
        UsageError: A float layer that the model does not have.
        ModelError: The graph can't be quantised, or moments are unknown without a calibration.
        DataError: The calibration is too small, or the same everywhere.
    """
    options = options or Int8Options()
    plan = QuantizationPlan(folded, options.float_layers)
    values = {**example, **Float64Evaluator(folded).intermediate(example)}
    shapes = {name: array.shape for name, array in values.items()}
    known = known_moments(norms(example), values)
    if calibration is None and not known:
        raise ModelError("the network has no BatchNorm from which ranges could be read", remedy=_UNKNOWN)
    pixels = _pixel_range(folded, preprocessing)
    given = {name: TrainedMoments(*_moments(found, shapes[name][1]), "pixels") for name, found in pixels.items()}
    trained = spreads(plan, known, given, shapes)
    if calibration is None:
        ranges, warnings = _trained_ranges(plan, trained, known, shapes), []
    else:
        ranges = _calibrated(plan, calibration)
        warnings = [text for name in plan.tensors if (text := _far_off(name, ranges[name], trained.get(name)))]
    pixels = {name: spread.range() for name, spread in trained.items() if spread.source == "pixels"} | pixels
    for name in ranges.keys() & pixels.keys():
        ranges[name] = Range(pixels[name].low, pixels[name].high, ranges[name].mean, "pixels")
    plan.drop(set(plan.tensors) - set(ranges))
    ranges = {name: _shared(ranges[name], ranges[plan.tensors[name]]) for name in plan.tensors}
    warnings += [
        f"{name} is always 0 ({found.source}): its codes represent 0 to 1"
        for name, found in ranges.items()
        if found.is_zero
    ]
    model = quantised_model(plan, ranges, options.target)
    record = _record(plan, ranges, options, calibration, warnings)
    if calibration is not None:  # otherwise the ranges are the trained ones
        record["trained"] = {
            name: [found.low, found.high]
            for name in plan.tensors
            if name in trained and "BatchNorm" in (found := trained[name].range()).source
        }
    return Int8Result(model, record)


def _record(
    plan: QuantizationPlan,
    ranges: Mapping[str, Range],
    options: Int8Options,
    calibration: Calibration | None,
    warnings: list[str],
) -> dict[str, Any]:
    exempt = [layer.name for layer in plan.layers if layer.depthwise]
    safe = f"no channel of {len(plan.layers) - len(exempt)} layers can saturate 16 bits, in any order of its products"
    return {
        "target": options.target,
        "calibration": "none: ranges from BatchNorm" if calibration is None else calibration.described,
        "allow_flips": options.allow_flips,
        "float_layers": list(options.float_layers),
        "kept_in_float": dict(plan.kept),
        "ranges": {name: found.to_json() for name, found in ranges.items()},
        "pair_safe": safe,
        "exempt": exempt,
        "relies_on": "depthwise kernels of ONNX Runtime and OpenVINO add in 32 bits" if exempt else "",
        "warnings": warnings,
    }


def _shared(own: Range, root: Range) -> Range:
    return own if own is root else Range(root.low, root.high, own.mean, root.source)


def _moments(found: Range, channels: int) -> tuple[Array, Array]:
    middle = np.full(channels, (found.low + found.high) / 2)
    return middle, np.full(channels, (found.high - found.low) / 8)  # 4 standard deviations on each side


def _pixel_range(model: ModelProto, preprocessing: Mapping[str, Any] | None) -> dict[str, Range]:
    """Return the range of the only input as its preprocessing gives it; nothing without a preprocessing."""
    if preprocessing is None or len(model.graph.input) != 1:
        return {}
    image, value = Preprocessing.from_json(preprocessing), model.graph.input[0]
    if value.type.tensor_type.elem_type == TensorProto.UINT8:  # the file converts pixels itself
        return {value.name: Range.of(0, 255, [0.0], "pixels")}
    mean, std = np.array(image.mean), np.array(image.std)
    low, high = -mean / std, (255 * image.scale - mean) / std
    return {value.name: Range.of(low.min(), high.max(), [0.0], "pixels")}


def _trained_ranges(
    plan: QuantizationPlan,
    trained: Mapping[str, Spread],
    known: Mapping[str, TrainedMoments],
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, Range]:
    """Return the ranges of all tensors whose moments are known.

    Raises:
        ModelError: The input of an int8 layer is not among them.
    """
    ranges = {}
    for name in plan.tensors:
        if name not in trained:
            if name in plan.required:
                raise ModelError(
                    f"no BatchNorm gives the range of {name!r}, which an int8 layer reads", remedy=_UNKNOWN
                )
            continue
        readers = [layer for layer in plan.layers if layer.input == name]
        spread = trained[name]
        mean = refined_means(readers, known, spread.mean, shapes) if readers else np.zeros(1)
        ranges[name] = spread.range(mean)
    return ranges


def _calibrated(plan: QuantizationPlan, calibration: Calibration) -> dict[str, Range]:
    """Return the smallest and largest values on the samples, and the means of the channels, in a stream.

    Raises:
        DataError: Too few samples, or samples that are all the same.
    """
    n = len(next(iter(calibration.feeds.values())))
    if n < _FEWEST:
        raise DataError(
            f"the calibration has {n} sample{'s' if n > 1 else ''}", remedy=f"Give at least {_FEWEST}, better 1,000"
        )
    if all((array == array[:1]).all() for array in calibration.feeds.values()):
        raise DataError("all samples of the calibration are the same", remedy="Give images that the network will see")
    evaluator = Float64Evaluator(plan.model)
    lows: dict[str, float] = {}
    highs: dict[str, float] = {}
    sums: dict[str, Array] = {}
    for at in range(0, n, _CHUNK):
        part = {name: array[at : at + _CHUNK] for name, array in calibration.feeds.items()}
        values = {**part, **evaluator.intermediate(part)}
        for name in plan.tensors:
            array = values[name].astype(np.float64)
            lows[name] = min(lows.get(name, np.inf), float(array.min()))
            highs[name] = max(highs.get(name, -np.inf), float(array.max()))
            channels = plan.channel_axis(name) % array.ndim
            means = array.mean(axis=tuple(place for place in range(array.ndim) if place != channels))
            sums[name] = sums.get(name, 0.0) + means * len(array)
    return {name: Range.of(lows[name], highs[name], sums[name] / n, "calibration") for name in plan.tensors}


def _far_off(name: str, found: Range, trained: Spread | None) -> str:
    """Return a warning if the samples exceed the trained range; "" otherwise."""
    if trained is None or "BatchNorm" not in trained.source:
        return ""
    low, high = trained.reach(_FAR)
    step = _SLACK * (high - low)
    if low - step <= found.low and found.high <= high + step:
        return ""
    return (
        f"{name} reaches {found.low:.3g} to {found.high:.3g} in the calibration, beyond {_FAR:g} standard deviations of its"
        f" training ({low:.3g} to {high:.3g}): the images may not be what the network was trained on"
    )
