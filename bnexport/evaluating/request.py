"""What ``bnexport recalibrate`` is asked to do; it loads no torch, so that the command line can offer its choices."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bnexport.errors import UsageError

#: Definition of exact statistics -> what it means. ``nn.moving_statistics`` has both in full.
DEFINITIONS: dict[str, str] = {
    "batch": "one pass; layers normalise with each batch's own statistics, as in training (precise BatchNorm)",
    "population": "one pass per layer; the layers before it are exact already, so batches do not matter",
}


@dataclass(frozen=True)
class RecalibrationRequest:
    """The options of a recalibration.

    Attributes:
        definition: A key of DEFINITIONS.
        dataset: A row of DATASETS; default: the one that the checkpoint names.
        data_dir: Root of data sets.
        samples: Training images, chosen at random; default: all.
        batch_size: Images at once; batches are made equal in size, at most this.
        seed: Of the choice and order of the images.
        device: One of ``training.config.DEVICES``.
        source: Code of a user's own network: ``file.py:factory``.
        weights_key: With ``source``, the set of weights to take from a file with several.
        force: Replace the output.
    """

    definition: str = "batch"
    dataset: str | None = None
    data_dir: Path | None = None
    samples: int | None = None
    batch_size: int = 256
    seed: int = 0
    device: str = "auto"
    source: str | None = None
    weights_key: str | None = None
    force: bool = False

    def __post_init__(self) -> None:
        if self.definition not in DEFINITIONS:
            raise UsageError(
                f"the definition {self.definition!r} is unknown", remedy=f"Choose one of {', '.join(DEFINITIONS)}"
            )
        for name, value in (("batch size", self.batch_size), ("number of samples", self.samples)):
            if value is not None and value < 1:
                raise UsageError(f"the {name} is {value}", remedy="Give at least 1")
