"""Folds that fit into a network's existing modules, and their writing into the modules.

The graph of torch.export is only read here. A module whose forward stays as it is can only get other numbers in existing
weights, or lose a norm. ``ModuleGraph`` marks every other operation as opaque, with the reason.
"""

from __future__ import annotations

import copy
import json
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from bnexport.folding.affine import Affine
from bnexport.folding.graph import ConstantAffine, Identity, Kind, Layer, Op, Opaque, Weight, weights_now
from bnexport.folding.proof import MAX_SITE_ERROR, scale_error
from bnexport.folding.torch_backend.nodes import BATCH_NORM, argument, module_stack
from bnexport.folding.torch_backend.torch_constants import functionalise, mutated_memory, shares_memory
from bnexport.folding.torch_backend.torch_graph import SHAPE_ONLY, TorchGraph
from bnexport.folding.torch_backend.torch_writer import check_stored, flushed
from bnexport.nn.folded import MARKER, ScaleShift

#: Format number of the JSON in MARKER. It grows if an older version would misunderstand the JSON.
FORMAT = 1
#: Name of a ScaleShift in front of a norm's own submodules.
_REST = "scale_shift"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_HOOKED = "a hook reads its value, which a fold would change"
_OVERWRITTEN = "its result is changed in place; without it, that change would reach its input, which has other readers"
_ARITHMETIC = "its numbers are in the code, which stays as it is"


@dataclass
class ModuleChanges:
    """A fold to be written into modules."""

    values: dict[str, Tensor] = field(default_factory=dict)  # Name in the state dict -> folded value in float64
    norms: dict[str, Affine | None] = field(default_factory=dict)  # Path of a norm -> the rest of its affine, or None
    biases: tuple[str, ...] = ()  # Paths of the layers that got a bias

    def layout(self) -> dict[str, Any]:
        """Return the description from which ``with_layout`` builds the folded network, as JSON values."""
        norms = {
            path: None if affine is None else [None if part is None else list(part.shape) for part in _parts(affine)]
            for path, affine in self.norms.items()
        }
        return {"format": FORMAT, "norms": norms, "biases": list(self.biases)}


def _parts(affine: Affine) -> tuple[Tensor | None, Tensor | None]:
    """Return the scale and the shift, each None if it changes nothing."""
    return affine.scale if affine.has_scale else None, affine.shift if affine.has_shift else None


# --- reading ---


