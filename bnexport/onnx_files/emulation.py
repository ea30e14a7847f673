"""Evaluate the written file with every rounding of a precision, and no other rounding.

The effect of a precision depends on the model, so it is computed. onnx's reference implementation runs the file, and
every operator rounds the values that an engine of that precision rounds. All arithmetic is float32, in which tensor cores and
half-precision kernels accumulate. For strict float32 the order of numpy's sums represents the order of another engine's.
Rounding is deterministic, so the outputs show both the size and the direction of a precision's error.

Rounding goes to nearest, ties to even, with gradual underflow and overflow to infinity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bnexport.errors import UsageError
from bnexport.onnx_files.float64 import Float64Evaluator, widen_array
from bnexport.onnx_files.models import graphs_within, nodes, read_model
from bnexport.tensors import Array

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

#: Type of an array -> the integer that holds its bit pattern, and how many of the bits are mantissa.
_PATTERNS: dict[Any, tuple[type[np.unsignedinteger[Any]], int]] = {
    np.dtype(np.float64): (np.uint64, 52),
    np.dtype(np.float32): (np.uint32, 23),
}


@dataclass(frozen=True)
class Format:
    """A binary floating-point format with its usual name ("TF32"), its stored mantissa bits and its exponent bits."""

    name: str
    mantissa: int
    exponent: int

    @property
    def smallest(self) -> float:
        """Return the smallest normal number; the steps below it stay the same (subnormals)."""
        return float(2.0 ** (2 - 2 ** (self.exponent - 1)))

    @property
    def largest(self) -> float:
        """Return the largest finite number."""
        return float(2.0 ** (2 ** (self.exponent - 1) - 1)) * (2.0 - 2.0**-self.mantissa)


FLOAT32 = Format("float32", 23, 8)
TF32 = Format("TF32", 10, 8)
FLOAT16 = Format("float16", 10, 5)
BFLOAT16 = Format("bfloat16", 7, 8)


def round_to(array: Array, to: Format) -> Array:
    """Return the nearest number of a format for each element, as a new array of the same type; infinities and NaN stay.

    float64 is rounded once: by way of float32 a number close to a tie could go the wrong way. The array is float64 or float32,
    and the format no wider than float32.
    """
    if to == FLOAT32:  # the processor's own conversion does the same
        with np.errstate(over="ignore", invalid="ignore"):
            return np.array(array.astype(np.float32), dtype=array.dtype)
    rounded = _shortened(array, to.mantissa)
    size = np.abs(array)
    if (small := size < to.smallest).any():
        step = array.dtype.type(to.smallest * 2.0**-to.mantissa)
        rounded[small] = np.rint(array[small] / step) * step
    if not np.max(size, initial=0.0) <= to.largest:  # also where there is a NaN
        with np.errstate(invalid="ignore"):
            rounded[np.abs(rounded) > to.largest] *= np.inf
        odd = ~np.isfinite(array)
        rounded[odd] = array[odd]
    return rounded


def cut_to(array: Array, to: Format) -> Array:
    """Return the next number of a format towards zero for each float32: its last bits are dropped; a new array.

    The format must have float32's exponents, so that only mantissa bits are lost.
    """
    pattern = np.array(array, np.float32, order="K", copy=True, ndmin=1).view(np.uint32)
    pattern &= np.uint32(np.iinfo(np.uint32).max - ((1 << (FLOAT32.mantissa - to.mantissa)) - 1))
    return pattern.view(np.float32).reshape(array.shape)


def step_of(array: Array, of: Format) -> Array:
    """Return a unit in the last place of each finite number, in float64; below the smallest normal number, its unit."""
    size = np.maximum(np.abs(array.astype(np.float64)), of.smallest)
    _, exponent = np.frexp(size)  # size in 2 ** [exponent - 1, exponent)
    return np.asarray(np.ldexp(1.0, exponent - 1 - of.mantissa))


def _shortened(array: Array, mantissa: int) -> Array:
    """Round the mantissa's last bits away: half a step is added to the bit pattern, a little less for even.

    A carry out of the mantissa goes into the exponent, which is the right answer.
    """
    integer, stored = _PATTERNS[array.dtype]
    bits = stored - mantissa
    rest = (1 << bits) - 1
    pattern = np.array(array, order="K", copy=True, ndmin=1).view(integer)
    even = (pattern >> integer(bits)) & integer(1)
    pattern += even + integer(rest >> 1)
    pattern &= integer(np.iinfo(integer).max - rest)
    return np.asarray(pattern.view(array.dtype).reshape(array.shape))


#: Operators that multiply and sum -> how many of their first inputs are factors; the rest (bias) is added in float32.
_FACTORS = {"Conv": 2, "ConvTranspose": 2, "Gemm": 2, "MatMul": 2, "Einsum": 8, "LSTM": 3, "GRU": 3, "RNN": 3}
_CONVOLUTIONS = ("Conv", "ConvTranspose")


@dataclass(frozen=True)
class Precision:
    """One row of PRECISIONS."""

    name: str  # Key of the row, such as "tf32"
    storage: Format  # Format of every stored value: weights, inputs and each operator's output
    factors: Format | None  # Format to which the factors of products are rounded first; None: no further rounding
    operators: tuple[str, ...]  # Operators with rounded factors
    source: str  # Engines with this precision, and its reference
    cuts: bool = False  # True if factors lose their last bits (truncation) instead of being rounded to nearest

    @property
    def words(self) -> str:
        """Return the name in a sentence: "TF32", "TF32 in convolutions alone"."""
        return _WORDS.get(self.name, self.storage.name)


_WORDS = {
    "tf32": "TF32",
    "tf32-convolutions": "TF32 in convolutions alone",
    "tf32-cut": "TF32 by truncation",
    "bfloat16-products": "bfloat16 factors",
    "int8": "int8",
    "int8-saturating": "int8 with 16-bit saturation",
}


def words_of(name: str) -> str:
    """Return a precision's name in a sentence; int8, which ``quantization.integer_emulation`` emulates, is included."""
    return _WORDS.get(name) or precision_of(name).words


