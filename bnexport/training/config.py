"""What a training run is asked to do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from bnexport.data.catalogue import DATASETS
from bnexport.errors import UsageError
from bnexport.nn.lenet import NORMS

DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class TrainingConfig:
    """The recipe; the defaults are those of "Dive into Deep Learning", section 8.5.

    Attributes:
        dataset: A row of ``data.catalogue.DATASETS``.
        norm: One of ``nn.lenet.NORMS``.
        epochs: Passes over the training set.
        lr: Learning rate of plain SGD.
        batch_size: Images per step; the last, partial batch is kept.
        device: One of DEVICES; "auto" is the first CUDA device if there is one.
        seed: Of the initial weights and the order of the images.
        recalibrate: Whether to re-estimate the moving statistics over the training set at the end.
    """

    dataset: str = "fashion-mnist"
    norm: str = "torch"
    epochs: int = 10
    lr: float = 1.0
    batch_size: int = 256
    device: str = "auto"
    seed: int = 0
    recalibrate: bool = True

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("dataset", self.dataset, tuple(DATASETS)),
            ("norm", self.norm, NORMS),
            ("device", self.device, DEVICES),
        ):
            if value not in choices:
                raise UsageError(f"the {name} {value!r} is unknown", remedy=f"Choose one of {', '.join(choices)}")
        for name, number in (("epochs", self.epochs), ("batch_size", self.batch_size)):
            if number < 1:
                raise UsageError(f"{name} is {number}", remedy="Give at least 1")
        if not math.isfinite(self.lr) or self.lr <= 0:
            raise UsageError(f"the learning rate is {self.lr}", remedy="Give a positive number")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"the seed is {self.seed}", remedy="Give a number from 0 to 2**63 - 1")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> TrainingConfig:
        """Read what ``to_json`` wrote.

        Raises:
            UsageError: Missing or unknown options, or values out of range.
        """
        known = {item.name for item in fields(cls)}
        if not isinstance(value, Mapping) or set(value) != known:
            raise UsageError(
                "the saved configuration has missing or unknown options", remedy="Start the training anew with --force"
            )
        try:
            return cls(**value)
        except TypeError as error:
            raise UsageError(
                "the saved configuration holds values of the wrong kind", remedy="Start the training anew with --force"
            ) from error

    def check_continues(self, before: TrainingConfig) -> None:
        """Refuse to continue a run with other options; only the number of epochs may grow.

        Raises:
            UsageError: Naming the first option that differs.
        """
        for item in fields(self):
            old, new = getattr(before, item.name), getattr(self, item.name)
            if item.name == "epochs" and new >= old:
                continue
            if old != new:
                option = item.name.replace("_", "-")
                raise UsageError(
                    f"the run was started with {option} {old}, it can't be resumed with {option} {new}",
                    remedy=f"Resume with {option} {old}, or choose another --out",
                )
