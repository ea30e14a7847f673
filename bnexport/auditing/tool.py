"""What a tool under audit is: it makes something callable of a network, and says how many BatchNorms are left in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bnexport.tensors import Array

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Job:
    """What a tool works on.

    Attributes:
        module: A copy of the network of its own, in eval mode.
        example: One batch of inputs, for tracing.
        folder: For its files; it vanishes afterwards.
    """

    module: nn.Module
    example: tuple[Tensor, ...]
    folder: Path


@dataclass(frozen=True)
class Product:
    """What a tool made.

    Attributes:
        run: Input batch -> outputs in order.
        batch_norms: BatchNorm operations left in what runs; None when they can't be counted.
    """

    run: Callable[[tuple[Tensor, ...]], Sequence[Array]]
    batch_norms: int | None


@dataclass(frozen=True)
class Tool:
    """One row of TOOLS.

    Attributes:
        name: As on the command line and in the report.
        open: Gives the product, and puts back on leaving whatever it changed. It raises ``Unavailable`` where the tool
            is not here.
        control: It folds nothing; its error is the noise of float32 that the others are allowed.
    """

    name: str
    open: Callable[[Job], AbstractContextManager[Product]]
    control: bool = False
