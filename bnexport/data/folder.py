"""Folders of images as data sets, in the layout of torchvision's ImageFolder: parts, classes and pixels."""

from __future__ import annotations

import filecmp
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from bnexport.data.dataset_table import FOLDER, Dataset, Images, Labels
from bnexport.data.decoded import Decoded, OnBad, PictureFile, PictureProgress, PictureSet, decode_once
from bnexport.data.images import ENDINGS, folder_entries, pictures_below
from bnexport.data.preprocessing import Preprocessing
from bnexport.errors import DataError, UsageError
from bnexport.files import input_errors
from bnexport.optional import need_packages

TRAIN = "train"
#: Names of the test part's folder; the first existing one is used.
TEST = ("test", "val")
#: Further image formats of torchvision: an error is better than an image that is silently left out.
_OTHER_ENDINGS = (".ppm", ".pgm", ".tif", ".tiff")
_LAYOUT = "Lay it out as PATH/train/CLASS/x.png and PATH/val/CLASS/y.png, or as PATH/CLASS/x.png"


@dataclass(frozen=True)
class FolderLayout:
    """The classes and the parts of a folder of images."""

    root: Path  # The folder
    labels: tuple[str, ...]  # Names of the classes, sorted as strings, as in torchvision
    train: Path  # The folder of the training part: ``root`` itself, or ``root/train``
    test: Path | None  # The folder of the test part; None if a share of ``train`` is held out
    ignored: str = ""  # ``val`` if there is a ``test`` too, else ""


def folder_layout(root: Path) -> FolderLayout:
    """Find the parts and classes of a folder of images.

    ``root/train`` is the training part if it has sub-folders; otherwise the folders of ``root`` are the classes. Hidden
    folders and files (".name") are ignored.
    """
    if not root.is_dir():
        what = "is a file, not a folder of images" if root.exists() else "does not exist"
        raise DataError(f"{root} {what}", remedy="Check the path, or give the folder's new place with --data-dir DIR")
    train, test, ignored = _parts(root)
    labels = _classes(train)
    if test is not None:
        _check_same_classes(train, labels, test, _classes(test))
    if len(labels) < 2:
        raise DataError(
            f"{train} has only the class {labels[0]!r}" if labels else f"{train} has no class folders",
            remedy="Give at least two classes" if labels else _LAYOUT,
        )
    return FolderLayout(root, labels, train, test, ignored)


def list_part(layout: FolderLayout, part: Path, seen: dict[tuple[int, int], Path] | None = None) -> list[PictureFile]:
    """Return the image files of a part by class and name."""
    seen = {} if seen is None else seen
    found: list[PictureFile] = []
    for label, name in enumerate(layout.labels):
        below = pictures_below(part / name, endings=(*ENDINGS, *_OTHER_ENDINGS), seen=seen)
        place = (part / name).relative_to(layout.root).as_posix()
        inside = sorted(
            (PictureFile(f"{place}/{file}", label, status.st_size, status.st_mtime_ns) for file, status in below),
            key=lambda file: file.name,
        )
        if not inside:
            raise DataError(
                f"the class folder {part / name} has no image ({', '.join(ENDINGS)})",
                remedy="Put images into it, or delete it",
            )
        found += inside
    return found


def hold_out(
    files: Sequence[PictureFile], *, share: float = 0.1, seed: int = 0
) -> tuple[list[PictureFile], list[PictureFile]]:
    """Split images into a training and a test part, class by class.

    The part follows from a hash of the seed and the name, so a growing folder keeps nearly all of its split.
    """
    if not 0 < share < 1:
        raise UsageError(f"the share to hold out is {share}", remedy="Give a number between 0 and 1, such as 0.1")
    classes: dict[int, list[str]] = {}
    for file in files:
        classes.setdefault(file.label, []).append(file.name)
    held: set[str] = set()
    for names in classes.values():
        if len(names) == 1:
            raise DataError(
                f"{names[0]} is the only image of its class, so none can be held out for testing",
                remedy="Give each class at least two images",
            )
        count = min(max(1, round(len(names) * share)), len(names) - 1)
        held.update(sorted(names, key=lambda name: _rank(name, seed))[:count])
    return [file for file in files if file.name not in held], [file for file in files if file.name in held]


def mixed(files: Sequence[PictureFile]) -> list[PictureFile]:
    """Return the images in an order independent of their classes, so that the first n are a fair sample."""
    return sorted(files, key=lambda file: _rank(file.name, 0))


def check_apart(layout: FolderLayout, train: Sequence[PictureFile], test: Sequence[PictureFile]) -> None:
    """Refuse an image that is in both parts under one name, because the test part would contain training data.

    Images of one name with different content are allowed: each part may have its own numbers.
    """
    if layout.test is None:
        return
    below = layout.train.relative_to(layout.root).as_posix(), layout.test.relative_to(layout.root).as_posix()
    known = {(file.name.removeprefix(f"{below[0]}/"), file.size): file.name for file in train}
    for file in test:
        twin = known.get((file.name.removeprefix(f"{below[1]}/"), file.size))
        if twin is not None and _same(layout.root / twin, layout.root / file.name):
            raise DataError(
                f"{layout.root / file.name} is the same image as {layout.root / twin} of the training part",
                remedy="Delete one of the two",
            )


def _same(first: Path, second: Path) -> bool:
    with input_errors(f"{first} or {second}", DataError, remedy="Check permissions"):
        return filecmp.cmp(first, second, shallow=False)


def _rank(name: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}/{name}".encode(errors="surrogateescape")).digest()


