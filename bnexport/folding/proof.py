"""Check of a fold: the folded graph against the original, both in float64."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from bnexport.folding.affine import dtype_of


def fold_error(
    original: GraphModule, folded: GraphModule, exact: dict[str, Tensor], inputs: tuple[Any, ...], *, seed: int = 0
) -> float | None:
    """Largest difference of any output, as a fraction of that output's largest value, in float64.

    The folded graph is run with the folded tensors as they were before their one cast, so that the figure shows the
    algebra alone: rounding of the stored weights is the business of the file's own proof.

    Args:
        original: The traced graph.
        folded: The rewritten graph.
        exact: Folded tensors in float64, by attribute.
        inputs: Example inputs; floating ones are replaced by seeded noise, which no channel can hide from.
        seed: Of the noise.

    Returns:
        The error; infinity when the folded graph alone fails, or when an output is not finite in one graph only; None when
        the original can't run in float64 (an operator that pins another type) or gives no finite number to compare.
    """
    wide = _double(original, {})
    # A network may take positive numbers alone, and answer noise with NaN: the user's own example is the second try.
    for probes in (_probes(inputs, seed), _widened(inputs)):
        try:
            reference = _run(wide, probes)
        except (RuntimeError, TypeError):
            return None
        if all(_comparable(output) for output in reference):
            break
    else:
        return None
    try:
        candidate = _run(_double(folded, exact), probes)
    except (RuntimeError, TypeError):
        return float("inf")
    return max((_scale_error(a, b) for a, b in zip(candidate, reference, strict=True)), default=0.0)


def _double(graph_module: GraphModule, exact: dict[str, Tensor]) -> GraphModule:
    """A float64 copy, with some attributes replaced."""
    module = copy.deepcopy(graph_module).double()
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default):
        module.graph.erase_node(node)  # torch.export pins the element types before every cast
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.to.dtype):
        if node.args[1] is torch.float32 and dtype_of(node.args[0]) is not torch.float64:
            node.update_arg(1, torch.float64)  # ``x.float()``: the algebra is compared, not its rounding
    module.recompile()
    for target, value in exact.items():
        holder, _, leaf = target.rpartition(".")
        parent = module.get_submodule(holder) if holder else module
        if leaf in parent._parameters:
            parent._parameters[leaf] = torch.nn.Parameter(value, requires_grad=False)
    return module


def _probes(inputs: tuple[Any, ...], seed: int) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(seed)

    def probe(item: Any) -> Any:
        if isinstance(item, Tensor) and item.is_floating_point():
            return torch.randn(item.shape, generator=generator, dtype=torch.float64).to(item.device)
        return item

    return tuple(pytree.tree_map(probe, inputs))


def _widened(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    def widened(item: Any) -> Any:
        return item.double() if isinstance(item, Tensor) and item.is_floating_point() else item

    return tuple(pytree.tree_map(widened, inputs))


def _comparable(output: Tensor) -> bool:
    return not output.numel() or not output.is_floating_point() or bool(torch.isfinite(output).any())


def _run(module: GraphModule, inputs: tuple[Any, ...]) -> list[Tensor]:
    # Random operators that are kept (dropout in training mode on purpose) must draw the same numbers in both runs.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        outputs = module(*pytree.tree_map(lambda item: item.clone() if isinstance(item, Tensor) else item, inputs))
    return [item for item in pytree.tree_leaves(outputs) if isinstance(item, Tensor)]


def _scale_error(candidate: Tensor, reference: Tensor) -> float:
    if candidate.shape != reference.shape:
        return float("inf")
    if not reference.numel() or not reference.is_floating_point():
        return 0.0 if bool(torch.equal(candidate, reference)) else float("inf")
    finite = torch.isfinite(reference)
    if not bool(torch.equal(finite, torch.isfinite(candidate))) or not bool(finite.any()):
        return float("inf")
    difference = (candidate - reference)[finite].abs().max()
    scale = reference[finite].abs().max()
    return float(difference / scale) if scale > 0 else float(difference)
