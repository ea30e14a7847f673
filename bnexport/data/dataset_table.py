"""The table of data sets, and the arrays of a data set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bnexport.errors import UsageError

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Dataset:
    """A data set in memory."""

    name: str  # Name of its row in DATASETS, or ``folder:PATH``
    # uint8: (n, 28, 28) for a row of DATASETS; for a folder (n, channels, height, width), a read-only map of a file, which
    # can be larger than memory. ``data.images.prepared`` converts both to (n, channels, height, width).
    train_images: Images
    train_labels: Labels  # int64 (n,)
    test_images: Images  # Like ``train_images``
    test_labels: Labels  # int64 (n,)
    labels: tuple[str, ...]  # Class names in the order of the labels
    origin: str  # Origin, in words


#: Prefix of a data set that is a folder of the user's images: "folder:PATH".
FOLDER = "folder:"

_DIGITS = tuple(str(digit) for digit in range(10))


@dataclass(frozen=True)
class DataFile:
    """One official file: its name, and the MD5 of its packed bytes as published."""

    name: str
    md5: str


@dataclass(frozen=True)
class DatasetInfo:
    """A row of DATASETS."""

    name: str  # Name on the command line
    title: str  # Name in sentences
    labels: tuple[str, ...]  # Class names in the order of the labels
    # Folder below a root of data sets, with ``raw/`` inside (torchvision's layout); "" for the embedded set
    folder: str = ""
    train: tuple[DataFile, ...] = ()  # Images, then labels
    test: tuple[DataFile, ...] = ()  # Images, then labels
    mirrors: tuple[str, ...] = ()  # Addresses to which a file's name is appended, in the order they are tried

    @property
    def embedded(self) -> bool:
        """True if the set needs no files."""
        return not self.folder


def _files(*md5s: str) -> tuple[tuple[DataFile, ...], tuple[DataFile, ...]]:
    """Return train and test files from the MD5s of train images, train labels, test images, test labels."""
    parts = [f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    files = tuple(DataFile(name, md5) for name, md5 in zip(parts, md5s, strict=True))
    return files[:2], files[2:]


_FASHION = _files(
    "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "25c81989df183df01b3e8a0aad5dffbe",
    "bef4ecab320f06d8554ea6380940ec79",
    "bb300cfdad3c16e7a12a480ee83cd310",
)
_MNIST = _files(
    "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "d53e105ee54ea40749a09fcbcd1e9432",
    "9fb629c4189551a2d022fa330f9573f3",
    "ec29112dd5afa0611ce80d1b7f02629c",
)
_KMNIST = _files(
    "bdb82020997e1d708af4cf47b453dcf7",
    "e144d726b3acfaa3e44228e80efcd344",
    "5c965bf0a639b31b8f53240b1b52f4d7",
    "7320c461ea6c1c855c0b718fb2a4b134",
)

#: Names, files and addresses: Fashion-MNIST (Xiao et al., 2017), MNIST (LeCun et al., 1998), KMNIST (Clanuwat et al., 2018).
DATASETS: dict[str, DatasetInfo] = {
    info.name: info
    for info in (
        DatasetInfo(
            "fashion-mnist",
            "Fashion-MNIST",
            ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"),
            "FashionMNIST",
            *_FASHION,
            mirrors=(
                "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
                "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
            ),
        ),
        DatasetInfo(
            "mnist",
            "MNIST",
            _DIGITS,
            "MNIST",
            *_MNIST,
            mirrors=(
                "https://ossci-datasets.s3.amazonaws.com/mnist/",
                "https://storage.googleapis.com/cvdf-datasets/mnist/",
            ),
        ),
        DatasetInfo(
            "kmnist",
            "KMNIST",
            ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
            "KMNIST",
            *_KMNIST,
            mirrors=("http://codh.rois.ac.jp/kmnist/dataset/kmnist/",),
        ),
        DatasetInfo("digits", "embedded digits", _DIGITS),
    )
}


def dataset_info(name: str) -> DatasetInfo:
    """Return a row of DATASETS."""
    if name not in DATASETS:
        raise UsageError(
            f"the data set {name!r} is unknown", remedy=f"Choose one of {', '.join(DATASETS)}, or {FOLDER}PATH"
        )
    return DATASETS[name]


def folder_of(name: str) -> Path | None:
    """Return the folder in the name of a data set; None for other names."""
    if not name.startswith(FOLDER):
        return None
    if not (path := name.removeprefix(FOLDER)):
        raise UsageError(f"{name!r} does not name a folder", remedy=f"Write it as {FOLDER}PATH")
    return Path(path)


def is_dataset(name: str) -> bool:
    """Return True if a name is a row of DATASETS or ``folder:PATH``."""
    return name in DATASETS or (name.startswith(FOLDER) and name != FOLDER)
