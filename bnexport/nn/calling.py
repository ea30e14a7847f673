"""Calls of a user's module as plain Python, with the line of a failure."""

from __future__ import annotations

import contextlib
import copy
import inspect
import os
import traceback
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bnexport.optional import one_line, quiet

#: Starts of file names in a traceback that belong to torch, bnexport or inspect, or to code without a file.
NOT_THEIRS = (
    os.path.dirname(torch.__file__) + os.sep,
    os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep,
    os.path.dirname(inspect.__file__) + os.sep + "inspect.py",
    "<",
)
#: Part of the path of installed code, which is not the user's own.
INSTALLED = f"{os.sep}site-packages{os.sep}"


_Module = TypeVar("_Module", bound=nn.Module)


def to_eval_mode(model: _Module) -> _Module:
    """Switch a module to eval mode in place, and return the module itself.

    ``eval()`` calls the author's ``train(False)``, which may return nothing, raise, or change nothing. Its return value is
    never used. If the root is in training mode afterwards, every flag is set directly. A part in training mode below a root
    in eval mode is left unchanged, because Monte Carlo dropout is switched on this way.
    """
    with contextlib.suppress(Exception):  # the author's own code
        model.eval()
        if not model.training:
            return model
    for module in model.modules():
        module.training = False
    return model


def switches_itself(model: nn.Module) -> bool:
    """Return True if a module overrides ``train`` or ``eval``, which may change more than the flags."""
    return any(
        getattr(type(module), name) is not getattr(nn.Module, name) or name in vars(module)
        for module in model.modules()
        if not isinstance(module, torch.jit.ScriptModule)
        for name in ("train", "eval")
    )


@dataclass(frozen=True)
class Outcome:
    """The result of one call."""

    result: Any = None  # Return value of forward; None if it failed
    # Place and reason of a failure, as the end of a sentence: "at net.py:7: ..."; None without a failure
    problem: str | None = None


def call_once(model: nn.Module, inputs: tuple[Any, ...], *, on_itself: bool = False) -> Outcome:
    """Run a copy of a module in eval mode; the module itself is never changed, and ``inputs`` are copied.

    A root in eval mode keeps layers that are in training mode on purpose. ``on_itself`` runs the given module, because the
    caller has made a copy.
    """
    feeds = pytree.tree_map(lambda item: item.clone() if isinstance(item, Tensor) else item, inputs)
    with quiet(), torch.no_grad():
        try:
            copied = model if on_itself else copy.deepcopy(model)
            return Outcome(result=(to_eval_mode(copied) if model.training else copied)(*feeds))
        except Exception as error:  # the module is the user's code
            return Outcome(
                problem=f"{place_of(error, model).removeprefix(' ')}: {one_line(error, 200)}".removeprefix(": ")
            )


@dataclass(frozen=True)
class TracedChanges:
    """Changes inside a block of ``unchanged``: names of plain attributes, and of new layers with parameters or buffers."""

    attributes: list[str] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[TracedChanges]:
    """Restore every module's attributes after the block: plain ones, layers, parameters, buffers, contents of containers.

    A forward that stores something (``self.last = y``, ``self.seen.append(y)``, a layer made in the first call) would keep the
    tracer's tensors, which hold no numbers and can't be copied. The yielded changes are complete after the block.
    """
    known = set(model.modules())
    kept = [
        (module, path, dict(vars(module)))
        for path, module in model.named_modules()
        if not isinstance(module, torch.jit.ScriptModule)
    ]
    contents = [
        (value, value.copy(), name if name.startswith("_") else f"{path}.{name}".lstrip("."))
        for _, path, attributes in kept
        for name, value in attributes.items()
        if type(value) in (list, dict, set, OrderedDict)
    ]
    changes = TracedChanges()
    try:
        yield changes
    finally:
        for name, module in model.named_modules():
            if module not in known and (*module.parameters(), *module.buffers()):
                changes.layers.append(name)
        altered = [name for value, before, name in contents if not name.startswith("_") and not _same(value, before)]
        for value, before, _ in contents:
            value.clear()
            value.extend(before) if isinstance(value, list) else value.update(before)
        for module, path, attributes in kept:
            now = vars(module)
            altered += [f"{path}.{name}".lstrip(".") for name in now if not _same(now[name], attributes.get(name))]
            now.clear()
            now.update(attributes)
        changes.attributes.extend(dict.fromkeys(altered))


def _same(value: Any, before: Any) -> bool:
    """Return True for the same object, and for a container of the same objects: the tracer copies containers."""
    if value is before or (isinstance(value, int | float | str | set) and value == before):
        return True
    if type(value) is not type(before) or not isinstance(value, list | tuple | dict) or len(value) != len(before):
        return False
    if isinstance(value, dict):
        return all(key in before and _same(item, before[key]) for key, item in value.items())
    return all(_same(a, b) for a, b in zip(value, before, strict=True))


def place_of(error: BaseException | None, model: nn.Module | None = None) -> str:
    """Return `` at FILE:LINE`` of the innermost frame of the user's code.

    Code of installed packages counts only without other code. Without any frame it is the line where forward of ``model`` is
    defined, if that is the user's code; else empty.
    """
    frames = [
        (frame.filename, frame.lineno)
        for frame in traceback.extract_tb(None if error is None else error.__traceback__)
        if not frame.filename.startswith(NOT_THEIRS)
    ]
    own = [frame for frame in frames if INSTALLED not in frame[0]] or frames or _definition(model)
    return f" at {os.path.basename(own[-1][0])}:{own[-1][1]}" if own else ""


def _definition(model: nn.Module | None) -> list[tuple[str, int | None]]:
    """Return file and line of a module's forward; empty if it is torch's, or was not written in a file."""
    forward: Any = getattr(type(model), "forward", None)
    try:
        file = inspect.getsourcefile(forward)
        if file is None or file.startswith(NOT_THEIRS):
            return []
        return [(file, inspect.getsourcelines(forward)[1])]
    except (OSError, TypeError, AttributeError):
        return []
