"""Sizes of tensors that must fit what is there for them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from bnexport.screening.limits import limit
from bnexport.screening.refusal import Refusal

_INT64 = 2**63


def count_elements(sizes: Sequence[object]) -> int:
    """The product of sizes.

    Raises:
        Refusal: A size is no number or negative, there are too many, or the product leaves 64 bits.
    """
    if len(sizes) > limit("onnx-rank"):
        raise Refusal(f"has a tensor with {len(sizes)} dimensions, more than {limit('onnx-rank')}")
    whole = [size for size in sizes if isinstance(size, int) and not isinstance(size, bool)]
    if len(whole) != len(sizes) or min(whole, default=0) < 0:
        raise Refusal("has a tensor with a negative size, or with one that is no number")
    # With a zero among them the product is 0, but engines multiply the others first.
    if math.prod(max(size, 1) for size in whole) >= _INT64:
        raise Refusal("has a tensor whose sizes multiply beyond 64 bits")
    return math.prod(whole)


def check_view(numel: int, offset: int, sizes: Sequence[object], strides: Sequence[object]) -> None:
    """Refuse a view that leaves its storage, or that repeats a small one into a huge tensor.

    Args:
        numel: Elements of the storage.
        offset: Its first element.
        sizes: One per dimension.
        strides: One per dimension, in elements.

    Raises:
        Refusal: It does not fit.
    """
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
