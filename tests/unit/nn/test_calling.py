"""Calling a user's module: on a copy, with the line at which it fails."""

import pytest
import torch
from torch import nn

import bnexport
from bnexport.errors import UntracedError
from bnexport.nn.calling import call_once, place_of, switches_itself, to_eval_mode, unchanged


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
    assert place_of(None, nn.Linear(1, 1)) == ""  # torch's own forward is not the user's code


def test_the_module_and_the_inputs_stay() -> None:
    model, x = Keeps(), torch.ones(4, 3)
    assert call_once(model, (x,)).problem is None
    assert model.seen == []
    assert not hasattr(model, "last")
    assert int(model.inner.num_batches_tracked) == 0  # in eval mode, though the model is in training mode
    assert model.training


class Frozen(nn.Module):
    """A network with an own ``train``, which does ``what``."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.norm, self.dropout = what, nn.BatchNorm1d(4), nn.Dropout()
        self.merged = False

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        if self.what == "raises":
            raise RuntimeError("this network is frozen")
        if self.what == "changes nothing":
            return
        super().train(mode)
        self.merged = not mode
        if self.what == "keeps dropout":
            self.dropout.train()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)


@pytest.mark.parametrize("what", ["returns nothing", "raises", "changes nothing"])
def test_a_network_with_its_own_train_comes_into_eval_mode(what):
    network = Frozen(what)
    assert to_eval_mode(network) is network
    assert [module.training for module in network.modules()] == [False] * 3
    assert network.merged == (what == "returns nothing")
    outcome = call_once(Frozen(what), (torch.ones(1, 4),))  # one row: batch statistics would be an error
    assert outcome.problem is None


def test_dropout_that_train_switches_on_stays_on():
    network = to_eval_mode(Frozen("keeps dropout"))
    assert [network.training, network.norm.training, network.dropout.training] == [False, False, True]
    assert switches_itself(network)
    assert not switches_itself(network.norm)


def test_state_that_a_forward_keeps_is_undone_and_named() -> None:
    model = Keeps().eval()
    with unchanged(model) as changes:
        model(torch.ones(4, 3))
    assert set(changes.attributes) == {"seen", "last"}
    assert model.seen == []
    assert not hasattr(model, "last")
    with unchanged(model.inner) as changes:
        model.inner(torch.ones(4, 3))
    assert changes.attributes == changes.layers == []


class Late(nn.Module):
    """A network that makes layers, a parameter and a buffer in its first call, and replaces a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first: nn.Module | None = None
        self.more = nn.ModuleList()
        self.norm = nn.BatchNorm1d(3)
        self.names = {"a"}
        self.register_parameter("scale", None)
        self.register_buffer("shift", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.first is None:
            self.first = nn.Linear(3, 3)
            self.more.append(nn.Linear(3, 3))
            self.add_module("late", nn.Linear(3, 3))
            self.scale, self.shift = nn.Parameter(torch.ones(1)), torch.ones(1)
            self.norm = nn.Identity()  # type: ignore[assignment]
            self.names.add("b")
        return self.norm(self.late(self.more[0](self.first(x)))) * self.scale + self.shift


def test_layers_made_in_the_first_call_are_gone_afterwards() -> None:
    model = Late().eval()
    norm, before = model.norm, list(model.state_dict())
    with unchanged(model) as changes:
        model(torch.ones(2, 3))
    assert (changes.attributes, sorted(changes.layers)) == (["names"], ["first", "late", "more.0"])
    with pytest.raises(UntracedError, match=r"makes the layer [a-z0.]+ in its first call"):
        bnexport.fold(model, torch.ones(2, 3))
    assert list(model.state_dict()) == before
    assert model.norm is norm
    assert model.names == {"a"}
    assert model.first is model.scale is model.shift is None
    assert not hasattr(model, "late")
    assert len(model.more) == 0
