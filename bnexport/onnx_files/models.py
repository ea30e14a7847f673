"""Read a written ONNX file: parse, validate, compare with the manifest, list its names, and count its work."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnexport.bundle import Manifest
from bnexport.errors import REBUILD, BundleError, ExportError
from bnexport.files import Refusal, input_errors
from bnexport.optional import one_line, require
from bnexport.tensors import Declared
from bnexport.validation.limits import limit, refusing
from bnexport.validation.onnx_file import validate_onnx
from bnexport.validation.paths import check_regular

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto


_NOT = "is not an ONNX model that bnexport opens: it"
#: TensorProto's number of a float type -> its name.
_FLOATS = {1: "float32", 10: "float16", 11: "float64", 16: "bfloat16"}
#: Operators whose constant weight decides the work, and whose weight and bias are trained numbers.
LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")
#: Most elements of a constant that may hold the sizes of a shape.
MAX_SIZES = 64


def read_model(source: bytes | Path) -> ModelProto:
    """Parse an ONNX file.

    A BundleError refuses a file that is not an ONNX model, is empty (zero bytes parse as a model without nodes), keeps its
    weights in other files, or does not pass the validation.
    """
    onnx = require("onnx", purpose="reading the written file")
    name = "the model" if isinstance(source, bytes) else str(source)
    content = _validated(source, name) if isinstance(source, bytes) else read_validated(source)
    try:
        model: ModelProto = onnx.load_model_from_string(content)
    except Exception as error:  # protobuf's DecodeError has no stable import path
        raise BundleError(f"{name} is not an ONNX model: {one_line(error, 160)}", remedy=REBUILD) from error
    if not model.graph.node or not model.graph.output:
        raise BundleError(f"{name} is an ONNX file without a single node", remedy=REBUILD)
    return model


def read_validated(file: Path) -> bytes:
    """Return the bytes of an ONNX file; a BundleError refuses a file that could harm the process that opens it.

    Engines get these bytes and not the file's name, so that they follow no reference to another file.
    """
    with input_errors(f"{file} is not an ONNX model: it", BundleError, remedy=REBUILD):
        with refusing(f"{file} {_NOT}", BundleError, remedy=REBUILD):
            check_regular(file)
            if file.stat().st_size > limit("onnx-bytes"):
                raise Refusal("has more than 2 GB, which protobuf can't read")
        return _validated(file.read_bytes(), str(file))


def _validated(content: bytes, name: str) -> bytes:
    with refusing(f"{name} {_NOT}", BundleError, remedy=REBUILD):
        validate_onnx(content)
    return content


def check_written(model: ModelProto, name: str, *, remedy: str) -> None:
    """Refuse (ExportError) a written model, called ``name`` in the message, that onnx.checker does not accept."""
    import onnx

    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # the checker's and the shape inference's errors share no base class
        raise ExportError(f"{name} is not valid ONNX: {one_line(error)}", remedy=remedy) from error


def without_weights(model: ModelProto) -> ModelProto:
    """Return a copy of a model without the initializers of its main graph, which are most of its bytes."""
    copy = type(model)()
    for source, target in ((model, copy), (model.graph, copy.graph)):
        for field, value in source.ListFields():
            if field.name not in ("graph", "initializer"):
                if field.is_repeated:
                    getattr(target, field.name).extend(value)
                else:
                    setattr(target, field.name, value)
    return copy


def for_inference(model: ModelProto) -> ModelProto:
    """Return a copy of a model for shape inference: large weights have no data, and outputs have no declared shape."""
    copy = without_weights(model)
    for tensor in model.graph.initializer:
        large = math.prod(tensor.dims) > MAX_SIZES
        stub = type(tensor)(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type) if large else tensor
        copy.graph.initializer.append(stub)
    for value in copy.graph.output:
        value.type.tensor_type.ClearField("shape")
    return copy


def inferred_graph(model: ModelProto) -> GraphProto:
    """Return the graph of a model after shape inference; the unchanged graph if inference fails."""
    import onnx

    try:
        return onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    except Exception:  # of no common class; shapes that it does not find stay unknown
        return model.graph


def put_initializers(model: ModelProto, tensors: Mapping[str, TensorProto]) -> None:
    """Add initializers by name, or replace those that exist; before IR version 4, each is listed as an input, too."""
    from onnx import helper

    groups: list[tuple[Any, Mapping[str, Any]]] = [(model.graph.initializer, tensors)]
    if model.ir_version < 4:
        listed = {
            name: helper.make_tensor_value_info(name, item.data_type, item.dims) for name, item in tensors.items()
        }
        groups.append((model.graph.input, listed))
    for group, items in groups:
        present = {item.name for item in group}
        for item in group:
            if item.name in items:
                item.CopyFrom(items[item.name])
        group.extend(item for name, item in items.items() if name not in present)


def subgraphs(node: NodeProto) -> list[GraphProto]:
    """Return the graphs in a node's attributes."""
    found: list[GraphProto] = []
    for attribute in node.attribute:
        if attribute.type == attribute.GRAPH:
            found.append(attribute.g)
        found += attribute.graphs
    return found


