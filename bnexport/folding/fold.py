"""The public door of folding: trace, find, fold, prove, account."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from bnexport.errors import ProofError
from bnexport.folding.affine import ChannelAffine, shape_of
from bnexport.folding.constants import Constants
from bnexport.folding.proof import fold_error
from bnexport.folding.report import FoldReport, FoldRow
from bnexport.folding.rules import RULES
from bnexport.folding.sites import Site, batch_norm_nodes, channels_of, describe, find_sites, module_class, module_path
from bnexport.folding.trace import trace

#: Float64 rounding through a deep network stays far below; the smallest real fault (a dropped eps) is far above.
MAX_FLOAT64_ERROR = 1e-9


@dataclass(frozen=True)
class FoldResult:
    """What ``fold`` returns.

    Attributes:
        model: The folded network in eval mode. It shares no memory with the user's module.
        report: What became of each BatchNorm.
    """

    model: GraphModule
    report: FoldReport


def fold(
    model: nn.Module, example_inputs: Tensor | Sequence[Any], *, dynamic_shapes: Any = None, prove: bool = True
) -> FoldResult:
    """Fold every BatchNorm that can be folded exactly into the linear layer before it.

    ``model`` is never changed. It is taken in eval mode: a model in training mode is traced as if ``eval()`` had been
    called on it; in a model in eval mode, a layer that is in training mode is so on purpose and stays as it is.
    Arithmetic is in float64, cast once to the layer's element type.

    Args:
        model: Any module that torch.export can trace.
        example_inputs: The inputs of one call, batch first: a tensor, or a sequence of forward's positional arguments.
        dynamic_shapes: As for ``torch.export.export``. Default: the first dimension of every tensor input is one shared
            batch dimension that may vary.
        prove: Check the folded graph against the original, both in float64.

    Returns:
        The folded graph and the account: one row per BatchNorm call.

    Raises:
        UntracedError: torch.export can't trace the model.
        ProofError: The folded graph does not compute what the original does; that is a fault in bnexport.
    """
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    original = trace(model, inputs, dynamic_shapes=dynamic_shapes)
    folded = _copy(original)
    with torch.no_grad():
        rows, exact = _fold_sites(folded)
        error = fold_error(original, folded, exact, inputs) if prove else None
    if error is not None and not error <= MAX_FLOAT64_ERROR:
        raise ProofError(
            f"the folded {type(model).__name__} differs from the original by {error:.1e} of scale in float64",
            remedy="Please report it with the model: a fold that is not exact is a fault in bnexport",
        )
    remaining = sum(1 for _ in batch_norm_nodes(folded))
    return FoldResult(folded, FoldReport(tuple(rows), remaining, error))


def _fold_sites(graph_module: GraphModule) -> tuple[list[FoldRow], dict[str, Tensor]]:
    """Apply the rules to every site; returns the account and the folded tensors in float64, by attribute."""
    constants = Constants(graph_module)
    rows = []
    for site in find_sites(graph_module, constants):
        site.locate()
        rows.append(_fold_site(site))
    rows += [_inner_row(node) for node in batch_norm_nodes(graph_module) if node.graph is not graph_module.graph]
    _drop_unused(graph_module)
    return rows, constants.exact


def _fold_site(site: Site) -> FoldRow:
    """Apply the first rule that matches, if its check allows it; the row says what happened, or why nothing did."""
    rule = next((rule for rule in RULES if rule.matches(site)), None)
    if site.affine is None:
        reason = site.why_not
    elif rule is None:
        reason = f"it follows {describe(site.producer)}, and no rule folds a batch norm into that"
    else:
        reason = rule.check(site)
    folded = rule if reason is None else None
    row = FoldRow(
        module=site.module_path,
        kind=site.kind,
        outcome="kept" if folded is None else "folded",
        rule="" if folded is None else folded.name,
        into="" if folded is None else module_path(site.producer),
        reason=reason or "",
        channels=channels_of(site) or 0,
        max_scale=_largest(site.affine),
    )
    if folded is not None:
        folded.rewrite(site)
    return row


def _largest(affine: ChannelAffine | None) -> float | None:
    """Largest |scale|; None when there is none, or when it is not finite (JSON has no infinity)."""
    largest = math.nan if affine is None else float(affine.scale.abs().max())
    return largest if math.isfinite(largest) else None


def _inner_row(node: Node) -> FoldRow:
    """The row of a BatchNorm that no rule sees, because torch.export keeps the region around it as a graph of its own."""
    shape = shape_of(node.all_input_nodes[0])
    return FoldRow(
        module=module_path(node),
        kind=module_class(node),
        outcome="kept",
        rule="",
        into="",
        reason="it is inside a branch (torch.cond) or a region with its own autocast or gradient mode",
        channels=(shape[1] or 0) if shape is not None and len(shape) > 1 else 0,
        max_scale=None,
    )


def _copy(graph_module: GraphModule) -> GraphModule:
    """A graph module with its own memory; parameters that were one stay one."""
    memo: dict[int, Any] = {}
    for tensor in (*graph_module.parameters(), *graph_module.buffers()):
        memo[id(tensor)] = _clone(tensor)
    copied = copy.deepcopy(graph_module, memo)
    # torch.export's guards on input shapes stop other tracers; what does not fit fails in the operators anyway.
    copied._forward_pre_hooks.clear()
    return copied


def _clone(tensor: Tensor) -> Tensor:
    copied = tensor.detach().clone()
    return nn.Parameter(copied, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied


def _drop_unused(graph_module: GraphModule) -> None:
    """Remove constants and attributes that nothing reads any more: folded statistics must not travel on."""
    for node in reversed(_constant_nodes(graph_module)):
        if not node.users:
            graph_module.graph.erase_node(node)
    used = {str(node.target) for node in graph_module.graph.nodes if node.op in ("get_attr", "call_module")}
    for path, module in list(graph_module.named_modules()):
        for name in [*module._parameters, *module._buffers]:
            if (f"{path}.{name}" if path else name) not in used:
                delattr(module, name)
    graph_module.delete_all_unused_submodules()
    graph_module.graph.lint()
    graph_module.recompile()


def _constant_nodes(graph_module: GraphModule) -> list[Node]:
    """Attributes and what is computed from them alone, without side effects; in the graph's order, in one pass.

    What looks at an input stays, though nothing reads it: torch.export's assertions have no readers either.
    """
    found: dict[Node, None] = {}
    for node in graph_module.graph.nodes:
        mutable = getattr(getattr(node.target, "_schema", None), "is_mutable", False)
        parents = node.all_input_nodes
        computed = node.op == "call_function" and not mutable and parents and all(item in found for item in parents)
        if node.op == "get_attr" or computed:
            found[node] = None
    return list(found)
