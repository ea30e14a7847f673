"""The graph on which folding works: values, the operation that computes each value, and its readers, without a framework.

A backend (``torch_backend`` for graphs of torch.export, ``onnx_backend`` for ONNX files) reads its nodes into these kinds,
evaluates them, and writes the changed ones back. The rules in between are the same for both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from bnexport.folding.affine import Affine, Dim


@dataclass(eq=False)
class Weight:
    """A stored tensor of a layer."""

    name: str  # The backend's name; "" for a tensor made by folding
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]  # Returns the tensor in float64
    readers: int = 1  # Number of operations that read the tensor
    # Number of elements that the file computes instead of storing (an expanded constant). A folded weight is stored in full.
    made: int = 0

    @property
    def elements(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()


class Kind:
    """The function of an operation. ``propagation`` defines for each subclass how an affine crosses it."""


@dataclass(frozen=True)
class Geometry:
    """Stride, dilation and zero padding (at the low end) of a convolution, per spatial axis."""

    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]


@dataclass(frozen=True)
class Layer(Kind):
    """A linear layer: ``W x + b``, then ``after`` added."""

    name: str  # Name in messages: "convolution", "linear layer"
    layout: str  # Key of ABSORBERS
    weight: Weight
    bias: Weight | None  # One value per output channel
    groups: int = 1
    out_axis: int | str = 1  # Axis of the output's channels, or a sentence why there is none
    in_axis: int | str = 1  # Axis of the input's channels, or a sentence why there is none
    geometry: Geometry | None = None  # Set for a convolution
    zero_padded: bool = False  # True if the input is padded with zeros
    takes_bias: bool = True  # True if the operation has a bias argument
    after: Tensor | None = None  # A shift that the bias can't hold: float64, broadcast over the output

    @classmethod
    def convolution(
        cls, weight: Weight, bias: Weight | None, *, transposed: bool, geometry: Geometry | None, **options: Any
    ) -> Layer:
        """Return a convolution, with further fields in ``options``."""
        name, layout = ("transposed convolution", "transposed") if transposed else ("convolution", "rows")
        return cls(name, layout, weight, bias, geometry=geometry, **options)

    @classmethod
    def matrix_product(cls, weight: Weight, before: Sequence[Any], rank: int, *, right: bool) -> Layer | str:
        """Return ``x @ W`` (``right``) or ``W @ x`` for an x of shape ``before``, or a sentence why it is not a layer.

        ``rank`` is the number of axes of the result.
        """
        if len(before) < 2 or len(weight.shape) < 2:
            return "a product with a vector has no channel axis"
        if not len(before) == rank >= len(weight.shape):
            return "its weight adds axes to the value"
        axis = rank - 1 if right else rank - 2
        layout = "right" if right else "left"
        return cls("matrix product", layout, weight, None, out_axis=axis, in_axis=axis, takes_bias=False)


@dataclass(frozen=True)
class ConstantAffine(Kind):
    """A scale and a shift by constants: a BatchNorm, or plain arithmetic."""

    affine: Affine


@dataclass(frozen=True)
class Identity(Kind):
    """Returns one of its inputs unchanged."""

    index: int = 0


@dataclass(frozen=True)
class Reshape(Kind):
    """Another shape, the same order of elements."""


@dataclass(frozen=True)
class Permute(Kind):
    """Axes in another order: output axis i is input axis ``axes[i]``."""

    axes: tuple[int, ...]


@dataclass(frozen=True)
class Reorder(Kind):
    """Positions of one axis in another order: output position i is input position ``index[i]``."""

    axis: int
    index: tuple[int, ...]


@dataclass(frozen=True)
class PixelShuffle(Kind):
    """Channels to space by a factor, as ``torch.nn.PixelShuffle``; ``inverse`` as ``PixelUnshuffle``."""

    factor: int
    inverse: bool = False


@dataclass(frozen=True)
class Average(Kind):
    """Every output is a weighted mean along some axes (pooling, interpolation, padding by copies)."""

    axes: tuple[int, ...]  # The axes along which values are mixed
    exact: bool = True  # True if the weights add up to one everywhere; False where zeros are averaged in or padded


@dataclass(frozen=True)
class Mean(Kind):
    """The mean over whole axes."""

    axes: tuple[int, ...]
    keepdim: bool


@dataclass(frozen=True)
class WindowMaximum(Kind):
    """The largest value along some axes."""

    axes: tuple[int, ...]


@dataclass(frozen=True)
class Clamp(Kind):
    """``min(max(x, low), high)``: ReLU is (0, inf), ReLU6 (0, 6). Bounds are float64 and broadcast over the value."""

    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, low: Tensor | float, high: Tensor | float, rank: int) -> Clamp | None:
        """Return the clamp of a value with ``rank`` axes; None if a lower bound is above its upper bound."""
        ones = torch.ones([1] * rank, dtype=torch.float64)
        return None if bool((low * ones > high * ones).any()) else cls(low * ones, high * ones)

    def same_bounds(self, other: Kind) -> bool:
        """Return True if another kind is a clamp with the same bounds."""
        return isinstance(other, Clamp) and bool((self.low == other.low).all() and (self.high == other.high).all())


@dataclass(frozen=True)
class Homogeneous(Kind):
    """``f(a x) = a f(x)`` for every a > 0: LeakyReLU, PReLU."""


@dataclass(frozen=True)
class Concat(Kind):
    """Inputs one after the other along an axis."""

    axis: int


@dataclass(frozen=True)
class Slice(Kind):
    """A run of positions along an axis."""

    axis: int
    start: int
    stop: int


@dataclass(frozen=True)
class WeightedSum(Kind):
    """``factors[0] * a + factors[1] * b`` of two values, broadcast."""

    factors: tuple[float, float]


@dataclass(frozen=True)
class Multiply(Kind):
    """The product of two values, or (``inverse``) the first divided by the second."""

    inverse: bool = False


@dataclass(frozen=True)
class Opaque(Kind):
    """Any other operation; ``reason`` states why an affine can't cross it, if its name does not."""

    reason: str = ""
    is_output: bool = False