def graphs_within(nodes: Iterable[NodeProto]) -> Iterator[GraphProto]:
    """Yield every graph inside some nodes, at any depth."""
    for node in nodes:
        for graph in subgraphs(node):
            yield graph
            yield from graphs_within(graph.node)


def mentioned_inside(node: NodeProto) -> list[str]:
    """Return every name that the graphs inside a node read or return; outer values are among them."""
    found: list[str] = []
    for graph in graphs_within([node]):
        found += [value.name for value in graph.output]
        found += [name for inner in graph.node for name in inner.input if name]
    return found


def reads(node: NodeProto) -> list[str]:
    """Return every name that a node reads, once per reading, those inside its graphs too."""
    return [*(name for name in node.input if name), *mentioned_inside(node)]


def mentions(graph: GraphProto) -> Counter[str]:
    """Count how often each name is read: by nodes, by the graphs inside them, as an output of the graph."""
    count: Counter[str] = Counter(value.name for value in graph.output)
    for node in graph.node:
        count.update(reads(node))
    return count


def graphs(model: ModelProto) -> Iterator[GraphProto]:
    """Yield the main graph and every graph inside a node (If, Loop, Scan), functions' nodes included."""
    yield model.graph
    for owner in (model.graph, *model.functions):
        yield from graphs_within(owner.node)


def nodes(model: ModelProto) -> Iterator[NodeProto]:
    """Yield every node of every graph and function."""
    for graph in graphs(model):
        yield from graph.node
    for function in model.functions:
        yield from function.node


def opset_of(model: ModelProto) -> int:
    """Return the version of the default operator set; 0 if the file imports none."""
    return next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)


def refill(group: Any, items: Sequence[Any]) -> None:
    """Make a repeated field hold exactly these messages; a field that holds them already is not changed."""
    if len(group) == len(items) and all(one is other for one, other in zip(group, items, strict=True)):
        return
    copies = [type(item).FromString(item.SerializeToString()) for item in items]
    del group[:]
    group.extend(copies)


def declaration_problem(model: ModelProto, manifest: Manifest) -> str | None:
    """Return how the file differs from the manifest: names, types, shapes, opset, IR version, metadata; None if it fits."""
    stored = {tensor.name for tensor in model.graph.initializer}
    inputs = [_declared(value) for value in model.graph.input if value.name not in stored]
    problem = manifest.signature.declaration_problem(inputs, list(map(_declared, model.graph.output)))
    if problem is not None:
        return problem
    for what, have in (("opset", opset_of(model)), ("ir_version", model.ir_version)):
        if (want := manifest.onnx.get(what, have)) != have:
            return f"the file has {what} {have}, the manifest states {want}"
    facts = manifest.model_facts()
    for item in model.metadata_props:  # a file that was not stamped yet has none
        if facts.get(item.key, item.value) != item.value:
            return f"the file's metadata {item.key!r} is not the value in the manifest"
    return _precision_problem(model, manifest.precision)


