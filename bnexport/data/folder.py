"""Folders of images as data sets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from bnexport.data.arrays import Dataset, Images, Labels
from bnexport.data.catalogue import FOLDER
from bnexport.data.decoded import Decoded, OnBad, PictureProgress, PictureSet, decode_once
from bnexport.data.folder_layout import (
    FolderLayout,
    PictureFile,
    check_apart,
    folder_layout,
    hold_out,
    list_part,
    mixed,
)
from bnexport.data.preprocessing import Preprocessing
from bnexport.errors import DataError
from bnexport.optional import need_packages

Part = Literal["train", "test"]

#: The share of each class that is held out for testing where a folder has no part of its own for that.
HOLDOUT = 0.1


def load_folder(
    path: str | Path,
    *,
    preprocessing: Preprocessing,
    seed: int = 0,
    holdout: float = HOLDOUT,
    cache_dir: Path | None = None,
    progress: PictureProgress | None = None,
    on_bad: OnBad = "stop",
) -> Dataset:
    """Load a folder of images, laid out as torchvision's ImageFolder takes it.

    ``PATH/train/CLASS/x.png`` with ``PATH/test`` or ``PATH/val`` (``test`` if both are there); or ``PATH/CLASS/x.png``, of
    which a share of each class is held out for testing. Class names are sorted. Pictures (PNG, JPEG, BMP, WebP, a GIF's
    first frame) are turned upright, converted and resized as ``data.images.load_images`` does it for prediction, and
    kept in the user's cache, see ``data.decoded.decode_once``; later calls map that file.

    Args:
        path: The folder.
        preprocessing: Of the model: size and channels (1 or 3).
        seed: Of the split, where a share is held out.
        holdout: That share.
        cache_dir: Where the decoded pictures are kept; default: the user's cache.
        progress: Called with the pictures decoded so far and in all, for each part.
        on_bad: "skip" leaves out pictures that can't be read, and ``origin`` says how many.

    Returns:
        Images uint8 (n, channels, height, width), read-only maps of files; labels int64 (n,). Those to train with are in
        the order of their classes and names; those to test with are mixed, so that the first n are a fair sample.

    Raises:
        DataError: The folder is not there or not laid out so; fewer than two classes, or one without pictures; a picture
        that is in both parts, or that can't be read.
        UsageError: A share that is not between 0 and 1.
        OutputError: The cache can't be written.
        MissingDependency: Pillow or filelock is not installed.
    """
    need_packages("reading a folder of images", "PIL", "filelock")
    layout = folder_layout(Path(path))
    train, test = _parts(layout, seed, holdout)
    check_apart(layout, train, test)
    parts = []
    for name, files in (("train", train), ("test", test)):
        wanted = PictureSet(layout.root, name, files, _fitting(preprocessing), on_bad)
        parts.append(_checked(layout, decode_once(wanted, cache_dir=cache_dir, progress=progress)))
    origin = _origin(layout, (len(train), len(test)), seed, parts)
    return Dataset(
        f"{FOLDER}{path}", parts[0].images, _labels(parts[0]), parts[1].images, _labels(parts[1]), layout.labels, origin
    )


def load_folder_part(path: str | Path, part: Part, *, preprocessing: Preprocessing) -> tuple[Images, Labels]:
    """One part of what ``load_folder`` gives with its defaults; the other part's pictures are not decoded.

    Args:
        path: As of ``load_folder``.
        part: Which.
        preprocessing: As of ``load_folder``.

    Returns:
        Images uint8 (n, channels, height, width), a read-only map of a file, and labels int64 (n,).

    Raises:
        BnexportError: As ``load_folder``.
    """
    need_packages("reading a folder of images", "PIL", "filelock")
    layout = folder_layout(Path(path))
    if layout.test is None:
        files = _parts(layout, 0, HOLDOUT)[part == "test"]
    else:
        files = list_part(layout, layout.train) if part == "train" else mixed(list_part(layout, layout.test))
    found = decode_once(PictureSet(layout.root, part, files, _fitting(preprocessing)))
    return found.images, _labels(found)


def folder_labels(path: str | Path) -> tuple[str, ...]:
    """The class names of a folder of images, in the order of the labels.

    Raises:
        DataError: As ``load_folder``.
    """
    return folder_layout(Path(path)).labels


def _parts(layout: FolderLayout, seed: int, holdout: float) -> tuple[list[PictureFile], list[PictureFile]]:
    """Pictures to train with, by class and name, and to test with, mixed."""
    seen: dict[tuple[int, int], Path] = {}
    train = list_part(layout, layout.train, seen)
    if layout.test is None:
        train, test = hold_out(train, share=holdout, seed=seed)
        return train, mixed(test)
    return train, mixed(list_part(layout, layout.test, seen))


def _fitting(preprocessing: Preprocessing) -> Preprocessing:
    if preprocessing.channels not in (1, 3):
        raise DataError(
            f"the model takes images of {preprocessing.channels} channels, pictures have 1 or 3",
            remedy="Give the model an input of 1 or 3 channels, as --input 3x64x64",
        )
    return preprocessing


def _checked(layout: FolderLayout, found: Decoded) -> Decoded:
    """Refuse a part in which skipping left a class without pictures."""
    if empty := set(range(len(layout.labels))) - {file.label for file in found.files}:
        raise DataError(
            f"no picture of the class {layout.labels[min(empty)]!r} can be read: {found.skipped[0][1]}",
            remedy="Mend its pictures, or delete the class",
        )
    return found


def _labels(found: Decoded) -> Labels:
    return np.array([file.label for file in found.files], np.int64)


def _origin(layout: FolderLayout, counts: tuple[int, int], seed: int, parts: Sequence[Decoded]) -> str:
    """Where the images came from, in words."""
    if layout.test is None:
        told = f"{layout.train}, {counts[1]} of {sum(counts)} pictures held out for testing (each class, seed {seed})"
    else:
        told = f"{layout.root}, {layout.train.name} and {layout.test.name}"
        told += f" ({layout.ignored} is not used)" if layout.ignored else ""
    if skipped := [item for part in parts for item in part.skipped]:
        told += f"; {len(skipped)} left out that can't be read, such as {skipped[0][0]}"
    return told