def _parts(root: Path) -> tuple[Path, Path | None, str]:
    """Return the training part, the test part, and the name of an unused part."""
    folders, _ = folder_entries(root)
    names = [folder.name for folder in folders]
    tests = [name for name in TEST if name in names]
    if TRAIN not in names or not folder_entries(root / TRAIN)[0]:
        if names and set(names) <= {TRAIN, *TEST}:
            raise DataError(f"{root} has {' and '.join(names)}, but no classes in {TRAIN}", remedy=_LAYOUT)
        return root, None, ""
    if not tests and (others := [name for name in names if name != TRAIN]):
        raise DataError(
            f"{root} has {TRAIN} and {others[0]!r}, but no {' or '.join(reversed(TEST))}",
            remedy=f"Name the test folder {TEST[1]}, or move the other folders away from {TRAIN}",
        )
    return root / TRAIN, root / tests[0] if tests else None, "".join(tests[1:])


def _classes(part: Path) -> tuple[str, ...]:
    folders, files = folder_entries(part)
    if loose := [file for file in files if file.name.lower().endswith((*ENDINGS, *_OTHER_ENDINGS))]:
        raise DataError(
            f"{part} has the image {loose[0].name} outside of the class folders", remedy="Move it into a class folder"
        )
    return tuple(folder.name for folder in folders)


def _check_same_classes(train: Path, labels: tuple[str, ...], test: Path, others: tuple[str, ...]) -> None:
    for there, missing in ((train, set(others) - set(labels)), (test, set(labels) - set(others))):
        if missing:
            name = min(missing)
            what = "is a file, not a class folder" if (there / name).exists() else "is missing"
            raise DataError(
                f"{there / name} {what}; {train.name} and {test.name} must have the same classes",
                remedy=f"Make it a folder with images, or delete the class {name!r} from the other part",
            )


Part = Literal["train", "test"]

#: Share of each class that is held out for testing if a folder has no test part.
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
    """Load a folder of images in the layout of torchvision's ImageFolder.

    The layout is ``PATH/train/CLASS/x.png`` with ``PATH/test`` or ``PATH/val`` (``test`` if both exist), or
    ``PATH/CLASS/x.png`` with the share ``holdout`` of each class as the test part, chosen by ``seed``. Class names are
    sorted. Images (PNG, JPEG, BMP, WebP, the first frame of a GIF) are converted as ``data.images.load_images`` does for
    prediction. The pixels are kept in ``cache_dir``, by default the user's cache, see ``data.decoded.decode_once``; later
    calls map that file. ``progress`` receives the number of decoded images and their total number, for each part.
    ``on_bad="skip"`` leaves out images that can't be read; ``origin`` contains their number.

    Returns:
        Images uint8 (n, channels, height, width), read-only maps of files; labels int64 (n,). Training images are in the order
        of their classes and names. Test images are mixed, so that the first n are a fair sample.

    Raises:
        DataError: The folder is missing or has another layout; there are fewer than two classes, or a class without images; an
            image is in both parts, or can't be read.
        UsageError: The share is not between 0 and 1.
        OutputError: The cache can't be written.
        MissingDependency: Pillow or filelock is not installed.
    """
    need_packages("reading a folder of images", "PIL", "filelock")
    layout = folder_layout(Path(path))
    train, test = _split(layout, seed, holdout)
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
    """Return images and labels of one part as ``load_folder`` does by default; the other part is not decoded."""
    need_packages("reading a folder of images", "PIL", "filelock")
    layout = folder_layout(Path(path))
    if layout.test is None:
        files = _split(layout, 0, HOLDOUT)[part == "test"]
    else:
        files = list_part(layout, layout.train) if part == "train" else mixed(list_part(layout, layout.test))
    found = decode_once(PictureSet(layout.root, part, files, _fitting(preprocessing)))
    return found.images, _labels(found)


def _split(layout: FolderLayout, seed: int, holdout: float) -> tuple[list[PictureFile], list[PictureFile]]:
    """Return the training images by class and name, and the test images mixed."""
    seen: dict[tuple[int, int], Path] = {}
    train = list_part(layout, layout.train, seen)
    if layout.test is None:
        train, test = hold_out(train, share=holdout, seed=seed)
        return train, mixed(test)
    return train, mixed(list_part(layout, layout.test, seen))


def _fitting(preprocessing: Preprocessing) -> Preprocessing:
    if preprocessing.channels not in (1, 3):
        raise DataError(
            f"the model needs images of {preprocessing.channels} channels, but image files have 1 or 3",
            remedy="Give the model an input of 1 or 3 channels, such as 3x64x64",
        )
    return preprocessing


def _checked(layout: FolderLayout, found: Decoded) -> Decoded:
    """Refuse a part in which skipped images leave a class without images."""
    if empty := set(range(len(layout.labels))) - {file.label for file in found.files}:
        raise DataError(
            f"no image of the class {layout.labels[min(empty)]!r} can be read: {found.skipped[0][1]}",
            remedy="Replace its images, or delete the class",
        )
    return found


def _labels(found: Decoded) -> Labels:
    return np.array([file.label for file in found.files], np.int64)


def _origin(layout: FolderLayout, counts: tuple[int, int], seed: int, parts: Sequence[Decoded]) -> str:
    """Return the origin of the images, in words."""
    if layout.test is None:
        text = f"{layout.train}, {counts[1]} of {sum(counts)} images held out for testing (each class, seed {seed})"
    else:
        text = f"{layout.root}, {layout.train.name} and {layout.test.name}"
        text += f" ({layout.ignored} is not used)" if layout.ignored else ""
    if skipped := [item for part in parts for item in part.skipped]:
        text += f"; {len(skipped)} unreadable images left out, such as {skipped[0][0]}"
    return text
