"""Small models for the table of cases, and random statistics for them."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune


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


_STATISTICS = (("weight", "bias", "running_mean", "running_var"), ("gamma", "beta", "moving_mean", "moving_var"))


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
    """A convolution whose weight changes at each forward."""

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


def transposed(
    channels_in: int = 3, channels_out: int = 6, *, dims: int = 2, **options: Any
) -> Callable[[], nn.Module]:
    kinds = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
    return lambda: kinds[dims](channels_in, channels_out, 3, **options)


def linear(features_in: int = 5, features_out: int = 7, **options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(features_in, features_out, **options)


def positive(model: nn.Module) -> nn.Module:
    """Every gamma positive; for rules that depend on the sign."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.weight is not None:
                module.weight.abs_().add_(0.1)
    return model


class Product(nn.Module):
    """A product with a stored matrix, on the right or on the left of the value, with or without an addition."""

    def __init__(self, *shape: int, left: bool = False, bias: bool = False) -> None:
        super().__init__()
        self.weight, self.left = nn.Parameter(torch.randn(*shape)), left
        self.bias = nn.Parameter(torch.randn(shape[-1])) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        result = self.weight @ x if self.left else x @ self.weight
        return result if self.bias is None else result + self.bias


class AddMM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(5, 7)), nn.Parameter(torch.randn(7))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


class AddCMul(nn.Module):
    """A norm written as one fused operator."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma, self.beta = (nn.Parameter(torch.randn(channels, 1, 1)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.beta, x, self.gamma)


class Subclass(nn.BatchNorm2d):
    """A user's own BatchNorm that changes nothing."""


def pruned() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))
    prune.random_unstructured(model[0], "weight", 0.4)
    return model


def old_weight_norm() -> nn.Module:
    """Weight normalisation by a hook, as it was before parametrisations."""
    layer = nn.Conv2d(3, 6, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(layer)
    return nn.Sequential(layer, nn.BatchNorm2d(6))


def lazy() -> nn.Module:
    model = nn.Sequential(nn.LazyConv2d(6, 3), nn.LazyBatchNorm2d())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.eval()(torch.zeros(2, 3, 8, 8))
    return model


def monte_carlo_dropout() -> nn.Module:
    model = nn.Sequential(conv()(), nn.Dropout(0.5), bn()())
    model.eval()
    model[1].train()
    return model
