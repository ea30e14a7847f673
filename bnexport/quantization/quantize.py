"""From a folded float32 model to an int8 model, with the record that a verification repeats it from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
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
#: Bins of a histogram on each side of 0, and the shares of the smallest and largest value that a range is chosen from.
_BINS, _SHARES = 2048, 0.98 ** np.arange(80)
#: A calibrated range beyond this many standard deviations of the trained one means other images than those of the training.
_FAR = 8.0
#: Share of the trained range by which a calibrated one may exceed it: ranges are kept with six digits.
_SLACK = 1e-3
_NO_RANGE = "squeeze-and-excitation has no BatchNorm, which gives ranges; see --calibrate"
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
        calibration: Samples from whose values the ranges are chosen; None: ranges from BatchNorm.

    Raises:
        UsageError: A float layer that the model does not have.
        ModelError: The graph can't be quantised, or moments are unknown without a calibration.
        DataError: The calibration is too small, or the same everywhere.
    """
    options = options or Int8Options()
    plan = QuantizationPlan(folded, options.float_layers)
    values = {**example, **Float64Evaluator(plan.model).intermediate(example)}
    shapes = {name: array.shape for name, array in values.items()}
    known = known_moments(norms(example), values)
    if calibration is None and not known:
        raise ModelError("the network has no BatchNorm from which ranges could be read", remedy=_UNKNOWN)
    if calibration is None and (gates := _without_ranges(plan, known, shapes)):
        options = replace(options, float_layers=(*options.float_layers, *gates))
        plan = QuantizationPlan(folded, options.float_layers)
        plan.kept |= dict.fromkeys(gates.values(), _NO_RANGE)
    plan.set_sizes({name: shape[2:] for name, shape in shapes.items()})
    pixels = _pixel_range(folded, preprocessing)
    given = {name: TrainedMoments(*_moments(found, shapes[name][1]), "pixels") for name, found in pixels.items()}
    trained = spreads(plan, known, given, shapes)
    if calibration is None:
        ranges, warnings = _trained_ranges(plan, trained, known), []
    else:
        observed = _observed(plan, calibration)
        inputs = {value.name for value in folded.graph.input}  # the caller's values are not clipped
        ranges = {name: found.range(options.target, clipped=name not in inputs) for name, found in observed.items()}
        warnings = [text for name, found in observed.items() if (text := _far_off(name, found, trained.get(name)))]
    pixels = {name: spread.range() for name, spread in trained.items() if spread.source == "pixels"} | pixels
    for name in ranges.keys() & pixels.keys():
        ranges[name] = Range(pixels[name].low, pixels[name].high, ranges[name].mean, "pixels")
    plan.drop(set(plan.tensors) - set(ranges))
    ranges = {name: _shared(ranges[name], ranges[plan.tensors[name]]) for name in plan.tensors}
    warnings += _always_zero(ranges)
    record = _record(plan, ranges, options, calibration, warnings)
    padded = {layer.input for layer in plan.layers if (layer.inside < 1).any()}
    record["sizes"] = {name: list(shapes[name][2:]) for name in plan.tensors if name in padded}
    if calibration is not None:  # otherwise the ranges are the trained ones
        record["trained"] = _trained_record(plan, trained)
    return Int8Result(quantised_model(plan, ranges, options.target), record)


def _trained_record(plan: QuantizationPlan, trained: Mapping[str, Spread]) -> dict[str, list[float]]:
    found = {name: trained[name].range() for name in plan.tensors if name in trained}
    return {name: [ends.low, ends.high] for name, ends in found.items() if "BatchNorm" in ends.source}


def _always_zero(ranges: Mapping[str, Range]) -> list[str]:
    return [
        f"{name} is always 0 ({found.source}): its codes represent 0 to 1"
        for name, found in ranges.items()
        if found.is_zero
    ]


def _without_ranges(
    plan: QuantizationPlan, known: Mapping[str, TrainedMoments], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, str]:
    """Return output -> name of each convolution that reads one pixel, feeds another int8 layer, and has no trained moments.

    They are those of squeeze-and-excitation, and cost next to nothing in float.
    """
    return {
        str(layer.node.output[0]): layer.name
        for layer in plan.layers
        if layer.node.op_type == "Conv"
        and layer.output not in known
        and set(shapes[layer.input][2:]) == {1}
        and plan.end(layer.output) in plan.tensors
    }


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
        mean = refined_means(readers, known, spread.mean) if readers else np.zeros(1)
        ranges[name] = spread.range(mean)
    return ranges


class Observed:
    """The values of one tensor in a stream of samples."""

    def __init__(self) -> None:
        self.low, self.high, self.n = np.inf, -np.inf, 0
        self._sums: Array = np.zeros(1)
        #: Numbers of values in bins of one width on both sides of 0; values of 0 have an exact code and are left out
        self._counts, self._width = np.zeros(2 * _BINS), 0.0

    def add(self, values: Array, channels: int) -> None:
        """Count values (n, ...), whose channels are along one axis."""
        self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))
        others = tuple(axis for axis in range(values.ndim) if axis != channels % values.ndim)
        self._sums = self._sums + values.mean(axis=others) * len(values)
        self.n += len(values)
        largest = float(np.abs(values).max())
        if not 0 < largest < np.inf:
            return
        width = 2.0 ** np.ceil(np.log2(largest / _BINS))
        self._width = self._width or width
        while self._width < width:  # two bins become one
            self._width *= 2
            self._counts = np.pad(self._counts.reshape(-1, 2).sum(axis=1), _BINS // 2)
        places = np.clip(np.floor(values[values != 0] / self._width), -_BINS, _BINS - 1) + _BINS
        self._counts += np.bincount(places.astype(np.int64), minlength=2 * _BINS)

    def range(self, target: str, *, clipped: bool) -> Range:
        """Return the range of the values, or the part of it whose codes have the smallest squared error on all values.

        The error of a value inside is that of rounding, step ** 2 / 12. A value outside has its distance from the range.
        """
        lows, highs = min(self.low, 0.0) * _SHARES, max(self.high, 0.0) * _SHARES
        at = to = 0
        if clipped and self._width:
            centres = (np.arange(-_BINS, _BINS) + 0.5) * self._width
            below = (self._counts * np.maximum(lows[:, None] - centres, 0) ** 2).sum(axis=1)
            above = (self._counts * np.maximum(centres - highs[:, None], 0) ** 2).sum(axis=1)
            ends = lows[:, None], highs
            steps = np.maximum(-ends[0], ends[1]) / 127 if target == "tensorrt" else (ends[1] - ends[0]) / 255
            errors = below[:, None] + above + self._counts.sum() * steps**2 / 12
            at, to = np.unravel_index(errors.argmin(), errors.shape)
        return Range.of(lows[at], highs[to], self._sums / self.n, "calibration")


def _observed(plan: QuantizationPlan, calibration: Calibration) -> dict[str, Observed]:
    """Return the values of every tensor with codes on the samples.

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
    evaluator, found = Float64Evaluator(plan.model), {name: Observed() for name in plan.tensors}
    for at in range(0, n, _CHUNK):
        part = {name: array[at : at + _CHUNK] for name, array in calibration.feeds.items()}
        values = {**part, **evaluator.intermediate(part)}
        for name, observed in found.items():
            observed.add(values[name], plan.channel_axis(name))
    return found


def _far_off(name: str, found: Observed, trained: Spread | None) -> str:
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
