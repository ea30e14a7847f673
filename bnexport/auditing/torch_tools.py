"""Tools that give a torch callable: eager mode, TorchScript, torch.fx, and bnexport itself."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.overrides import TorchFunctionMode

from bnexport.auditing.subject import call
from bnexport.auditing.tool import Job, Product
from bnexport.folding.fold import fold

_CALLS = (torch.nn.functional.batch_norm, torch.batch_norm)


class counted_calls(TorchFunctionMode):  # noqa: N801 -- used as a context manager, like torch.no_grad
    """Counts the BatchNorm calls that Python makes inside the block."""

    count = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call ``func``; what it calls in turn is not counted again."""
        self.count += func in _CALLS
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def eager(job: Job) -> Iterator[Product]:
    """The network as it is."""
    yield _called(job.module, job.example)


@contextlib.contextmanager
def fx_fuse(job: Job) -> Iterator[Product]:
    """``torch.fx.experimental.optimization.fuse``."""
    from torch.fx.experimental.optimization import fuse

    yield _called(fuse(job.module), job.example)


@contextlib.contextmanager
def jit_freeze(job: Job) -> Iterator[Product]:
    """``torch.jit.trace``, then ``torch.jit.freeze``."""
    yield _scripted(torch.jit.freeze(_traced(job)))


@contextlib.contextmanager
def jit_optimize(job: Job) -> Iterator[Product]:
    """``torch.jit.trace``, then ``torch.jit.optimize_for_inference``, which freezes and moves to oneDNN."""
    yield _scripted(torch.jit.optimize_for_inference(_traced(job)))


@contextlib.contextmanager
def bnexport_fold(job: Job) -> Iterator[Product]:
    """``bnexport.fold``, run in torch."""
    folded = fold(job.module, job.example).model
    graphs = [module.graph for module in folded.modules() if isinstance(module, GraphModule)]  # branches too
    left = sum(node.target is torch.ops.aten.batch_norm.default for graph in graphs for node in graph.nodes)
    yield Product(functools.partial(call, folded), left)


def _called(module: Any, example: tuple[Tensor, ...]) -> Product:
    with counted_calls() as calls:
        call(module, example)
    return Product(functools.partial(call, module), calls.count)


def _traced(job: Job) -> Any:
    # Not strict, because a network that returns a dict is not wrong for that.
    return torch.jit.trace(job.module, job.example, check_trace=False, strict=False)  # type: ignore[no-untyped-call]


def _scripted(module: Any) -> Product:
    return Product(functools.partial(call, module), sum(_kinds(module.inlined_graph, "aten::batch_norm")))


def _kinds(block: Any, kind: str) -> Iterator[bool]:
    """For every node of a TorchScript graph, also in its inner blocks: whether it is of a kind."""
    for node in block.nodes():
        yield node.kind() == kind
        for inner in node.blocks():
            yield from _kinds(inner, kind)
