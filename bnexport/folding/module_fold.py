"""``bnexport.fold_modules``: fold inside a copy of the user's module, which keeps its class and forward."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from bnexport.errors import ModelError, ProofError, UntracedError
from bnexport.folding.engine import Engine, EngineResult
from bnexport.folding.fold import Clock, drop_unused, forward_arguments, inner_rows, judged
from bnexport.folding.fold_report import FoldReport, FoldRow, Reported
from bnexport.folding.plan import GrowthBudget
from bnexport.folding.proof import scale_error
from bnexport.folding.torch_backend import modules, torch_proof
from bnexport.folding.torch_backend.trace import trace
from bnexport.nn.batch_norm import BATCH_NORMS
from bnexport.nn.calling import place_of
from bnexport.nn.folded import MARKER
from bnexport.optional import one_line

#: Other inputs of the comparison: one sample (None), and sides of images as multiples of the example's.
_OTHER_SIZES = (None, 0.75, 1.5)
#: Error of that comparison above which forward took another branch; rounding in an amplifying network stays below.
_OTHER_WAY = 1e-5
#: Largest side of an image that is multiplied in that comparison.
_LARGEST = 64
#: Largest error of the same computation with a module exchanged; a forward that takes another branch is far above.
_SAME = 1e-3
#: Reason of a norm with a call in a separate graph, where no rule applies.
_INNER = "it is called inside a branch (torch.cond) or a region with its own autocast or gradient mode"


@dataclass(frozen=True)
class ModuleFoldResult(Reported):
    """The result of ``fold_modules``.

    Attributes:
        model: A copy of the network, of the same class, in eval mode, with folded weights. A folded BatchNorm is an
            ``nn.Identity``, or an ``nn.Sequential`` of its submodules (an activation). The buffer ``bnexport_folded`` states
            what was folded.
        report: The fold report, with one row per BatchNorm call, and one per BatchNorm that eval mode never calls.
            ``print(result)`` shows it.
        seconds: Duration of "trace", "fold" and "proof".
    """

    model: nn.Module
    report: FoldReport
    seconds: Mapping[str, float] = field(default_factory=dict)


def fold_modules(
    model: nn.Module, example_inputs: Tensor | Sequence[Any], *, dynamic_shapes: Any = None, prove: bool = True
) -> ModuleFoldResult:
    """Fold BatchNorm inside a copy of a network, which keeps its class, its forward and the names of its weights.

    A fold is made if it only changes numbers of existing layers and removes the BatchNorm; a layer without a bias gets one.
    Everything else stays as it was, with its reason in the report: a weight that is shared or computed in forward, a module
    that is called twice with different neighbours, a module with hooks, parallel branches that only another forward could
    merge. ``model`` is never changed. Arithmetic is in float64, cast once to each tensor's type.

    In training mode too, the result is a network without these BatchNorms.

    Example:
        >>> import bnexport, torch
        >>> model = bnexport.bn_lenet().eval()
        >>> result = bnexport.fold_modules(model, torch.randn(2, 1, 28, 28))
        >>> print(result.summary())
        4 of 4 BatchNorm calls folded
        >>> type(result.model) is type(model), bnexport.is_folded(result.model)
        (True, True)

    Args:
        model: Any module that torch.export can trace; one in training mode is folded as if ``eval()`` had been called.
        example_inputs: The inputs of one call, batch first: a tensor, or a sequence of forward's positional arguments. The
            fold is valid for the branches that forward takes with these inputs.
        dynamic_shapes: As for ``bnexport.fold``.
        prove: Check each fold separately, and the folded module against the original, in float64. Only this check finds a
            forward that uses a BatchNorm for more than calling it.

    Returns:
        The folded copy, its fold report, and the duration of each step.

    Raises:
        UsageError: An input is a numpy array.
        UntracedError: torch.export can't trace the model.
        ModelError: The model can't be copied, or has parameters without a value (lazy layers).
        ProofError: The folded module does not compute what the original does.
    """
    inputs = forward_arguments(example_inputs, dynamic_shapes)
    original = _copied(model)
    with torch.no_grad():
        try:
            return _attempt(original, inputs, dynamic_shapes, {}, prove)
        except (UntracedError, ProofError):
            kept = _needed_as_they_are(original, inputs)
            if not kept:
                raise
        return _attempt(original, inputs, dynamic_shapes, kept, prove)


def load_folded(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy of an unfolded network with the weights of a folded one.

    Example:
        >>> import bnexport, torch
        >>> folded = bnexport.fold_modules(bnexport.bn_lenet().eval(), torch.randn(2, 1, 28, 28)).model
        >>> torch.save(folded.state_dict(), "folded.pt")
        >>> again = bnexport.load_folded(bnexport.bn_lenet(), torch.load("folded.pt"))
        >>> torch.equal(again.conv1.weight, folded.conv1.weight)
        True

    Args:
        model: A network of the class that was folded. Its weights are replaced in the copy; the network is not changed.
        state: The folded network's state dict, as ``torch.load`` or ``safetensors.torch.load_file`` returns it. A prefix that
            all names have ("module.") is dropped.

    Returns:
        The copy in eval mode, with the folded weights.

    Raises:
        ModelError: The state dict is not of a folded network, or not of this network.
    """
    markers = [name for name in state if name.rpartition(".")[2] == MARKER]
    if not markers:
        raise ModelError(
            f"the state dict has no {MARKER}, so it is not of a folded network",
            remedy="Load it with model.load_state_dict(state)",
        )
    prefix = markers[0].removesuffix(MARKER)
    if len(markers) == 1 and all(name.startswith(prefix) for name in state):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
        markers = [MARKER]
    copied = _copied(model)
    try:
        for marker in markers:
            layout = json.loads(bytes(state[marker].tolist()))
            if layout["format"] > modules.FORMAT:
                raise ModelError(
                    f"the state dict has format {layout['format']}, but this bnexport reads formats up to {modules.FORMAT}",
                    remedy="Update bnexport: pip install --upgrade bnexport",
                )
            modules.with_layout(copied.get_submodule(marker.removesuffix(MARKER).rstrip(".")), layout)
        copied.load_state_dict(dict(state))
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"the folded weights are not of this {type(model).__name__}: {one_line(error)}",
            remedy="Give a network of the class and the options that was folded, before any fold",
        ) from error
    return copied


