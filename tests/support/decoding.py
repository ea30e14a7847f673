"""Folders of images and cache entries, for the tests of decoding."""

from pathlib import Path
from typing import Any

import numpy as np
from support.pictures import GREY

from bnexport.data.dataset_table import Dataset
from bnexport.data.folder import load_folder
from bnexport.data.images import load_images
from bnexport.data.preprocessing import Preprocessing
from bnexport.tensors import Array


def load(root: Path, preprocessing: Preprocessing = GREY, **options: Any) -> Dataset:
    return load_folder(root, preprocessing=preprocessing, cache_dir=root.parent / "cache", **options)


def one_by_one(root: Path, part: str, preprocessing: Preprocessing) -> Array:
    """The pictures of a part as prediction reads them: (n, channels, height, width)."""
    files = sorted((root / part).rglob("*.*"), key=lambda file: (file.parts[len(root.parts) + 1], file.as_posix()))
    rows = [load_images(file, preprocessing)[0][1] for file in files]
    return np.stack([row[None] if row.ndim == 2 else row.transpose(2, 0, 1) for row in rows])


def left(root: Path) -> list[str]:
    """Return the entries of the cache, by part."""
    return sorted(path.name for path in (root.parent / "cache").glob("folders/*/*"))
