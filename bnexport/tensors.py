"""Signatures of models: names, element types and shapes of inputs and outputs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from bnexport.errors import FeedError

#: A dimension is a size, or the name of one that varies ("batch").
Dim = int | str
Array = np.ndarray[Any, np.dtype[Any]]
#: The declaration of an input or output in a file: name, numpy's element type, shape with a text or None for an open size.
Declared = tuple[str, str, Sequence[int | str | None]]


class ElementType(NamedTuple):
    """Names of one element type in other systems."""

    onnx: int  # Number in TensorProto.DataType
    onnxruntime: str  # Type of an input or output in ONNX Runtime
    datatype: str  # Open Inference Protocol ("Tensor Data Types"); Triton's configuration adds the prefix "TYPE_"
    contents: str  # Field of the protocol's InferTensorContents; "" if the type is sent as raw bytes only


#: Element types of signatures: numpy's name -> names in other systems.
ELEMENT_TYPES: Mapping[str, ElementType] = {
    "float16": ElementType(10, "tensor(float16)", "FP16", ""),
    "float32": ElementType(1, "tensor(float)", "FP32", "fp32_contents"),
    "float64": ElementType(11, "tensor(double)", "FP64", "fp64_contents"),
    "uint8": ElementType(2, "tensor(uint8)", "UINT8", "uint_contents"),
    "int8": ElementType(3, "tensor(int8)", "INT8", "int_contents"),
    "int16": ElementType(5, "tensor(int16)", "INT16", "int_contents"),
    "int32": ElementType(6, "tensor(int32)", "INT32", "int_contents"),
    "int64": ElementType(7, "tensor(int64)", "INT64", "int64_contents"),
    "bool": ElementType(9, "tensor(bool)", "BOOL", "bool_contents"),
}
DTYPES = tuple(ELEMENT_TYPES)
_NUMPY = {name: np.dtype(name) for name in DTYPES}


@dataclass(frozen=True)
class TensorSpec:
    """One input or output."""

    name: str  # Name in the exported file: "input", "logits"
    dtype: str  # numpy's name of the element type, one of DTYPES
    shape: tuple[Dim, ...]  # Batch axis first; a varying dimension has a name: ``("batch", 1, 28, 28)``
    # Name of a dimension of ``shape`` -> the smallest size at which the model equals the network. The network refuses smaller
    # sizes, engines do not: ONNX Runtime pools an input that is smaller than the window.
    smallest: Mapping[str, int] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise FeedError(
                f"{self.name!r} has the unknown element type {self.dtype!r}", remedy=f"Use one of {', '.join(DTYPES)}"
            )

    @property
    def sample_shape(self) -> tuple[Dim, ...]:
        """Shape of one sample, without the batch axis."""
        return self.shape[1:]

    def problem(self, array: object) -> str | None:
        """Return why ``array`` does not fit, as a sentence without its full stop; None if it fits."""
        if not isinstance(array, np.ndarray):
            return f"{self.name!r} is a {type(array).__name__}, expected a numpy array"
        if array.dtype != _NUMPY[self.dtype]:  # also another byte order, which onnxruntime would misread
            return f"{self.name!r} is {array.dtype}, expected {self.dtype}"
        shape = array.shape
        if len(shape) != len(self.shape) or any(
            want != have and isinstance(want, int) for want, have in zip(self.shape, shape, strict=True)
        ):
            expected = "x".join(str(dim) for dim in self.shape)
            return f"{self.name!r} has shape {'x'.join(map(str, array.shape)) or 'scalar'}, expected {expected}"
        return self.too_small(shape)

    def too_small(self, shape: Sequence[int]) -> str | None:
        """Return why an array of this shape is too small; None if it is not."""
        for dim, size in zip(self.shape, shape, strict=True):
            if isinstance(dim, str) and size < (least := self.smallest.get(dim, 0)):
                return f"{self.name!r} has {dim} = {size}, the model needs at least {least}"
        return None

    def to_json(self) -> dict[str, Any]:
        """Return the value in manifest.json."""
        limits = {"smallest": dict(self.smallest)} if self.smallest else {}
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape), **limits}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> TensorSpec:
        """Read the value of ``to_json``; KeyError or TypeError for others."""
        shape = tuple(value["shape"])
        if not all(isinstance(dim, int | str) for dim in shape):
            raise TypeError(f"{value['name']!r} has a dimension that is neither a size nor a name")
        smallest = dict(value.get("smallest", {}))
        if not all(dim in shape and type(size) is int for dim, size in smallest.items()):
            raise TypeError(f"{value['name']!r} has a smallest size that is not an integer, or of an unknown dimension")
        return cls(str(value["name"]), str(value["dtype"]), shape, smallest)


@dataclass(frozen=True)
class Signature:
    """All inputs and outputs of a model, in order."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def batched(self) -> bool:
        """True if samples of several requests can run in one batch.

        The same named dimension is the first one of every input and output, and occurs at no other place.
        """
        specs = (*self.inputs, *self.outputs)
        first = next((dim for spec in specs for dim in spec.shape[:1]), None)
        return isinstance(first, str) and all(
            spec.shape[:1] == (first,) and first not in spec.sample_shape for spec in specs
        )

    @property
    def smallest(self) -> dict[str, int]:
        """Name of a dimension -> the smallest size that every input accepts; empty if none is known."""
        found: dict[str, int] = {}
        for spec in self.inputs:
            found |= {dim: max(size, found.get(dim, 0)) for dim, size in spec.smallest.items()}
        return found

    def with_smallest(self, sizes: Mapping[str, int]) -> Signature:
        """Return a copy whose inputs have these smallest sizes of their dimensions."""
        limits = ({dim: size for dim, size in sizes.items() if dim in spec.shape} for spec in self.inputs)
        inputs = (replace(spec, smallest=limit) for spec, limit in zip(self.inputs, limits, strict=True))
        return replace(self, inputs=tuple(inputs))

    def named_sizes(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
        """Return name -> size of the varying dimensions except the batch."""
        return {
            dim: size
            for spec in self.inputs
            for dim, size in zip(spec.sample_shape, shapes[spec.name], strict=True)
            if isinstance(dim, str)
        }

    def declaration_problem(self, inputs: Sequence[Declared], outputs: Sequence[Declared]) -> str | None:
        """Return how a file's inputs and outputs differ from these, as a sentence without its full stop; None if they fit."""
        for kind, specs, declared in (("input", self.inputs, inputs), ("output", self.outputs, outputs)):
            names, wanted = [name for name, _, _ in declared], [spec.name for spec in specs]
            if names != wanted:
                return f"the file has the {kind}s {names or 'none'}, the manifest states {wanted}"
            for spec, (_, dtype, shape) in zip(specs, declared, strict=True):
                if (problem := _declared_problem(spec, dtype, shape, strict=kind == "input")) is not None:
                    return f"{kind} {problem}"
        return None

    def to_json(self) -> dict[str, Any]:
        """Return the value in manifest.json."""
        return {"inputs": [s.to_json() for s in self.inputs], "outputs": [s.to_json() for s in self.outputs]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Signature:
        """Read from manifest.json."""
        return cls(
            tuple(TensorSpec.from_json(item) for item in value["inputs"]),
            tuple(TensorSpec.from_json(item) for item in value["outputs"]),
        )


def check_feeds(signature: Signature, feeds: Mapping[str, Array]) -> None:
    """Raise FeedError for a missing or unknown input, another element type or shape, or unequal named dimensions."""
    specs = {spec.name: spec for spec in signature.inputs}
    for name in feeds:
        if name not in specs:
            raise FeedError(f"there is no input {name!r}", remedy=f"The inputs are {_listed(specs)}")
    sizes: dict[str, int] = {}
    for name, spec in specs.items():
        if name not in feeds:
            raise FeedError(f"the input {name!r} is missing", remedy=f"The inputs are {_listed(specs)}")
        if (problem := spec.problem(feeds[name])) is not None:
            raise FeedError(f"input {problem}", remedy="Feed arrays of the signature's element type and shape")
        for dim, size in zip(spec.shape, feeds[name].shape, strict=True):
            if isinstance(dim, str) and sizes.setdefault(dim, size) != size:
                raise FeedError(
                    f"input {name!r} has {dim} = {size}, but another input has {dim} = {sizes[dim]}",
                    remedy=f"Feed every input with the same {dim}",
                )


def _listed(specs: Mapping[str, TensorSpec]) -> str:
    return ", ".join(map(repr, specs))


#: Number of dimensions of a batch of images, channels second -> names of its sizes from axis 2.
SIZE_WORDS: dict[int, tuple[str, ...]] = {3: ("length",), 4: ("height", "width"), 5: ("depth", "height", "width")}


def size_axes(ndim: int) -> dict[int, str]:
    """Return axis -> name of the sizes of a batch of images, sounds or volumes; empty for other inputs."""
    return dict(enumerate(SIZE_WORDS.get(ndim, ()), start=2))


def other_sizes(names: Sequence[str]) -> Iterator[dict[str, int]]:
    """Yield enlargements of the varying sizes at which a network is tried, the most informative first.

    Odd and unequal steps come first, because they show rounding and exchanged width and height. Networks that halve their
    input several times, or need squares, accept only the later ones.
    """
    for steps in ((7, 13, 5), (32, 64, 32), (32, 32, 32), (64, 128, 64), (128, 128, 128)):
        yield dict(zip(names, itertools.cycle(steps), strict=False))


def _declared_problem(spec: TensorSpec, dtype: str, shape: Sequence[int | str | None], *, strict: bool) -> str | None:
    """Return how a file's declaration differs from the manifest's; None if it fits.

    With ``strict`` the file must declare each size of the manifest. This holds for inputs, since an output's size may be open.
    """
    if dtype != spec.dtype:
        return f"{spec.name!r} is {dtype}, the manifest states {spec.dtype}"
    fits = len(shape) == len(spec.shape) and all(
        (have == want if isinstance(have, int) else not strict) if isinstance(want, int) else not isinstance(have, int)
        for want, have in zip(spec.shape, shape, strict=True)
    )
    if not fits:
        have, want = ("x".join("?" if dim is None else str(dim) for dim in dims) for dims in (shape, spec.shape))
        return f"{spec.name!r} has shape {have or 'scalar'}, the manifest states {want}"
    return None
