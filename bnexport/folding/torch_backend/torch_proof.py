"""Proof of a folded graph or module against the original, both in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from bnexport.folding.proof import scale_error
from bnexport.folding.torch_backend.nodes import dtype_of

#: Rounding of float64 through a network of usual depth stays below; the smallest real fault (a dropped eps) is far above.
MAX_ERROR = 1e-12
#: Allowed error, in multiples of the response to a change of last digits.
DEPTH = 100
#: Bound above which the comparison of the whole network could hide a real fault.
MAX_ROUNDING = 1e-9
#: Rounding in float16 and bfloat16 stays below in ordinary networks; a wrong fold is far above.
ROUGH_ERROR = 0.05
#: Number of multiplications of one run above which images are cut, and the smallest side after a cut.
_WORK = 2_000_000_000
_SMALLEST = 64


def torch_fold_error(
    original: GraphModule, folded: GraphModule, exact: dict[str, Tensor], inputs: tuple[Any, ...]
) -> tuple[float, float] | None:
    """Return the largest difference of any output, as a fraction of that output's largest value, in float64, and its bound.

    The folded graph runs with the folded tensors before their one cast (``exact``: float64, by attribute), so that the error is
    that of the algebra alone. The file's own proof covers rounding of the stored weights. Floating inputs are replaced by
    seeded noise, so that every channel takes part. Large images are cut to a smaller size if the network accepts it: the
    algebra is the same at every size.

    The bound is ``MAX_ERROR``, or what float64 rounding explains in a network that amplifies last digits. The error is infinite
    if the folded graph alone fails, or if an output is finite in one graph only. The result is None if the original can't run
    in float64 (an operator pins another type) or has no finite number to compare.
    """
    return compare(_double(original, {}), _double(folded, exact), inputs, image_sizes(original, inputs))


def compare(
    wide: nn.Module, narrow: nn.Module, inputs: tuple[Any, ...], sizes: list[int | None]
) -> tuple[float, float] | None:
    """Compare two networks in float64 as ``torch_fold_error`` does; ``sizes`` is the result of ``image_sizes``."""
    noise = probes_like(inputs, 0)

    def cut(size: int | None) -> tuple[Any, ...]:
        return tuple(pytree.tree_map_only(Tensor, lambda t: t[..., :size, :size] if t.ndim == 4 else t, noise))

    # A network may return NaN for noise because it expects positive numbers: the user's example is the last try.
    tries = [*map(cut, sizes), _floats_mapped(Tensor.double, inputs)]
    for number, probes in enumerate(tries):
        full = number >= len(sizes) - 1
        try:
            reference = run(wide, probes)
        except Exception:  # forward may be the user's code, which raises any class
            if full:
                return None
            continue
        if not all(comparable(output) for output in reference):
            continue
        found = output_error(narrow, probes, reference)
        if found <= MAX_ERROR:
            return found, MAX_ERROR
        if full:
            return found, max(MAX_ERROR, last_digit_response(wide, probes, reference))
    return None


def rough_error(original: nn.Module, folded: nn.Module, inputs: tuple[Any, ...]) -> float | None:
    """Return the error in the network's own element types, for a network that can't run in float64; None if it can't run."""
    try:
        reference = run(original, inputs)
    except Exception:  # forward may be the user's code, which raises any class
        return None
    if not all(comparable(output) for output in reference):
        return None
    return output_error(folded, inputs, reference)


def output_error(narrow: nn.Module, probes: tuple[Any, ...], reference: list[Tensor]) -> float:
    """Return the largest difference of any output from ``reference``; infinity if the network fails."""
    try:
        candidate = run(narrow, probes)
    except Exception:  # forward may be the user's code, which raises any class
        return float("inf")
    return max((scale_error(a, b) for a, b in zip(candidate, reference, strict=True)), default=0.0)


def last_digit_response(wide: nn.Module, probes: tuple[Any, ...], reference: list[Tensor]) -> float:
    """Return the error that float64 rounding explains: a multiple of the outputs' change when last digits change.

    Once the last digit of every input changes, and once that of every parameter and buffer. The first change averages out over
    an image; the second does not, as the rounding of folded weights does not. A fold changes the order of operations in every
    layer too, hence the factor. A deep network, or one with a steep softmax, amplifies last digits.
    """
    generator = torch.Generator().manual_seed(1)

    def nudged(tensor: Tensor) -> Tensor:
        sign = torch.randint(0, 2, tensor.shape, generator=generator).to(tensor) * 2 - 1
        return tensor * (1 + sign * torch.finfo(torch.float64).eps)

    kept = {item: item.detach().clone() for item in (*wide.parameters(), *wide.buffers()) if item.is_floating_point()}
    others = [run(wide, _floats_mapped(nudged, probes))]
    with torch.no_grad():
        for item, value in kept.items():
            item.copy_(nudged(value))
        others.append(run(wide, probes))
        for item, value in kept.items():
            item.copy_(value)
    pairs = (pair for other in others for pair in zip(other, reference, strict=True))
    return DEPTH * max((scale_error(a, b) for a, b in pairs), default=0.0)