def _precision_problem(model: ModelProto, precision: str) -> str | None:
    """Return the first weight of another float type than the manifest's: a coarser type would get a wider bound."""
    if precision == "int8":  # layers that stay in float
        precision = "float32"
    for tensor in trained_tensors(model):
        stored = _FLOATS.get(tensor.data_type)
        if stored is not None and stored != precision:
            return f"the file holds {tensor.name!r} in {stored}, the manifest states {precision}"
    return None


def _declared(value: ValueInfoProto) -> Declared:
    from onnx import helper

    number, dims = value.type.tensor_type.elem_type, value.type.tensor_type.shape.dim
    try:
        dtype = str(helper.tensor_dtype_to_np_dtype(number).name)
    except (KeyError, ValueError):
        dtype = f"element type {number}"
    return value.name, dtype, [dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in dims]


def trained_tensors(model: ModelProto) -> list[TensorProto]:
    """Return weights and biases of the main graph's linear operators, each once, in order of use."""
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    used = [name for node in model.graph.node if node.op_type in LINEAR for name in node.input if name in stored]
    return [stored[name] for name in dict.fromkeys(used)]


def multiplications(model: ModelProto, sizes: Mapping[str, Sequence[int]] | None = None) -> int:
    """Return the multiplications per sample; see ``work_of``."""
    return work_of(model, sizes)[0]


def work_of(model: ModelProto, sizes: Mapping[str, Sequence[int]] | None = None) -> tuple[int, int]:
    """Return the multiplications per sample, and the bytes of all its values in float32: inputs and outputs of operators.

    The multiplications are estimated from the weights of linear operators and their outputs' sizes: a convolution uses each
    weight once per output position. Where the file does not give the size of an output, one position is counted; the numbers
    only choose how many samples are checked. ``sizes`` (input name -> shape of one sample) fills dimensions that the file
    leaves open.
    """
    onnx = require("onnx", purpose="reading the written file")
    sized = for_inference(model)
    for value in sized.graph.input:
        given = (sizes or {}).get(value.name, ())
        for dim, size in zip(list(value.type.tensor_type.shape.dim)[1:], given, strict=False):
            dim.dim_value = size
    try:
        inferred = onnx.shape_inference.infer_shapes(sized)
    except Exception:  # the estimate then uses the declared shapes
        inferred = model
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output)
    }
    stored = {tensor.name: math.prod(tensor.dims) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in stored:
            stored[node.output[0]] = stored[node.input[0]]
    total = 0
    for node in model.graph.node:
        if node.op_type in LINEAR:
            positions = math.prod(max(dim, 1) for dim in shapes.get(node.output[0], [])[2:])
            total += sum(stored.get(name, 0) for name in node.input[1:2]) * positions
    elements = sum(math.prod(max(dim, 1) for dim in dims[1:]) for name, dims in shapes.items() if name not in stored)
    return max(total, 1), 4 * elements


def attributes(node: NodeProto) -> dict[str, Any]:
    """Return the attributes of a node by name."""
    from onnx import helper

    return {item.name: helper.get_attribute_value(item) for item in node.attribute}


class Names:
    """Creates names that a model does not use."""

    def __init__(self, model: ModelProto) -> None:
        self._taken: set[str] = set()
        inner = list(graphs(model))
        for graph in inner:
            for group in (graph.input, graph.output, graph.initializer, graph.value_info):
                self._taken.update(item.name for item in group)
        for owner in (*inner, *model.functions):
            for node in owner.node:
                self._taken.update([node.name, *node.input, *node.output])

    def free(self, *parts: str) -> str:
        """Return the parts joined by "_", with a number if that name is used."""
        wanted = "_".join(parts)
        name, number = wanted, 1
        while name in self._taken:
            name, number = f"{wanted}_{number}", number + 1
        self._taken.add(name)
        return name
