"""Small networks for the audit; every BatchNorm has random statistics."""

import torch
from cases import randomise
from torch import Tensor, nn

from bnexport.exporting.export_request import InputSpec

IMAGE = (InputSpec("input", (3, 8, 8)),)


class Twice(nn.Module):
    """One convolution called twice, and only one call has a BatchNorm; two plain pairs come before it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn_a = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.b, self.bn_b = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.conv, self.bn = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn_b(self.b(self.bn_a(self.a(x)).tanh()))
        return self.bn(self.conv(x)).tanh() + self.conv(x).tanh()


class Tokens(nn.Module):
    """A linear layer on (N, L, C) and a BatchNorm over L, with L == C: the numbers fit, the axis does not."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm, self.last = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.fc(x)).tanh())


def pair() -> nn.Module:
    """A convolution, its BatchNorm, an activation, and a BatchNorm that follows it."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))


def deep(depth: int = 6) -> nn.Module:
    """Convolution, BatchNorm, activation, again and again; the BatchNorms are "0.1", "1.1", ..."""
    return nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Tanh()) for _ in range(depth)))


def trained(network: nn.Module) -> nn.Module:
    """With random statistics, in eval mode."""
    for parameter in network.parameters():
        parameter.data.copy_(
            torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())) / 3
        )
    return randomise(network).eval()
