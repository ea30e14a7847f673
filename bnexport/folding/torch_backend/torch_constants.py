"""Memory and constants of a torch.export graph: shared memory, constant values, and their float64 numbers.

``torch.export`` keeps ``relu_`` and ``add_`` as the author of the network wrote them. If the changed memory belongs to a single
value, the functional operator computes the same and replaces the in-place operator. Otherwise the in-place operator stays, and
folding does not change the values that share its memory.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

aten = torch.ops.aten


def _overloads(*names: str) -> set[Any]:
    """Return all overloads of operators that this version of torch has."""
    packets = [getattr(aten, name, None) for name in names]
    return {getattr(packet, name) for packet in packets if packet is not None for name in packet.overloads()}


#: Composite operators, whose schema does not declare views, with a result that always has separate memory.
_FRESH = _overloads(
    *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear", "matmul"),
    *("batch_norm", "instance_norm", "group_norm", "layer_norm", "prelu", "relu6", "selu", "softmax", "log_softmax"),
    *("avg_pool1d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d"),
    *("max_pool1d", "max_pool2d", "max_pool3d", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d"),
    *("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d"),
    *("scaled_dot_product_attention", "cosine_similarity", "where", "square", "concat", "concatenate"),
)


def shares_memory(node: Node) -> bool:
    """Return True if an operator's result may be memory of one of its arguments."""
    if node.op != "call_function":
        return False
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return node.target is operator.getitem  # one of the views that chunk, split or unbind return
    if any(item.alias_info is not None for item in schema.returns):
        return True
    if node.target in _FRESH:
        return False
    name = f"{schema.name}.{schema.overload_name}" if schema.overload_name else schema.name
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd"))


def memory_of(node: Node) -> set[str | Node]:
    """Return the possible owners of a value's memory: targets of attributes, and nodes that allocated memory."""
    found: set[str | Node] = set()
    stack, seen = [node], {node}
    while stack:
        item = stack.pop()
        if item.op == "get_attr":
            found.add(str(item.target))
        elif not shares_memory(item):
            found.add(item)
        else:
            for parent in item.all_input_nodes:
                if parent not in seen and isinstance(parent.meta.get("val"), Tensor | list | tuple):
                    seen.add(parent)
                    stack.append(parent)
    return found


def functionalise(graph_module: GraphModule) -> None:
    """Replace in-place operators by functional ones where that is exact, in one pass over the graph."""
    order = {node: index for index, node in enumerate(graph_module.graph.nodes)}
    for node in order:
        if (twin := _functional(node)) is not None and _owned(node, order):
            node.target = twin
    graph_module.recompile()