_PRODUCTS = tuple(_FACTORS)

PRECISIONS: dict[str, Precision] = {
    row.name: row
    for row in (
        Precision("float32", FLOAT32, None, (), "IEEE 754-2019, binary32"),
        Precision(
            "tf32", FLOAT32, TF32, _PRODUCTS,
            "ONNX Runtime's CUDA provider and TensorRT by default. NVIDIA, Accelerating AI Training with NVIDIA TF32 Tensor "
            "Cores: factors rounded to 10 mantissa bits, products exact, sums in float32. PTX's cvt.rna.tf32.f32 rounds ties "
            "away from zero, here they go to even: one in 8,192 random float32 numbers is a tie",
        ),
        Precision("tf32-convolutions", FLOAT32, TF32, _CONVOLUTIONS, "torch on CUDA by default: cudnn.conv.fp32_precision"),
        Precision(
            "tf32-cut", FLOAT32, TF32, _PRODUCTS,
            "kernels that hand float32 numbers to mma without cvt.rna, which leaves the last 13 bits unread: a bias, and about "
            "2.4 times the error",
            cuts=True,
        ),
        Precision("float16", FLOAT16, None, (), "IEEE 754-2019, binary16: 65504 is the largest number, 2**-24 the smallest"),
        Precision("bfloat16", BFLOAT16, None, (), "torch, Tensor Attributes, torch.bfloat16: float32 cut to 7 mantissa bits"),
        Precision(
            "bfloat16-products", FLOAT32, BFLOAT16, _PRODUCTS,
            'torch on CPUs that have bfloat16 after set_float32_matmul_precision("medium"): oneDNN, floating-point math mode',
        ),
    )
}  # fmt: skip

#: Precision -> the roundings of engines of that name, the usual one first. Only the error shows which one a GPU uses.
ROUNDINGS: dict[str, tuple[str, ...]] = {"tf32": ("tf32", "tf32-cut")}

#: Operators whose outputs are numbers of their inputs, which are rounded already, or are not numbers.
_MOVERS = (
    "Identity", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Relu", "MaxPool", "Concat",
    "Slice", "Gather", "GatherElements", "GatherND", "Expand", "Tile", "Split", "DepthToSpace",
    "SpaceToDepth", "Neg", "Abs", "Max", "Min", "Where", "Shape", "Size", "If", "Loop", "Scan", "NonZero",
    "ArgMax", "ArgMin", "Compress",
)  # fmt: skip
#: (operator, place of an input) of settings, which are not data: engines keep them in float32 in every precision.
SETTINGS = {("Resize", 1), ("Resize", 2), ("Upsample", 1)}