@dataclass(eq=False)
class Op:
    """One value and the operation that computes it."""

    kind: Kind  # The current function; folding changes it
    inputs: list[Op]  # The values that the operation reads, without constants
    shape: tuple[Dim, ...]  # Sizes and expressions; () if the value is not a tensor
    dtype: torch.dtype | None
    name: str  # Name in messages: "relu (features.2)"
    path: str  # Module path
    source: Any  # The backend's nodes
    index: int = 0  # Position in the graph's order
    users: list[Op] = field(default_factory=list)  # Readers of the value; one that reads it twice is listed twice
    original: Kind = field(init=False)  # The function before folding
    norm: NormCall | None = None  # Set for an operation that counts as a BatchNorm call

    def __post_init__(self) -> None:
        self.original = self.kind

    @property
    def rank(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def changed(self) -> bool:
        """True if folding changed the operation."""
        return self.kind is not self.original


@dataclass(frozen=True)
class NormCall:
    """A BatchNorm call; the first three fields are those of ``FoldRow``."""

    module: str
    kind: str
    channels: int
    affine: Affine | None  # The affine before folding; None if it can't be read
    why_not: str = ""  # The reason why the affine can't be read
    hint: str = ""  # A change that would make the affine readable
    # Largest |moving mean| in standard deviations: the cancellation in a sum if the mean is subtracted later than before
    offset: float = 0.0


class Graph(Protocol):
    """The interface of a backend."""

    @property
    def ops(self) -> Sequence[Op]:
        """Every operation, each after its inputs."""
        ...

    def evaluate(self, op: Op, kind: Kind, inputs: Sequence[Tensor]) -> Tensor:
        """Return the float64 result that ``op`` has with ``kind``; the backend's nodes run if they compute ``kind``."""
        ...

    def probe(self, op: Op, generator: torch.Generator, *, largest: int | None) -> Tensor:
        """Return a random float64 value of ``op``'s shape, with at most ``largest`` positions per spatial axis."""
        ...


def weights_now(ops: Sequence[Op]) -> Iterator[tuple[Weight, Weight | None]]:
    """Yield every weight and bias of the layers with its present tensor, which is another one if folding changed it."""
    for op in ops:
        if isinstance(op.kind, Layer) and isinstance(op.original, Layer):
            before, after = op.original, op.kind
            for old, new in ((before.weight, after.weight), (before.bias, after.bias)):
                if old is not None:
                    yield old, new


def connect(ops: Sequence[Op]) -> None:
    """Number the operations and set the readers of every value."""
    for index, op in enumerate(ops):
        op.index = index
        op.users = []
    for op in ops:
        for parent in op.inputs:
            parent.users.append(op)
