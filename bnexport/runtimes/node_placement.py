"""Where the nodes of an onnxruntime session run, and which of those on the CPU are shape arithmetic.

On a GPU onnxruntime keeps small integer nodes that compute shapes on the CPU, next to the caller who needs the shape
(onnxruntime, "GetCpuPreferredNodes"). ``session.disable_cpu_ep_fallback`` refuses these nodes, too, so the assignment is
read back and each node on the CPU is judged by its outputs. onnxruntime itself infers their types: a serving machine has
neither the onnx package nor torch.
"""

from __future__ import annotations

import itertools
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bnexport.optional import one_line
from bnexport.protobuf_wire import message, read_fields

CPU = "CPUExecutionProvider"
#: onnxruntime's names of the element types that shape arithmetic may have.
_INTEGERS = frozenset(
    {"tensor(bool)", *(f"tensor({kind}{bits})" for kind in ("int", "uint") for bits in (8, 16, 32, 64))}
)
#: onnx.proto: ModelProto.graph; GraphProto.node and .output; NodeProto.input, .output, .name and .op_type; ValueInfoProto.name.
_GRAPH, _NODE, _OUTPUT = 7, 1, 12
_NODE_INPUT, _NODE_OUTPUT, _NODE_NAME, _NODE_OPERATOR, _VALUE_NAME = 1, 2, 3, 4, 1
#: Number of nodes that a message names.
_NAMED = 3


class PlacedNode(NamedTuple):
    """One node of a session: name ("" where the file gives none), operator ("Conv") and execution provider."""

    name: str
    operator: str
    provider: str


class _Value(NamedTuple):
    """Element type by onnxruntime's name, and rank; None when onnxruntime can't infer the rank."""

    kind: str
    rank: int | None

    def is_shape(self) -> bool:
        return self.kind in _INTEGERS and self.rank is not None and self.rank <= 1


def with_unique_names(model: bytes) -> bytes:
    """Return the model with a unique name for every node of its main graph; the same bytes when it has them already.

    The assignment lists nodes by name and operator alone, and ONNX allows nodes without names.
    """
    places = list(_parts(model, _GRAPH, _NODE))
    names = [_texts(model, *place).get(_NODE_NAME, [""])[-1] for place in places]
    taken = Counter(names)
    if "" not in taken and len(taken) == len(names):
        return model
    fresh = (f"node_{number}" for number in itertools.count() if f"node_{number}" not in taken)
    new = {place[0]: next(fresh) for place, name in zip(places, names, strict=True) if not name or taken[name] > 1}
    return _rebuilt(model, 0, len(model), (_GRAPH, _NODE), new)


def _rebuilt(content: bytes, start: int, end: int, path: tuple[int, ...], new: Mapping[int, str]) -> bytes:
    """Return a message with new names for its nodes, which lie at a path of field numbers; ``new`` has start -> name."""
    parts, before = [], start
    for field in read_fields(content, start, end):
        if field.number != path[0]:
            parts.append(content[before : field.end])
        elif len(path) > 1:
            parts.append(message((field.number, _rebuilt(content, field.start, field.end, path[1:], new))))
        else:  # protobuf takes the last of repeated fields
            name = message((_NODE_NAME, new[field.start])) if field.start in new else b""
            parts.append(message((field.number, content[field.start : field.end] + name)))
        before = field.end
    return b"".join(parts)


def placed_nodes(session: Any) -> tuple[PlacedNode, ...]:
    """Return every node that the session recorded, with its provider; needs ``session.record_ep_graph_assignment_info``."""
    return tuple(
        PlacedNode(node.name, node.op_type, part.ep_name)
        for part in session.get_provider_graph_assignment_info()
        for node in part.get_nodes()
    )


def not_shape_arithmetic(ort: Any, model: bytes, nodes: Sequence[PlacedNode], level: Any) -> str | None:
    """Return which nodes on the CPU are not shape arithmetic, as a clause; None when all of them are.

    A node is shape arithmetic when all its outputs are integers or bools of rank 0 or 1. A node with unknown outputs is not.
    ``level`` is the graph optimisation after which nodes are assigned: basic, or none for a session without optimisation.
    """
    wanted = [node for node in nodes if node.provider == CPU]
    if not wanted:
        return None
    outputs: dict[tuple[str, str], tuple[str, ...]] = {}
    values: dict[str, _Value] = {}
    why = ""
    try:
        graph, outputs = model, _outputs_by_node(model)
        if any(node[:2] not in outputs for node in wanted):  # the optimiser has added nodes
            graph = _assigned_graph(ort, model, level)
            outputs = _outputs_by_node(graph)
        values = _value_types(ort, graph, sorted({name for node in wanted for name in outputs.get(node[:2], ())}))
    except Exception as error:  # onnxruntime's classes derive from Exception alone; the nodes are refused as unknown
        why = f" ({one_line(error, 100)})"
    for key, number in Counter(node[:2] for node in nodes).items():
        if number > 1:  # names are unique in the main graph, so a duplicate is in a subgraph
            outputs.pop(key, None)
    refused = [node for node in wanted if not _is_shape(outputs.get(node[:2], ()), values)]
    if not refused:
        return None
    words = [_described(node, outputs.get(node[:2], ()), values) for node in refused[:_NAMED]]
    more = f" and {len(refused) - _NAMED} more" if len(refused) > _NAMED else ""
    return "; ".join(words) + more + why


