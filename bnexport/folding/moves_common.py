"""Refusals that several moves share."""

from __future__ import annotations

from collections.abc import Iterable

from bnexport.folding.affine import Affine
from bnexport.folding.graph import Op
from bnexport.folding.plan import Refused


def size_along(op: Op, axis: int) -> int:
    """The size of a value along an axis; Refused when it varies."""
    size = op.shape[axis]
    if not isinstance(size, int):
        raise Refused(f"the size of {op.name} along axis {axis} varies")
    return size


def refuse_varying(op: Op, affine: Affine, axes: Iterable[int]) -> None:
    """Refuse an affine that differs between positions which an operation mixes."""
    for axis in axes:
        if affine.varies_along(axis % affine.rank):
            raise Refused(f"{op.name} mixes positions of axis {axis % affine.rank}, along which its scale varies")


def refuse_negative(op: Op, affine: Affine) -> None:
    """Refuse a negative scale before or after an operation that keeps the order of values."""
    if bool((affine.scale < 0).any()):
        negative = int((affine.scale < 0).sum())
        raise Refused(
            f"{negative} of its scales are negative, and {op.name} keeps the order of values",
            "gammas that are not negative",
        )
