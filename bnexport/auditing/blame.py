"""Which BatchNorm a wrong tool gets wrong, found by hiding BatchNorms from it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bnexport.auditing.subject import Subject, call


class Hidden(nn.Module):
    """A BatchNorm that no fold finds: its input and its output are negated twice, which changes no bit.

    Args:
        batch_norm: Called as it is, with its hooks.
    """

    def __init__(self, batch_norm: nn.Module) -> None:
        super().__init__()
        self.batch_norm = batch_norm

    def forward(self, x: Tensor) -> Any:
        """As the BatchNorm alone."""
        output = self.batch_norm(x.neg().neg())
        return output.neg().neg() if isinstance(output, Tensor) else output


def first_culprit(subject: Subject, is_wrong: Callable[[nn.Module], bool]) -> str:
    """Path of the first BatchNorm, in the order of the calls, that a tool gets wrong.

    A search by halves: with the BatchNorms up to this one in sight the tool is wrong, with those before it alone it is
    right. It costs one run of the tool per halving, and one to see that the tool is right when all are hidden.

    Args:
        subject: The network; it is not changed.
        is_wrong: Runs the tool on a module that computes what the network does, and judges it. What it raises ends the
            search.

    Returns:
        The path; "" when there is no BatchNorm, when the tool is wrong for another reason, or when it fails on the changed
        network, so that nothing can be said.
    """
    names = calls_in_order(subject)
    try:
        if not names or is_wrong(hide(subject.module, names)):
            return ""
        right, wrong = 0, len(names)
        while wrong - right > 1:
            middle = (right + wrong) // 2
            if is_wrong(hide(subject.module, names[middle:])):
                wrong = middle
            else:
                right = middle
    except Exception:  # the tool's own classes
        return ""
    return names[wrong - 1]


def hide(module: nn.Module, paths: list[str]) -> nn.Module:
    """A copy of a network in which some BatchNorms are hidden; one that has several paths is hidden at each.

    Args:
        module: The network.
        paths: As in ``named_modules``, none of them the root.
    """
    copied = copy.deepcopy(module)
    wanted = {id(copied.get_submodule(path)): Hidden(copied.get_submodule(path)).eval() for path in paths}
    for path, inner in list(copied.named_modules(remove_duplicate=False)):
        if id(inner) in wanted:
            parent, _, name = path.rpartition(".")
            setattr(copied.get_submodule(parent), name, wanted[id(inner)])
    return copied


def calls_in_order(subject: Subject) -> list[str]:
    """Paths of the BatchNorms that forward calls, in the order of their first calls; not of blocks that hold some."""
    copied = copy.deepcopy(subject.module)
    called: dict[str, None] = {}
    for path, inner in copied.named_modules():
        if path and is_batch_norm(inner) and not any(map(is_batch_norm, list(inner.modules())[1:])):
            inner.register_forward_pre_hook(lambda _module, _inputs, path=path: called.setdefault(path))
    with torch.no_grad():
        call(copied, subject.example)
    return list(called)


def is_batch_norm(module: nn.Module) -> bool:
    """Whether a module is a BatchNorm of any make, by the names of its class and of those that it derives from."""
    return any("BatchNorm" in kind.__name__ for kind in type(module).__mro__)
