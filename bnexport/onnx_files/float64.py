"""Evaluate the written file in float64, for the proof of fold and file.

The evaluator is onnx's reference implementation in numpy, which shares no code with torch or onnxruntime. It computes
in the type that the file declares, so every float in a copy of the file is widened to float64 first, without loss:
float16, bfloat16 and float32 are subsets of it. The remaining difference is the rounding of the weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bnexport.errors import BnexportError, BundleError, ProofError
from bnexport.onnx_files.models import graphs, nodes, read_model, without_weights
from bnexport.optional import one_line, require
from bnexport.tensors import Array

if TYPE_CHECKING:
    from onnx import AttributeProto, ModelProto, NodeProto, TensorProto

    from bnexport.onnx_files.operators import Evaluator

#: Elements of the inputs that are evaluated at once, and the most samples.
_ELEMENTS, _MOST = 1 << 21, 64

#: TensorProto's numbers of FLOAT, FLOAT16, BFLOAT16, and of DOUBLE.
_NARROW = (1, 10, 16)
_DOUBLE = 11
#: Attributes that hold an element type: Cast's "to", EyeLike's and the random operators' "dtype".
_TYPE_ATTRIBUTES = ("to", "dtype")


class Float64Evaluator:
    """Evaluates an ONNX file, its bytes, or the model read from it (which is not changed) with every float in float64.

    ``chunk`` samples are evaluated at once where the batch dimension varies, which bounds the memory. None: as many as have 2
    million elements, at most 64. A BundleError reports a file that onnx's reference implementation can't evaluate.
    """

    arithmetic = "float64"
    _weight_type: type[np.floating[Any]] = np.float64

    def __init__(self, source: bytes | Path | ModelProto, *, chunk: int | None = None) -> None:
        require("onnx", purpose="the float64 proof")
        model = read_model(source) if isinstance(source, bytes | Path) else source
        self.inputs = tuple(item.name for item in model.graph.input)
        self.outputs = tuple(item.name for item in model.graph.output)
        first: Any = model.graph.input[0].type.tensor_type.shape.dim if model.graph.input else ()
        self.varies = bool(first) and not first[0].HasField("dim_value")
        self._chunk = chunk
        with self._evaluating():
            self._engine: Any = wide_evaluator(model, to=self._weight_type)
        self._checked = False

    def evaluate(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Return outputs in float64; input name -> (n, ...), floats of any width, n >= 1.

        A ProofError reports a value inside that was not float64: the result would prove nothing.
        """
        wide = {name: widen_array(feeds[name]) for name in self.inputs if name in feeds}
        with self._evaluating():
            size = len(next(iter(wide.values()), np.empty(0)))
            step = (self._chunk or samples_at_once(wide)) if self.varies else max(size, 1)
            parts = []
            for at in range(0, max(size, 1), step):
                part = {name: array[at : at + step] for name, array in wide.items()}
                self._engine.look = None if self._checked else self._look
                parts.append(self._engine.run(None, part))
                self._checked = True
            return {name: np.concatenate([part[i] for part in parts]) for i, name in enumerate(self.outputs)}

    def intermediate(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Return every computed array by its name in the file, for few samples.

        All samples are evaluated at once, since not every value has the batch first.
        """
        wide = {name: widen_array(feeds[name]) for name in self.inputs if name in feeds}
        with self._evaluating():
            values = self._engine.run(None, wide, intermediate=True)
        return {name: value for name, value in values.items() if isinstance(value, np.ndarray)}

    def _look(self, name: str, value: Any) -> None:
        """Refuse a value that left float64; the first run shows all values."""
        # bfloat16 is a "V" to numpy
        if isinstance(value, np.ndarray) and value.dtype.kind in "fV" and value.dtype != np.float64:
            raise ProofError(
                f"the float64 evaluation left float64 at {name!r}",
                remedy="Report this with the model: an operator of onnx's reference implementation rounds",
            )

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Convert the exceptions of an evaluation to BundleError."""
        try:
            # Overflow in a branch that numpy evaluates and discards (sigmoid) is not an error of the model.
            with np.errstate(all="ignore"):
                yield
        except BnexportError:
            raise
        except Exception as error:  # onnx's own classes, and any class of numpy's inside an operator
            raise BundleError(
                f"the written file can't be evaluated in {self.arithmetic}: {one_line(error, 200)}",
                remedy="Check that the file is the exported one, and that the inputs fit it",
            ) from error


def samples_at_once(feeds: Mapping[str, Array]) -> int:
    """Return how many samples an evaluation in float64 takes at once, which bounds its memory."""
    elements = sum(array.size // max(len(array), 1) for array in feeds.values() if array.ndim)
    return min(max(_ELEMENTS // max(elements, 1), 1), _MOST)


def widen_array(array: Array) -> Array:
    """Return floats as float64; other arrays are unchanged."""
    return array.astype(np.float64) if array.dtype.kind == "f" else array


def wide_evaluator(
    model: ModelProto, weights: Mapping[str, Array] | None = None, *, to: type[np.floating[Any]] = np.float64
) -> Evaluator:
    """Return an evaluator of a model with every float widened to float64; the model is not changed.

    ``weights`` replace initializers of the same name. The weights are of the type ``to``: float32 for an emulation, which
    would round them to that type anyway.
    """
    from onnx import numpy_helper

    from bnexport.onnx_files.operators import evaluator_of

    given = weights or {}
    wide: dict[str, Array] = {}
    for tensor in model.graph.initializer:
        array = given[tensor.name] if tensor.name in given else numpy_helper.to_array(tensor)
        wide[tensor.name] = array.astype(to, copy=False) if tensor.data_type in _NARROW else array
    return evaluator_of(widen(without_weights(model)), wide)


def widen(model: ModelProto) -> ModelProto:
    """Return a copy of a model in which every float is float64: weights, constants, casts, declared types."""
    copy = deepcopy(model)
    for graph in graphs(copy):
        if graph.sparse_initializer:
            raise BundleError("the model has sparse weights, which the proof can't read", remedy="Store them densely")
        for tensor in graph.initializer:
            _widen_tensor(tensor)
        for value in (*graph.input, *graph.output, *graph.value_info):
            if value.type.tensor_type.elem_type in _NARROW:
                value.type.tensor_type.elem_type = _DOUBLE
    for node in nodes(copy):
        for attribute in node.attribute:
            _widen_attribute(node, attribute)
    return copy


def _widen_tensor(tensor: TensorProto) -> None:
    from onnx import numpy_helper

    if tensor.data_type in _NARROW:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))


def _widen_attribute(node: NodeProto, attribute: AttributeProto) -> None:
    from onnx import helper, numpy_helper

    if attribute.type == attribute.TENSOR:
        _widen_tensor(attribute.t)
    elif attribute.type == attribute.INT and attribute.name in _TYPE_ATTRIBUTES and attribute.i in _NARROW:
        attribute.i = _DOUBLE
    elif node.op_type == "Constant" and attribute.name in ("value_float", "value_floats"):
        # These two forms can only be float32; the tensor form holds the same numbers in any type.
        numbers = attribute.f if attribute.name == "value_float" else list(attribute.floats)
        tensor = numpy_helper.from_array(np.asarray(numbers, np.float64))
        attribute.CopyFrom(helper.make_attribute("value", tensor))
