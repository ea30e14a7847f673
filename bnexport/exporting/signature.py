"""The signature of a folded network: names, element types and shapes of its inputs and outputs, and which sizes vary.

The formats are written from the flat graph, whose inputs and outputs are plain tensors in the signature's order.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from onnx import ModelProto, TensorProto, ValueInfoProto, helper
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from bnexport.errors import ExportError
from bnexport.exporting.export_request import OnnxTarget
from bnexport.optional import one_line, quiet
from bnexport.tensors import DTYPES, Signature, TensorSpec, size_axes

BATCH = "batch"
#: Remedy for an ONNX file that can be folded, but not verified as a bundle.
FILE_ALONE = "Pass --out FILE.onnx to write the folded file alone"
_HALVES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)


def flat(folded: GraphModule) -> GraphModule:
    """Return a copy of the graph with plain tensors as inputs and outputs, in the signature's order, instead of nested ones.

    An output that is an input is copied: in a file every input and output has a separate name.
    """
    graph = Graph()
    outputs = [item for item in pytree.tree_leaves(graph.graph_copy(folded.graph, {})) if item is not None]
    for index, node in enumerate(outputs):
        if isinstance(node, Node) and node.op == "placeholder":
            outputs[index] = graph.call_function(torch.ops.aten.clone.default, (node,))
    graph.output(outputs[0] if len(outputs) == 1 else tuple(outputs))
    return GraphModule(folded, graph)


def export_flat(folded: GraphModule, inputs: tuple[Tensor, ...], axes: tuple[tuple[int, ...], ...]) -> ExportedProgram:
    """Return ``torch.export`` of the flat graph: the batch varies, and the given axes of each input.

    ``inputs`` need a batch of at least 2, because torch.export treats a batch of 1 as a constant.
    """
    batch = torch.export.Dim(BATCH)
    vary = torch.export.Dim.AUTO
    shapes = tuple(
        {0: batch, **dict.fromkeys(varying, vary)} if item.ndim else None
        for item, varying in zip(inputs, axes, strict=True)
    )
    return torch.export.export(flat(folded), inputs, dynamic_shapes=shapes)


@dataclass(frozen=True)
class ExportJob:
    """The inputs of every format: the folded network in eval mode, example inputs (at least 2 samples), signature, target."""

    folded: GraphModule
    inputs: tuple[Tensor, ...]
    signature: Signature
    onnx: OnnxTarget = field(default_factory=OnnxTarget)

    @cached_property
    def program(self) -> ExportedProgram:
        """Return ``torch.export`` of the flat graph, made once; the format that changes it is the last one of FORMATS."""
        return export_flat(self.folded, self.inputs, varying_axes(self.signature))


def of_dtype(signature: Signature, dtype: str) -> Signature:
    """Return a signature whose inputs have another element type."""
    return replace(signature, inputs=tuple(replace(spec, dtype=dtype) for spec in signature.inputs))


def varying_axes(signature: Signature) -> tuple[tuple[int, ...], ...]:
    """Return for each input the varying axes other than the batch."""
    return tuple(
        tuple(at for at, dim in enumerate(spec.shape) if at and isinstance(dim, str)) for spec in signature.inputs
    )


def with_varying_sizes(plain: Signature, folded: GraphModule, inputs: tuple[Tensor, ...]) -> Signature:
    """Return a signature with names for the image sizes that vary, and for the sizes that depend on them, with smallest sizes.

    Inputs that must have the same height share its name; a separate height is named after its input. A dimension of an output
    that equals a size of an input has its name; another varying dimension is named after its output. ``plain`` is the signature
    for one image size. An ExportError reports a graph that can't be exported with varying sizes, or pins one.
    """
    axes = tuple(tuple(size_axes(item.ndim)) for item in inputs)
    with quiet(), torch.no_grad():
        try:
            program = export_flat(folded, inputs, axes)
        except Exception as error:  # torch.export raises many unrelated classes
            raise ExportError(
                f"the folded graph can't be exported with varying sizes: {one_line(error)}",
                remedy="Leave --dynamic-size out",
            ) from error
    values = {node.name: node.meta["val"] for node in program.graph.nodes if "val" in node.meta}
    taken = [values[str(name)] for name in program.graph_signature.user_inputs]
    given = [values[str(name)] for name in program.graph_signature.user_outputs]
    names = {str(taken[0].shape[0]): BATCH}
    inputs_named = tuple(
        _named(spec, value, names, first=index == 0)
        for index, (spec, value) in enumerate(zip(plain.inputs, taken, strict=True))
    )
    traced = [node.meta["val"] for node in folded.graph.find_nodes(op="placeholder")]
    smallest: dict[str, int] = {}
    for spec, *values_of in zip(inputs_named, taken, traced, strict=True):
        for axis in size_axes(len(spec.shape)):
            if isinstance(dim := spec.shape[axis], str):
                smallest[dim] = max(smallest.get(dim, 1), *(_lower_bound(value.shape[axis]) for value in values_of))
    outputs_named = tuple(_named(spec, value, names) for spec, value in zip(plain.outputs, given, strict=True))
    return Signature(inputs_named, outputs_named).with_smallest(smallest)


def _lower_bound(size: Any) -> int:
    """Return the smallest size at which the graph surely equals forward: torch.export follows ``if x.shape[2] > 40``."""
    if isinstance(size, int):
        return 1
    return int(size.node.shape_env.bound_sympy(size.node.expr).lower)


def _named(spec: TensorSpec, value: Any, names: dict[str, str], *, first: bool = False) -> TensorSpec:
    """Return a tensor's spec with names for sizes that vary; ``names`` maps expressions to names and grows."""
    words, shape = size_axes(value.ndim), []
    for axis, size in enumerate(value.shape):
        if isinstance(size, int):
            shape.append(spec.shape[axis])
            continue
        word = words.get(axis, f"dim{axis}")
        wanted = word if first else f"{spec.name}_{word}"
        if str(size) not in names and wanted in names.values():
            wanted = f"{spec.name}_{word}_{axis}"
        shape.append(names.setdefault(str(size), wanted))
    return replace(spec, shape=tuple(shape))


