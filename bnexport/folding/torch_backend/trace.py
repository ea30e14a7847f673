"""Trace a module into a graph of ATen operators in eval mode, and check that the graph is valid for every image size.

torch.export follows ``if x.shape[2] % 2`` for the size of the example and records the condition as a guard (PyTorch
documentation, "Dynamic Shapes"). A branch that is taken from a smallest size upwards is accepted: the signature states that
size.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import itertools
import os
import re
import traceback
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.dynamic_shapes import _DimHint
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from bnexport.errors import UntracedError
from bnexport.nn.batch_axis import batch_problem
from bnexport.nn.calling import NOT_THEIRS, call_once, place_of, switches_itself, to_eval_mode, unchanged
from bnexport.optional import one_line, quiet
from bnexport.tensors import size_axes

#: Sizes at which a guard is tried, as steps above the smallest: odd and even, around powers of two, and large.
_STEPS = (0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 31, 32, 33, 63, 64, 127, 128, 256, 1000, 4096, 65537)
#: Largest number in a guard whose neighbours and multiples are tried.
_LARGEST = 100_000


def refuse_forks(program: ExportedProgram, model: nn.Module) -> None:
    """Refuse a graph whose forward takes another branch in Python for other sizes, naming the line of the branch.

    Guards of torch's own code are skipped: its operators refuse sizes that do not fit, or the guard only affects speed.
    """
    values = [node.meta.get("val") for node in program.graph.find_nodes(op="placeholder")]
    sizes = [size for value in values for size in getattr(value, "shape", ()) if not isinstance(size, int)]
    environments = {id(size.node.shape_env): size.node.shape_env for size in sizes}  # they hold the guards of the sizes
    for environment in environments.values():
        for guard in environment.guards:
            place = _place(guard)
            if place and not _holds(environment, guard.expr):
                raise UntracedError(
                    f"forward of {type(model).__name__} takes another branch at {place}, or fails there, for some sizes of the"
                    " image, so one graph is not valid for all sizes",
                    remedy="Leave --dynamic-size out, or write that line without a condition in Python",
                )


def _place(guard: Any) -> str:
    """Return FILE:LINE of the branch in the user's code; "" if the branch is in torch's own code."""
    frame = getattr(guard.sloc, "framework_loc", None)
    if not isinstance(frame, traceback.FrameSummary) or frame.filename.startswith(NOT_THEIRS):
        return ""
    return f"{os.path.basename(frame.filename)}:{frame.lineno}"


def _holds(environment: Any, condition: Any) -> bool:
    """Return True if a condition holds for every tried size from the smallest on.

    The numbers in the condition are tried, too, with their neighbours and multiples: a size of 40, or a multiple of 32.
    """
    condition = environment.replace(condition)
    symbols = sorted(condition.free_symbols, key=str)
    lowest = [environment.bound_sympy(symbol).lower for symbol in symbols]
    if not all(getattr(low, "is_Integer", False) for low in lowest):  # a size that depends on a tensor's values
        return True
    numbers = {abs(int(atom)) for atom in condition.atoms() if atom.is_Integer}
    near = {size for n in numbers if n <= _LARGEST for size in (n - 1, n, n + 1, 2 * n, 3 * n)}
    sides = [sorted({int(low) + step for step in _STEPS} | {size for size in near if size >= low}) for low in lowest]
    sizes: Iterable[tuple[int, ...]] = itertools.product(*sides)
    if len(symbols) > 2:  # all combinations would be too many: each list of sizes has another start
        most = max(map(len, sides))
        sizes = [
            tuple(side[(index + 5 * turn) % len(side)] for turn, side in enumerate(sides)) for index in range(most)
        ]
    return all(bool(condition.xreplace(dict(zip(symbols, chosen, strict=True)))) for chosen in sizes)


#: Part of torch.export's message if forward takes another branch for other batch sizes, or fails with them.
_BATCH = "constraints violated"
_TENSORS = "Write that line with torch's own operations on tensors, or move it out of forward"
#: Part of torch.export's message (lower case) -> an explanation and the remedy. The first row that fits is used.
EXPLANATIONS: tuple[tuple[str, str, str], ...] = (
    (
        "scriptmodule",
        "it is a TorchScript module, whose Python code is gone",
        "Give the Python module that it was made from, and its weights with --weights",
    ),
    (
        "data-dependent",
        "the code there needs the value of a tensor, which is not known before the model runs, for an if, a number or a size",
        "Choose between values with torch.where instead of if, loop over sizes instead of values, or move it out of forward",
    ),
    (
        ".numpy() is not supported",
        "a tensor becomes a numpy array there, which an exported file can't contain",
        _TENSORS,
    ),
    ("data pointer", "a tensor's memory is handed to code that is not torch's there", _TENSORS),
    (
        "no fake impl",
        "a custom operator there does not declare its output shape",
        "Register one for it with torch.library.register_fake, or write it with torch's own operations",
    ),
    (
        "not a known type",
        "forward returns an object whose tensors can't be seen",
        "Return tensors, or a tuple, list, dict, NamedTuple or dataclass of them",
    ),
    (
        _BATCH,
        "a size that should vary, such as the batch, can't vary in forward",
        "Take the batch size from the input's shape (x.shape[0] or -1) instead of writing a number or comparing with one",
    ),
)
#: Start of the advice in a message of torch.export, after the statement of the problem.
_ADVICE = re.compile(
    r"\(unhinted:|Caused by:|For more information|The error above occurred|Please see|See https?:|If you're using torch\."
)

#: Part of torch.export's message about an output of an unknown class; the second is torch 2.11's.
_UNKNOWN_TYPE = ("not a known type", "unhashable type")
#: An upper bound of this size or more, or an infinity, means "no limit".
_ENDLESS = 2**31


def trace(model: nn.Module, inputs: tuple[Any, ...], *, dynamic_shapes: Any = None) -> GraphModule:
    """Trace a module by ``torch.export`` into a graph that can run and be rewritten; the module stays as it is.

    ``dynamic_shapes`` is as for ``torch.export.export``; by default one shared batch dimension varies. An image size that
    should vary (``size_shapes``) but can't is an error.

    Raises:
        UntracedError: With the line of the user's code at which tracing stopped.
    """
    shapes = batch_shapes(model, inputs) if dynamic_shapes is None else dynamic_shapes
    if model.training and switches_itself(model):
        model = _switched_copy(model)
    try:
        with eval_mode(model), unchanged(model) as changes, quiet(), torch.no_grad():
            program = _export(model, inputs, shapes)
            graph_module = program.module(check_guards=False)
    except Exception as error:  # torch.export raises many unrelated classes
        raise _untraced(model, inputs, error) from error
    if changes.layers:
        raise UntracedError(
            f"forward of {type(model).__name__} makes the layer {changes.layers[0]} in its first call",
            remedy="Run the network once on an example, so that all its layers exist, and load its weights",
        )
    if changes.attributes:
        _refuse_memory(model, inputs, changes.attributes)
    if any(isinstance(item, _DimHint) for item in pytree.tree_leaves(shapes)):
        _refuse_pinned(program, model)
        refuse_forks(program, model)
    assert isinstance(graph_module, GraphModule)
    return graph_module


def _switched_copy(model: nn.Module) -> nn.Module:
    """Return a copy in eval mode, or the module itself if it can't be copied.

    The author's ``train`` may do more than set flags: LoRA merges its weights.
    """
    with contextlib.suppress(Exception):
        return to_eval_mode(copy.deepcopy(model))
    return model


def batch_shapes(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, Any]:
    """Return dynamic shapes by forward's argument names: the first dimension of every tensor is shared, "batch"."""
    return _shapes(model, inputs, lambda _rank: {})