def _copied(model: nn.Module) -> nn.Module:
    """Return a copy in eval mode, without the history of any tensor."""
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise UntracedError(
                f"{path or 'the network'} is a TorchScript module, whose Python code is gone",
                remedy="Give the Python module that it was made from, and its weights",
            )
    lazy = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if is_lazy(tensor)]
    if lazy:
        raise ModelError(
            f"{lazy[0]} has no value yet",
            remedy="Run the network once on an example, so that its lazy layers get shapes",
        )
    # A tensor that a pre-hook computed (old weight_norm, pruning) has a history, which deepcopy refuses.
    values = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    memo: dict[int, Any] = {id(value): value.detach().clone() for value in values if not value.is_leaf}
    try:
        copied = copy.deepcopy(model, memo)
    except Exception as error:  # the module is the user's code
        raise ModelError(
            f"{type(model).__name__} can't be copied: {one_line(error)}",
            remedy="Keep no tensors with a history, locks or open files in the module",
        ) from error
    if copied.training:
        copied.eval()
    return copied


def _attempt(
    original: nn.Module, inputs: tuple[Any, ...], dynamic_shapes: Any, kept: Mapping[str, str], prove: bool
) -> ModuleFoldResult:
    """Trace a copy with a bias in every layer, fold it except for the parts in ``kept``, and write the fold into that copy."""
    clock = Clock()
    folded = copy.deepcopy(original)
    added = modules.add_biases(folded, kept)
    traced = trace(folded, inputs, dynamic_shapes=dynamic_shapes)
    if handles := modules.show_hooked(folded, traced):
        traced = trace(folded, inputs, dynamic_shapes=dynamic_shapes)
        for handle in handles:
            handle.remove()
    clock.note("trace")
    overwritten = modules.overwritten_by(traced)
    drop_unused(traced)
    inner = tuple(inner_rows(traced))
    kept = {**kept, **dict.fromkeys((row.module for row in inner), _INNER)}
    graph, outcome = _folded(traced, folded, overwritten, kept, prove)
    changes = graph.changes(added)
    rows = (*outcome.rows, *inner)
    rows = (*rows, *_uncalled(original, rows))
    clock.note("fold")
    error, warnings = _proved(original, folded, changes, added, traced, inputs) if prove else (None, ())
    modules.write(folded, changes, added)
    clock.note("proof")
    growth = _elements(folded) / max(_elements(original), 1)
    remaining = sum(not row.gone for row in rows)
    report = FoldReport(rows, remaining, error, growth, (*outcome.warnings, *warnings))
    return ModuleFoldResult(folded, report, clock.seconds)


