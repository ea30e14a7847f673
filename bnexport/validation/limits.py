"""Limits on untrusted files: the table of limits, refusals, and sizes of tensors."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from bnexport.errors import BadInput
from bnexport.files import Refusal


class Limit(NamedTuple):
    """One row of LIMITS."""

    value: int  # Largest allowed number
    what: str  # Counted thing
    reason: str  # Reason for the number


_KB, _MB, _GB = 2**10, 2**20, 2**30

LIMITS: dict[str, Limit] = {
    # Names
    "name-bytes": Limit(255, "bytes in one part of a file name", "the limit of common file systems"),
    "name-parts": Limit(
        16, "levels of folders above a file", "a bundle has two levels, an archive of torch about eight"
    ),
    "bundle-files": Limit(10_000, "files in a bundle", "a bundle has about ten; each one is hashed"),
    "bundle-file-bytes": Limit(16 * _GB, "bytes of one file of a bundle", "each one is hashed, a gigabyte a second"),
    # JSON
    "manifest-bytes": Limit(8 * _MB, "bytes of manifest.json", "a LeNet needs 24 kB, and a BatchNorm about 300 bytes"),
    "tuning-bytes": Limit(64 * _KB, "bytes of tuned.json", "three choices need 1 kB"),
    "json-depth": Limit(64, "levels of lists and objects in JSON", "a manifest has 8; Python's parser is recursive"),
    "json-values": Limit(2_000_000, "lists, objects and separators in JSON", "each value takes about 80 bytes"),
    "json-digits": Limit(20, "digits of a whole number in JSON", "64 bits need no more"),
    "sample-elements": Limit(
        2**28, "elements in one sample of an input or output", "1 GB of float32; runners try two samples on opening"
    ),
    # Archives
    "archive-files": Limit(
        65_536, "files in an archive", "one per tensor, or four per layer: EfficientNetV2-L has 1,825"
    ),
    "archive-directory": Limit(32 * _MB, "bytes of an archive's table of contents", "the files above, long names"),
    "archive-inflated": Limit(
        256 * _MB,
        "unpacked bytes of what torch archives pack",
        "torch packs source text only: 0.3 to 0.9 MB of a large network",
    ),
    "npz-inflated": Limit(4 * _GB, "unpacked bytes of an .npz file", "7,000 images of 3x224x224 in float32"),
    "archive-ratio": Limit(
        200, "times that packed data may grow", "source text grows 6 to 11 times, a bomb 1,000 times"
    ),
    "ratio-free": Limit(4 * _MB, "unpacked bytes below which the growth does not count", "a size without risk"),
    # Pickles
    "pickle-bytes": Limit(64 * _MB, "bytes of one pickle", "a checkpoint needs about 170 per tensor"),
    "pickle-steps": Limit(2_000_000, "steps of one pickle", "a checkpoint needs about 40 per tensor"),
    "pickle-depth": Limit(64, "levels of values in a pickle", "a state dict has 4; its readers are recursive"),
    # Texts in archives
    "code-bytes": Limit(64 * _MB, "bytes of one text in an archive", "the code of EfficientNetV2-L has 0.07 MB"),
    "expression": Limit(
        65_536, "characters of one expression in a .pt2 file", "sums and products of sizes fill at most a page"
    ),
    # ONNX
    "onnx-bytes": Limit(2 * _GB - 1, "bytes of an ONNX file", "protobuf reads no larger message"),
    "onnx-depth": Limit(64, "levels of messages in an ONNX file", "three per subgraph; protobuf itself stops at 100"),
    "onnx-fields": Limit(
        2_000_000, "fields of an ONNX file", "EfficientNetV2-L has 55,000; an empty one may take 160 bytes in memory"
    ),
    "onnx-rank": Limit(64, "dimensions of a tensor", "numpy's own limit"),
    "onnx-dense": Limit(2**28, "elements of all sparse tensors made dense", "1 GB of float32; engines make them dense"),
    "onnx-expanded": Limit(
        1_000_000, "nodes after each function is put in place of its calls", "engines do so when they load a file"
    ),
    # Weights, arrays and pictures
    "safetensors-header": Limit(16 * _MB, "bytes of a safetensors header", "160,000 tensors; the format allows 100 MB"),
    "array-bytes": Limit(_GB, "bytes of an array of images", "20 times the largest known set"),
    "npy-header": Limit(10_000, "bytes of a .npy header", "numpy's own limit; a plain one has 118"),
    "picture-bytes": Limit(256 * _MB, "bytes of a picture's file", "50 million pixels as PNG stay below it"),
}


def limit(name: str) -> int:
    """Return the number of a row of LIMITS."""
    return LIMITS[name].value


@contextlib.contextmanager
def refusing(name: object, kind: type[BadInput], *, remedy: str) -> Iterator[None]:
    """Turn a Refusal inside the block into an error that names the file."""
    try:
        yield
    except Refusal as refusal:
        raise kind(f"{name} {refusal}", remedy=remedy) from refusal


def shown(name: str, limit: int = 80) -> str:
    """Quote an untrusted name for a sentence, without invisible characters and cut if it is long."""
    text = repr(name) if name.isprintable() and name.isascii() else ascii(name)
    return text if len(text) <= limit else f"{text[: limit - 4]}...'"


_INT64 = 2**63


def count_elements(sizes: Sequence[object]) -> int:
    """Return the product of sizes; refuse sizes that are negative, too many, or beyond 64 bits together."""
    if len(sizes) > limit("onnx-rank"):
        raise Refusal(f"has a tensor with {len(sizes)} dimensions, more than {limit('onnx-rank')}")
    whole = [size for size in sizes if isinstance(size, int) and not isinstance(size, bool)]
    if len(whole) != len(sizes) or min(whole, default=0) < 0:
        raise Refusal("has a tensor with a negative size, or a size that is not a number")
    # A zero makes the product 0, but engines multiply the other sizes first.
    if math.prod(max(size, 1) for size in whole) >= _INT64:
        raise Refusal("has a tensor whose sizes multiply beyond 64 bits")
    return math.prod(whole)


def check_view(numel: int, offset: int, sizes: Sequence[object], strides: Sequence[object]) -> None:
    """Refuse a view that leaves its storage, or that repeats a small storage into a huge tensor."""
    elements = count_elements(sizes)
    steps = [step for step in strides if isinstance(step, int) and 0 <= step < _INT64]
    if len(steps) != len(sizes) or not 0 <= offset < _INT64:
        raise Refusal("has a tensor with strides or an offset that do not fit its sizes")
    whole = [size for size in sizes if isinstance(size, int)]
    last = offset + sum((size - 1) * step for size, step in zip(whole, steps, strict=True))
    if elements and last >= numel:
        raise Refusal(f"has a tensor that needs {last + 1} elements of a storage of {numel}")
    if elements > max(numel, limit("sample-elements")):
        raise Refusal(f"has a tensor that repeats {numel} elements into {elements}")