def two_samples(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Repeat example inputs of a single sample: torch.export treats a size of 1 as a constant."""
    tensors = [item for item in pytree.tree_leaves(inputs) if isinstance(item, Tensor) and item.ndim]
    if not tensors or any(item.shape[0] != 1 for item in tensors):
        return inputs
    return tuple(pytree.tree_map_only(Tensor, lambda item: torch.cat([item, item]) if item.ndim else item, inputs))


def size_shapes(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, Any]:
    """Return ``batch_shapes`` with a height and width (length, depth) of image inputs that vary as well.

    torch.export finds the relations between the sizes of several inputs; ``trace`` checks that a size really varies.
    """
    return _shapes(model, inputs, lambda rank: dict.fromkeys(size_axes(rank), torch.export.Dim.AUTO))


def _shapes(model: nn.Module, inputs: tuple[Any, ...], others: Callable[[int], dict[int, Any]]) -> dict[str, Any]:
    batch = torch.export.Dim("batch")

    def vary(item: Any) -> dict[int, Any] | None:
        return {0: batch, **others(item.ndim)} if isinstance(item, Tensor) and item.ndim else None

    try:
        arguments = inspect.signature(model.forward).bind(*inputs).arguments
    except TypeError as error:
        raise UntracedError(
            f"forward of {type(model).__name__}{place_of(None, model)} does not take {len(inputs)} inputs: {one_line(error)}",
            remedy="Give one example (--input) per argument of forward",
        ) from error
    return dict(pytree.tree_map(vary, dict(arguments)))


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluate in eval mode inside the block and restore every module's flag after it.

    Only a model whose root is in training mode is switched. Below a root in eval mode, a layer in training mode is so on
    purpose (Monte Carlo dropout, batch statistics at test time).
    """
    flags = [(module, module.training) for module in model.modules()]
    try:
        if model.training:
            to_eval_mode(model)
        yield
    finally:
        for module, flag in flags:
            module.training = flag


def _export(model: nn.Module, inputs: tuple[Any, ...], shapes: Any) -> ExportedProgram:
    """Export; try again with the outputs' dataclasses registered if torch does not support one of them yet."""
    try:
        return torch.export.export(model, inputs, dynamic_shapes=shapes)
    except Exception as error:
        unknown = any(text in str(error) for text in _UNKNOWN_TYPE)
        if not unknown or not _register_dataclasses(call_once(model, inputs).result):
            raise
        return torch.export.export(model, inputs, dynamic_shapes=shapes)


def _register_dataclasses(result: Any) -> bool:
    """Register the dataclasses of a result with torch; return True if any was unknown."""
    found = False
    for leaf in pytree.tree_leaves(result):
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            if type(leaf) not in pytree.SUPPORTED_NODES:
                torch.export.register_dataclass(type(leaf))
            found = True
            _register_dataclasses([getattr(leaf, item.name) for item in dataclasses.fields(leaf)])
    return found


def _untraced(model: nn.Module, inputs: tuple[Any, ...], error: Exception) -> UntracedError:
    """Return the problem in one sentence: of the model itself, a limit of torch.export, or torch's own message."""
    name = type(model).__name__
    text = " ".join(str(error).split())
    problem = None if isinstance(model, torch.jit.ScriptModule) else call_once(model, inputs).problem
    if (problem is not None or _BATCH in text.lower()) and (found := batch_problem(model, inputs)) is not None:
        return found
    if problem is not None:
        if (types := _other_types(model, inputs)) is not None:
            return types
        shapes = ", ".join("x".join(map(str, item.shape)) for item in inputs if isinstance(item, Tensor))
        return UntracedError(
            f"{name} fails on an example input of shape {shapes}, before any tracing, {problem}",
            remedy="Check the shape given with --input (of one sample; a batch of 2 is fed), and that line",
        )
    for part, meaning, remedy in EXPLANATIONS:
        if part in text.lower():
            return UntracedError(f"torch.export can't trace {name}{place_of(error, model)}: {meaning}", remedy=remedy)
    reason = _ADVICE.split(text)[0].strip(" .") or type(error).__name__
    if re.fullmatch(r"[a-z]+\.\w+(\.\w+)?", reason):  # the bare name of an operator
        reason = f"it does not support the operator {reason}"
    return UntracedError(
        f"torch.export can't trace {name}{place_of(error, model)}: {reason if len(reason) < 300 else reason[:297] + '...'}",
        remedy=_TENSORS,
    )


def _other_types(model: nn.Module, inputs: tuple[Any, ...]) -> UntracedError | None:
    """Return the error if a model that fails runs on inputs of the same shapes and another element type; else None."""
    own = next((item.dtype for item in model.parameters() if item.is_floating_point()), torch.float32)
    tensors = [item for item in pytree.tree_leaves(inputs) if isinstance(item, Tensor)]
    for floats, wanted in ((True, own), (False, own), (True, torch.int64)):
        given = {item.dtype for item in tensors if item.is_floating_point() == floats} - {wanted}
        if given and call_once(model, _retyped(inputs, given, wanted)).problem is None:
            have, need = (str(item).removeprefix("torch.") for item in (given.pop(), wanted))
            return UntracedError(
                f"{type(model).__name__} fails on an example input of type {have}, and runs on one of type {need}",
                remedy=f"Give the input as {need} (--input SHAPE:{need})"
                + f", or convert the network with .to(torch.{have})" * (floats and wanted.is_floating_point),
            )
    return None


def _retyped(inputs: tuple[Any, ...], given: set[torch.dtype], wanted: torch.dtype) -> tuple[Any, ...]:
    """Return inputs with zeros of another type in place of tensors of some types."""
    zeros = partial(torch.zeros_like, dtype=wanted)
    return tuple(pytree.tree_map_only(Tensor, lambda item: zeros(item) if item.dtype in given else item, inputs))


def _refuse_memory(model: nn.Module, inputs: tuple[Any, ...], kept: list[str]) -> None:
    """Refuse a model whose result depends on the number of calls; one that only stores something is accepted."""
    with quiet():
        copied = copy.deepcopy(model)
    first, second = (call_once(copied, inputs, on_itself=True).result for _ in range(2))
    pairs = zip(pytree.tree_leaves(first), pytree.tree_leaves(second), strict=False)
    if any(isinstance(a, Tensor) and isinstance(b, Tensor) and not torch.equal(a, b) for a, b in pairs):
        raise UntracedError(
            f"{type(model).__name__}{place_of(None, model)} gives another result when it is called again: it keeps"
            f" {' and '.join(kept[:2])} between calls, which an exported file can't",
            remedy="Pass what is kept as an input and return it as an output, or leave it out in eval mode",
        )


def _refuse_pinned(program: ExportedProgram, model: nn.Module) -> None:
    """Refuse a graph in which an image size that should vary is a number or has an upper limit."""
    values: dict[str, Any] = {node.name: node.meta.get("val") for node in program.graph.find_nodes(op="placeholder")}
    for name in program.graph_signature.user_inputs:
        value = values.get(str(name))
        if not isinstance(value, Tensor):
            continue
        for axis, word in size_axes(value.ndim).items():
            size: Any = value.shape[axis]
            how = "is pinned"
            if not isinstance(size, int) and not size.node.expr.is_number:
                upper: Any = getattr(program.range_constraints.get(size.node.expr), "upper", None)
                if not getattr(upper, "is_Integer", False) or int(upper) >= _ENDLESS:
                    continue
                how = f"can't grow above {upper}"
            raise UntracedError(
                f"the {word} of the input of {type(model).__name__}{place_of(None, model)} {how}, so it can't vary",
                remedy="Leave --dynamic-size out",
            )
