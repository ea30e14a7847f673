"""Networks and comparisons that the tests of ``fold_modules`` share."""

import copy
from collections.abc import Mapping

import torch
from support.models import Graph, bn, conv, graph, linear, randomise
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.utils import _pytree as pytree

IMAGE = torch.zeros(2, 3, 8, 8)
X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(5))


def tensors(outputs: object) -> list[Tensor]:
    return [item for item in pytree.tree_leaves(outputs) if isinstance(item, Tensor)]


def difference(one: nn.Module, other: nn.Module, inputs: tuple[Tensor, ...]) -> float:
    """Largest difference in float64, as a share of the largest value."""
    found = []
    for model in (one, other):
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            found.append(tensors(double(model)(*(item.double() for item in inputs))))
    return max((float((a - b).abs().max() / a.abs().max()) for a, b in zip(*found, strict=True)), default=0.0)


def double(model: nn.Module) -> nn.Module:
    values = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    return copy.deepcopy(model, {id(value): value.detach().clone() for value in values}).double()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def residual() -> nn.Module:
    """Two blocks, a shortcut, a head: small, and with everything that training needs."""

    def forward(m: Graph, x: Tensor) -> Tensor:
        y = torch.relu(m.bn1(m.conv1(x)))
        z = m.act(m.bn2(m.conv2(y)) + y)
        return m.fc(z.mean((2, 3)))

    layers = {
        "conv1": conv(bias=False, padding=1),
        "bn1": bn(),
        "conv2": conv(6, 6, bias=False, padding=1),
        "bn2": bn(),
        "act": lambda: nn.ReLU(inplace=True),
        "fc": linear(6, 4),
    }
    torch.manual_seed(0)
    return randomise(graph(forward, **layers)())


class Residual(nn.Module):
    """As ``residual``, picklable."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(*residual().children())
        self.bn_act = randomise(BatchNormAct2d(4, act_layer=nn.PReLU))
        self.last = nn.Conv2d(4, 4, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        conv1, bn1, conv2, bn2, act, fc = self.inner
        y = torch.relu(bn1(conv1(x)))
        z = act(bn2(conv2(y)) + y)
        return self.bn_act(self.last(fc(z.mean((2, 3)))[:, :, None, None])).flatten(1)


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-5 * expected.abs().max())