def _functional(node: Node) -> Any:
    """``aten.relu_.default`` -> ``aten.relu.default``; None for other operators, or if the result would have another type."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    schema = node.target._schema
    name = schema.name.removeprefix("aten::")
    if not schema.is_mutable or not name.endswith("_") or name.startswith("_") or not node.args:
        return None
    packet = getattr(torch.ops.aten, name.removesuffix("_"), None)
    twin = getattr(packet, node.target._overloadname, None)
    value, types = node.meta.get("val"), {_type(item) for item in node.all_input_nodes}
    if twin is None or not isinstance(value, Tensor) or types - {None} != {(value.dtype, value.device)}:
        return None
    first = node.args[0]
    before = first.meta.get("val") if isinstance(first, Node) else None
    return twin if isinstance(before, Tensor) and before.shape == value.shape else None


def _type(node: Node) -> tuple[torch.dtype, torch.device] | None:
    value = node.meta.get("val")
    return (value.dtype, value.device) if isinstance(value, Tensor) else None


def _owned(node: Node, order: dict[Node, int]) -> bool:
    """Return True if no other value reads the memory that a node changes, through an earlier view or afterwards."""
    reader, value = node, node.args[0]
    while isinstance(value, Node):
        if value.op != "call_function":
            return False  # an input of the network, or a parameter
        if any(user is not reader and (order[user] > order[node] or shares_memory(user)) for user in value.users):
            return False
        if not shares_memory(value):
            return True
        tensors = [item for item in value.all_input_nodes if isinstance(item.meta.get("val"), Tensor | list | tuple)]
        if len(value.users) > 1 or len(tensors) != 1:
            return False
        reader, value = value, tensors[0]
    return False


#: Operators without inputs whose result has no defined values.
_UNSET = _overloads("empty", "empty_strided", "empty_permuted", "empty_quantized", "_empty_affine_quantized")
#: Casts to a wider floating type inside a constant are skipped, so that the constant keeps its float64 precision. A cast that
#: rounds (to float16, to an integer) is part of the network's computation.
_CASTS = (aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout, aten.to.device)


class TorchConstants:
    """Values that depend on parameters, buffers and literals alone, computed in float64 on demand.

    A parameter or buffer that an operator of the graph changes in place (also through a view) is not a constant: its value
    depends on the time of reading. ``mutated`` holds the changed memory: targets of attributes, and computed nodes.
    """

    def __init__(self, module: GraphModule) -> None:
        self._module = module
        self._values: dict[Node, Tensor | tuple[Tensor, ...] | None] = {}
        self.mutated = set(mutated_memory(module))

    def changes(self, *nodes: Node) -> bool:
        """Return True if the memory of a value is changed in place, so that the time of reading matters."""
        return bool(self.mutated) and any(not self.mutated.isdisjoint(memory_of(node)) for node in nodes)

    def value(self, item: Any) -> Tensor | None:
        """Return an operator's argument (a node, a number, ...) as a float64 constant; None if it is not a constant."""
        if isinstance(item, bool) or not isinstance(item, (int, float, Node)):
            return None
        if isinstance(item, (int, float)):
            return torch.tensor(float(item), dtype=torch.float64)
        found = self._found(item)
        return _wide(found) if isinstance(found, Tensor) else None

    def known(self, item: Any) -> bool:
        """Return True for a number, and for a node with one or several constant results (``torch.var_mean``)."""
        return isinstance(item, (int, float)) or (isinstance(item, Node) and self._found(item) is not None)

    def why_not(self, *items: Any) -> str:
        """Return why some of the values are not constants, as the end of a sentence: "computed from the input"."""
        found = [item for item in items if isinstance(item, Node) and not self.known(item)]
        stack, seen = list(found), set(found)
        while stack:
            node = stack.pop()
            if self.changes(node):
                return "changed in forward"
            if node.op == "placeholder":
                return "computed from the input"
            parents = [parent for parent in node.all_input_nodes if not self.known(parent)]
            if not parents:
                random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
                return "drawn at random in forward" if random else "made in forward without values"
            stack += [parent for parent in parents if parent not in seen]
            seen.update(parents)
        return "not constant"

    def _found(self, node: Node) -> Tensor | tuple[Tensor, ...] | None:
        if node not in self._values:
            self._resolve(node)
        return self._values[node]

    def _resolve(self, target: Node) -> None:
        """Compute ``target`` and the constants it needs, without recursion: constant subgraphs can be long."""
        stack = [target]
        while stack:
            node = stack[-1]
            missing = [parent for parent in node.all_input_nodes if parent not in self._values]
            if node in self._values:
                stack.pop()
            elif node.op == "call_function" and missing and is_pure(node):
                stack.extend(missing)
            else:
                self._values[stack.pop()] = self._compute(node)

    def _compute(self, node: Node) -> Tensor | tuple[Tensor, ...] | None:
        if self.changes(node):
            return None
        if node.op == "get_attr":
            value = attribute(self._module, str(node.target))
            return value.detach() if isinstance(value, Tensor) else None
        parents = node.all_input_nodes
        if node.op != "call_function" or not is_pure(node) or node.target in _UNSET:
            return None
        if any(self._values[parent] is None for parent in parents):
            return None
        if node.target in _CASTS and isinstance(node.args[0], Node) and _widens(node):
            return self._values[node.args[0]]
        for look_up in (self._wide_value, self._narrow_value)[_looks_at_bits(node) :]:
            try:
                with torch.no_grad():
                    args: Any = torch.fx.map_arg(node.args, look_up)
                    kwargs: Any = torch.fx.map_arg(node.kwargs, look_up)
                    result = node.target(*args, **kwargs)  # type: ignore[operator]
            except (RuntimeError, TypeError, ValueError, NotImplementedError):
                continue  # an operator that supports only float32, as those of quantisation
            if isinstance(result, tuple | list) and all(isinstance(item, Tensor) for item in result):
                return tuple(_wide(item) for item in result)
            if isinstance(result, Tensor) and _fits(result, node):
                return result if result.is_quantized else _wide(result)
        return None

    def _wide_value(self, node: Node) -> Any:
        value = self._values[node]
        return _wide(value) if isinstance(value, Tensor) else value

    def _narrow_value(self, node: Node) -> Any:
        """Return the value in the element type in which the network computes it."""
        value, traced = self._values[node], node.meta.get("val")
        if not isinstance(value, Tensor) or not isinstance(traced, Tensor) or not value.is_floating_point():
            return value
        return value.cpu().to(traced.dtype)


def _wide(value: Tensor) -> Tensor:
    """Return a tensor in float64 on the CPU, on which the whole algebra runs."""
    if value.is_quantized:
        return value
    value = value.cpu()
    return value.double() if value.is_floating_point() else value


def _looks_at_bits(node: Node) -> bool:
    """Return True if an operator's result depends on the element type, so that widening would change the result."""
    name = getattr(getattr(node.target, "_schema", None), "name", "")
    return node.target is aten.view.dtype or any(part in name for part in ("quantize", "bitwise", "frexp", "nextafter"))


def _fits(result: Tensor, node: Node) -> bool:
    traced = node.meta.get("val")
    return not isinstance(traced, Tensor) or tuple(result.shape) == tuple(traced.shape)


def attribute(module: torch.nn.Module, target: str) -> Any:
    """Return the attribute at a dotted path."""
    return operator.attrgetter(target)(module)


def is_pure(node: Node) -> bool:
    """Return True if a node is deterministic and without side effects, so that it can be computed ahead of time."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or schema.is_mutable:
        return node.target is operator.getitem
    return torch.Tag.nondeterministic_seeded not in node.target.tags  # type: ignore[union-attr]


def _widens(cast: Node) -> bool:
    """Return True if a cast keeps every value: from a floating type to itself or to one with more bits."""
    source = cast.args[0]
    before = source.meta.get("val") if isinstance(source, Node) else None
    after = cast.meta.get("val")
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    if not before.is_floating_point() or not after.is_floating_point():
        return False
    return before.dtype == after.dtype or torch.finfo(after.dtype).bits > torch.finfo(before.dtype).bits


def mutated_memory(module: GraphModule) -> Iterator[str | Node]:
    """Yield the memory that in-place operators change, also through a view: targets of attributes, and computed nodes."""
    for node in module.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if node.op != "call_function" or schema is None or not schema.is_mutable:
            continue
        for position, argument in enumerate(schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
                for item in _nodes(given):
                    yield from memory_of(item)
    # Training-mode batch_norm changes its statistics, which its schema does not declare.
    for node in module.graph.find_nodes(op="call_function", target=aten.batch_norm.default):
        for item in _nodes(node.args[3:5] if node.args[5] else ()):
            yield from memory_of(item)


def _nodes(value: Any) -> list[Node]:
    found: list[Node] = []
    torch.fx.map_arg(value, found.append)
    return found
