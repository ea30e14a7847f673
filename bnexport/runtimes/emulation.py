"""The written file evaluated as an engine of another precision would: every rounding of that precision, and no other.

What a precision does to a model depends on the model, so it is computed, not guessed: onnx's reference implementation runs the
file, and every operator rounds what an engine of that precision rounds. All arithmetic is float32, which is what tensor cores
and half-precision kernels add up in; for strict float32 itself the order of numpy's sums stands for the order of another
engine's. Rounding is deterministic, so the outputs tell not only how large the error of a precision is but which error it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bnexport.bundle import MODEL_ONNX, Bundle
from bnexport.errors import BundleError, UsageError
from bnexport.optional import one_line
from bnexport.runtimes.base import Runner
from bnexport.runtimes.float64 import Float64Evaluator, widen_array
from bnexport.runtimes.onnx_file import read_model
from bnexport.runtimes.rounding import BFLOAT16, FLOAT16, FLOAT32, TF32, Format, cut_to, round_to
from bnexport.tensors import Array

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto
    from torch import nn

    from bnexport.runtimes.settings import RunSettings

#: Operators that multiply and sum -> how many of their first inputs are factors; the rest (bias) is added in float32.
FACTORS: dict[str, int] = {
    "Conv": 2,
    "ConvTranspose": 2,
    "Gemm": 2,
    "MatMul": 2,
    "Einsum": 8,
    "LSTM": 3,
    "GRU": 3,
    "RNN": 3,
}
_CONVOLUTIONS = ("Conv", "ConvTranspose")


@dataclass(frozen=True)
class Precision:
    """One row of PRECISIONS.

    Attributes:
        name: Its key: "tf32".
        storage: Format of every stored value: weights, inputs and each operator's output.
        factors: Format to which the factors of products are rounded before; None: they are taken as they are stored.
        operators: Where ``factors`` holds.
        source: Who computes so, and where it is said.
        cuts: The factors lose their last bits (truncation) instead of being rounded to nearest.
    """

    name: str
    storage: Format
    factors: Format | None
    operators: tuple[str, ...]
    source: str
    cuts: bool = False

    @property
    def words(self) -> str:
        """For a sentence: "TF32", "TF32 in convolutions alone"."""
        return _WORDS.get(self.name, self.storage.name)


_WORDS = {
    "tf32": "TF32",
    "tf32-convolutions": "TF32 in convolutions alone",
    "tf32-cut": "TF32 by truncation",
    "bfloat16-products": "bfloat16 factors",
}
_PRODUCTS = tuple(FACTORS)

PRECISIONS: dict[str, Precision] = {
    row.name: row
    for row in (
        Precision("float32", FLOAT32, None, (), "IEEE 754-2019, binary32"),
        Precision(
            "tf32",
            FLOAT32,
            TF32,
            _PRODUCTS,
            "ONNX Runtime's CUDA provider and TensorRT by default. NVIDIA, Accelerating AI Training with NVIDIA TF32 Tensor "
            "Cores: factors rounded to 10 mantissa bits, products exact, sums in float32. PTX's cvt.rna.tf32.f32 rounds ties "
            "away from zero, here they go to even: one in 8,192 random float32 numbers is a tie",
        ),
        Precision(
            "tf32-convolutions", FLOAT32, TF32, _CONVOLUTIONS, "torch on CUDA by default: cudnn.conv.fp32_precision"
        ),
        Precision(
            "tf32-cut",
            FLOAT32,
            TF32,
            _PRODUCTS,
            "kernels that hand float32 numbers to mma without cvt.rna, which leaves the last 13 bits unread: a bias, and about "
            "2.4 times the error",
            cuts=True,
        ),
        Precision(
            "float16", FLOAT16, None, (), "IEEE 754-2019, binary16: 65504 is the largest number, 2**-24 the smallest"
        ),
        Precision(
            "bfloat16", BFLOAT16, None, (), "torch, Tensor Attributes, torch.bfloat16: float32 cut to 7 mantissa bits"
        ),
        Precision(
            "bfloat16-products",
            FLOAT32,
            BFLOAT16,
            _PRODUCTS,
            'torch on CPUs that have bfloat16 after set_float32_matmul_precision("medium"): oneDNN, floating-point math mode',
        ),
    )
}

#: Precision -> the ways in which engines of that name round, the usual one first. What a GPU does is seen in its error alone.
ROUNDINGS: dict[str, tuple[str, ...]] = {"tf32": ("tf32", "tf32-cut")}

#: Operators whose outputs are some of their inputs' numbers, rounded already, or no numbers at all.
_MOVERS = (
    "Identity", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Relu", "MaxPool", "Concat",
    "Slice", "Gather", "GatherElements", "GatherND", "Expand", "Tile", "Split", "DepthToSpace",
    "SpaceToDepth", "Neg", "Abs", "Max", "Min", "Where", "Shape", "Size", "If", "Loop", "Scan", "NonZero",
    "ArgMax", "ArgMin", "Compress",
)  # fmt: skip
#: (operator, place of an input): settings, no data, which engines keep in float32 whatever the precision.
SETTINGS = {("Resize", 1), ("Resize", 2), ("Upsample", 1)}


class Emulator(Float64Evaluator):
    """Evaluates an ONNX file with the roundings of a precision.

    Args:
        source: The file, its bytes, or the model read from it (which is not changed).
        precision: A key of PRECISIONS.
        chunk: Samples evaluated at once where the batch dimension varies; bounds the memory.

    Raises:
        BundleError: Not a model, or one with an operator that onnx's reference implementation lacks.
        UsageError: There is no such precision.
    """

    def __init__(self, source: bytes | Path | ModelProto, precision: str, *, chunk: int = 64) -> None:
        self.precision = precision_of(precision)
        model = read_model(source) if isinstance(source, bytes | Path) else source
        super().__init__(model, chunk=chunk)
        self._named = {name for node in model.graph.node for name in node.output if name}
        _Rounding(self.precision).put_into(self._engine, _exempt(model.graph))

    def evaluate(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs, as float32 arrays that hold numbers of the precision's storage format.

        Args:
            feeds: Input name -> (n, ...), floats of any width, n >= 1.

        Raises:
            BundleError: The file can't be evaluated with these inputs.
        """
        return super().evaluate(self._stored(feeds))

    def values(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Every array that a node of the main graph computes, by its name in the file.

        All samples are evaluated at once, since not every value has the batch first: give few.

        Args:
            feeds: Input name -> (n, ...), n >= 1.

        Raises:
            BundleError: The file can't be evaluated with these inputs.
        """
        given = self._stored({name: feeds[name] for name in self.inputs if name in feeds})
        try:
            with np.errstate(all="ignore"):  # infinity is an answer here
                found = self._engine.run(None, given, intermediate=True)
        except Exception as error:  # whatever numpy says inside an operator
            raise _not_emulated(self.precision, error) from error
        return {name: value for name, value in found.items() if name in self._named and isinstance(value, np.ndarray)}

    def _stored(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        return {name: _rounded(widen_array(array), self.precision.storage) for name, array in feeds.items()}

    def _refuse_narrow_values(self, wide: Mapping[str, Array]) -> None:
        """Nothing: values that are not float64 are the point of an emulation."""


class EmulatedRunner(Runner):
    """Runs a bundle's model.onnx under an emulated precision, behind the interface of a real engine.

    It stands in for a GPU where there is none, and says so: its device is the CPU. It proves nothing about any engine.

    Args:
        bundle: Its model.onnx is read.
        precision: A key of PRECISIONS.

    Raises:
        BundleError: The file is missing, or can't be evaluated.
        UsageError: There is no such precision.
    """

    def __init__(self, bundle: Bundle, precision: str) -> None:
        self.name = f"emulated-{precision}"
        self.signature = bundle.manifest.signature
        self.effective_device = "cpu"
        self._emulator = Emulator(bundle.file(MODEL_ONNX), precision)
        self.description = {
            "engine": "emulation in numpy, not a real engine",
            "device": self.effective_device,
            "file": MODEL_ONNX,
            "precision": f"{self._emulator.precision.words}, emulated",
        }

    def _run(self, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        found = self._emulator.evaluate(feeds)
        with np.errstate(over="ignore"):  # infinity is what such an engine would give
            return {spec.name: found[spec.name].astype(spec.dtype) for spec in self.signature.outputs}


def open_emulated(bundle: Bundle, _device: str, _module: nn.Module | None, settings: RunSettings) -> Runner:
    """``RunnerSpec.opener`` of a runner that emulates the precision it is asked for."""
    return EmulatedRunner(bundle, settings.precision)


def precision_of(name: str) -> Precision:
    """The row of a name.

    Raises:
        UsageError: There is no such precision.
    """
    if name not in PRECISIONS:
        raise UsageError(f"the precision {name!r} is not known", remedy=f"Known: {', '.join(PRECISIONS)}")
    return PRECISIONS[name]


class _Rounding:
    """Makes an evaluator of onnx's reference implementation round as a precision does."""

    def __init__(self, precision: Precision) -> None:
        self._precision = precision
        self._weights: dict[int, Any] = {}  # id -> stored weight, held so that the id stays its own
        self._factors: dict[int, Any] = {}  # id -> that weight as a factor: rounded once, not in every chunk
        self._done: set[int] = set()

    def put_into(self, engine: Any, exempt: frozenset[str]) -> None:
        """Round the evaluator's weights, and wrap each of its nodes and of the graphs and functions inside them.

        Args:
            engine: A ReferenceEvaluator of a model whose floats are all float64.
            exempt: Names of values that stay float32 whatever the precision.
        """
        if id(engine) in self._done:  # a function that is called twice has one evaluator
            return
        self._done.add(id(engine))
        for name, weight in engine.rt_inits_.items():
            engine.rt_inits_[name] = _rounded(weight, FLOAT32 if name in exempt else self._precision.storage)
        self._weights |= {id(weight): weight for weight in engine.rt_inits_.values()}
        for node in engine.rt_nodes_:
            for inner in _graphs_inside(node):
                self.put_into(inner, exempt)
            body = _local_function(node)
            if body is not None:
                self.put_into(body, _exempt(body.proto_))
            node.run = self._rounding_run(node, exempt, stores=body is None and node.op_type not in _MOVERS)

    def _rounding_run(self, node: Any, exempt: frozenset[str], *, stores: bool) -> Callable[..., tuple[Any, ...]]:
        """What a node does, with its factors rounded before and its results after."""
        run = node.run
        untouched = [name in exempt for name in node.input]
        kept = [FLOAT32 if name in exempt else self._precision.storage for name in node.output]
        count = FACTORS[node.op_type] if node.op_type in self._precision.operators and not node.onnx_node.domain else 0

        def rounding_run(*inputs: Any, **options: Any) -> tuple[Any, ...]:
            given = [
                self._factor(value) if at < count and not exact else _narrow(value)
                for at, (value, exact) in enumerate(zip(inputs, untouched, strict=True))
            ]
            results: tuple[Any, ...] = run(*given, **options)
            return tuple(map(_rounded, results, kept)) if stores else results

        return rounding_run

    def _factor(self, value: Any) -> Any:
        """A value as it enters a product."""
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
    """Floats rounded, as float32, inside sequences too; integers, flags and inputs that are not there as they are."""
    if isinstance(value, list):
        return [_rounded(item, to) for item in value]
    if isinstance(value, np.ndarray | np.floating) and value.dtype.kind == "f":
        with np.errstate(over="ignore", invalid="ignore"):
            return round_to(np.asarray(value), to).astype(np.float32)
    return value


def _cut(value: Any, to: Format) -> Any:
    """As ``_rounded``, towards zero; for factors, which are arrays."""
    return cut_to(value, to) if getattr(value, "dtype", np.dtype(bool)).kind == "f" else value


def _narrow(value: Any) -> Any:
    """A float64 array in float32: a feed, which holds such numbers already; anything else as it is."""
    return value.astype(np.float32) if getattr(value, "dtype", None) == np.float64 else value


def _graphs_inside(node: Any) -> list[Any]:
    """Evaluators of the graphs that a node holds (If, Loop, Scan)."""
    attributes = [getattr(node, item.name, None) for item in node.onnx_node.attribute]
    return [value for value in attributes if hasattr(value, "rt_nodes_")]


def _local_function(node: Any) -> Any | None:
    """The evaluator of a function of the file; None for an operator, also for one that onnx itself defines by a function."""
    return getattr(node, "impl_", None) if node.onnx_node.domain not in ("", "ai.onnx") else None


def _exempt(owner: Any) -> frozenset[str]:
    """Names of values that stay float32 whatever the precision: settings, and numbers computed from sizes alone.

    Args:
        owner: A graph, or a function.
    """
    settings: set[str] = set()
    sizes: set[str] = set()
    constants: set[str] = set()
    for graph in _with_inner(owner):
        constants |= {item.name for item in getattr(graph, "initializer", ())}
        for node in graph.node:
            settings |= {name for at, name in enumerate(node.input) if (node.op_type, at) in SETTINGS}
            if node.op_type == "Constant":
                constants |= set(node.output)
            elif node.op_type in ("Shape", "Size") or _of_sizes(node, sizes, constants):
                sizes |= set(node.output)
    return frozenset(settings | sizes)


def _of_sizes(node: NodeProto, sizes: set[str], constants: set[str]) -> bool:
    """Whether a node computes with sizes and constants alone; what is inside a graph of a node is not looked at."""
    given = {name for name in node.input if name}
    plain = not any(item.type in (item.GRAPH, item.GRAPHS) for item in node.attribute)
    return plain and bool(given & sizes) and given <= sizes | constants


def _with_inner(owner: Any) -> Iterator[Any]:
    """A graph or function, and every graph inside it."""
    yield owner
    for node in owner.node:
        for attribute in node.attribute:
            if attribute.type == attribute.GRAPH:
                yield from _with_inner(attribute.g)


def _not_emulated(precision: Precision, error: Exception) -> BundleError:
    return BundleError(
        f"the written file can't be evaluated in {precision.name}: {one_line(error, 200)}",
        remedy="Check that the file is the one that was exported, and the inputs those it takes",
    )