def _folded(
    traced: GraphModule, model: nn.Module, overwritten: set[Any], kept: dict[str, str], prove: bool
) -> tuple[modules.ModuleGraph, EngineResult]:
    """Plan until no module or weight would need two different values."""
    while True:
        graph = modules.ModuleGraph(traced, model, overwritten, kept)
        outcome = Engine(graph, GrowthBudget(graph.elements), prove=prove, in_place=True).run()
        clashes = {name: reason for name, reason in graph.clashes().items() if name not in kept}
        if not clashes:
            return graph, outcome
        kept = {**kept, **clashes}


def _uncalled(model: nn.Module, rows: Sequence[FoldRow]) -> Iterator[FoldRow]:
    """Return a row for each BatchNorm that eval mode never calls, as in an auxiliary head of training."""
    by_path = dict(model.named_modules(remove_duplicate=False))
    called = {by_path[row.module] for row in rows if row.module in by_path}
    for path, module in model.named_modules():
        if isinstance(module, BATCH_NORMS) and module not in called:
            channels = getattr(module, "num_features", 0)
            reason = "forward does not call it in eval mode"
            yield FoldRow(path, type(module).__name__, "kept", reason=reason, channels=channels)


def _elements(model: nn.Module) -> int:
    return sum(tensor.numel() for name, tensor in model.state_dict().items() if name != MARKER)


def _proved(
    original: nn.Module,
    folded: nn.Module,
    changes: modules.ModuleChanges,
    added: Sequence[str],
    traced: GraphModule,
    inputs: tuple[Any, ...],
) -> tuple[float | None, tuple[str, ...]]:
    """Compare the modules in float64, with the folded numbers before their one cast; raise ProofError if they differ."""
    wide, narrow = copy.deepcopy(original).double(), copy.deepcopy(folded).double()
    modules.write(narrow, changes, added)
    proof = torch_proof.compare(wide, narrow, inputs, torch_proof.image_sizes(traced, inputs))

    def rough() -> float | None:
        candidate = copy.deepcopy(folded)
        modules.write(candidate, changes, added)
        return torch_proof.rough_error(copy.deepcopy(original), candidate, inputs)

    name = type(original).__name__
    found = judged(name, proof, bool(changes.norms), rough)
    if proof is not None and proof[1] <= torch_proof.MAX_ERROR:
        _prove_other_sizes(name, wide, narrow, inputs)
    return found