def _is_shape(names: Sequence[str], values: dict[str, _Value]) -> bool:
    return bool(names) and all(name in values and values[name].is_shape() for name in names)


def _described(node: PlacedNode, names: Sequence[str], values: dict[str, _Value]) -> str:
    found = next((values[name] for name in names if name in values and not values[name].is_shape()), None)
    if found is None:
        kind = "an unknown type"
    else:
        rank = "unknown rank" if found.rank is None else f"rank {found.rank}"
        kind = f"{found.kind.removeprefix('tensor(').removesuffix(')')} of {rank}"
    return f"the node {node.name!r} ({node.operator}) with an output of {kind} runs on {node.provider}"


def _assigned_graph(ort: Any, model: bytes, level: Any) -> bytes:
    """Return the model after the optimisation that precedes the assignment, which renames, adds and removes nodes."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "assigned.onnx"
        _cpu_session(ort, model, level, file)
        return file.read_bytes()


def _cpu_session(ort: Any, model: bytes, level: Any, file: Path | None = None) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = level
    if file is not None:
        options.optimized_model_filepath = str(file)
    return ort.InferenceSession(model, options, providers=[CPU])


def _outputs_by_node(model: bytes) -> dict[tuple[str, str], tuple[str, ...]]:
    """Return (name, operator) of each node of the main graph -> its outputs; nodes that share both share the entry."""
    found: dict[tuple[str, str], tuple[str, ...]] = {}
    for start, end in _parts(model, _GRAPH, _NODE):
        texts = _texts(model, start, end)
        key = (texts.get(_NODE_NAME, [""])[-1], texts.get(_NODE_OPERATOR, [""])[-1])
        outputs = tuple(name for name in texts.get(_NODE_OUTPUT, []) if name)  # an optional output may be left out
        found[key] = (*found.get(key, ()), *outputs)
    return found


def _value_types(ort: Any, model: bytes, names: Sequence[str]) -> dict[str, _Value]:
    """Return the element type and rank of inner values, as onnxruntime infers them.

    The values become outputs of the graph. onnxruntime reports an unknown rank and a scalar alike, so the rank is taken
    from the size of an appended Shape node's output. Protobuf joins the appended bytes to the model's own graph.
    """
    known = {
        model[field.start : field.end].decode()
        for start, end in _parts(model, _GRAPH, _OUTPUT)
        for field in read_fields(model, start, end)
        if field.number == _VALUE_NAME
    }
    added = bytearray(model)
    for name in names:
        node = message((_NODE_INPUT, name), (_NODE_OUTPUT, _shape_name(name)), (_NODE_OPERATOR, "Shape"))
        added += message((_GRAPH, message((_NODE, node))))
        for value in ({name} - known) | {_shape_name(name)}:
            added += message((_GRAPH, message((_OUTPUT, message((_VALUE_NAME, value))))))
    level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    outputs = {item.name: item for item in _cpu_session(ort, bytes(added), level).get_outputs()}
    ranks = {name: outputs[_shape_name(name)].shape for name in names}
    return {
        name: _Value(outputs[name].type, ranks[name][0] if isinstance(ranks[name][0], int) else None) for name in names
    }


def _shape_name(name: str) -> str:
    return f"{name}/shape of the placement check"


def _texts(content: bytes, start: int, end: int) -> dict[int, list[str]]:
    """Return the outputs, name and operator of a node, by field number."""
    found: dict[int, list[str]] = {}
    for field in read_fields(content, start, end):
        if field.number in (_NODE_OUTPUT, _NODE_NAME, _NODE_OPERATOR):
            found.setdefault(field.number, []).append(content[field.start : field.end].decode())
    return found


def _parts(content: bytes, *path: int) -> Iterator[tuple[int, int]]:
    """Yield where the messages at a path of field numbers lie."""
    places = [(0, len(content))]
    for number in path:
        places = [
            (field.start, field.end)
            for start, end in places
            for field in read_fields(content, start, end)
            if field.number == number
        ]
    yield from places


def counts(nodes: Sequence[PlacedNode]) -> dict[str, int]:
    """Return provider -> number of its nodes."""
    return dict(Counter(node.provider for node in nodes))