class ModuleGraph(TorchGraph):
    """A traced network in which every operation that has no place in a module is opaque.

    ``overwritten`` is the result of ``overwritten_by``. ``kept`` maps module paths and names of weights that must stay as they
    are to the reason.
    """

    def __init__(self, traced: GraphModule, model: nn.Module, overwritten: set[Node], kept: Mapping[str, str]) -> None:
        super().__init__(traced)
        self._model, self._overwritten, self._kept = model, overwritten, kept
        self._cells = _cells(model)
        self._modules = dict(model.named_modules(remove_duplicate=False))
        hooked = _hooked(model)
        for op in self.ops:
            if isinstance(op.kind, Opaque):
                continue
            if problem := self._problem(op) or (_HOOKED if _is_seen(op.source.result, hooked) else ""):
                op.kind = op.original = Opaque(problem)
                if op.norm is not None:
                    op.norm = replace(op.norm, affine=None, why_not=problem, hint="")

    def _problem(self, op: Op) -> str:
        """Return why an operation's numbers can't be changed in a module; "" if they can, or if it has none."""
        if isinstance(op.kind, ConstantAffine):
            return _ARITHMETIC if op.norm is None else self._norm_problem(op)
        return self._layer_problem(op) if isinstance(op.kind, Layer) else ""

    def _norm_problem(self, op: Op) -> str:
        if op.path in self._kept:
            return self._kept[op.path]
        if not op.path:
            return "it is computed in forward itself, so there is no module to exchange"
        module = self._modules.get(op.path)
        if module is None:
            return "it is not registered as a submodule, so it can't be exchanged"
        if _has_hooks(module):
            return _HOOKED
        if not self._can_be_exchanged(op, module):
            return f"forward of {type(module).__name__} does more than this scale and shift, so the module can't be exchanged"
        return ""

    def _can_be_exchanged(self, op: Op, module: nn.Module) -> bool:
        """Return True if the module computes its affine, then its submodules in their order, and nothing else."""
        assert isinstance(op.kind, ConstantAffine)
        try:
            value = self.probe(op.inputs[0], torch.Generator().manual_seed(0), largest=4)
            wide = copy.deepcopy(module).cpu().double()
            other = copy.deepcopy(exchanged(wide, ScaleShift(op.kind.affine.scale, op.kind.affine.shift)))
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                torch.manual_seed(0)
                before = wide(value.clone())
                torch.manual_seed(0)
                after = other(value.clone())
        except Exception:  # the module is the user's code
            return False
        return isinstance(before, Tensor) and scale_error(after, before) <= MAX_SITE_ERROR

    def _layer_problem(self, op: Op) -> str:
        node = op.source.nodes[-1]
        for place, name in ((op.source.weight, "weight"), (op.source.bias, "bias")):
            given = None if place is None else argument(node, place, name)
            if isinstance(given, Node) and (problem := self._weight_problem(given, name)):
                return problem
        return ""

    def _weight_problem(self, node: Node, name: str) -> str:
        """Return why a layer's tensor can't be changed in its module; "" if it can."""
        if node.op != "get_attr":
            return f"its {name} is computed in forward (by a parametrization, or by other code)"
        target = str(node.target)
        if target in self._kept:
            return self._kept[target]
        cells = self._cells.get(_memory(_tensor(self._model, target)), [])
        if not cells:
            return f"its {name} is neither a parameter nor a buffer"
        if len(cells) > 1:
            others = [other for other in cells if other != target]
            return f"its {name} is shared with {others[0]}"
        return ""

    # --- the result ---

    def clashes(self) -> dict[str, str]:
        """Return weights and norms whose calls would need different values, with the reason, to keep in the next attempt."""
        found: dict[str, str] = {}
        weights: dict[str, set[Weight]] = {}
        for old, new in weights_now(self.ops):
            if new is not None:
                weights.setdefault(old.name, set()).add(new)
        for name, seen in weights.items():
            if len(seen) > 1:
                found[name] = "its weight is read several times, and the calls would need different numbers"
        norms: dict[nn.Module, list[Op]] = {}
        for op in self.ops:
            if op.norm is not None and op.path in self._modules:
                norms.setdefault(self._modules[op.path], []).append(op)
        for calls in norms.values():
            if any(not _same(op.kind, op.original, calls[0].kind, calls[0].original) for op in calls):
                reason = f"it is called {len(calls)} times, and the calls would fold differently"
                found |= {op.path: reason for op in calls}
            for op in calls:
                overwritten = isinstance(op.kind, Identity) and op.source.result in self._overwritten
                if overwritten and not _only_reader(op.source):
                    found[op.path] = _OVERWRITTEN
        return found

    def changes(self, added: Iterable[str]) -> ModuleChanges:
        """Return the fold. ``added`` are the paths of layers that got a bias of zeros before tracing."""
        changes = ModuleChanges()
        for old, new in weights_now(self.ops):
            if new is not None and new is not old:
                changes.values[old.name] = new.load()
        for op in self.ops:
            if op.norm is not None and op.changed:
                changes.norms[op.path] = op.kind.affine if isinstance(op.kind, ConstantAffine) else None
        changes.biases = tuple(path for path in added if f"{path}.bias".lstrip(".") in changes.values)
        return changes


def _same(kind: Kind, original: Kind, other: Kind, other_original: Kind) -> bool:
    """Return True if two calls of one module have the same result: unchanged, gone, or the same remaining affine."""
    if (kind is original) != (other is other_original):
        return False
    if kind is original or (isinstance(kind, Identity) and isinstance(other, Identity)):
        return True
    return isinstance(kind, ConstantAffine) and isinstance(other, ConstantAffine) and kind.affine.equals(other.affine)


def overwritten_by(traced: GraphModule) -> set[Node]:
    """Return the nodes whose memory an in-place operator of forward changes, then make the graph functional."""
    found = {item for item in mutated_memory(traced) if isinstance(item, Node)}
    functionalise(traced)
    return found


def _only_reader(source: Any) -> bool:
    """Return True if a norm is the only reader of its input's memory, so that its result may be that memory."""
    node = source.reads[0]
    while node.op == "call_function":
        if sum(user.target not in SHAPE_ONLY for user in node.users) > 1:
            return False
        if node.target is not BATCH_NORM and not shares_memory(node):
            return True
        node = node.all_input_nodes[0]
    return False  # an input of the network, or a parameter


def _cells(model: nn.Module) -> dict[int, list[str]]:
    """Return the names of all parameters and buffers by their memory; a shared module counts once."""
    found: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and tensor.numel():
                found.setdefault(_memory(tensor), []).append(f"{path}.{name}".lstrip("."))
    return found


def _memory(tensor: Tensor | None) -> int:
    return 0 if tensor is None or not tensor.numel() else tensor.untyped_storage().data_ptr()


def _tensor(model: nn.Module, name: str) -> Tensor | None:
    holder, _, leaf = name.rpartition(".")
    try:
        value = getattr(model.get_submodule(holder), leaf, None)
    except AttributeError:
        return None
    return value if isinstance(value, Tensor) else None


def show_hooked(model: nn.Module, traced: GraphModule) -> list[Any]:
    """Make modules with hooks that leave no operation in the graph (an identity) copy their input, so that they are visible.

    Return the handles of the added hooks.
    """
    paths = {path for node in traced.graph.nodes for _, path, _ in module_stack(node)}
    unseen = [model.get_submodule(path) for path in _hooked(model) if path not in paths]

    def copy_inputs(_module: nn.Module, given: tuple[Any, ...]) -> Any:
        return pytree.tree_map_only(Tensor, torch.clone, given)

    return [module.register_forward_pre_hook(copy_inputs) for module in unseen]


