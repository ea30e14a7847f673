"""From a user's module to a graph of ATen operators in eval mode."""

from __future__ import annotations

import contextlib
import inspect
import os
import traceback
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from bnexport.errors import UntracedError
from bnexport.optional import one_line, quiet

_TORCH = os.path.dirname(torch.__file__) + os.sep
_HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


def trace(model: nn.Module, inputs: tuple[Any, ...], *, dynamic_shapes: Any = None) -> GraphModule:
    """Trace a module by ``torch.export`` into a graph that can run and be rewritten.

    Args:
        model: Left as it is, its training flags included.
        inputs: Positional arguments of forward, batch first.
        dynamic_shapes: As for ``torch.export.export``; default: one shared batch dimension.

    Raises:
        UntracedError: With the line of the user's code at which tracing stopped.
    """
    shapes = batch_shapes(model, inputs) if dynamic_shapes is None else dynamic_shapes
    with eval_mode(model), quiet(), torch.no_grad():
        try:
            program = torch.export.export(model, inputs, dynamic_shapes=shapes)
            graph_module = program.module(check_guards=False)
        except Exception as error:  # torch.export raises many unrelated classes
            raise UntracedError(
                f"torch.export can't trace {type(model).__name__}{_where(error)}: {one_line(error)}",
                remedy="Rewrite that line without Python control flow on tensor values, or check the example input's shape",
            ) from error
    assert isinstance(graph_module, GraphModule)
    return graph_module


def batch_shapes(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, Any]:
    """Dynamic shapes, by forward's argument names: the first dimension of every tensor is the shared dimension "batch"."""
    batch = torch.export.Dim("batch")
    try:
        arguments = inspect.signature(model.forward).bind(*inputs).arguments
    except TypeError as error:
        raise UntracedError(
            f"forward of {type(model).__name__} does not take {len(inputs)} inputs: {one_line(error)}",
            remedy="Give one example (--input) per argument of forward",
        ) from error
    return dict(
        pytree.tree_map(lambda item: {0: batch} if isinstance(item, Tensor) and item.ndim else None, dict(arguments))
    )


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluate in eval mode inside the block and give every module its own flag back after it.

    Only a model whose root is in training mode is switched: below a root in eval mode, a layer in training mode is so on
    purpose (Monte Carlo dropout, batch statistics at test time).
    """
    flags = [(module, module.training) for module in model.modules()]
    try:
        if model.training:
            model.eval()
        yield
    finally:
        for module, flag in flags:
            module.training = flag


def _where(error: BaseException) -> str:
    """`` at FILE:LINE`` of the innermost frame of the user's code; empty when there is none."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((_TORCH, _HERE)) and not frame.filename.startswith("<")
    ]
    return f" at {os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else ""
