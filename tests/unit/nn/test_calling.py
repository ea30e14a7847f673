"""Calling a user's module: on a copy, with the line at which it fails."""

from __future__ import annotations

import torch
from torch import nn

from bnexport.nn.calling import call_once, place_of, unchanged


class Fails(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, torch.ones(3, 7))


class Keeps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.BatchNorm1d(3)
        self.seen: list[torch.Tensor] = []
        self.size = (1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x)
        self.last = x
        self.size = (1, 2)
        return self.inner(x)


def test_the_line_is_the_users() -> None:
    line = Fails.forward.__code__.co_firstlineno + 1
    problem = call_once(Fails(), (torch.ones(2, 4),)).problem
    assert problem is not None
    assert problem.startswith(f"at test_calling.py:{line}: mat1 and mat2")
    assert place_of(None, Fails()) == f" at test_calling.py:{line - 1}"
    assert place_of(ValueError("no traceback")) == ""
    assert place_of(None, nn.Linear(1, 1)) == ""  # torch's own forward is nobody's fault


def test_the_module_and_the_inputs_stay() -> None:
    model, x = Keeps(), torch.ones(4, 3)
    assert call_once(model, (x,)).problem is None
    assert model.seen == []
    assert not hasattr(model, "last")
    assert int(model.inner.num_batches_tracked) == 0  # in eval mode, though the model is in training mode
    assert model.training


def test_what_a_forward_keeps_is_undone_and_named() -> None:
    model = Keeps().eval()
    with unchanged(model) as kept:
        model(torch.ones(4, 3))
    assert set(kept) == {"seen", "last"}
    assert model.seen == []
    assert not hasattr(model, "last")
    with unchanged(model.inner) as kept:
        model.inner(torch.ones(4, 3))
    assert kept == []
