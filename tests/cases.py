"""The one table of models: what they are, what goes in, and what must become of each BatchNorm.

Statistics are always randomised per channel (``randomise``): a fresh BatchNorm makes every wrong fold look right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torchvision.ops import FrozenBatchNorm2d

from bnexport.nn.batch_norm import BatchNorm


@dataclass(frozen=True)
class Case:
    """One model.

    Attributes:
        name: Of the test.
        build: Makes the model; its BatchNorms are randomised afterwards.
        shapes: One per input, batch first.
        outcomes: Module path -> outcome, in the order of the calls.
        because: Part of the reason of the first BatchNorm that is not folded.
    """

    name: str
    build: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    outcomes: tuple[tuple[str, str], ...]
    because: str = ""

    def model(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return randomise(self.build(), seed).eval()

    def inputs(self, seed: int = 1, batch: int | None = None) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        return tuple(torch.randn(batch or shape[0], *shape[1:], generator=generator) for shape in self.shapes)


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every BatchNorm its own eps and, per channel, a negative, zero or positive gamma and a tiny to large variance."""
    generator = torch.Generator().manual_seed(seed)
    for number, module in enumerate(model.modules()):
        names = next((names for names in _STATISTICS if hasattr(module, names[3])), None)
        if names is None or getattr(module, names[3]) is None:
            continue
        gamma, beta, mean, var = (getattr(module, name, None) for name in names)
        channels = var.numel()
        with torch.no_grad():
            var.copy_(10 ** (torch.rand(channels, generator=generator).reshape(var.shape) * 5 - 3))
            mean.copy_(torch.randn(channels, generator=generator).reshape(mean.shape) * var.sqrt())
            if gamma is not None:
                gamma.copy_(torch.randn(channels, generator=generator).reshape(gamma.shape))
                gamma.reshape(-1)[0] = -gamma.reshape(-1)[0].abs()
                if channels > 2:
                    gamma.reshape(-1)[1] = 0.0
                beta.copy_(torch.randn(channels, generator=generator).reshape(beta.shape))
        if hasattr(module, "eps"):
            module.eps = (1e-5, 1e-3, 3e-2)[number % 3]
        if isinstance(getattr(module, "num_batches_tracked", None), Tensor):
            module.num_batches_tracked.fill_(7)
    return model


_STATISTICS = (
    ("weight", "bias", "running_mean", "running_var"),
    ("gamma", "beta", "moving_mean", "moving_var"),
)


