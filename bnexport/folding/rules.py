"""The table of rules: what may be rewritten, when it is safe, and how.

A rule's ``check`` returns None when the rewrite is exact, else a sentence that says why not; the sentence goes into the
report, so that nothing is left alone in silence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from bnexport.folding.affine import dtype_of, shape_of
from bnexport.folding.constants import attribute
from bnexport.folding.sites import Site, describe, module_path


@dataclass(frozen=True)
class FoldRule:
    """One way to make an affine disappear.

    Attributes:
        name: As it appears in the report.
        pattern: Kinds of layers in the order of the data flow.
        check: None when the rewrite is exact at this site, else why not.
        rewrite: Does it. Called only after ``check`` returned None.
    """

    name: str
    pattern: tuple[str, ...]
    check: Callable[[Site], str | None]
    rewrite: Callable[[Site], None]

    def matches(self, site: Site) -> bool:
        """Whether the layer before the affine is of the pattern's kind."""
        return site.absorber is not None and self.pattern == (site.absorber.kind, "affine")


def check_backward(site: Site) -> str | None:
    """Whether the linear layer before the affine may take it in."""
    checks = (_consumers, _axis, _constant_weights, _shared_call, _element_types, _representable)
    return next((reason for check in checks if (reason := check(site)) is not None), None)


def _consumers(site: Site) -> str | None:
    """The value before the affine must be seen by the affine alone."""
    for node in (site.producer, *site.between):
        if len(node.users) > 1:
            return f"the output of {describe(node)} has a second consumer, which needs it as it is"
    return None


def _axis(site: Site) -> str | None:
    """The affine's channels must be the layer's output channels."""
    assert site.absorber is not None
    assert site.affine is not None
    axis = site.absorber.channel_axis(site.producer)
    if isinstance(axis, str):
        return axis
    if site.axis is not None and site.axis != axis:
        return (
            f"it normalises axis {site.axis}, the output channels of {describe(site.producer)} are on axis {axis}"
            " (equal sizes would not make it right)"
        )
    shape = shape_of(site.producer)
    if site.affine.channels != 1 and (shape is None or shape[axis] != site.affine.channels):
        return (
            f"it has {site.affine.channels} channels, {describe(site.producer)} has another number of output channels"
        )
    return None


def _shared_call(site: Site) -> str | None:
    """A weight that another call reads must stay as it is."""
    assert site.absorber is not None
    for node in (site.absorber.weight_node(site.producer), site.absorber.bias_node(site.producer)):
        if node is not None and (uses := _uses(node)) > 1:
            return f"the weights of {describe(site.producer)} are used {uses} times (a shared layer or parameter)"
    return None


def _uses(node: Node) -> int:
    """How many operators read a value; an attribute may be read by several nodes."""
    if node.op != "get_attr":
        return len(node.users)
    return sum(len(item.users) for item in node.graph.find_nodes(op="get_attr", target=node.target))


def _constant_weights(site: Site) -> str | None:
    assert site.absorber is not None
    weight, bias = site.absorber.weight_node(site.producer), site.absorber.bias_node(site.producer)
    if site.constants.value(weight) is None or (bias is not None and site.constants.value(bias) is None):
        return f"the weights of {describe(site.producer)} are computed from the input or changed in forward"
    return None


def _element_types(site: Site) -> str | None:
    before, after = dtype_of(site.producer), dtype_of(site.result)
    if before != after:
        return f"it turns {before} into {after}; folded, that conversion would be lost"
    return None


def _representable(site: Site) -> str | None:
    """Folded weights must be finite in the layer's own element type (float16 ends at 65504)."""
    dtype = dtype_of(site.producer)
    assert dtype is not None
    for name, tensor in zip(("weight", "bias"), _folded(site), strict=True):
        if not bool(torch.isfinite(tensor).all()):
            return f"the folded {name} is not finite"
        if not bool(torch.isfinite(tensor.to(dtype)).all()):
            return f"the folded {name} does not fit into {dtype}"
    return None


