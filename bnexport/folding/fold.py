"""``bnexport.fold``: trace a network, read its graph, fold, prove, report."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from bnexport.errors import ProofError, UsageError
from bnexport.folding.engine import Engine, EngineResult
from bnexport.folding.fold_report import FoldReport, FoldRow, Reported
from bnexport.folding.plan import ATTEMPTS, GrowthBudget
from bnexport.folding.torch_backend.nodes import batch_norm_nodes, channels_of, module_class, module_path, region_of
from bnexport.folding.torch_backend.torch_constants import functionalise, is_pure
from bnexport.folding.torch_backend.torch_graph import TorchGraph
from bnexport.folding.torch_backend.torch_proof import MAX_ROUNDING, ROUGH_ERROR, rough_error, torch_fold_error
from bnexport.folding.torch_backend.torch_writer import TorchWriter, follow_input
from bnexport.folding.torch_backend.trace import trace, two_samples

DEFAULT_MAX_GROWTH = 1.1
#: Warning of a network whose rounding hides the error of a fold.
AMPLIFIES = (
    "a change in the last digit of the input or of the weights changes much of the output, so the network as a whole is"
    " compared in float64 only up to 100 times that effect; each fold was also proved separately"
)


@dataclass(frozen=True)
class FoldResult(Reported):
    """The result of ``fold``.

    Attributes:
        model: The folded network in eval mode. It shares no memory with the user's module, and ``to(device)`` moves it.
        report: The fold report, with one row per BatchNorm call. ``print(result)`` shows it.
        seconds: Duration of "trace", "fold" (with each fold's proof) and "proof" (of the whole).
    """

    model: GraphModule
    report: FoldReport
    seconds: Mapping[str, float] = field(default_factory=dict)


def fold(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Any],
    *,
    dynamic_shapes: Any = None,
    max_growth: float = DEFAULT_MAX_GROWTH,
    clamps: bool = False,
    prove: bool = True,
) -> FoldResult:
    """Fold every BatchNorm that can be folded exactly, and report what happened to each, and why.

    ``model`` is never changed, and its eval mode is folded. A model in training mode is traced as if ``eval()`` had been
    called on it. In a model in eval mode, a layer in training mode is so on purpose and stays as it is. Arithmetic is in
    float64, cast once to the layer's element type.

    Example:
        >>> import bnexport, torch
        >>> model = bnexport.bn_lenet().eval()
        >>> result = bnexport.fold(model, torch.randn(2, 1, 28, 28))
        >>> print(result.summary())
        4 of 4 BatchNorm calls folded
        >>> images = torch.randn(8, 1, 28, 28)
        >>> torch.allclose(result.model(images), model(images), atol=1e-5)
        True

    Args:
        model: Any module that torch.export can trace.
        example_inputs: The inputs of one call, batch first: a tensor, or a sequence of forward's positional arguments.
        dynamic_shapes: As for ``torch.export.export``. Default: the first dimension of every tensor input is one shared
            batch dimension that may vary.
        max_growth: Upper bound on parameter growth, as a factor of the original element count. Folds spend it on copies of
            shared weights and on maps of constants.
        clamps: Let a BatchNorm cross a ReLU by turning the ReLU into a maximum with a constant per channel. That leaves fewer
            operations, but ONNX Runtime runs them no faster on a CPU (docs/results/affine_form.md).
        prove: Check each fold separately, and the folded graph against the original, in float64.

    Returns:
        The folded network, its fold report, and the duration of each step.

    Raises:
        UsageError: ``max_growth`` is below 1, or an input is a numpy array.
        UntracedError: torch.export can't trace the model.
        ProofError: The folded graph does not compute what the original does. That is a fault in bnexport.
    """
    if not max_growth >= 1.0:
        raise UsageError(f"max_growth is {max_growth:g}", remedy="Give a factor of 1 or more; 1 allows no copies")
    inputs = forward_arguments(example_inputs, dynamic_shapes)
    started = time.perf_counter()
    original = trace(model, inputs, dynamic_shapes=dynamic_shapes)
    traced = time.perf_counter() - started
    name = type(model).__name__
    result = fold_traced(original, inputs, name=name, max_growth=max_growth, clamps=clamps, prove=prove)
    return replace(result, seconds={"trace": traced, **result.seconds})


def forward_arguments(example_inputs: Tensor | Sequence[Any], dynamic_shapes: Any) -> tuple[Any, ...]:
    """Return the arguments of one call of forward, with a batch of two samples if the batch may vary."""
    inputs = tuple(example_inputs) if isinstance(example_inputs, Sequence) else (example_inputs,)
    if odd := [item for item in inputs if type(item).__module__ == "numpy"]:
        raise UsageError(
            f"bnexport takes example inputs as tensors, not as a numpy.{type(odd[0]).__name__}",
            remedy="Give a tensor with the batch first, torch.from_numpy(array), or a tuple of tensors",
        )
    return two_samples(inputs) if dynamic_shapes is None else inputs


def fold_traced(
    original: GraphModule,
    inputs: tuple[Any, ...],
    *,
    name: str = "network",
    max_growth: float = DEFAULT_MAX_GROWTH,
    clamps: bool = False,
    prove: bool = True,
) -> FoldResult:
    """Fold a graph that ``trace`` returned for ``inputs``, with the options of ``fold``; the graph is not changed.

    ``name`` is the network's name in messages.
    """
    clock = Clock()
    error: float | None = None
    warnings: tuple[str, ...] = ()
    with torch.no_grad():
        folded, outcome, exact, growth = _fold_copy(original, max_growth, clamps, prove)
        rows = (*outcome.rows, *inner_rows(folded))
        clock.note("fold")
        if prove:
            proof = torch_fold_error(original, folded, exact, inputs)
            gone = any(row.gone for row in rows)
            error, warnings = judged(name, proof, gone, lambda: rough_error(original, folded, inputs))
        clock.note("proof")
    remaining = sum(1 for _ in batch_norm_nodes(folded))
    follow_input(folded)
    report = FoldReport(rows, remaining, error, growth, (*outcome.warnings, *warnings))
    return FoldResult(folded, report, clock.seconds)


def judged(
    name: str, proof: tuple[float, float] | None, folded: bool, rough: Callable[[], float | None]
) -> tuple[float | None, tuple[str, ...]]:
    """Return the error of the whole network in float64, and a warning if there is none or its bound is large.

    ``proof`` is the result of ``torch_fold_error``; ``rough`` returns the error in the network's own element types. ``folded``
    is True if any BatchNorm is gone. An error above its bound raises ProofError.
    """
    if proof is None:
        if not folded:
            return None, ()
        refuse_wrong(name, rough(), ROUGH_ERROR, "its own element types")
        return None, (
            "the network as a whole can't be compared in float64 (an operator needs another type, or no output is finite): each"
            " fold was proved separately",
        )
    refuse_wrong(name, *proof, "float64")
    return proof[0], (AMPLIFIES,) if proof[1] > MAX_ROUNDING else ()


def refuse_wrong(name: str, error: float | None, bound: float, types: str) -> None:
    """Raise ProofError if the error of a whole network is above its bound."""
    if error is not None and not error <= bound:
        raise ProofError(
            f"the folded {name} differs from the original by {error:.1e} of scale in {types}",
            remedy="Please report it with the model: a fold that is not exact is a fault in bnexport",
        )


def _fold_copy(
    original: GraphModule, max_growth: float, clamps: bool, prove: bool
) -> tuple[GraphModule, EngineResult, dict[str, Tensor], float]:
    """Return the folded copy, the engine's result, the folded tensors in float64 by attribute, and the growth.

    The copy is folded again with stricter settings while it exceeds the budget (calls that did not fold alike).
    """
    for apart, biases in ATTEMPTS:
        folded = _copy(original)
        functionalise(folded)
        drop_unused(folded)  # heads that eval mode never runs do not count for the budget
        graph = TorchGraph(folded)
        before = graph.elements
        outcome = Engine(graph, GrowthBudget(before, max_growth, apart, biases), clamps=clamps, prove=prove).run()
        writer = TorchWriter(graph)
        writer.write(outcome.dropped)
        drop_unused(folded)
        growth = (graph.elements - writer.standalone) / max(before, 1)
        if growth <= max_growth:
            break
    return folded, outcome, writer.exact, growth


def inner_rows(root: GraphModule) -> Iterator[FoldRow]:
    """Yield the rows of BatchNorms in regions that torch.export keeps as separate graphs, where no rule applies."""
    for node in batch_norm_nodes(root):
        if node.graph is not root.graph:
            reason = f"it is inside {region_of(node, root)}, which torch.export keeps as a separate graph"
            channels = channels_of(node.all_input_nodes[0], 1, None)
            hint = "the same code outside of that region"
            yield FoldRow(module_path(node), module_class(node), "kept", reason=reason, hint=hint, channels=channels)


def _copy(graph_module: GraphModule) -> GraphModule:
    """Return a graph module with separate memory; shared parameters stay shared."""

    def clone(tensor: Tensor) -> Tensor:
        copied = tensor.detach().clone()
        return nn.Parameter(copied, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied

    memo: dict[int, Any] = {id(item): clone(item) for item in (*graph_module.parameters(), *graph_module.buffers())}
    copied = copy.deepcopy(graph_module, memo)
    # torch.export's guards on input shapes stop other tracers; sizes that do not fit fail in the operators anyway.
    copied._forward_pre_hooks.clear()
    return copied


def drop_unused(graph_module: GraphModule) -> None:
    """Remove constants and attributes without a reader: folded statistics must not stay in the file.

    A node that reads an input stays, even without a reader: torch.export's assertions have no readers either.
    """
    constants: dict[Node, None] = {}  # attributes, tensors that the graph makes itself, nodes that read only constants
    for node in graph_module.graph.nodes:
        mutable = getattr(getattr(node.target, "_schema", None), "is_mutable", False)
        parents = node.all_input_nodes
        alone = all(item in constants for item in parents) if parents else is_pure(node)
        if node.op == "get_attr" or (node.op == "call_function" and not mutable and alone):
            constants[node] = None
    for node in reversed(constants):
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


class Clock:
    """Seconds between notes."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def note(self, name: str) -> None:
        """Record the seconds since the last note."""
        now = time.perf_counter()
        self.seconds[name], self._last = now - self._last, now
