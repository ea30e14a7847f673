"""Write changed operations back into an ONNX model: rounded once, named as before, everything else unchanged."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable

import torch
from onnx import ModelProto, NodeProto, TensorProto, helper
from torch import Tensor

from bnexport.folding.affine import Affine
from bnexport.folding.graph import Clamp, ConstantAffine, Identity, Layer, Op, Weight, weights_now
from bnexport.folding.onnx_backend.inventory import BATCH_NORM, pinned, stored
from bnexport.folding.onnx_backend.onnx_graph import OnnxGraph, OnnxSource, with_tensors
from bnexport.onnx_files.models import Names, mentions, put_initializers, reads, refill


class OnnxWriter:
    """Writes the changed operations of a graph back into its model."""

    def __init__(self, graph: OnnxGraph) -> None:
        self.graph = graph
        self.model: ModelProto = graph.model
        self.exact: dict[str, Tensor] = {}  # The written tensors, in float64 before their one rounding, by initializer
        self._tensors: dict[str, TensorProto] = {}
        self._names = Names(self.model)
        self._pinned = pinned(self.model.graph)
        self._before: Counter[str] = mentions(self.model.graph)
        self._groups: list[list[NodeProto]] = [[node] for node in graph.nodes]
        self._place = {id(node): index for index, (node,) in enumerate(self._groups)}
        self._given = {name for (node,) in self._groups for name in node.output if name}
        self._producers = {name: node for (node,) in self._groups for name in node.output if name}
        self._called: dict[str, str] = {}
        self._shared: dict[tuple[str, bytes], str] = {}
        self._kept = self._names_still_read()

    def write(self, dropped: Iterable[Op]) -> bool:
        """Write every changed operation, remove operations without a reader, and return True if anything changed."""
        left_out = set(dropped)
        changed = [op for op in self.graph.ops if op.changed and op not in left_out]
        for op in changed:
            self._write(op)
        if changed:
            self._finish()
        return bool(changed)

    def _write(self, op: Op) -> None:
        kind = op.kind
        if isinstance(kind, Layer):
            self._layer(op, kind)
        elif isinstance(kind, Identity):
            self._remove(op)
        elif isinstance(kind, ConstantAffine):
            self._norm(op, kind.affine)
        elif isinstance(kind, Clamp):
            self._clamp(op, kind)

    def _now(self, name: str) -> str:
        """Return the present name of a value."""
        while name in self._called:
            name = self._called[name]
        return name

    def _replace(self, op: Op, nodes: list[NodeProto]) -> None:
        """Replace an operation's nodes; the last new node computes the value under the same name."""
        source: OnnxSource = op.source
        for index, node in enumerate(source.nodes):
            self._groups[self._place[id(node)]] = nodes if index == len(source.nodes) - 1 else []
        self._producers.update((name, node) for node in nodes for name in node.output if name)

    # --- removed operations ---

    def _remove(self, op: Op) -> None:
        """Remove an operation: its readers read its input. A name that must stay is given to the producer of that input."""
        name, value = op.source.output, self._now(op.inputs[0].source.output)
        if name not in self._pinned:
            self._called[name] = value
            return self._replace(op, [])
        producer = self._producers.get(value)
        if producer is None or value in self._pinned:
            label = op.source.nodes[-1].name
            return self._replace(op, [helper.make_node("Identity", [value], [name], name=label)])
        self._replace(op, [])
        outputs = list(producer.output)
        del producer.output[:]
        producer.output.extend(name if item == value else item for item in outputs)
        self._producers[name] = producer
        self._called[value] = name
        return None

    # --- layers ---

    def _layer(self, op: Op, kind: Layer) -> None:
        source: OnnxSource = op.source
        before = op.original
        assert isinstance(before, Layer)
        weight = self._tensor(op, "weight", kind.weight, before.weight)
        bias = self._tensor(op, "bias", kind.bias, before.bias)
        nodes = with_tensors(source.nodes, source.weight, source.bias, weight=weight, bias=bias)
        if kind.after is not None:
            inner = self._names.free(op.path, "unshifted")
            shift = self._constant(op, "shift", kind.after, kind.weight.dtype)
            nodes[-1].output[0] = inner
            name = self._names.free(op.path, "add")
            nodes.append(helper.make_node("Add", [inner, shift], [source.output], name=name))
        for index, node in enumerate(source.nodes):
            last = index == len(source.nodes) - 1
            self._groups[self._place[id(node)]] = nodes[index:] if last else [nodes[index]]
        self._producers.update((name, node) for node in nodes for name in node.output if name)

    def _tensor(self, op: Op, what: str, new: Weight | None, old: Weight | None) -> str | None:
        """Return the name of a folded tensor: the old name, unless it has other readers; None if nothing changed."""
        if new is old or new is None:
            return None
        value = new.load()
        if old is None:
            return self._constant(op, what, value, new.dtype)
        key = (old.name, hashlib.sha256(value.contiguous().numpy().tobytes()).digest())
        if key not in self._shared:
            free = old.name not in self._kept
            self._kept.add(old.name)
            self._shared[key] = old.name if free else self._names.free(old.name, "folded")
            self._store(self._shared[key], value, new.dtype)
        return self._shared[key]

    def _names_still_read(self) -> set[str]:
        """Return the constants that must keep their values because an unchanged operation reads them."""
        replaced = Counter(old.name for old, new in weights_now(self.graph.ops) if new is not old)
        return {name for name, times in replaced.items() if self.graph.constants.uses(name) > times}

    def _constant(self, op: Op, what: str, value: Tensor, dtype: torch.dtype) -> str:
        name = self._names.free(op.path or op.source.output, what)
        self._store(name, value, dtype)
        return name

    def _store(self, name: str, value: Tensor, dtype: torch.dtype) -> None:
        self._tensors[name] = stored(name, value, dtype)
        self.exact[name] = value.contiguous()

    # --- affines and clamps that stay ---

    def _norm(self, op: Op, affine: Affine) -> None:
        if not affine.has_scale and not affine.has_shift:
            return self._remove(op)
        node = op.source.nodes[-1]
        size = op.shape[1] if op.rank >= 2 else None
        vector = affine.channels(1, size) if isinstance(size, int) else None
        value = op.inputs[0].source.output
        if node.op_type == BATCH_NORM and affine.has_scale and vector is not None:
            return self._replace(op, [self._batch_norm(op, node, value, vector.scale, vector.shift)])
        assert op.dtype is not None
        steps = []
        if affine.has_scale:
            steps.append(("Mul", self._constant(op, "scale", affine.scale, op.dtype)))
        if affine.has_shift:
            steps.append(("Add", self._constant(op, "shift", affine.shift, op.dtype)))
        return self._chain(op, value, steps)

    def _batch_norm(self, op: Op, node: NodeProto, value: str, scale: Tensor, shift: Tensor) -> NodeProto:
        """Return the canonical affine: mean 0, variance 1, epsilon 0, and the element types of the file."""
        tensors = {"scale": scale, "shift": shift, "mean": torch.zeros_like(scale), "var": torch.ones_like(scale)}
        names = []
        for what, tensor in tensors.items():
            old = node.input[1 if what in ("scale", "shift") else 3]
            dtype = self.graph.constants.dtype(old) or op.dtype or torch.float32
            names.append(self._constant(op, what, tensor.clone(), dtype))
        return helper.make_node(BATCH_NORM, [value, *names], [op.source.output], name=node.name, epsilon=0.0)

    def _clamp(self, op: Op, kind: Clamp) -> None:
        assert op.dtype is not None
        if bool((kind.low == 0).all()) and bool((kind.high == torch.inf).all()):
            node, output = op.source.nodes[-1], [op.source.output]
            return self._replace(op, [helper.make_node("Relu", [op.inputs[0].source.output], output, name=node.name)])
        steps = [
            (operator, self._constant(op, what, bound, op.dtype))
            for operator, what, bound in (("Max", "low", kind.low), ("Min", "high", kind.high))
            if not bool(torch.isinf(bound).all())
        ]
        return self._chain(op, op.inputs[0].source.output, steps) if steps else self._remove(op)

    def _chain(self, op: Op, value: str, steps: list[tuple[str, str]]) -> None:
        """Write elementwise operators with one constant each, in turn; the last gets the operation's names."""
        node, nodes = op.source.nodes[-1], []
        for index, (operator, constant) in enumerate(steps):
            last = index == len(steps) - 1
            output = op.source.output if last else self._names.free(op.path, operator.lower())
            name = node.name if last or not node.name else self._names.free(node.name, operator.lower())
            nodes.append(helper.make_node(operator, [value, constant], [output], name=name))
            value = output
        self._replace(op, nodes)

    # --- the model ---

    def _finish(self) -> None:
        graph = self.model.graph
        kept = [node for group in self._groups for node in group]
        for node in kept:
            for index, name in enumerate(node.input):
                if name in self._called:
                    node.input[index] = self._now(name)
        # A node that computed a constant is removed if an initializer of its name replaces it.
        refill(graph.node, [node for node in kept if not any(name in self._tensors for name in node.output)])
        put_initializers(self.model, self._tensors)
        self._drop_unused()

    def _drop_unused(self) -> None:
        """Remove nodes, initializers and declarations of values that had readers before and have none now."""
        graph = self.model.graph
        count = mentions(graph)
        dead: set[int] = set()
        for index in range(len(graph.node) - 1, -1, -1):  # readers come after what they read
            node = graph.node[index]
            names = [name for name in node.output if name]
            if not any(count[name] for name in names) and any(self._before[name] for name in names):
                dead.add(index)
                count.subtract(reads(node))
        refill(graph.node, [node for index, node in enumerate(graph.node) if index not in dead])
        unused = {tensor.name for tensor in graph.initializer if not count[tensor.name] and self._before[tensor.name]}
        refill(graph.initializer, [item for item in graph.initializer if item.name not in unused])
        if self.model.ir_version < 4:
            refill(graph.input, [item for item in graph.input if item.name not in unused])
        gone = self._given - {name for node in graph.node for name in node.output} | unused
        refill(graph.value_info, [item for item in graph.value_info if item.name not in gone])