def rewrite_backward(site: Site) -> None:
    """Put the folded weight and bias in place of the layer's own and take the affine out of the graph."""
    assert site.absorber is not None
    dtype = dtype_of(site.producer)
    assert dtype is not None
    weight, bias = _folded(site)
    weight_node = _store(site, "weight", site.absorber.weight_node(site.producer), weight, dtype)
    bias_node = _store(site, "bias", site.absorber.bias_node(site.producer), bias, dtype)
    arguments = list(site.producer.args)
    arguments += [None] * (site.absorber.bias + 1 - len(arguments))
    arguments[site.absorber.weight], arguments[site.absorber.bias] = weight_node, bias_node
    kwargs = {name: value for name, value in site.producer.kwargs.items() if name not in ("weight", "bias")}
    site.producer.args, site.producer.kwargs = tuple(arguments), kwargs
    site.result.replace_all_uses_with(site.value)
    for node in reversed(site.nodes):
        site.graph_module.graph.erase_node(node)
    site.constants.replace(str(weight_node.target), weight)
    site.constants.replace(str(bias_node.target), bias)


def _folded(site: Site) -> tuple[Tensor, Tensor]:
    """The folded weight and bias in float64."""
    assert site.absorber is not None
    assert site.affine is not None
    weight = site.constants.value(site.absorber.weight_node(site.producer))
    bias_node = site.absorber.bias_node(site.producer)
    bias = None if bias_node is None else site.constants.value(bias_node)
    assert weight is not None
    return site.absorber.after(weight, bias, site.affine)


def _store(site: Site, name: str, old: Node | None, value: Tensor, dtype: torch.dtype) -> Node:
    """A node that reads ``value``, cast once; under the old attribute's name where there is one.

    A subnormal result is flushed to zero: it is below the resolution of every sum it enters, and slows a CPU several times.
    """
    cast = value.to(dtype)
    cast = torch.where(cast.abs() < torch.finfo(dtype).tiny, torch.zeros_like(cast), cast)
    stored = old is not None and old.op == "get_attr"
    target = str(old.target) if old is not None and stored else _free_name(site, name)
    holder, _, leaf = target.rpartition(".")
    module = site.graph_module.get_submodule(holder) if holder else site.graph_module
    old_value = getattr(module, leaf, None)
    device = old_value.device if isinstance(old_value, Tensor) else _device(site)
    if leaf in module._buffers:
        del module._buffers[leaf]
    setattr(module, leaf, torch.nn.Parameter(cast.to(device), requires_grad=False))
    if old is not None and stored:
        old.meta["val"] = cast
        return old
    with site.graph_module.graph.inserting_before(site.producer):
        node = site.graph_module.graph.get_attr(target)
    node.meta["val"] = cast
    return node


def _free_name(site: Site, name: str) -> str:
    """An attribute name in the layer's module that nothing uses yet."""
    path = module_path(site.producer)
    holder: torch.nn.Module = site.graph_module
    for part in path.split(".") if path else ():
        if not isinstance(getattr(holder, part, None), torch.nn.Module):
            holder.add_module(part, torch.nn.Module())
        holder = attribute(holder, part)
    candidate, number = name, 1
    while hasattr(holder, candidate):
        candidate, number = f"{name}_{number}", number + 1
    return f"{path}.{candidate}" if path else candidate


def _device(site: Site) -> torch.device:
    assert site.absorber is not None
    value = site.constants.value(site.absorber.weight_node(site.producer))
    assert value is not None
    return value.device


#: Every rule, in the order in which they are tried.
RULES: tuple[FoldRule, ...] = (
    FoldRule("convolution <- batch norm", ("conv", "affine"), check_backward, rewrite_backward),
    FoldRule("linear <- batch norm", ("linear", "affine"), check_backward, rewrite_backward),
)
