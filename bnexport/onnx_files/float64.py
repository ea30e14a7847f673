"""The written file evaluated in float64, which the proof of fold and file rests on.

The evaluator is onnx's reference implementation in numpy, which shares no code with torch or onnxruntime. It computes
in whatever type the file declares, so every float in a copy of the file is widened to float64 first, without loss:
float16, bfloat16 and float32 are all subsets of it. What is left of the difference is the rounding of the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bnexport.errors import BnexportError, BundleError, ProofError
from bnexport.onnx_files.models import graphs, nodes, read_model
from bnexport.optional import one_line, require
from bnexport.tensors import Array

if TYPE_CHECKING:
    from onnx import AttributeProto, ModelProto, NodeProto, TensorProto


#: TensorProto's numbers of FLOAT, FLOAT16, BFLOAT16, and of DOUBLE.
_NARROW = (1, 10, 16)
_DOUBLE = 11
#: Attributes that hold an element type: Cast's "to", EyeLike's and the random operators' "dtype".
_TYPE_ATTRIBUTES = ("to", "dtype")


class Float64Evaluator:
    """Evaluates an ONNX file with every float widened to float64.

    Args:
        source: The file, its bytes, or the model read from it (which is not changed).
        chunk: Samples evaluated at once where the batch dimension varies; bounds the memory.

    Raises:
        BundleError: Not a model, or one with an operator that onnx's reference implementation lacks.
    """

    def __init__(self, source: bytes | Path | ModelProto, *, chunk: int = 64) -> None:
        require("onnx", purpose="the float64 proof")
        from onnx.reference import ReferenceEvaluator

        from bnexport.onnx_files.operators import better_operators

        model = widen(read_model(source) if isinstance(source, bytes | Path) else source)
        self.inputs = tuple(item.name for item in model.graph.input)
        self.outputs = tuple(item.name for item in model.graph.output)
        first: Any = model.graph.input[0].type.tensor_type.shape.dim if model.graph.input else ()
        self.varies = bool(first) and not first[0].HasField("dim_value")
        self._chunk = chunk if self.varies else None
        try:
            self._engine: Any = ReferenceEvaluator(model, new_ops=better_operators(model))
        except Exception as error:  # NotImplementedError, RuntimeError, onnx's own
            raise _not_evaluated(error) from error
        self._checked = False

    def evaluate(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs in float64.

        Args:
            feeds: Input name -> (n, ...), floats of any width, n >= 1.

        Raises:
            BundleError: The file can't be evaluated with these inputs.
            ProofError: A value inside was not float64: the result would prove nothing.
        """
        wide = {name: widen_array(feeds[name]) for name in self.inputs if name in feeds}
        size = len(next(iter(wide.values()), np.empty(0)))
        step = self._chunk or max(size, 1)
        try:
            # Overflow in a branch that numpy evaluates and discards (sigmoid) is not an error of the model.
            with np.errstate(all="ignore"):
                self._refuse_narrow_values(wide)
                parts = [
                    self._engine.run(None, {name: array[at : at + step] for name, array in wide.items()})
                    for at in range(0, max(size, 1), step)
                ]
                return {name: np.concatenate([part[i] for part in parts]) for i, name in enumerate(self.outputs)}
        except BnexportError:
            raise
        except Exception as error:  # whatever numpy says inside an operator
            raise _not_evaluated(error) from error

    def intermediate(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Every array that is computed on the way, by its name in the file; all samples at once, so give few.

        Raises:
            BundleError: The file can't be evaluated with these inputs.
        """
        wide = {name: widen_array(feeds[name]) for name in self.inputs if name in feeds}
        try:
            with np.errstate(all="ignore"):
                values = self._engine.run(None, wide, intermediate=True)
        except Exception as error:  # whatever numpy says inside an operator
            raise _not_evaluated(error) from error
        return {name: value for name, value in values.items() if isinstance(value, np.ndarray)}

    def _refuse_narrow_values(self, wide: Mapping[str, Array]) -> None:
        """Run a sample or two with all intermediate values, once, and look at their types."""
        if self._checked:
            return
        few = {name: array[:2] for name, array in wide.items()} if self._chunk else dict(wide)
        values = dict(self._engine.run(None, few, intermediate=True))
        narrow = [name for name, value in values.items() if isinstance(value, np.ndarray) and _is_narrow(value.dtype)]
        if narrow:
            raise ProofError(
                f"the float64 evaluation left float64 at {', '.join(map(repr, narrow[:3]))}",
                remedy="Report this with the model: an operator of onnx's reference implementation rounds",
            )
        self._checked = True


def widen_array(array: Array) -> Array:
    """Floats to float64; anything else as it is."""
    return array.astype(np.float64) if array.dtype.kind == "f" else array


def widen(model: ModelProto) -> ModelProto:
    """A copy of a model in which every float is float64: weights, constants, casts, declared types."""
    copy = type(model)()
    copy.CopyFrom(model)
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
        wide = numpy_helper.to_array(tensor).astype(np.float64)
        tensor.CopyFrom(numpy_helper.from_array(wide, tensor.name))


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


def _is_narrow(dtype: np.dtype[Any]) -> bool:
    """A float that is not float64; bfloat16 is a "V" to numpy."""
    return dtype.kind in "fV" and dtype != np.float64


def _not_evaluated(error: Exception) -> BundleError:
    return BundleError(
        f"the written file can't be evaluated in float64: {one_line(error, 200)}",
        remedy="Check that the file is the one that was exported",
    )
