"""What a data set is in memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Dataset:
    """A data set.

    Attributes:
        name: Its row in DATASETS, or ``folder:PATH``.
        train_images: uint8 (n, 28, 28) of a row of DATASETS; of a folder (n, channels, height, width), a read-only map of
            a file, so that a set larger than memory can be used: take batches of it. ``data.prepare.prepared`` makes
            both (n, channels, height, width).
        train_labels: int64 (n,).
        test_images: As ``train_images``.
        test_labels: int64 (n,).
        labels: Class names in the order of the labels.
        origin: Where it came from, in words.
    """

    name: str
    train_images: Images
    train_labels: Labels
    test_images: Images
    test_labels: Labels
    labels: tuple[str, ...]
    origin: str