def image_sizes(original: GraphModule, inputs: tuple[Any, ...]) -> list[int | None]:
    """Return the largest sides of the images to try, the smallest first; None for the traced size."""
    images = [item for item in pytree.tree_leaves(inputs) if isinstance(item, Tensor) and item.ndim == 4]
    side = max((max(item.shape[2:]) for item in images), default=0)
    work, sizes = multiplications(original), [side]
    while work > _WORK and sizes[-1] > 2 * _SMALLEST:
        sizes.append(max(sizes[-1] // 2, _SMALLEST))
        work //= 4
    return [*(size for size in reversed(sizes[1:])), None]


def multiplications(graph_module: GraphModule) -> int:
    """Return the multiplications of a run on the traced sizes, by the convolutions and linear layers."""
    total = 0
    for node in graph_module.graph.nodes:
        weight = node.args[1] if node.op == "call_function" and len(node.args) > 1 else None
        before, after = weight.meta.get("val") if isinstance(weight, Node) else None, node.meta.get("val")
        name = getattr(getattr(node.target, "_schema", None), "name", "")
        if not isinstance(before, Tensor) or not isinstance(after, Tensor) or before.ndim < 2:
            continue
        if not name.startswith(("aten::conv", "aten::linear")):
            continue
        sizes = [size if isinstance(size, int) else size.node.hint for size in after.shape]
        positions = sizes[:1] + sizes[2:] if "conv" in name else sizes[:-1]
        total += int(before.numel() * torch.Size(positions).numel())
    return total


def _floats_mapped(change: Callable[[Tensor], Tensor], inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return inputs with every floating tensor changed."""
    return tuple(pytree.tree_map_only(Tensor, lambda t: change(t) if t.is_floating_point() else t, inputs))


def _double(graph_module: GraphModule, exact: dict[str, Tensor]) -> GraphModule:
    """Return a float64 copy with some attributes replaced; replaced tensors are not copied, others once."""
    memo: dict[int, Any] = {}
    for name, tensor in (*graph_module.named_parameters(), *graph_module.named_buffers()):
        value = exact.get(name, tensor.detach()).to(tensor.device)
        wide = value.double() if value.is_floating_point() else value
        is_parameter = isinstance(tensor, nn.Parameter)
        # A buffer is cloned, because forward may change it.
        memo[id(tensor)] = nn.Parameter(wide, requires_grad=False) if is_parameter else wide.clone()
    module = copy.deepcopy(graph_module, memo)
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default):
        module.graph.erase_node(node)  # torch.export pins the element types before every cast
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.to.dtype):
        if node.args[1] is torch.float32 and dtype_of(node.args[0]) is not torch.float64:
            node.update_arg(1, torch.float64)  # ``x.float()``: the algebra is compared, not its rounding
    module.recompile()
    for target, value in exact.items():
        holder, _, leaf = target.rpartition(".")
        parent = module.get_submodule(holder)
        if leaf in parent._parameters:
            device = parent.get_parameter(leaf).device
            parent._parameters[leaf] = nn.Parameter(value.to(device), requires_grad=False)
    return module


def probes_like(inputs: tuple[Any, ...], seed: int) -> tuple[Any, ...]:
    """Replace floating inputs by seeded noise in float64."""
    generator = torch.Generator().manual_seed(seed)
    return _floats_mapped(lambda t: torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.device), inputs)


def comparable(output: Tensor) -> bool:
    """Return False if all numbers of an output are infinite or NaN."""
    return not output.numel() or not output.is_floating_point() or bool(torch.isfinite(output).any())


def run(module: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    """Run a network on copies of its inputs; return the tensors of its result."""
    # Random operators that are kept (dropout in training mode on purpose) must draw the same numbers in both runs.
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        outputs = module(*pytree.tree_map_only(Tensor, Tensor.clone, inputs))
    return [item for item in pytree.tree_leaves(outputs) if isinstance(item, Tensor)]
