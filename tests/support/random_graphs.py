"""Random networks for property tests: a program of up to twelve operations on images, drawn by Hypothesis."""

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from support.models import positive, randomise
from torch import Tensor, nn

Shape = tuple[int, int, int]  # (channels, height, width)
Step = tuple[str, Callable[[list[Tensor]], Tensor]]
_DEPTH = 12
_LARGEST = 16


class Program(nn.Module):
    """Runs its steps one after the other; each reads earlier values and adds one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        self.steps: list[Step] = []
        self.outputs: list[int] = []
        self.input_shape: Shape = (0, 0, 0)

    def layer(self, layer: nn.Module) -> nn.Module:
        self.layers.append(layer)
        return layer

    def forward(self, x: Tensor) -> Any:
        values = [x]
        for _, step in self.steps:
            values.append(step(values))
        return tuple(values[index] for index in self.outputs)


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """A network of random layers, axes, groups, paddings, shared layers and second consumers."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    program, shapes = Program(), [draw(_shapes())]
    program.input_shape = shapes[0]
    made = ["input"]
    for _ in range(draw(st.integers(2, _DEPTH))):
        recent = [index for index in range(len(shapes)) if index >= len(shapes) - 3]
        source = recent[-1] if draw(st.integers(0, 3)) else draw(st.sampled_from(recent))
        name = draw(st.sampled_from(_names(shapes, source, made)))
        made.append(name)
        step, shape = STEPS[name][1](draw, program, shapes, source)
        program.steps.append((f"{name} of {source}", step))
        shapes.append(shape)
    last = len(shapes) - 1
    program.outputs = sorted({last, draw(st.sampled_from([last, last, max(last - 1, 1)]))})
    randomise(program, draw(st.integers(0, 2**16)))
    program.eval()
    return positive(program) if draw(st.booleans()) else program


