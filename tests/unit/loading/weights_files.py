"""Networks, weights files and checks that the tests of loading share."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import randomise
from torch import Tensor, nn

from bnexport.errors import ModelError
from bnexport.loading.sources import load_source

State = dict[str, Tensor]
NETWORK = """
from torch import nn

class Net(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(4, classes)

    def forward(self, x):
        return self.head(self.backbone(x))

class Wrapped(nn.Module):
    def __init__(self, name="module"):
        super().__init__()
        setattr(self, name, Net())
        self.name = name

    def forward(self, x):
        return getattr(self, self.name)(x)

def in_model():
    return Wrapped("model")

def dense():
    import torchvision
    return torchvision.models.DenseNet(4, (2,), 8, num_classes=3)

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.norm, self.out = nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 5, bias=False)
        self.out.weight = self.table.weight
"""
#: A smaller network, by the function ``make``.
SMALL = """
import torch
from torch import nn

def make():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
"""
_SPACE: dict[str, Any] = {}
exec(NETWORK, _SPACE)


def network(name: str = "Net", seed: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return randomise(_SPACE[name](), seed).eval()


def state_of(name: str = "Net", seed: int = 3) -> State:
    return dict(network(name, seed).state_dict())


def loaded(stored: Any, name: str = "Net", *, key: str | None = None, **options: Any) -> Any:
    torch.save(stored, "w.pth", **options)
    return load_source(f"net.py:{name}", weights="w.pth", weights_key=key)


def refusal(stored: Any, name: str = "Net", *, key: str | None = None) -> str:
    """Return the sentence that refuses a file."""
    with pytest.raises(ModelError) as caught:
        loaded(stored, name, key=key)
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 600
    return caught.value.sentence


def message(source: str, weights: Path | None = None, kind: type[Exception] = ModelError) -> str:
    """Return the message that refuses a source."""
    with pytest.raises(kind) as caught:
        load_source(source, weights=weights)
    assert type(caught.value) is kind
    assert caught.value.remedy
    assert "\n" not in caught.value.message
    return caught.value.message


def same(module: nn.Module, state: Mapping[str, Tensor]) -> bool:
    mine = module.state_dict()
    return set(mine) == set(state) and all(torch.equal(value, state[name]) for name, value in mine.items())


def with_prefix(prefix: str) -> Callable[[State], State]:
    return lambda state: {prefix + name: value for name, value in state.items()}


def inside(place: str, wrapper: str) -> Callable[[State], State]:
    return lambda state: {name.replace(f"{place}.", f"{place}.{wrapper}."): value for name, value in state.items()}