def _has_hooks(module: nn.Module) -> bool:
    return any(getattr(module, name, None) for name in _HOOKS)


def _hooked(model: nn.Module) -> tuple[str, ...]:
    return tuple(path for path, module in model.named_modules() if path and _has_hooks(module))


def _is_seen(node: Node, hooked: tuple[str, ...]) -> bool:
    """Return True if a value enters or leaves a module that has hooks."""
    readers = [user for user in node.users if user.target not in SHAPE_ONLY]
    return any(_is_inside(user, path) != _is_inside(node, path) for path in hooked for user in readers)


def _is_inside(node: Node, path: str) -> bool:
    return any(f"{item}.".startswith(f"{path}.") for _, item, _ in module_stack(node))


# --- writing ---


def add_biases(model: nn.Module, excluded: Iterable[str] = ()) -> tuple[str, ...]:
    """Add a bias of zeros to every linear layer without a bias, in place; return the layers' paths."""
    return tuple(path for path, module in model.named_modules() if path not in excluded and add_bias(module))


def add_bias(module: nn.Module) -> bool:
    """Add a bias of zeros to a linear layer without a bias, in place; return True if it got one."""
    weight, size = module._parameters.get("weight"), getattr(module, "out_channels", getattr(module, "out_features", 0))
    if weight is None or weight.ndim < 2 or module._parameters.get("bias", weight) is not None or not size:
        return False
    if not weight.is_floating_point():
        return False
    module.bias = nn.Parameter(weight.detach().new_zeros(size), requires_grad=weight.requires_grad)
    return True


def write(model: nn.Module, changes: ModuleChanges, added: Iterable[str]) -> None:
    """Write a fold into a copy of the network, in place: each value rounded once to the type of its tensor.

    ``added`` is the result of ``add_biases``; a bias that the fold does not use is removed again.
    """
    with torch.no_grad():
        for name, value in changes.values.items():
            stored = _tensor(model, name)
            assert stored is not None
            rounded = flushed(value, stored.dtype)
            check_stored(rounded, value, name)
            stored.copy_(rounded)
    for path in set(added) - set(changes.biases):
        model.get_submodule(path).register_parameter("bias", None)
    for path, affine in changes.norms.items():
        norm = model.get_submodule(path)
        replace_module(model, norm, exchanged(norm, None if affine is None else _rest(norm, _parts(affine))))
    if changes.values or changes.norms:
        mark(model, changes.layout())


def _rest(norm: nn.Module, parts: Iterable[Tensor | None]) -> ScaleShift:
    """Return a module for a scale and a shift, in the element type and on the device of a norm's tensors."""
    tensors = [tensor for tensor in (*norm.parameters(), *norm.buffers()) if tensor.is_floating_point()]

    def like(value: Tensor) -> Tensor:
        return flushed(value.contiguous(), tensors[0].dtype).to(tensors[0].device) if tensors else value.float()

    return ScaleShift(*(None if part is None else like(part) for part in parts))


def exchanged(norm: nn.Module, rest: ScaleShift | None) -> nn.Module:
    """Return the replacement of a norm: its remaining affine, then its submodules (an activation) under their names."""
    children = dict(norm.named_children())
    if not children:
        replacement: nn.Module = rest or nn.Identity()
    else:
        first = {} if rest is None else {_REST: rest}
        replacement = nn.Sequential(OrderedDict({**first, **children}))
    replacement.training = norm.training
    return replacement


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replace a module by another, wherever it is registered."""
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is old:
                module._modules[name] = new


def mark(model: nn.Module, layout: Mapping[str, Any]) -> None:
    """Register the buffer that states what was folded; a network that is folded again keeps the earlier statements."""
    if isinstance(before := getattr(model, MARKER, None), Tensor):
        old = json.loads(bytes(before.tolist()))
        layout = {
            **layout,
            "norms": {**old["norms"], **layout["norms"]},
            "biases": list(dict.fromkeys([*old["biases"], *layout["biases"]])),
        }
    text = json.dumps(layout, separators=(",", ":")).encode()
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    model.register_buffer(MARKER, torch.tensor(list(text), dtype=torch.uint8, device=device))


def with_layout(model: nn.Module, layout: Mapping[str, Any]) -> None:
    """Give an unfolded network the modules of a folded one, in place, with zeros for the values that are loaded later."""
    for path in layout["biases"]:
        add_bias(model.get_submodule(path))
    for path, shapes in layout["norms"].items():
        old = model.get_submodule(path)
        parts = None if shapes is None else [None if shape is None else torch.zeros(shape) for shape in shapes]
        replace_module(model, old, exchanged(old, None if parts is None else _rest(old, parts)))
    mark(model, layout)