def _names(shapes: list[Shape], source: int, made: list[str]) -> list[str]:
    """Steps that fit here; a norm often comes after a layer that could absorb it, and rarely after another norm."""
    names = [name for name, (fits, _) in STEPS.items() if fits(shapes, source)]
    if made[source].startswith("norm"):
        return [name for name in names if name != "norm"]
    return names + ["norm"] * (2 * len(names) if made[source].strip() in _OFTEN_NORMALISED else len(names) // 3)


_OFTEN_NORMALISED = (
    "conv",
    "conv again",
    "transposed",
    "tokens",
    "pool",
    "concat",
    "sum",
    "shuffle",
    "piece",
    "pixels",
)


def _shapes() -> st.SearchStrategy[Shape]:
    return st.tuples(st.sampled_from([2, 4, 6]), st.integers(4, 7), st.integers(4, 7))


def _unary(
    layer: Callable[[st.DrawFn, Shape], nn.Module], result: Callable[[nn.Module, Shape], Shape] | None = None
) -> Any:
    """A step that applies one layer; its shape is that of a run on zeros unless it is given."""

    def make(draw: st.DrawFn, program: Program, shapes: list[Shape], source: int) -> tuple[Any, Shape]:
        made = program.layer(layer(draw, shapes[source]))
        return (lambda values: made(values[source])), (result or _measured)(made, shapes[source])

    return make


def _measured(layer: nn.Module, shape: Shape) -> Shape:
    with torch.no_grad():
        return tuple(layer.eval()(torch.zeros(2, *shape)).shape[1:])


def _conv(draw: st.DrawFn, shape: Shape) -> nn.Module:
    channels, *size = shape
    groups = draw(st.sampled_from([1, 1, 2 - channels % 2, channels]))
    kernel = draw(st.sampled_from([k for k in (1, 2, 3) if k <= min(size)]))
    stays = kernel == 3 and draw(st.booleans())
    padding = 1 if stays else draw(st.sampled_from([0, 0, kernel - 1]))
    mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
    return nn.Conv2d(
        channels,
        channels if stays else groups * draw(st.integers(1, max(1, _LARGEST // groups // 2))),
        kernel,
        padding=padding,
        stride=1 if stays else draw(st.sampled_from([1, 1, 2])),
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=mode if padding < min(size) else "zeros",
    )


def _transposed(draw: st.DrawFn, shape: Shape) -> nn.Module:
    groups = draw(st.sampled_from([1, 2 - shape[0] % 2, shape[0]]))
    channels = groups * draw(st.integers(1, 3))
    return nn.ConvTranspose2d(shape[0], channels, 2, stride=draw(st.sampled_from([1, 2])), groups=groups)


def _pool(draw: st.DrawFn, _shape: Shape) -> nn.Module:
    return draw(
        st.sampled_from(
            [
                nn.AvgPool2d(2),
                nn.AvgPool2d(2, padding=1, count_include_pad=draw(st.booleans())),
                nn.AvgPool2d(3, 2, ceil_mode=True),
                nn.MaxPool2d(2),
                nn.MaxPool2d(3, 1, padding=1),
                nn.AdaptiveAvgPool2d(2),
            ]
        )
    )


def _resize(draw: st.DrawFn, _shape: Shape) -> nn.Module:
    mode = draw(st.sampled_from(["nearest", "bilinear", "bicubic"]))
    return nn.Upsample(scale_factor=2, mode=mode)


def _pad(draw: st.DrawFn, _shape: Shape) -> nn.Module:
    return draw(st.sampled_from([nn.ZeroPad2d(1), nn.ReflectionPad2d(1), nn.ReplicationPad2d((1, 0, 2, 0))]))


def _activation(draw: st.DrawFn, _shape: Shape) -> nn.Module:
    inplace = draw(st.booleans())
    kinds = [
        nn.ReLU(inplace),
        nn.ReLU(inplace),
        nn.LeakyReLU(0.1, inplace),
        nn.PReLU(),
        nn.ReLU6(),
        nn.GELU(),
        nn.SiLU(),
    ]
    return draw(st.sampled_from(kinds))


def _norm(draw: st.DrawFn, shape: Shape) -> nn.Module:
    return nn.BatchNorm2d(shape[0], affine=draw(st.sampled_from([True, True, True, False])))


class _Tokens(nn.Module):
    """A linear layer on channels last, with a norm on the right or on the wrong axis between the permutations."""

    def __init__(self, channels: int, features: int) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, features)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _tokens(draw: st.DrawFn, shape: Shape) -> nn.Module:
    return _Tokens(shape[0], draw(st.sampled_from([shape[0], 4, shape[1]])))


class _Shuffle(nn.Module):
    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        channels, height, width = x.shape[1:]
        parts = x.view(x.shape[0], self.groups, channels // self.groups, height, width)
        return parts.transpose(1, 2).reshape(x.shape[0], channels, height, width)


def _again(kind: type[nn.Module]) -> Any:
    """A call of a layer that was called before: its weights are shared."""

    def make(draw: st.DrawFn, program: Program, shapes: list[Shape], source: int) -> tuple[Any, Shape]:
        layer = draw(st.sampled_from(_fitting(program, kind, shapes[source])))
        return (lambda values: layer(values[source])), _measured(layer, shapes[source])

    return make


def _fitting(program: Program, kind: type[nn.Module], shape: Shape) -> list[nn.Module]:
    sizes = {nn.Conv2d: "in_channels", nn.BatchNorm2d: "num_features"}
    found = [item for item in program.layers if isinstance(item, kind) and getattr(item, sizes[kind]) == shape[0]]
    return [item for item in found if not isinstance(item, nn.Conv2d) or min(shape[1:]) >= max(item.kernel_size)]


def _pair(combine: Callable[[Tensor, Tensor], Tensor], same_channels: bool) -> Any:
    def make(draw: st.DrawFn, _program: Program, shapes: list[Shape], source: int) -> tuple[Any, Shape]:
        partners = _partners(shapes, source, same_channels)
        other = draw(st.sampled_from(partners))
        first, second = draw(st.permutations([source, other]))
        with torch.no_grad():
            shape = combine(torch.zeros(2, *shapes[first]), torch.zeros(2, *shapes[second])).shape[1:]
        return (lambda values: combine(values[first], values[second])), tuple(shape)

    return make


def _partners(shapes: list[Shape], source: int, same_channels: bool) -> list[int]:
    start = 0 if same_channels else 1
    return [i for i, shape in enumerate(shapes) if i != source and shape[start:] == shapes[source][start:]]


def _piece(draw: st.DrawFn, _program: Program, shapes: list[Shape], source: int) -> tuple[Any, Shape]:
    channels, *size = shapes[source]
    start = draw(st.integers(0, channels - 1))
    stop = draw(st.integers(start + 1, channels))
    if draw(st.booleans()) and channels % 2 == 0:
        half = draw(st.integers(0, 1))
        return (lambda values: values[source].chunk(2, 1)[half]), (channels // 2, size[0], size[1])
    return (lambda values: values[source][:, start:stop]), (stop - start, size[0], size[1])


def _arithmetic(draw: st.DrawFn, _program: Program, shapes: list[Shape], source: int) -> tuple[Any, Shape]:
    change = draw(
        st.sampled_from([lambda x: 2.0 - x, lambda x: x * -0.5, lambda x: x / 3.0 + 1.0, lambda x: (x + 0).add_(1.5)])
    )
    return (lambda values: change(values[source])), shapes[source]


def _drop(draw: st.DrawFn, _shape: Shape) -> nn.Module:
    return draw(st.sampled_from([nn.Dropout(), nn.Dropout2d(), nn.Identity()]))


def _always(_shapes: list[Shape], _source: int) -> bool:
    return True


def _roomy(shapes: list[Shape], source: int) -> bool:
    return min(shapes[source][1:]) >= 3


def _small(shapes: list[Shape], source: int) -> bool:
    return max(shapes[source][1:]) <= 10


#: Name -> (whether it fits here, makes it).
STEPS: dict[str, tuple[Callable[[list[Shape], int], bool], Any]] = {
    "norm": (_always, _unary(_norm)),
    "conv": (_always, _unary(_conv)),
    "conv ": (_always, _unary(_conv)),
    "conv  ": (_always, _unary(_conv)),
    "transposed": (_small, _unary(_transposed)),
    "pool": (_roomy, _unary(_pool)),
    "resize": (_small, _unary(_resize)),
    "pad": (_roomy, _unary(_pad)),
    "activation": (_always, _unary(_activation)),
    "activation ": (_always, _unary(_activation)),
    "dropout": (_always, _unary(_drop)),
    "tokens": (_always, _unary(_tokens)),
    "shuffle": (lambda shapes, at: shapes[at][0] % 2 == 0, _unary(lambda _draw, _shape: _Shuffle(2))),
    "pixels": (
        lambda shapes, at: shapes[at][0] % 4 == 0 and _small(shapes, at),
        _unary(lambda _d, _s: nn.PixelShuffle(2)),
    ),
    "sum": (lambda shapes, at: bool(_partners(shapes, at, True)), _pair(torch.add, True)),
    "difference": (lambda shapes, at: bool(_partners(shapes, at, True)), _pair(torch.sub, True)),
    "product": (lambda shapes, at: bool(_partners(shapes, at, True)), _pair(torch.mul, True)),
    "concat": (lambda shapes, at: bool(_partners(shapes, at, False)), _pair(lambda a, b: torch.cat([a, b], 1), False)),
    "piece": (_always, _piece),
    "arithmetic": (_always, _arithmetic),
}


def _reusing(kind: type[nn.Module]) -> Any:
    """Draw a layer again where one fits, else make a new one."""
    fresh = _unary(_conv if kind is nn.Conv2d else _norm)

    def make(draw: st.DrawFn, program: Program, shapes: list[Shape], source: int) -> tuple[Any, Shape]:
        again = bool(_fitting(program, kind, shapes[source]))
        return (_again(kind) if again else fresh)(draw, program, shapes, source)

    return make


STEPS["conv again"] = (_roomy, _reusing(nn.Conv2d))
STEPS["norm again"] = (_always, _reusing(nn.BatchNorm2d))