def signature_of(
    folded: GraphModule, inputs: tuple[Tensor, ...], *, input_names: tuple[str, ...], dynamic_size: bool = False
) -> Signature:
    """Run the network once and name its inputs and outputs.

    A tensor returned alone is called "logits". Others are named by their keys or fields, joined by "." if they are nested:
    "out", "features.0"; without keys "output_0", "output_1", ... in the order in which forward returns them. None is not an
    output. With ``dynamic_size``, height and width of image inputs, and sizes that depend on them, are names in the signature.
    """
    _refuse_other_precisions(folded)
    with torch.no_grad():
        found = pytree.tree_flatten_with_path(folded(*inputs))[0]
    found = [(path, output) for path, output in found if output is not None]
    if not found:
        raise ExportError("forward returns no tensor", remedy="Return the tensors that the network computes")
    names, outputs = _output_names([path for path, _ in found]), [output for _, output in found]
    if clash := set(names) & set(input_names):
        raise ExportError(
            f"{clash.pop()!r} names an input and an output", remedy="Give the input another name in --input"
        )
    if len({id(output) for output in outputs}) < len(outputs):
        raise ExportError("forward returns one tensor twice", remedy="Return it once: every output has a separate name")
    batch = inputs[0].shape[0]
    for name, output in zip(names, outputs, strict=True):
        if not isinstance(output, Tensor) or output.ndim == 0 or output.shape[0] != batch:
            what = f"has shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"is a {type(output).__name__}"
            raise ExportError(
                f"output {name!r} {what} for a batch of {batch}, so its first dimension is not the batch",
                remedy="Return tensors with the batch first; reduce over the batch outside the model",
            )
    plain = Signature(
        tuple(_spec(name, tensor) for name, tensor in zip(input_names, inputs, strict=True)),
        tuple(_spec(name, tensor) for name, tensor in zip(names, outputs, strict=True)),
    )
    return with_varying_sizes(plain, folded, inputs) if dynamic_size else plain


