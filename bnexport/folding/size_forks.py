"""Whether forward takes one way for every size of image: a graph holds one.

``if x.shape[2] % 2`` is followed by torch.export for the example's size and noted as a guard of the graph (PyTorch
documentation, "Dynamic Shapes"). A way that is taken from a smallest size on is one way, and the signature names that size.
"""

from __future__ import annotations

import itertools
import os
import traceback
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from bnexport.errors import UntracedError
from bnexport.nn.calling import NOT_THEIRS

#: What is added to the smallest size where a guard is tried: odd and even, around the powers of two, and large.
_STEPS = (0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 31, 32, 33, 63, 64, 127, 128, 256, 1000, 4096, 65537)


def refuse_forks(program: ExportedProgram, model: nn.Module) -> None:
    """Refuse a graph whose forward asked in Python for a size, where other sizes would have gone another way.

    Guards of torch's own code are none of these: what does not fit them is refused by the operator, or costs only time.

    Args:
        program: With sizes that vary.
        model: In sentences.

    Raises:
        UntracedError: Naming the line that asks.
    """
    for environment in _environments(program):
        for guard in environment.guards:
            place = _place(guard)
            if place and not _holds(environment, guard.expr):
                raise UntracedError(
                    f"forward of {type(model).__name__} asks for a size at {place} and goes another way, or refuses, for some"
                    " sizes of the image, so one graph does not do for all",
                    remedy="Leave --dynamic-size out, or write that line without a question in Python",
                )


def _environments(program: ExportedProgram) -> list[Any]:
    """Where torch.export keeps the guards of the sizes that vary."""
    found: dict[int, Any] = {}
    for node in program.graph.find_nodes(op="placeholder"):
        for size in getattr(node.meta.get("val"), "shape", ()):
            if not isinstance(size, int):
                found[id(size.node.shape_env)] = size.node.shape_env
    return list(found.values())


def _place(guard: Any) -> str:
    """FILE:LINE of the user's code that asked; empty where torch itself did."""
    frame = getattr(guard.sloc, "framework_loc", None)
    if not isinstance(frame, traceback.FrameSummary) or frame.filename.startswith(NOT_THEIRS):
        return ""
    return f"{os.path.basename(frame.filename)}:{frame.lineno}"


def _holds(environment: Any, condition: Any) -> bool:
    """Whether a condition is true for every size from the smallest on, as far as trying tells."""
    condition = environment.replace(condition)
    symbols = sorted(condition.free_symbols, key=str)
    lowest = [environment.bound_sympy(symbol).lower for symbol in symbols]
    if not all(getattr(low, "is_Integer", False) for low in lowest):  # no size of an input, but of what a tensor holds
        return True
    tried = itertools.product(_STEPS, repeat=len(symbols)) if len(symbols) <= 2 else _turned(len(symbols))
    return all(
        bool(
            condition.xreplace(
                {symbol: int(low) + step for symbol, low, step in zip(symbols, lowest, steps, strict=True)}
            )
        )
        for steps in tried
    )


def _turned(count: int) -> list[tuple[int, ...]]:
    """Steps for many sizes at once, each list of steps begun elsewhere: all combinations would be too many."""
    most = len(_STEPS)
    return [tuple(_STEPS[(index + 5 * turn) % most] for turn in range(count)) for index in range(most)]
