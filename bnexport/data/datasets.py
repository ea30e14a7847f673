"""The data sets as arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bnexport.data import digits
from bnexport.data.catalogue import DATASETS, DatasetInfo, dataset_info
from bnexport.data.download import DownloadProgress
from bnexport.data.idx import read_idx
from bnexport.data.locate import DATA_VARIABLE, locate
from bnexport.errors import DataError

__all__ = [
    "DATASETS",
    "DATA_VARIABLE",
    "Dataset",
    "DatasetInfo",
    "dataset_info",
    "load_dataset",
    "load_test_images",
    "load_train_images",
]

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]
_SIDE = 28


@dataclass(frozen=True)
class Dataset:
    """A data set in memory.

    Attributes:
        name: Its row in DATASETS.
        train_images: uint8 (n, 28, 28).
        train_labels: int64 (n,).
        test_images: uint8 (n, 28, 28).
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


def load_dataset(
    name: str,
    *,
    data_dir: str | Path | None = None,
    download: bool = True,
    progress: DownloadProgress | None = None,
) -> Dataset:
    """Load the training and the test part.

    Files are looked for in ``data_dir`` alone if it is given, else in the folder that BNEXPORT_DATA names and then in
    the user's cache; the first that has them all wins. Else they are downloaded, into ``data_dir`` if given, otherwise
    into the cache. Reading never writes.

    Args:
        name: A row of DATASETS.
        data_dir: A root: it holds ``FashionMNIST/raw/*.gz`` (or the unpacked files).
        download: Whether to fetch files that are found nowhere.
        progress: Called with a file's name, the bytes so far and the bytes in all (None when unknown).

    Raises:
        UsageError: An unknown name.
        DataError: A file with a wrong MD5, truncated, or not what it should be; or none found and ``download`` is
        false.
        NetworkError: No mirror delivered a file.
        OutputError: A downloaded file can't be written.
    """
    info = dataset_info(name)
    if info.embedded:
        return Dataset(name, *digits.training_set(), *digits.test_set(), info.labels, "drawn by bnexport (embedded)")
    found = locate(info, (*info.train, *info.test), data_dir=data_dir, fetch=download, progress=progress)
    train, test = _read_part(info, found.paths[:2]), _read_part(info, found.paths[2:])
    return Dataset(name, *train, *test, info.labels, found.origin)


def load_test_images(name: str, *, data_dir: str | Path | None = None, download: bool = False) -> tuple[Images, Labels]:
    """Load the test part alone; the training files need not be there.

    Returns:
        Images uint8 (n, 28, 28) and labels int64 (n,).

    Raises:
        UsageError: An unknown name.
        DataError: As ``load_dataset``.
        NetworkError: As ``load_dataset``.
    """
    info = dataset_info(name)
    if info.embedded:
        return digits.test_set()
    return _read_part(info, locate(info, info.test, data_dir=data_dir, fetch=download).paths)


def load_train_images(
    name: str, *, data_dir: str | Path | None = None, download: bool = False
) -> tuple[Images, Labels]:
    """Load the training part alone; the test files need not be there.

    Returns:
        Images uint8 (n, 28, 28) and labels int64 (n,).

    Raises:
        UsageError: An unknown name.
        DataError: As ``load_dataset``.
        NetworkError: As ``load_dataset``.
    """
    info = dataset_info(name)
    if info.embedded:
        return digits.training_set()
    return _read_part(info, locate(info, info.train, data_dir=data_dir, fetch=download).paths)


def _read_part(info: DatasetInfo, paths: Sequence[Path]) -> tuple[Images, Labels]:
    """Images and labels of one part, checked against each other and against the set's labels."""
    images, labels = (read_idx(path) for path in paths)
    if images.dtype != np.uint8 or images.shape[1:] != (_SIDE, _SIDE) or len(images) == 0:
        raise _odd(paths[0], f"holds {images.dtype.name} of shape {images.shape}, expected uint8 (n, {_SIDE}, {_SIDE})")
    if labels.dtype != np.uint8 or labels.ndim != 1 or len(labels) != len(images):
        raise _odd(paths[1], f"holds {labels.dtype.name} of shape {labels.shape}, expected uint8 ({len(images)},)")
    if int(labels.max()) >= len(info.labels):
        raise _odd(paths[1], f"holds the label {int(labels.max())}, {info.title} has {len(info.labels)} classes")
    return images, labels.astype(np.int64)


def _odd(path: Path, what: str) -> DataError:
    return DataError(f"{path} {what}", remedy="Copy the official file there again")
