"""Find the precision that explains an error, and measure the effect of rounding the weights alone.

Rounding is deterministic: TF32, float16 and bfloat16 round the same numbers in the same way on every machine. The rest, the
order of sums in float32, is thousands of times smaller. So an error made by such a precision points in the direction of its
emulation, with a cosine near 1. An error of the same size that has another cause points elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bnexport.errors import ProofError
from bnexport.onnx_files.emulation import BFLOAT16, FLOAT16, FLOAT32, SETTINGS, Format, step_of, words_of
from bnexport.onnx_files.float64 import Float64Evaluator
from bnexport.onnx_files.models import graphs, nodes
from bnexport.runtimes.replay import incomparable, scale
from bnexport.tensors import Array

if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto

#: Precision -> coarseness: bits of the mantissa fewer than float32, and one more if every stored value loses them.
_COARSENESS: dict[str, int] = {
    "float32": 0,
    "tf32-convolutions": 13,
    "tf32": 13,
    "tf32-cut": 13,
    "float16": 14,
    "bfloat16-products": 16,
    "bfloat16": 17,
    "int8": 18,
    "int8-saturating": 20,
}
#: Coarser than any precision.
_TOO_COARSE = 99
#: (operator, index of an input) whose constant is not a weight. A negative number to the power of 2.0000001 is NaN.
_FIXED = SETTINGS | {("Pow", 1)}
#: Minimum cosine for attributing an error to a precision. Real engines against their emulation: 1.00 as a rule, 0.68 in
#: networks of a hundred layers, where numbers close to a tie are rounded either way.
ALIKE = 0.5
#: Minimum cosine at which an error of the right size may come from the precision. Faults are below 0.2 as a rule, but reach 0.8
#: if one channel dominates all errors. So a detected precision does not excuse a failed strict stage.
_PERHAPS = 0.25
#: Results for an error that no precision makes, and for an error that a precision may have made.
UNKNOWN, UNDECIDED = "none", "undecided"
#: Sizes of errors with a smaller ratio count as equal.
_SAME_SIZE = 3.0
#: Largest ratio of an engine's float32 noise to numpy's: 8.9 was measured for sums of thousands of numbers in sequence.
_FLOAT32_SPREAD = 10.0
#: Two emulations are distinguishable when one leaves this much more of the error unexplained than the other.
_CLEARER = 1.25
#: Noise of float32 if its emulation happens to be exact.
_LEAST = 2.0**-26


@dataclass(frozen=True)
class Detected:
    """The precision that an error shows."""

    #: A key of ``emulation.PRECISIONS``, several indistinguishable ones joined by " or ", "none", or "undecided": as
    #: large as a precision's error, but not clearly in its direction
    precision: str
    #: Cosine of the error with the emulated error of ``precision``, else of the precision with the nearest size. None
    #: where directions mean nothing: for float32, and for weights other than those emulated
    cosine: float | None
    #: Rank of the precision, 0 for float32; of the finest one that fits where several do, and of the finest one that
    #: makes errors this large where none does
    coarseness: int
    sentence: str  # Text for the report


def detect(
    candidate: Mapping[str, Array],
    exact: Mapping[str, Array],
    emulated: Mapping[str, Mapping[str, Array]],
    *,
    same_weights: bool = True,
    functions: float = 0.0,
) -> Detected:
    """Find the precision that made the error of an engine: ``candidate`` - ``exact``, in float64 with the engine's weights.

    ``emulated`` has the outputs of each precision for the same inputs; it must contain "float32", and one that overflows is
    left out. Without ``same_weights``, the engine did not use the emulated weights: the unfolded network rounds other numbers,
    so its errors have the size of the emulated ones, but not their direction. ``functions`` is the root mean square of the
    error, over scale, that the engine's approximated functions add to float32's.
    """
    error = _difference(candidate, exact)
    if not np.isfinite(error).all():
        sentence = "the outputs are not all finite, so no precision explains their error"
        return Detected(UNKNOWN, None, _TOO_COARSE, sentence)
    size = _rms(error)
    errors = {name: _difference(outputs, exact) for name, outputs in emulated.items()}
    errors = {name: values for name, values in errors.items() if np.isfinite(values).all()}
    sizes = {name: _rms(values) for name, values in errors.items()}
    float32 = Detected("float32", None, 0, f"the error (rms {size:.1e} of scale) is that of float32")
    if size <= _limit_of_float32(sizes, 0.0):
        return float32
    coarse = [name for name in errors if name != "float32"]
    cosines = {name: _cosine(error, errors[name]) for name in coarse} if same_weights else {}
    alike = [name for name in cosines if cosines[name] >= ALIKE and size <= _SAME_SIZE * sizes[name]]
    # A coarser kernel has the direction and the size of its emulation, so the noise of functions does not hide it. Where all
    # outputs follow one direction, as behind a global mean, a direction alone is chance.
    coarser = [name for name in alike if sizes[name] <= _SAME_SIZE * size]
    if functions and not coarser and size <= _limit_of_float32(sizes, functions):
        return float32
    if not same_weights:
        return _by_size(size, sizes, coarse)
    if not alike:
        return _unknown(size, sizes, coarse, cosines)
    left = {name: _rms(error - errors[name]) / size for name in alike}
    found = [name for name in alike if left[name] <= _CLEARER * min(left.values())]
    best = max(cosines[name] for name in found)
    sentence = f"the error is that of {_listed(found)} (cosine {best:.3f} with its emulation)"
    sentence += ", which can't be distinguished here" if len(found) > 1 else ""
    return Detected(" or ".join(found), best, min(_COARSENESS[name] for name in found), sentence)


def points_along(
    candidate: Mapping[str, Array],
    expected: Mapping[str, Array],
    outputs: Mapping[str, Array],
    exact: Mapping[str, Array],
) -> bool:
    """Return whether candidate - expected points in the direction of outputs (emulated) - exact: a cosine of 0.5 or more."""
    if any(name not in candidate or incomparable(name, candidate[name], values) for name, values in expected.items()):
        return False
    if any(name not in exact or exact[name].shape != values.shape for name, values in expected.items()):
        return False
    error = _difference(candidate, expected)
    emulated = _difference(outputs, {name: exact[name] for name in expected})
    return bool(np.isfinite(error).all()) and _cosine(error, emulated) >= ALIKE


def compatible(requested: str, seen: Detected) -> bool:
    """Return whether the requested precision explains the error: the detected one must not be coarser; a finer one may be."""
    return seen.coarseness <= _COARSENESS[requested]


def rounding_noise(model: ModelProto, feeds: Mapping[str, Array], *, seeds: int = 3) -> float:
    """Return the largest change of the outputs, of scale, by rounding the weights to the file's own types.

    The weights before rounding are not in the file, but each differed by at most half a unit in the last place. So, for each
    seed, each stored number is moved by a random part of this, in float64, and the outputs for few samples are compared.
    ProofError if the outputs are not finite.
    """
    exact = Float64Evaluator(model).evaluate(feeds)
    worst = 0.0
    for seed in range(seeds):
        moved = Float64Evaluator(_moved(model, np.random.default_rng(seed))).evaluate(feeds)
        for name, values in exact.items():
            if not (np.isfinite(values).all() and np.isfinite(moved[name]).all()):
                raise ProofError(
                    "the outputs of the file in float64 are not finite", remedy="Check the network's weights"
                )
            worst = max(worst, float(np.abs(moved[name] - values).max(initial=0.0)) / scale(values))
    return worst


def _moved(model: ModelProto, rng: np.random.Generator) -> ModelProto:
    """Return a copy whose weights are float64 and off by up to half a unit in the last place of their former type."""
    from onnx import numpy_helper

    copy = type(model)()
    copy.CopyFrom(model)
    for tensor, of in _weights(copy):
        wide = numpy_helper.to_array(tensor).astype(np.float64)
        # Most zeros are exact: padding, pruning, a bias that the layer did not have.
        reach = np.where(wide == 0, 0.0, 0.5 * step_of(wide, of))
        wide = wide + reach * rng.uniform(-1, 1, wide.shape)
        tensor.CopyFrom(numpy_helper.from_array(wide, tensor.name))
    return copy


def _weights(model: ModelProto) -> Iterator[tuple[TensorProto, Format]]:
    """Yield the stored numbers that were rounded when they were stored, without settings of operators and exponents."""
    fixed = {name for node in nodes(model) for at, name in enumerate(node.input) if (node.op_type, at) in _FIXED}
    formats = {1: FLOAT32, 10: FLOAT16, 16: BFLOAT16}  # TensorProto's FLOAT, FLOAT16, BFLOAT16
    stored = [(tensor.name, tensor) for graph in graphs(model) for tensor in graph.initializer]
    for node in nodes(model):
        if node.op_type == "Constant":
            stored += [(node.output[0], item.t) for item in node.attribute if item.name == "value"]
    for name, tensor in stored:
        if name not in fixed and tensor.data_type in formats:
            yield tensor, formats[tensor.data_type]


def _limit_of_float32(sizes: Mapping[str, float], functions: float) -> float:
    """Return the largest size of float32's error: halfway, by ratio, to the next coarser precision, but at least its spread.

    The order of summation differs between engines, and fast algorithms (Winograd) lose some bits more.
    """
    own = (sizes.get("float32", 0.0) or _LEAST) + functions
    next_up = min((value for name, value in sizes.items() if name != "float32" and value > 0), default=0.0)
    return max(_FLOAT32_SPREAD * own, math.sqrt(own * next_up))


def _by_size(size: float, sizes: Mapping[str, float], names: list[str]) -> Detected:
    fitting = [name for name in names if sizes[name] / _SAME_SIZE <= size <= sizes[name] * _SAME_SIZE]
    if not fitting:
        return _unknown(size, sizes, names, {})
    nearest = min(fitting, key=lambda name: abs(math.log(size / sizes[name])))
    ordered = [nearest, *(name for name in fitting if name != nearest)]
    sentence = f"the error (rms {size:.1e} of scale) is about as large as that of {_listed(ordered)}"
    return Detected(nearest, None, min(_COARSENESS[name] for name in fitting), sentence)


def _unknown(size: float, sizes: Mapping[str, float], names: list[str], cosines: Mapping[str, float]) -> Detected:
    fine = [_COARSENESS[name] for name, own in sizes.items() if size <= _SAME_SIZE * own]
    coarseness = min(fine, default=_TOO_COARSE)
    sentence = f"no precision explains the error (rms {size:.1e} of scale)"
    some = [name for name in names if sizes[name]]
    if not some:
        return Detected(UNKNOWN, None, coarseness, sentence)
    nearest = min(some, key=lambda name: abs(math.log(size / sizes[name])))
    times, cosine = size / sizes[nearest], cosines.get(nearest)
    compared = f"{times:.2g} x the noise of {words_of(nearest)}"
    compared += "" if cosine is None else f", cosine {cosine:.2f} with it"
    if cosine is not None and cosine >= _PERHAPS and 1 / _SAME_SIZE <= times <= _SAME_SIZE:
        return Detected(UNDECIDED, cosine, coarseness, f"either a precision or a fault makes the error: {compared}")
    return Detected(UNKNOWN, cosine, coarseness, f"{sentence}: {compared}")


def _listed(names: list[str]) -> str:
    return " or ".join(words_of(name) for name in names)


def _difference(one: Mapping[str, Array], other: Mapping[str, Array]) -> Array:
    """Return all float outputs in one row, each over its scale."""
    with np.errstate(invalid="ignore"):  # infinity - infinity: the caller checks for values that are not finite
        parts = [
            (one[name].astype(np.float64) - values).ravel() / scale(values)
            for name, values in other.items()
            if np.issubdtype(values.dtype, np.floating)
        ]
    return np.concatenate(parts) if parts else np.zeros(1)


def _rms(values: Array) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def _cosine(one: Array, other: Array) -> float:
    lengths = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(one @ other) / lengths if lengths else 0.0
