"""Loading of data sets by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from bnexport.data import digits
from bnexport.data.dataset_table import Dataset, DatasetInfo, Images, Labels, dataset_info, folder_of
from bnexport.data.decoded import PictureProgress
from bnexport.data.folder import Part, folder_layout, load_folder, load_folder_part
from bnexport.data.images import read_idx
from bnexport.data.locate import DownloadProgress, locate
from bnexport.data.preprocessing import Preprocessing
from bnexport.errors import DataError, UsageError

_SIDE = 28


def load_dataset(
    name: str,
    *,
    data_dir: str | Path | None = None,
    download: bool = True,
    progress: DownloadProgress | None = None,
    preprocessing: Preprocessing | None = None,
    on_picture: PictureProgress | None = None,
) -> Dataset:
    """Load the training and the test part of a data set.

    A given ``data_dir`` is the only folder that is searched. Otherwise the first folder with all files is used: the one that
    BNEXPORT_DATA names, then the user's cache. Missing files are downloaded into ``data_dir``, or into the cache.

    Args:
        name: A row of DATASETS, or ``folder:PATH`` for a folder of images (see ``data.folder.load_folder``).
        data_dir: A root with ``FashionMNIST/raw/*.gz`` or the unpacked files; for ``folder:PATH`` the new place of the folder.
        download: Download missing files.
        progress: Called with a file's name, the bytes so far and the total bytes (None if unknown).
        preprocessing: The model's preprocessing: images of a folder are decoded to its size and channels. Other images are
            unchanged; ``data.images.prepared`` fits them.
        on_picture: Called with the number of decoded images and their total number.

    Returns:
        Images as uint8 (n, 28, 28); for a folder (n, channels, height, width).

    Raises:
        UsageError: The name is unknown, a folder is given without a preprocessing, or ``data_dir`` for embedded images.
        DataError: A file has a wrong MD5, is truncated or has another content; or it is missing and ``download`` is false.
        NetworkError: No mirror delivered a file.
        OutputError: A downloaded file, or the cache, can't be written.
    """
    if (folder := _folder(name, data_dir)) is not None:
        dataset = load_folder(folder, preprocessing=_needed(preprocessing, name), progress=on_picture)
        return replace(dataset, name=name)
    info = _info(name, data_dir)
    if info.embedded:
        return Dataset(name, *digits.training_set(), *digits.test_set(), info.labels, "drawn by bnexport (embedded)")
    found = locate(info, (*info.train, *info.test), data_dir=data_dir, fetch=download, progress=progress)
    train, test = _read_part(info, found.paths[:2]), _read_part(info, found.paths[2:])
    return Dataset(name, *train, *test, info.labels, found.origin)


def load_test_images(
    name: str, *, data_dir: str | Path | None = None, download: bool = False, preprocessing: Preprocessing | None = None
) -> tuple[Images, Labels]:
    """Load the test part as ``load_dataset`` does; training files may be missing, and training images are not decoded."""
    return _load_part(name, "test", data_dir=data_dir, download=download, preprocessing=preprocessing)


def load_train_images(
    name: str, *, data_dir: str | Path | None = None, download: bool = False, preprocessing: Preprocessing | None = None
) -> tuple[Images, Labels]:
    """Load the training part as ``load_dataset`` does; test files may be missing, and test images are not decoded."""
    return _load_part(name, "train", data_dir=data_dir, download=download, preprocessing=preprocessing)


def dataset_labels(name: str, *, data_dir: str | Path | None = None) -> tuple[str, ...]:
    """Return the class names in the order of the labels; the classes of a folder are its sub-folders."""
    if (folder := _folder(name, data_dir)) is not None:
        return folder_layout(folder).labels
    return _info(name, data_dir).labels


def _folder(name: str, data_dir: str | Path | None) -> Path | None:
    """Return the place of a data set that is a folder; None for a row of DATASETS."""
    folder = folder_of(name)
    return Path(data_dir) if data_dir and folder is not None else folder


def _info(name: str, data_dir: str | Path | None) -> DatasetInfo:
    info = dataset_info(name)
    if info.embedded and data_dir is not None:
        raise UsageError(f"the images of {name} are part of bnexport", remedy="Leave --data-dir out")
    return info


def _load_part(
    name: str, part: Part, *, data_dir: str | Path | None, download: bool, preprocessing: Preprocessing | None
) -> tuple[Images, Labels]:
    if (folder := _folder(name, data_dir)) is not None:
        return load_folder_part(folder, part, preprocessing=_needed(preprocessing, name))
    info = _info(name, data_dir)
    if info.embedded:
        return digits.training_set() if part == "train" else digits.test_set()
    files = info.train if part == "train" else info.test
    return _read_part(info, locate(info, files, data_dir=data_dir, fetch=download).paths)


def _needed(preprocessing: Preprocessing | None, name: str) -> Preprocessing:
    if preprocessing is None:
        raise UsageError(f"{name} can't be read without the image size of the model", remedy="Pass preprocessing=")
    return preprocessing


def _read_part(info: DatasetInfo, paths: Sequence[Path]) -> tuple[Images, Labels]:
    """Read images and labels of one part, and check that they fit each other and the set's classes."""
    images, labels = (read_idx(path) for path in paths)
    if images.dtype != np.uint8 or images.shape[1:] != (_SIDE, _SIDE) or len(images) == 0:
        raise _odd(paths[0], f"has {images.dtype.name} of shape {images.shape}, expected uint8 (n, {_SIDE}, {_SIDE})")
    if labels.dtype != np.uint8 or labels.ndim != 1 or len(labels) != len(images):
        raise _odd(paths[1], f"has {labels.dtype.name} of shape {labels.shape}, expected uint8 ({len(images)},)")
    if int(labels.max()) >= len(info.labels):
        raise _odd(paths[1], f"has the label {int(labels.max())}, {info.title} has {len(info.labels)} classes")
    return images, labels.astype(np.int64)


def _odd(path: Path, what: str) -> DataError:
    return DataError(f"{path} {what}", remedy="Copy the official file there again")