def _prove_other_sizes(name: str, wide: nn.Module, narrow: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Compare on one sample and on images of other sizes, if forward accepts them: it may take a branch that was not traced."""

    def other(item: Tensor, factor: float | None) -> Tensor:
        if not item.ndim:
            return item
        if factor is None:
            return item[:1]
        if item.ndim != 4 or not item.is_floating_point():
            return item
        return item.new_zeros(*item.shape[:2], *(max(int(min(size, _LARGEST) * factor), 1) for size in item.shape[2:]))

    for factor in _OTHER_SIZES:
        resized = pytree.tree_map_only(Tensor, partial(other, factor=factor), inputs)
        probes = torch_proof.probes_like(resized, 1)
        try:
            reference = torch_proof.run(wide, probes)
        except Exception:  # the user's code does not take this size
            continue
        if not all(map(torch_proof.comparable, reference)):
            continue
        error = torch_proof.output_error(narrow, probes, reference)
        # An output that is only rounding (the mean of normalised numbers) differs by more than any bound.
        if not error <= _OTHER_WAY and not error <= torch_proof.last_digit_response(wide, probes, reference):
            size = "one sample" if factor is None else f"{factor:g} times height and width"
            raise ProofError(
                f"the folded {name} differs from the original by {error:.1e} of scale on inputs of another size than the"
                f" example ({size}): forward takes another branch there",
                remedy="Write forward without a branch on the size, or use bnexport.fold, whose result has a single branch",
            )


def _needed_as_they_are(original: nn.Module, inputs: tuple[Any, ...]) -> dict[str, str]:
    """Return modules that forward uses for more than calls (``bn.running_mean``, ``conv.bias is None``), with the reason.

    Each BatchNorm is exchanged for a module that computes the same, and each layer without a bias gets a bias of zeros.
    Forward must then give the same result.
    """
    model = copy.deepcopy(original)
    try:
        reference = torch_proof.run(model, inputs)
    except Exception:  # the user's code; the first error states the reason
        return {}
    kept: dict[str, str] = {}
    for path, module in list(model.named_modules()):
        if path and (isinstance(module, BATCH_NORMS) or hasattr(module, "running_mean")):
            if problem := _exchange_problem(model, module, inputs, reference):
                kept[path] = problem
        elif modules.add_bias(module):
            problem = _difference(model, inputs, reference)
            module.register_parameter("bias", None)
            if problem:
                kept[path] = f"forward takes another branch when it has a bias{problem}"
    return kept


def _exchange_problem(model: nn.Module, norm: nn.Module, inputs: tuple[Any, ...], reference: Sequence[Tensor]) -> str:
    """Return why a norm can't be exchanged for another module; "" if it can."""
    calls: list[nn.Module] = []
    other = ExchangedNorm(norm)
    handles = [module.register_forward_hook(lambda called, *_: calls.append(called)) for module in (norm, other)]
    modules.replace_module(model, norm, other)
    problem = _difference(model, inputs, reference)
    modules.replace_module(model, other, norm)
    for handle in handles:
        handle.remove()
    if problem:
        return f"forward uses it for more than calling it{problem}"
    if calls.count(norm) > calls.count(other):
        return "forward calls it through a list or another attribute instead of as a submodule"
    return ""


def _difference(model: nn.Module, inputs: tuple[Any, ...], reference: Sequence[Tensor]) -> str:
    """Return "" if a network still gives the reference, else the place or the error, as the end of a sentence."""
    try:
        pairs = zip(torch_proof.run(model, inputs), reference, strict=True)
        worst = max((scale_error(a, b) for a, b in pairs), default=0.0)
    except Exception as error:  # the user's code
        return f"{place_of(error, model)}: {one_line(error, 120)}"
    return "" if worst <= _SAME else place_of(None, model)


class ExchangedNorm(nn.Module):
    """Calls a norm, is not a norm itself, and has its submodules but none of its attributes."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        for name, child in norm.named_children():
            self.add_module(name, child)
        self.__dict__["_norm"] = norm

    def forward(self, x: Tensor) -> Any:
        """Return what the norm returns."""
        return self.__dict__["_norm"](x)
