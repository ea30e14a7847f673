"""The one table of models, with their inputs and the outcome of each BatchNorm.

Statistics are always randomised per channel (``randomise``): a fresh BatchNorm makes every wrong fold look right. A row that
folds has a twin in which a second consumer, another axis, a sign or an edge makes the same fold wrong.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from support.models import (
    AddCMul,
    AddMM,
    Chapter,
    Graph,
    MutatesWeight,
    Product,
    Subclass,
    bn,
    conv,
    graph,
    in_training_mode,
    lazy,
    linear,
    monte_carlo_dropout,
    old_weight_norm,
    positive,
    pruned,
    randomise,
    sequential,
    shared_weight,
    transposed,
    with_hook,
)
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from torchvision.ops import FrozenBatchNorm2d

from bnexport.nn.batch_norm import BatchNorm

__all__ = ["CASES", "Case", "Graph", "randomise"]

Outcomes = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Case:
    """One model."""

    name: str
    build: Callable[[], nn.Module]  # Makes the model; its BatchNorms are randomised afterwards
    shapes: tuple[tuple[int, ...], ...]  # One per input, batch first
    outcomes: Outcomes  # Module path -> outcome, in the order of the calls
    because: str = ""  # Part of the reason of the first BatchNorm that is not gone
    positive: bool = False  # All gammas are positive
    max_growth: float = 1.1  # As for ``bnexport.fold``
    clamps: bool = False  # As for ``bnexport.fold``

    def model(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        model = randomise(self.build(), seed).eval()
        for path in TRAINING.get(self.name, ()):
            model.get_submodule(path).train()
        return positive(model) if self.positive else model

    def inputs(self, seed: int = 1, batch: int | None = None) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        return tuple(torch.randn(batch or shape[0], *shape[1:], generator=generator) for shape in self.shapes)


#: Layers that are in training mode on purpose.
TRAINING = {"training-mode": ("1",), "monte-carlo-dropout": ("1",)}
IMAGE = ((2, 3, 8, 8),)
SIX = ((2, 6, 8, 8),)
_SECOND = "second consumer"
_OUTPUT = "output of the model"


def one(path: str, outcome: str) -> Outcomes:
    return ((path, outcome),)


def _backward() -> tuple[Case, ...]:
    """Linear layer <- batch norm."""
    gone = one("1", "backward")
    return (
        Case("conv1d", sequential(conv(dims=1), bn(dims=1)), ((2, 3, 8),), gone),
        Case("conv2d", sequential(conv(), bn(), nn.ReLU), IMAGE, gone),
        Case("conv3d", sequential(conv(dims=3), bn(dims=3)), ((2, 3, 5, 6, 7),), gone),
        Case("conv-no-bias", sequential(conv(bias=False), bn()), IMAGE, gone),
        Case("conv-groups", sequential(conv(4, 6, groups=2), bn()), ((2, 4, 8, 8),), gone),
        Case("conv-depthwise", sequential(conv(3, 6, groups=3), bn()), IMAGE, gone),
        Case("conv-stride", sequential(conv(stride=2, dilation=2), bn()), IMAGE, gone),
        Case("conv-padding", sequential(conv(padding=1), bn()), IMAGE, gone),
        Case("conv-same", sequential(conv(padding="same"), bn()), IMAGE, gone),
        Case("conv-reflect", sequential(conv(padding=1, padding_mode="reflect"), bn()), IMAGE, gone),
        Case("conv-circular", sequential(conv(padding=2, padding_mode="circular"), bn()), IMAGE, gone),
        Case("conv-transposed-1d", sequential(transposed(dims=1), bn(dims=1)), ((2, 3, 8),), gone),
        Case("conv-transposed-2d", sequential(transposed(stride=2, padding=1, output_padding=1), bn()), IMAGE, gone),
        Case("conv-transposed-3d", sequential(transposed(dims=3), bn(dims=3)), ((2, 3, 3, 4, 5),), gone),
        Case("conv-transposed-square", sequential(transposed(3, 3), bn(3)), IMAGE, gone),
        Case("conv-transposed-groups", sequential(transposed(6, 4, groups=2), bn(4)), SIX, gone),
        Case("conv-transposed-multiplier", sequential(transposed(6, 12, groups=6), bn(12)), SIX, gone),
        Case("one-channel", sequential(conv(3, 1), bn(1)), IMAGE, gone),
        Case("not-affine", sequential(conv(), bn(affine=False)), IMAGE, gone),
        Case("dropout-between", sequential(conv(), nn.Dropout2d, nn.Identity, bn()), IMAGE, one("3", "backward")),
        Case("clone-between", graph(lambda m, x: m.bn(m.conv(x).clone().contiguous()), conv=conv(), bn=bn()), IMAGE,
             one("bn", "backward")),
        Case("relu-in-place", sequential(conv(), bn(), lambda: nn.ReLU(inplace=True), conv(6, 6), bn()), IMAGE,
             (("1", "backward"), ("4", "backward"))),
        Case("two-in-a-row", sequential(conv(), bn(), bn()), IMAGE, (("1", "backward"), ("2", "backward"))),
        Case("called-twice-by-two-convs", graph(lambda m, x: m.bn(m.a(x)) * m.bn(m.b(x)), a=conv(), b=conv(), bn=bn()),
             IMAGE, (("bn", "backward"), ("bn", "backward"))),
        Case("residual", graph(lambda m, x: torch.relu(x + m.bn(m.conv(x))), conv=conv(3, 3, padding=1), bn=bn(3)), IMAGE,
             one("bn", "backward")),
        Case("linear", sequential(linear(), bn(7, dims=1), nn.Sigmoid), ((3, 5),), gone),
        Case("linear-no-bias", sequential(linear(bias=False), bn(7, dims=1)), ((3, 5),), gone),
        Case("addmm", sequential(AddMM, bn(7, dims=1)), ((3, 5),), gone),
        Case("matmul", sequential(lambda: Product(5, 7), bn(7, dims=1)), ((3, 5),), gone),
        Case("matmul-add", sequential(lambda: Product(5, 7, bias=True), bn(7, dims=1)), ((3, 5),), gone),
        Case("matmul-on-the-left", sequential(lambda: Product(4, 6, left=True), bn(4, dims=1)), ((3, 6, 5),), gone),
        Case("batched-product", graph(lambda m, x: m.bn(m.p(x).permute(0, 3, 1, 2)), p=lambda: Product(2, 5, 7), bn=bn(7)),
             ((2, 2, 3, 5),), one("bn", "through")),
        # what acts like a BatchNorm
        Case("scratch-conv", sequential(conv(), lambda: BatchNorm(6, 4)), IMAGE, gone),
        Case("scratch-linear", sequential(linear(), lambda: BatchNorm(7, 2)), ((3, 5),), gone),
        Case("scratch-one-channel", sequential(conv(3, 1), lambda: BatchNorm(1, 4)), IMAGE, gone),
        Case("scratch-in-a-row", sequential(conv(), lambda: BatchNorm(6, 4), lambda: BatchNorm(6, 4)), IMAGE,
             (("1", "backward"), ("2", "backward"))),
        Case("frozen", sequential(conv(), lambda: FrozenBatchNorm2d(6), nn.ReLU), IMAGE, gone),
        Case("chapter", Chapter, IMAGE, one("", "backward")),
        Case("addcmul", sequential(conv(), lambda: AddCMul(6)), IMAGE, gone),
        Case("sync", sequential(conv(), lambda: nn.SyncBatchNorm(6)), IMAGE, gone),
        Case("lazy", lazy, IMAGE, gone),
        Case("subclass", sequential(conv(), lambda: Subclass(6)), IMAGE, gone),
        Case("norm-with-activation", sequential(conv(), lambda: BatchNormAct2d(6)), IMAGE, gone),
        Case("functional",
             graph(lambda m, x: functional.batch_norm(m.conv(x), m.bn.running_mean, m.bn.running_var), conv=conv(), bn=bn()),
             IMAGE, one("", "backward")),
        # materialised weights
        Case("weight-norm", sequential(lambda: parametrizations.weight_norm(conv()()), bn()), IMAGE, gone),
        Case("weight-norm-by-hook", old_weight_norm, IMAGE, gone),
        Case("spectral-norm", sequential(lambda: parametrizations.spectral_norm(conv()()), bn()), IMAGE, gone),
        Case("pruned", pruned, IMAGE, gone),
    )  # fmt: skip


def _through_backward() -> tuple[Case, ...]:
    """Linear layer, operations that commute, batch norm; each with a twin that does not commute."""
    moved = one("2", "through")

    def across(name: str, layer: Callable[[], nn.Module], outcome: str = "through", because: str = "", size: int = 6,
               **options: bool) -> Case:  # fmt: skip
        return Case(name, sequential(conv(), layer, bn(size)), IMAGE, one("2", outcome), because, **options)

    return (
        across("avg-pool", lambda: nn.AvgPool2d(2)),
        across("avg-pool-padding-not-counted", lambda: nn.AvgPool2d(2, padding=1, count_include_pad=False)),
        across("avg-pool-padding-counted", lambda: nn.AvgPool2d(2, padding=1), "affine", "averages or pads with zeros"),
        across("avg-pool-ceil", lambda: nn.AvgPool2d(4, ceil_mode=True)),
        across("avg-pool-divisor", lambda: nn.AvgPool2d(2, divisor_override=3), "affine", "averages or pads with zeros"),
        across("adaptive-pool", lambda: nn.AdaptiveAvgPool2d(2)),
        across("upsample-nearest", lambda: nn.Upsample(scale_factor=2)),
        across("upsample-bilinear", lambda: nn.Upsample(scale_factor=2, mode="bilinear")),
        across("upsample-bicubic", lambda: nn.Upsample(size=(9, 7), mode="bicubic", align_corners=True)),
        across("zero-pad", lambda: nn.ZeroPad2d(1), "affine", "pads with zeros"),
        across("replication-pad", lambda: nn.ReplicationPad2d(1)),
        across("max-pool", lambda: nn.MaxPool2d(2), "affine", "scales are negative"),
        across("max-pool-positive", lambda: nn.MaxPool2d(3, 2, padding=1), positive=True),
        across("adaptive-max-pool-positive", lambda: nn.AdaptiveMaxPool2d(2), positive=True),
        across("channel-shuffle", lambda: nn.ChannelShuffle(2)),
        across("relu-between", nn.ReLU, "affine", "bound per channel"),
        across("relu-between-clamped", nn.ReLU, positive=True, clamps=True),
        across("relu-between-both-signs", nn.ReLU, "affine", "two clamps", clamps=True),
        across("gelu-between", nn.GELU, "affine", "it follows gelu"),
        across("hardswish-between", nn.Hardswish, "affine", "it follows hardswish"),
        across("leaky-relu-between", nn.LeakyReLU, "affine", "shift can't cross leaky_relu", positive=True),
        Case("pixel-shuffle", sequential(conv(3, 8), lambda: nn.PixelShuffle(2), bn(2)), IMAGE, moved),
        Case("pixel-unshuffle", sequential(conv(3, 2), lambda: nn.PixelUnshuffle(2), bn(8)), IMAGE, one("2", "affine"),
             "different scales or shifts into positions"),
        Case("mean", graph(lambda m, x: m.bn(m.conv(x).mean((2, 3))), conv=conv(), bn=bn(dims=1)), IMAGE, one("bn", "through")),
        Case("squeezed", sequential(conv(3, 6, 8), lambda: nn.Flatten(1), bn(dims=1)), IMAGE, moved),
        Case("flattened-positions", sequential(conv(3, 2, 7), lambda: nn.Flatten(1), bn(8, dims=1)), IMAGE,
             one("2", "affine"), "normalises axis"),
        Case("tokens-flattened", graph(lambda m, x: m.bn(m.fc(x).flatten(0, 1)).reshape_as(m.fc(x)), fc=linear(), bn=bn(7, dims=1)),
             ((2, 4, 5),), one("bn", "affine"), "used 2 times"),
        Case("tokens", graph(lambda m, x: m.bn(m.fc(x).flatten(0, 1)).reshape(x.shape[0], 4, 7), fc=linear(), bn=bn(7, dims=1)),
             ((2, 4, 5),), one("bn", "through")),
        Case("channels-last", graph(lambda m, x: m.bn(m.fc(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)), fc=linear(3, 6), bn=bn()),
             IMAGE, one("bn", "through")),
        Case("shuffle-by-views", graph(lambda m, x: m.bn(m.conv(x).view(-1, 2, 3, 6, 6).transpose(1, 2).reshape(-1, 6, 6, 6)),
                                       conv=conv(), bn=bn()), IMAGE, one("bn", "through")),
        Case("concat", graph(lambda m, x: m.bn(torch.cat([m.a(x), m.b(x)], 1)), a=conv(3, 4), b=conv(3, 2), bn=bn()), IMAGE,
             one("bn", "through")),
        Case("concat-second-consumer", graph(lambda m, x: (lambda y: m.bn(torch.cat([y, m.b(x)], 1)) + y.mean())(m.a(x)),
                                             a=conv(3, 4), b=conv(3, 2), bn=bn()), IMAGE, one("bn", "affine"), _SECOND),
        Case("chunk", graph(lambda m, x: (lambda a, b: m.bn(a) * b.sigmoid())(*m.conv(x).chunk(2, 1)), conv=conv(), bn=bn(3)),
             IMAGE, one("bn", "through")),
        Case("split-both", graph(lambda m, x: (lambda a, b: torch.cat([m.p(a), m.q(b)], 1))(*m.conv(x).split([2, 4], 1)),
                                 conv=conv(), p=bn(2), q=bn(4)), IMAGE, (("p", "through"), ("q", "through"))),
        Case("slice", graph(lambda m, x: (lambda y: m.bn(y[:, :4]).sum() + y[:, 4:])(m.conv(x)), conv=conv(), bn=bn(4)), IMAGE,
             one("bn", "through")),
        Case("slice-overlapping", graph(lambda m, x: (lambda y: m.bn(y[:, :4]).sum() + y[:, 3:])(m.conv(x)), conv=conv(), bn=bn(4)),
             IMAGE, one("bn", "affine"), _SECOND),
        Case("sum", graph(lambda m, x: m.bn(m.a(x) + m.b(x)), a=conv(), b=conv(), bn=bn()), IMAGE, one("bn", "through")),
        Case("difference", graph(lambda m, x: m.bn(torch.sub(m.a(x), m.b(x), alpha=0.5)), a=conv(), b=conv(), bn=bn()), IMAGE,
             one("bn", "through")),
        Case("sum-second-consumer", graph(lambda m, x: (lambda y: m.bn(m.a(x) + y) * y)(m.b(x)), a=conv(), b=conv(), bn=bn()),
             IMAGE, one("bn", "affine"), _SECOND),
        Case("sum-with-itself", graph(lambda m, x: (lambda y: m.bn(y + y))(m.a(x)), a=conv(), bn=bn()), IMAGE,
             one("bn", "affine"), "to itself"),
        Case("gate", graph(lambda m, x: m.out(m.bn(m.a(x) * m.b(x).sigmoid())), a=conv(), b=conv(), bn=bn(), out=conv(6, 2)),
             IMAGE, one("bn", "forward")),
        Case("gate-then-padding", graph(lambda m, x: m.out(m.bn(m.a(x) * m.b(x).sigmoid())), a=conv(), b=conv(), bn=bn(),
                                        out=conv(6, 2, padding=1)), IMAGE, one("bn", "affine"), "product of two values"),
        Case("changed-in-place-between", graph(lambda m, x: m.bn(m.conv(x).add_(1.0)), conv=conv(), bn=bn()), IMAGE,
             one("bn", "backward")),
        Case("changed-in-place-beside", graph(lambda m, x: (lambda y: (y.add_(1.0), m.bn(y))[1])(m.conv(x)), conv=conv(), bn=bn()),
             IMAGE, one("bn", "backward")),
        Case("changed-through-a-view", graph(lambda m, x: (lambda y: (y[:, :2].mul_(2.0), m.bn(y))[1])(m.conv(x)),
                                             conv=conv(), bn=bn()), IMAGE, one("bn", "kept"), "changed in forward"),
        Case("scaled-between", graph(lambda m, x: m.bn(2.0 - m.conv(x) / 3.0), conv=conv(), bn=bn()), IMAGE, one("bn", "backward")),
        Case("hook-on-conv", with_hook("conv", lambda _module, _inputs, output: output * 2 + 1), IMAGE, one("1", "backward")),
        Case("hook-on-bn", with_hook("bn", lambda _module, _inputs, output: output.tanh()), IMAGE, one("1", "backward")),
    )  # fmt: skip


def _forward() -> tuple[Case, ...]:
    """Batch norm -> linear layer, directly and through what commutes."""
    gone, left = one("0", "forward"), one("0", "affine")
    return (
        Case("at-the-input", sequential(bn(3), conv()), IMAGE, gone),
        Case("before-conv1d", sequential(bn(3, dims=1), conv(dims=1)), ((2, 3, 8),), gone),
        Case("before-groups", sequential(bn(6), conv(6, 4, groups=2, bias=False)), SIX, gone),
        Case("before-depthwise", sequential(bn(6), conv(6, 12, groups=6)), SIX, gone),
        Case("before-reflect", sequential(bn(3), conv(padding=1, padding_mode="reflect")), IMAGE, one("0", "through")),
        Case("before-zero-padding", sequential(bn(3), conv(padding=1)), IMAGE, left, "pads its input with zeros"),
        Case("before-zero-padding-positive", sequential(bn(3), conv(padding=1)), IMAGE, left, "pads its input with zeros",
             positive=True),
        Case("before-zero-padding-map", sequential(bn(3), conv(3, 2, padding=1, stride=2)), IMAGE, gone, max_growth=4.0),
        Case("before-transposed-positive", sequential(bn(6), transposed(6, 12, groups=6)), SIX, left, "positions use different kernel taps",
             positive=True),
        Case("before-transposed", sequential(bn(3), transposed(3, 4)), IMAGE, left, "positions use different kernel taps"),
        Case("before-linear", sequential(bn(5, dims=1), nn.Dropout, linear()), ((3, 5),), gone),
        Case("before-matmul", sequential(bn(5, dims=1), lambda: Product(5, 7)), ((3, 5),), gone),
        Case("before-matmul-on-the-left", sequential(bn(6, dims=1), lambda: Product(4, 6, left=True)), ((3, 6, 5),), gone),
        Case("before-addmm", sequential(bn(5, dims=1), AddMM), ((3, 5),), gone),
        Case("before-flatten", sequential(bn(3), nn.Flatten, linear(192, 4)), IMAGE, one("0", "through")),
        Case("before-pool-and-head", sequential(bn(3), lambda: nn.AdaptiveAvgPool2d(1), nn.Flatten, linear(3, 4)), IMAGE,
             one("0", "through")),
        Case("before-mean", graph(lambda m, x: m.fc(m.bn(x).mean((2, 3))), bn=bn(3), fc=linear(3, 4)), IMAGE,
             one("bn", "through")),
        Case("before-max-pool", sequential(bn(3), lambda: nn.MaxPool2d(2), conv()), IMAGE, left, "scales are negative"),
        Case("before-max-pool-positive", sequential(bn(3), lambda: nn.MaxPool2d(2), conv()), IMAGE, one("0", "through"),
             positive=True),
        Case("before-two-layers", graph(lambda m, x: (lambda y: m.a(y) + m.b(y))(m.bn(x)), bn=bn(3), a=conv(), b=conv()), IMAGE,
             one("bn", "forward")),
        Case("before-a-layer-and-the-output", graph(lambda m, x: (lambda y: (m.a(y), y))(m.bn(x)), bn=bn(3), a=conv()), IMAGE,
             one("bn", "affine"), _OUTPUT),
        Case("before-another", sequential(bn(3), bn(3), conv()), IMAGE, (("0", "merged"), ("1", "forward"))),
        Case("two-that-stay", sequential(bn(3), bn(3), nn.GELU), IMAGE, (("0", "merged"), ("1", "affine")), "feeds gelu"),
        Case("before-concat", graph(lambda m, x, y: m.out(torch.cat([m.bn(x), y.tanh()], 1)), bn=bn(3), out=conv(6, 2)),
             ((2, 3, 8, 8), (2, 3, 8, 8)), one("bn", "through")),
        Case("before-chunk", graph(lambda m, x: (lambda a, b: m.a(a) + m.b(b))(*m.bn(x).chunk(2, 1)), bn=bn(6), a=conv(), b=conv()),
             SIX, one("bn", "through")),
        Case("before-pixel-unshuffle", sequential(bn(3), lambda: nn.PixelUnshuffle(2), conv(12, 4)), IMAGE, one("0", "through")),
        Case("before-relu", sequential(bn(3), nn.ReLU, conv()), IMAGE, left, "bound per channel"),
        Case("before-relu-clamped", sequential(bn(3), nn.ReLU, conv()), IMAGE, one("0", "through"), clamps=True),
        Case("before-relu6-clamped", sequential(bn(3), nn.ReLU6, conv()), IMAGE, one("0", "through"), clamps=True),
        Case("before-relu-sign-rule", sequential(bn(3), nn.ReLU, conv(padding=1)), IMAGE, left, "bound per channel", positive=True),
        Case("before-prelu-sign-rule", sequential(bn(3), nn.PReLU, conv()), IMAGE, left, "shift can't cross", positive=True),
        Case("before-leaky-both-signs", sequential(bn(3), nn.LeakyReLU, conv()), IMAGE, left, "shift can't cross"),
        Case("before-sum", graph(lambda m, x, y: m.out(m.bn(x) + y), bn=bn(3), out=conv()), ((2, 3, 8, 8), (2, 3, 8, 8)),
             one("bn", "affine"), "other operand"),
        Case("scale-before-shift-after", graph(lambda m, x, y: m.out(m.bn(m.a(x).relu()) + y), a=conv(), bn=bn(), out=conv(6, 2)),
             ((2, 3, 8, 8), (2, 6, 6, 6)), one("bn", "through"), positive=True),
    )  # fmt: skip


def _branches_and_sharing() -> tuple[Case, ...]:
    """Sums of parallel branches, weights that several calls read."""

    def rep(m: Graph, x: Tensor) -> Tensor:
        y = x.tanh()
        return torch.relu(m.b3(m.c3(y)) + m.b1(m.c1(y)) + m.b0(y))

    branch = {
        "c3": conv(6, 6, padding=1, bias=False),
        "b3": bn(),
        "c1": conv(6, 6, 1, bias=False),
        "b1": bn(),
        "b0": bn(),
    }
    wide = {**branch, "c3": conv(6, 6, padding=1, groups=6), "c1": conv(6, 6, 1, groups=6)}
    uneven = {**branch, "c3": conv(6, 6, padding=2, dilation=2), "c1": conv(6, 6, 1, padding=0)}
    odd = {**branch, "c3": conv(6, 6, 4, padding="same"), "c1": conv(6, 6, 1, groups=3)}
    merged = (("b3", "backward"), ("b1", "backward"), ("b0", "merged"))
    skip = graph(lambda m, x: (lambda y: m.bn(m.a(y) + m.b(y) + y))(x.tanh()), a=conv(3, 3, padding=1, groups=3),
                 b=conv(3, 3, 1, groups=3), bn=bn(3))  # fmt: skip
    both = graph(lambda m, x, y: m.bn(m.conv(x)) + m.bn(m.conv(y)).tanh(), conv=conv(), bn=bn())
    twice = graph(lambda m, x: m.bn(m.conv(x)) + m.conv(x), conv=conv(), bn=bn())
    norms = graph(lambda m, x: m.p(m.conv(x)) * m.q(m.conv(x.tanh())), conv=conv(), p=bn(), q=bn())
    return (
        Case("rep-vgg", graph(rep, **branch), SIX, merged),
        Case("rep-vgg-depthwise", graph(rep, **wide), SIX, merged),
        Case("rep-vgg-dilated", graph(rep, **uneven), SIX, merged),
        Case("rep-vgg-even-kernel", graph(rep, **odd), SIX, merged),
        Case("rep-vgg-stride", graph(lambda m, x: m.b3(m.c3(x)) + m.b0(x)[:, :, ::2, ::2], c3=conv(6, 6, padding=1, stride=2),
                                     b3=bn(), b0=bn()), SIX, (("b3", "backward"), ("b0", "affine")), "slice"),
        Case("rep-vgg-second-consumer", graph(lambda m, x: (lambda z: m.b3(m.c3(x)) + z + z.mean())(m.b0(x)),
                                              c3=conv(6, 6, padding=1), b3=bn(), b0=bn()), SIX,
             (("b0", "affine"), ("b3", "backward")), "other operand"),
        Case("skip-into-convolution", skip, IMAGE, one("bn", "through")),
        Case("conv-called-twice", twice, IMAGE, one("bn", "affine"), "used 2 times"),
        Case("conv-called-twice-unshared", twice, IMAGE, one("bn", "backward"), max_growth=2.0),
        Case("conv-and-norm-called-twice", both, ((2, 3, 8, 8), (2, 3, 8, 8)), (("bn", "backward"), ("bn", "backward"))),
        Case("conv-with-two-norms", norms, IMAGE, (("p", "affine"), ("q", "affine")), "used 2 times"),
        Case("conv-with-two-norms-unshared", norms, IMAGE, (("p", "backward"), ("q", "backward")), max_growth=2.0),
        Case("shared-weight", shared_weight, IMAGE, one("bn", "affine"), "used 2 times"),
    )  # fmt: skip


def _left_alone() -> tuple[Case, ...]:
    """Cases that must stay, each with its reason."""
    return (
        Case("declared-in-another-order", graph(lambda m, x: m.bn(torch.relu(m.conv(x))), conv=conv(), bn=bn()), IMAGE,
             one("bn", "affine"), "before: across relu"),
        Case("second-consumer", graph(lambda m, x: (lambda y: m.bn(y) + y.mean())(m.conv(x)), conv=conv(), bn=bn()), IMAGE,
             one("bn", "affine"), _SECOND),
        Case("second-consumer-is-the-output", graph(lambda m, x: (lambda y: (m.bn(y), y))(m.conv(x)), conv=conv(), bn=bn()),
             IMAGE, one("bn", "affine"), _SECOND),
        Case("second-consumer-after-dropout",
             graph(lambda m, x: (lambda y: m.bn(m.drop(y)) + y)(m.conv(x)), conv=conv(), bn=bn(), drop=nn.Dropout), IMAGE,
             one("bn", "affine"), _SECOND),
        Case("linear-3d", graph(lambda m, x: m.bn(m.fc(x)), fc=linear(), bn=bn(4, dims=1)), ((3, 4, 5),), one("bn", "affine"), "axis"),
        Case("linear-3d-equal-sizes", graph(lambda m, x: m.bn(m.fc(x)), fc=linear(5, 4), bn=bn(4, dims=1)),
             ((3, 4, 5),), one("bn", "affine"), "equal sizes would not make it right"),
        Case("unbatched-conv1d", graph(lambda m, x: m.bn(m.conv(x)), conv=conv(3, 6, dims=1), bn=bn(6, dims=1)), ((3, 8),),
             one("bn", "affine"), "no batch dimension"),
        Case("training-mode", in_training_mode, IMAGE, (("1", "kept"), ("3", "backward")), "training mode"),
        Case("monte-carlo-dropout", monte_carlo_dropout, IMAGE, one("2", "affine"), "it follows dropout"),
        Case("no-statistics", sequential(conv(), bn(track_running_stats=False)), IMAGE, one("1", "kept"), "track_running_stats"),
        Case("weight-changed-in-forward", MutatesWeight, IMAGE, one("bn", "affine"), "changed in forward"),
        Case("instance-and-group-norm",
             sequential(conv(), lambda: nn.InstanceNorm2d(6, affine=True, track_running_stats=True), lambda: nn.GroupNorm(2, 6)),
             IMAGE, ()),
        Case("scale-alone", graph(lambda m, x: m.conv(x) * m.conv.bias.view(1, -1, 1, 1), conv=conv()), IMAGE, ()),
    )  # fmt: skip


CASES: tuple[Case, ...] = (*_backward(), *_through_backward(), *_forward(), *_branches_and_sharing(), *_left_alone())