class Graph(nn.Module):
    """A model whose forward is given as a function of its layers."""

    def __init__(self, forward: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self._forward = forward

    def forward(self, *inputs: Tensor) -> Any:
        return self._forward(self, *inputs)


def sequential(*layers: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*(layer() for layer in layers))


def graph(forward: Callable[..., Any], **layers: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: Graph(forward, **{name: layer() for name, layer in layers.items()})


def conv(
    channels_in: int = 3, channels_out: int = 6, kernel: int = 3, *, dims: int = 2, **options: Any
) -> Callable[[], nn.Module]:
    kinds = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
    return lambda: kinds[dims](channels_in, channels_out, kernel, **options)


def bn(channels: int = 6, *, dims: int = 2, **options: Any) -> Callable[[], nn.Module]:
    kinds = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
    return lambda: kinds[dims](channels, **options)


def shared_weight() -> nn.Module:
    model = Graph(lambda m, x: m.bn(m.a(x)) + m.b(x), a=conv()(), b=conv()(), bn=bn()())
    model.b.weight = model.a.weight
    return model


def with_hook(place: str, hook: Callable[..., Any]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = nn.Sequential(conv()(), bn()(), nn.ReLU())
        model[{"conv": 0, "bn": 1}[place]].register_forward_hook(hook)
        return model

    return build


def in_training_mode() -> nn.Module:
    model = nn.Sequential(conv()(), bn()(), conv(6, 6)(), bn()())
    model.eval()
    model[1].train()
    return model


class MutatesWeight(nn.Module):
    """Changes its convolution's weight in forward: what it holds depends on how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.register_buffer("weight", torch.randn(6, 3, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        self.weight.view(-1).mul_(0.5)
        return self.bn(torch.nn.functional.conv2d(x, self.weight))


class Chapter(nn.Module):
    """The chapter's own way to write it, with (1, C, 1, 1) statistics and the function inlined."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.gamma, self.beta = nn.Parameter(torch.randn(1, 6, 1, 1)), nn.Parameter(torch.randn(1, 6, 1, 1))
        self.register_buffer("mean", torch.randn(1, 6, 1, 1))
        self.register_buffer("var", torch.rand(1, 6, 1, 1) + 0.1)

    def forward(self, x: Tensor) -> Tensor:
        x_hat = (self.conv(x) - self.mean) / torch.sqrt(self.var + 1e-5)
        return self.gamma * x_hat + self.beta


IMAGE = ((2, 3, 8, 8),)
_SECOND = "second consumer"

CASES: tuple[Case, ...] = (
    # convolution <- batch norm
    Case("conv1d", sequential(conv(dims=1), bn(dims=1)), ((2, 3, 8),), (("1", "folded"),)),
    Case("conv2d", sequential(conv(), bn(), nn.ReLU), IMAGE, (("1", "folded"),)),
    Case("conv3d", sequential(conv(dims=3), bn(dims=3)), ((2, 3, 5, 6, 7),), (("1", "folded"),)),
    Case("conv-no-bias", sequential(conv(bias=False), bn()), IMAGE, (("1", "folded"),)),
    Case("conv-groups", sequential(conv(4, 6, groups=2), bn()), ((2, 4, 8, 8),), (("1", "folded"),)),
    Case("conv-depthwise", sequential(conv(3, 6, groups=3), bn()), IMAGE, (("1", "folded"),)),
    Case("conv-stride", sequential(conv(stride=2, dilation=2), bn()), IMAGE, (("1", "folded"),)),
    Case("conv-padding", sequential(conv(padding=1), bn()), IMAGE, (("1", "folded"),)),
    Case("conv-same", sequential(conv(padding="same"), bn()), IMAGE, (("1", "folded"),)),
    Case("conv-reflect", sequential(conv(padding=1, padding_mode="reflect"), bn()), IMAGE, (("1", "folded"),)),
    Case("conv-circular", sequential(conv(padding=2, padding_mode="circular"), bn()), IMAGE, (("1", "folded"),)),
    Case("one-channel", sequential(conv(3, 1), bn(1)), IMAGE, (("1", "folded"),)),
    Case("not-affine", sequential(conv(), bn(affine=False)), IMAGE, (("1", "folded"),)),
    Case("dropout-between", sequential(conv(), nn.Dropout2d, nn.Identity, bn()), IMAGE, (("3", "folded"),)),
    Case("clone-between", graph(lambda m, x: m.bn(m.conv(x).clone().contiguous()), conv=conv(), bn=bn()), IMAGE,
         (("bn", "folded"),)),
    Case("relu-in-place", sequential(conv(), bn(), lambda: nn.ReLU(inplace=True), conv(6, 6), bn()), IMAGE,
         (("1", "folded"), ("4", "folded"))),
    Case("two-in-a-row", sequential(conv(), bn(), bn()), IMAGE, (("1", "folded"), ("2", "folded"))),
    Case("called-twice-by-two-convs", graph(lambda m, x: m.bn(m.a(x)) * m.bn(m.b(x)), a=conv(), b=conv(), bn=bn()),
         IMAGE, (("bn", "folded"), ("bn", "folded"))),
    Case("residual", graph(lambda m, x: torch.relu(x + m.bn(m.conv(x))), conv=conv(3, 3, padding=1), bn=bn(3)), IMAGE,
         (("bn", "folded"),)),
    # linear <- batch norm
    Case("linear", sequential(lambda: nn.Linear(5, 7), bn(7, dims=1), nn.Sigmoid), ((3, 5),), (("1", "folded"),)),
    Case("linear-no-bias", sequential(lambda: nn.Linear(5, 7, bias=False), bn(7, dims=1)), ((3, 5),), (("1", "folded"),)),
    # what acts like a BatchNorm
    Case("scratch-conv", sequential(conv(), lambda: BatchNorm(6, 4)), IMAGE, (("1", "folded"),)),
    Case("scratch-linear", sequential(lambda: nn.Linear(5, 7), lambda: BatchNorm(7, 2)), ((3, 5),), (("1", "folded"),)),
    Case("scratch-one-channel", sequential(conv(3, 1), lambda: BatchNorm(1, 4)), IMAGE, (("1", "folded"),)),
    Case("scratch-in-a-row", sequential(conv(), lambda: BatchNorm(6, 4), lambda: BatchNorm(6, 4)), IMAGE,
         (("1", "folded"), ("2", "folded"))),
    Case("frozen", sequential(conv(), lambda: FrozenBatchNorm2d(6), nn.ReLU), IMAGE, (("1", "folded"),)),
    Case("chapter", Chapter, IMAGE, (("", "folded"),)),
    Case("sync", sequential(conv(), lambda: nn.SyncBatchNorm(6)), IMAGE, (("1", "folded"),)),
    Case("functional",
         graph(lambda m, x: nn.functional.batch_norm(m.conv(x), m.bn.running_mean, m.bn.running_var), conv=conv(), bn=bn()),
         IMAGE, (("", "folded"),)),
    # materialised weights
    Case("weight-norm", sequential(lambda: parametrizations.weight_norm(conv()()), bn()), IMAGE, (("1", "folded"),)),
    Case("spectral-norm", sequential(lambda: parametrizations.spectral_norm(conv()()), bn()), IMAGE, (("1", "folded"),)),
    # left alone, each with its reason
    Case("relu-between", sequential(conv(), nn.ReLU, bn()), IMAGE, (("2", "kept"),), "it follows relu"),
    Case("declared-in-another-order", graph(lambda m, x: m.bn(torch.relu(m.conv(x))), conv=conv(), bn=bn()), IMAGE,
         (("bn", "kept"),), "it follows relu"),
    Case("at-the-input", sequential(bn(3), conv()), IMAGE, (("0", "kept"),), "the model's input"),
    Case("second-consumer", graph(lambda m, x: (lambda y: m.bn(y) + y.mean())(m.conv(x)), conv=conv(), bn=bn()), IMAGE,
         (("bn", "kept"),), _SECOND),
    Case("second-consumer-is-the-output", graph(lambda m, x: (lambda y: (m.bn(y), y))(m.conv(x)), conv=conv(), bn=bn()),
         IMAGE, (("bn", "kept"),), _SECOND),
    Case("second-consumer-after-dropout",
         graph(lambda m, x: (lambda y: m.bn(m.drop(y)) + y)(m.conv(x)), conv=conv(), bn=bn(), drop=nn.Dropout), IMAGE,
         (("bn", "kept"),), _SECOND),
    Case("changed-in-place-between", graph(lambda m, x: m.bn(m.conv(x).add_(1.0)), conv=conv(), bn=bn()), IMAGE,
         (("bn", "kept"),), "it follows add_"),
    Case("changed-in-place-beside", graph(lambda m, x: (lambda y: (y.add_(1.0), m.bn(y))[1])(m.conv(x)), conv=conv(), bn=bn()),
         IMAGE, (("bn", "kept"),), "it follows add_"),
    Case("conv-called-twice", graph(lambda m, x: m.bn(m.conv(x)) + m.conv(x), conv=conv(), bn=bn()), IMAGE,
         (("bn", "kept"),), "used 2 times"),
    Case("shared-weight", shared_weight, IMAGE, (("bn", "kept"),), "used 2 times"),
    Case("linear-3d", graph(lambda m, x: m.bn(m.fc(x)), fc=lambda: nn.Linear(5, 7), bn=bn(4, dims=1)), ((3, 4, 5),),
         (("bn", "kept"),), "axis"),
    Case("linear-3d-equal-sizes", graph(lambda m, x: m.bn(m.fc(x)), fc=lambda: nn.Linear(5, 4), bn=bn(4, dims=1)),
         ((3, 4, 5),), (("bn", "kept"),), "equal sizes would not make it right"),
    Case("unbatched-conv1d", graph(lambda m, x: m.bn(m.conv(x)), conv=conv(3, 6, dims=1), bn=bn(6, dims=1)), ((3, 8),),
         (("bn", "kept"),), "no batch dimension"),
    Case("training-mode", in_training_mode, IMAGE, (("1", "kept"), ("3", "folded")), "training mode"),
    Case("no-statistics", sequential(conv(), bn(track_running_stats=False)), IMAGE, (("1", "kept"),), "track_running_stats"),
    Case("weight-changed-in-forward", MutatesWeight, IMAGE, (("bn", "kept"),), "changed in forward"),
    Case("hook-on-conv", with_hook("conv", lambda _module, _inputs, output: output * 2 + 1), IMAGE, (("1", "kept"),),
         "it follows add"),
    Case("hook-on-bn", with_hook("bn", lambda _module, _inputs, output: output.tanh()), IMAGE, (("1", "folded"),)),
    Case("transposed", sequential(lambda: nn.ConvTranspose2d(3, 3, 3), bn(3)), IMAGE, (("1", "kept"),), "no rule folds"),
    Case("instance-and-group-norm",
         sequential(conv(), lambda: nn.InstanceNorm2d(6, affine=True, track_running_stats=True), lambda: nn.GroupNorm(2, 6)),
         IMAGE, ()),
    Case("scale-alone", graph(lambda m, x: m.conv(x) * m.conv.bias.view(1, -1, 1, 1), conv=conv()), IMAGE, ()),
)  # fmt: skip