def _output_names(paths: list[tuple[Any, ...]]) -> tuple[str, ...]:
    """Return one name per output from its place in the result of forward."""
    names = tuple(_path_name(path, index) for index, path in enumerate(paths))
    if len(paths) == 1 and names == ("output_0",):
        return ("logits",)
    if len(set(names)) < len(names):  # keys that differ only in characters that a name can't hold
        return tuple(f"output_{index}" for index in range(len(names)))
    return names


def _path_name(path: tuple[Any, ...], index: int) -> str:
    """Join keys and fields by "."; "output_3" if there are none, or as the first part if that is a position."""
    if all(isinstance(key, pytree.SequenceKey) for key in path):
        return f"output_{index}"
    first, *rest = (getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))) for key in path)
    start = f"output_{first}" if isinstance(first, int) else str(first)
    return re.sub(r"[^\w.\-]", "_", ".".join([start, *map(str, rest)]))


def check_labels(signature: Signature, labels: tuple[str, ...] | None) -> None:
    """Refuse labels whose number differs from the number of scores; other outputs than one row of scores are not checked."""
    shape = signature.outputs[0].sample_shape
    if labels is not None and len(signature.outputs) == 1 and len(shape) == 1 and shape[0] != len(labels):
        raise ExportError(
            f"there are {len(labels)} labels, but the network returns {shape[0]} scores",
            remedy="Name every class in the order of the scores, one per line",
        )


def _refuse_other_precisions(folded: GraphModule) -> None:
    """Refuse a network whose parameters are not float32: the bounds of the verification are those of float32 kernels."""
    for name, tensor in folded.named_parameters():
        if tensor.is_floating_point() and tensor.dtype is not torch.float32:
            raise ExportError(
                f"{name} is {str(tensor.dtype).removeprefix('torch.')}; only networks that compute in float32 are exported",
                remedy="Call float() on the network before exporting it",
            )


def _spec(name: str, tensor: Tensor) -> TensorSpec:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise ExportError(
            f"{name!r} is {dtype}, which an exported file does not support", remedy=f"Use one of {', '.join(DTYPES)}"
        )
    return TensorSpec(name, dtype, (BATCH, *map(int, tensor.shape[1:])))


def signature_of_file(model: ModelProto) -> Signature:
    """Return the declared names, element types and shapes of a file; open sizes without a name get one.

    An ExportError refuses an undeclared shape, a missing batch, and a precision that the strict float32 bounds do not fit.
    """
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for name, tensor in stored.items():
        if tensor.data_type in _HALVES:
            raise ExportError(f"{name!r} is in half precision; bundles are verified in float32", remedy=FILE_ALONE)
    inputs = [_declared(value) for value in model.graph.input if value.name not in stored]
    if not inputs:
        raise ExportError("the file has no input", remedy=FILE_ALONE)
    return Signature(tuple(inputs), tuple(_declared(value) for value in model.graph.output))


def _declared(value: ValueInfoProto) -> TensorSpec:
    kind = value.type.tensor_type
    if value.type.WhichOneof("value") != "tensor_type" or not kind.HasField("shape") or not kind.shape.dim:
        raise ExportError(
            f"the file does not declare a shape with a batch for {value.name!r}, which a bundle needs",
            remedy=f"Run onnx.shape_inference over it first. {FILE_ALONE}",
        )
    dtype = str(helper.tensor_dtype_to_np_dtype(kind.elem_type).name)
    if dtype not in DTYPES or kind.elem_type in _HALVES:
        raise ExportError(f"{value.name!r} is {dtype}; bundles are verified in float32", remedy=FILE_ALONE)
    shape = tuple(
        int(dim.dim_value)
        if dim.HasField("dim_value")
        else dim.dim_param or (f"{value.name}_{axis}" if axis else "batch")
        for axis, dim in enumerate(kind.shape.dim)
    )
    return TensorSpec(value.name, dtype, shape)