class Emulator(Float64Evaluator):
    """A ``Float64Evaluator`` that rounds to ``precision``, a key of PRECISIONS."""

    _weight_type = np.float32  # without loss, because no precision stores wider numbers

    def __init__(self, source: bytes | Path | ModelProto, precision: str, *, chunk: int | None = None) -> None:
        self.precision = precision_of(precision)
        self.arithmetic = precision
        model = read_model(source) if isinstance(source, bytes | Path) else source
        super().__init__(model, chunk=chunk)
        self._named = {name for node in model.graph.node for name in node.output if name}
        rounding = _Rounding(self.precision)
        for engine, exempt in _parts(self._engine, _exempt(model.graph)):
            rounding.put_into(engine, exempt)

    def evaluate(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Return outputs like ``Float64Evaluator.evaluate``, as float32 arrays of the precision's numbers."""
        return super().evaluate(self._stored(feeds))

    def intermediate(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Return every array that a node of the main graph computes, by its name in the file, for few samples."""
        found = super().intermediate(self._stored(feeds))
        return {name: value for name, value in found.items() if name in self._named}

    def _stored(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        return {name: _rounded(widen_array(array), self.precision.storage) for name, array in feeds.items()}

    def _look(self, name: str, value: Any) -> None:
        """Do nothing: an emulation computes values that are not float64."""


def precision_of(name: str) -> Precision:
    """Return the row of a name, or raise a UsageError."""
    if name not in PRECISIONS:
        raise UsageError(f"the precision {name!r} is not known", remedy=f"Known: {', '.join(PRECISIONS)}")
    return PRECISIONS[name]


#: Runtime -> operator -> largest absolute error of the engine's function, if that exceeds the rounding of the exact result to
#: float32. Measured over [-30, 30] with onnxruntime 1.31.1 and openvino 2026.4.1 on an AMD EPYC (AVX2). ONNX Runtime computes
#: the logistic function as a rational approximation plus 0.5 (MLAS, logistic.cpp, after Eigen), so that a result near 0 keeps
#: the last digit of 0.5: microsoft/onnxruntime issues 22557 and 26281. torch's functions are exact to a few units in the last
#: place.
APPROXIMATED: dict[str, dict[str, float]] = {
    "onnxruntime-cpu": {"Sigmoid": 1.5e-7, "Tanh": 2.7e-7},
    "openvino-cpu": {"Erf": 4.9e-7, "Softplus": 1.9e-6},
}
#: Runtime -> operator -> lanes in which it sums number by number. On a constant image every addition rounds alike: means of
#: 112 x 112 equal numbers are off by 1.2e-5 in 8 lanes and by 1.3e-4 in one; by pairwise summation (numpy, torch) by 1e-7.
#: OpenVINO has one lane behind a convolution whose channels are not a multiple of its vectors, and more elsewhere.
#: Measured with onnxruntime 1.31.1 and openvino 2026.4.1.
SUMMED_IN_LINE: dict[str, dict[str, int]] = {
    "onnxruntime-cpu": {"GlobalAveragePool": 1, "ReduceMean": 8, "ReduceSum": 8},
    "openvino-cpu": {"GlobalAveragePool": 1, "ReduceMean": 1, "ReduceSum": 1},
}


class ApproximatingEvaluator(Float64Evaluator):
    """Evaluates an ONNX file in float64 with the errors of a runtime's functions: APPROXIMATED and SUMMED_IN_LINE.

    The error of a function is a pseudo-random function of its argument in float32: an engine gives equal arguments equal
    results, so on a constant image the errors of all pixels add up.
    """

    def __init__(self, model: ModelProto, runtime: str, *, seed: int) -> None:
        super().__init__(model)
        self._errors, self._summed = APPROXIMATED.get(runtime, {}), SUMMED_IN_LINE.get(runtime, {})
        self._seed = seed
        for node in (node for engine, _ in _parts(self._engine, frozenset()) for node in engine.rt_nodes_):
            if node.op_type in self._errors and not node.onnx_node.domain:
                node.run = self._off(node.run, self._errors[node.op_type])
            elif node.op_type in self._summed and not node.onnx_node.domain:
                node.run = _in_line(node.run, self._summed[node.op_type])

    def _off(self, run: Callable[..., tuple[Any, ...]], error: float) -> Callable[..., tuple[Any, ...]]:
        def off(*inputs: Any, **options: Any) -> tuple[Any, ...]:
            (result,) = run(*inputs, **options)
            return (result + error * _scattered(np.asarray(inputs[0]), self._seed),)

        return off


def approximated_operators(model: ModelProto, runtime: str) -> tuple[str, ...]:
    """Return the operators of a file whose results a runtime approximates by more than rounding."""
    named = {*APPROXIMATED.get(runtime, {}), *SUMMED_IN_LINE.get(runtime, {})}
    return tuple(sorted(named & {node.op_type for node in nodes(model) if not node.domain}))


def _in_line(run: Callable[..., tuple[Any, ...]], width: int) -> Callable[..., tuple[Any, ...]]:
    """Return the function of a sum or mean, with the relative error of summing in float32, number by number, in lanes."""

    def in_line(x: Array, *rest: Any, **options: Any) -> tuple[Any, ...]:
        (result,) = run(x, *rest, **options)
        reduced = [at for at in range(x.ndim) if at >= np.ndim(result) or np.shape(result)[at] != x.shape[at]]
        kept = [at for at in range(x.ndim) if at not in reduced]
        numbers = x.transpose(*kept, *reduced).astype(np.float32).reshape(*(x.shape[at] for at in kept), -1)
        n = numbers.shape[-1]
        if np.ndim(result) != x.ndim or n <= width or not np.all(np.isfinite(numbers)):
            return (result,)
        lanes = numbers[..., : n - n % width].reshape(*numbers.shape[:-1], -1, width)
        error = np.add.accumulate(lanes, axis=-2)[..., -1, :].astype(np.float64) - lanes.sum(axis=-2, dtype=np.float64)
        exact = lanes.sum(axis=(-2, -1), dtype=np.float64)
        share = np.divide(error.sum(axis=-1), exact, out=np.zeros_like(exact), where=exact != 0)
        return (result * (1 + share.reshape(np.shape(result))),)

    return in_line


def _scattered(array: Array, seed: int) -> Array:
    """Return a number in [-1, 1) for each element, by a hash of its float32 bit pattern and the seed."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32).reshape(array.shape)
    bits = (bits + np.uint32(seed)) * np.uint32(0x9E3779B1)
    bits = (bits ^ (bits >> np.uint32(15))) * np.uint32(0x85EBCA77)
    return np.asarray((bits ^ (bits >> np.uint32(13))) * 2.0**-31 - 1.0)


class _Rounding:
    """Makes an evaluator of onnx's reference implementation round as a precision does."""

    def __init__(self, precision: Precision) -> None:
        self._precision = precision
        self._weights: dict[int, Any] = {}  # id -> stored weight; while it is held, its id is not reused
        self._factors: dict[int, Any] = {}  # id -> that weight as a factor: rounded once, not in every chunk

    def put_into(self, engine: Any, exempt: frozenset[str]) -> None:
        """Round the weights of a float64 evaluator, and wrap its nodes; the values named in ``exempt`` stay float32."""
        for name, weight in engine.rt_inits_.items():
            engine.rt_inits_[name] = _rounded(weight, FLOAT32 if name in exempt else self._precision.storage)
        self._weights |= {id(weight): weight for weight in engine.rt_inits_.values()}
        for node in engine.rt_nodes_:
            stores = _local_function(node) is None and node.op_type not in _MOVERS
            node.run = self._rounding_run(node, exempt, stores=stores)

    def _rounding_run(self, node: Any, exempt: frozenset[str], *, stores: bool) -> Callable[..., tuple[Any, ...]]:
        """Return a node's function, with its factors rounded before and its results after."""
        run = node.run
        untouched = [name in exempt for name in node.input]
        kept = [FLOAT32 if name in exempt else self._precision.storage for name in node.output]
        count = _FACTORS[node.op_type] if node.op_type in self._precision.operators and not node.onnx_node.domain else 0

        def rounding_run(*inputs: Any, **options: Any) -> tuple[Any, ...]:
            given = [
                self._factor(value) if at < count and not exact else _narrow(value)
                for at, (value, exact) in enumerate(zip(inputs, untouched, strict=True))
            ]
            results: tuple[Any, ...] = run(*given, **options)
            return tuple(map(_rounded, results, kept)) if stores else results

        return rounding_run

    def _factor(self, value: Any) -> Any:
        """Return a value as it enters a product."""
        to = self._precision.factors
        if to is None:
            return _narrow(value)
        rounded = _cut if self._precision.cuts else _rounded
        if id(value) not in self._weights:
            return rounded(value, to)
        if id(value) not in self._factors:
            self._factors[id(value)] = rounded(value, to)
        return self._factors[id(value)]


def _rounded(value: Any, to: Format) -> Any:
    """Return floats rounded, as float32, inside sequences too; integers, flags and absent inputs are unchanged."""
    if isinstance(value, list):
        return [_rounded(item, to) for item in value]
    if isinstance(value, np.ndarray | np.floating) and value.dtype.kind == "f":
        with np.errstate(over="ignore", invalid="ignore"):
            if to == FLOAT32:
                return np.asarray(value).astype(np.float32, copy=False)
            return round_to(np.asarray(value), to).astype(np.float32, copy=False)
    return value


def _cut(value: Any, to: Format) -> Any:
    """Return factors, which are arrays, rounded like ``_rounded`` but towards zero."""
    return cut_to(value, to) if getattr(value, "dtype", np.dtype(bool)).kind == "f" else value


def _narrow(value: Any) -> Any:
    """Return a float64 array (a feed, which holds float32 numbers already) in float32; other values are unchanged."""
    return value.astype(np.float32) if getattr(value, "dtype", None) == np.float64 else value


def _parts(engine: Any, exempt: frozenset[str]) -> Iterator[tuple[Any, frozenset[str]]]:
    """Yield a ReferenceEvaluator and those of its inner graphs (If, Loop, Scan) and functions, each once.

    Each comes with the names of its values that stay float32 in every precision: ``exempt``, or those of the function.
    """
    stack, seen = [(engine, exempt)], set()
    while stack:
        part, names = stack.pop()
        if id(part) in seen:  # a function that is called twice has one evaluator
            continue
        seen.add(id(part))
        yield part, names
        for node in part.rt_nodes_:
            inner = (getattr(node, item.name, None) for item in node.onnx_node.attribute)
            stack += [(value, names) for value in inner if hasattr(value, "rt_nodes_")]
            if (body := _local_function(node)) is not None:
                stack.append((body, _exempt(body.proto_)))


def _local_function(node: Any) -> Any | None:
    """Return the evaluator of a function of the file; None for operators, also those that onnx defines by a function."""
    return getattr(node, "impl_", None) if node.onnx_node.domain not in ("", "ai.onnx") else None


def _exempt(owner: Any) -> frozenset[str]:
    """Return names of a graph's or function's values that stay float32: settings, and numbers computed from sizes alone."""
    settings: set[str] = set()
    sizes: set[str] = set()
    constants: set[str] = set()
    for graph in (owner, *graphs_within(owner.node)):
        constants |= {item.name for item in getattr(graph, "initializer", ())}
        for node in graph.node:
            settings |= {name for at, name in enumerate(node.input) if (node.op_type, at) in SETTINGS}
            if node.op_type == "Constant":
                constants |= set(node.output)
            elif node.op_type in ("Shape", "Size") or _of_sizes(node, sizes, constants):
                sizes |= set(node.output)
    return frozenset(settings | sizes)


def _of_sizes(node: NodeProto, sizes: set[str], constants: set[str]) -> bool:
    """Return whether a node computes with sizes and constants alone; graphs inside a node are not examined."""
    given = {name for name in node.input if name}
    plain = not any(item.type in (item.GRAPH, item.GRAPHS) for item in node.attribute)
    return plain and bool(given & sizes) and given <= sizes | constants
