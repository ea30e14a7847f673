"""Which pictures a folder of images holds, of which classes, for training and for testing (torchvision's ImageFolder)."""

from __future__ import annotations

import filecmp
import hashlib
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from bnexport.data.images import ENDINGS
from bnexport.errors import DataError, UsageError
from bnexport.optional import one_line
from bnexport.validation.limits import limit

TRAIN = "train"
#: Names of the test part's folder; the first that is there counts.
TEST = ("test", "val")
#: What torchvision takes for an image as well: an error is better than a picture that is silently left out.
_OTHER_ENDINGS = (".ppm", ".pgm", ".tif", ".tiff")
_LAYOUT = "Lay it out as PATH/train/CLASS/x.png and PATH/val/CLASS/y.png, or as PATH/CLASS/x.png"


class PictureFile(NamedTuple):
    """One picture.

    Attributes:
        name: Its path below the folder, with "/".
        label: The number of its class.
        size: In bytes.
        mtime_ns: When it was changed last.
    """

    name: str
    label: int
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class FolderLayout:
    """The classes of a folder of images, and where its parts are.

    Attributes:
        root: The folder.
        labels: Names of the classes, sorted as Python sorts strings (so does torchvision).
        train: The folder of the training part: ``root`` itself, or ``root/train``.
        test: The folder of the test part; None where a share of ``train`` is held out.
        ignored: ``val`` when there is a ``test`` as well, else "".
    """

    root: Path
    labels: tuple[str, ...]
    train: Path
    test: Path | None
    ignored: str = ""


def folder_layout(root: Path) -> FolderLayout:
    """Look at the folders of a folder of images.

    ``root/train`` is the training part if it holds folders itself; else the folders of ``root`` are the classes. Hidden
    folders and files (".name") do not count.

    Raises:
        DataError: The folder is not there, can't be read, or is laid out otherwise; there are fewer than two classes; the
        parts have different classes.
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
            f"{train} has the one class {labels[0]!r}" if labels else f"{train} holds no class folders",
            remedy="A classifier needs at least two classes" if labels else _LAYOUT,
        )
    return FolderLayout(root, labels, train, test, ignored)


def list_part(layout: FolderLayout, part: Path, seen: dict[tuple[int, int], Path] | None = None) -> list[PictureFile]:
    """The pictures of a part by class and name.

    Args:
        layout: Of the folder.
        part: ``layout.train`` or ``layout.test``.
        seen: Folders that were listed before, by device and number; the part's are added.

    Raises:
        DataError: A class without pictures, a folder that links lead to twice, a link to nowhere, what can't be read.
    """
    seen = {} if seen is None else seen
    found: list[PictureFile] = []
    for label, name in enumerate(layout.labels):
        inside = sorted(_walk(layout.root, part / name, label, seen), key=lambda file: file.name)
        if not inside:
            raise DataError(
                f"the class folder {part / name} holds no picture ({', '.join(ENDINGS)})",
                remedy="Put pictures into it, or delete it",
            )
        found += inside
    return found


def hold_out(
    files: Sequence[PictureFile], *, share: float = 0.1, seed: int = 0
) -> tuple[list[PictureFile], list[PictureFile]]:
    """Split pictures into those to train with and those to test with, class by class.

    A picture's place follows from a hash of the seed and its name, so that a folder that grows keeps nearly all of the
    split.

    Args:
        files: Of all classes.
        share: Of each class, to be held out; at least one picture is, and one is left.
        seed: Another seed, another split.

    Raises:
        UsageError: A share that is not between 0 and 1.
        DataError: A class with one picture.
    """
    if not 0 < share < 1:
        raise UsageError(f"the share to hold out is {share}", remedy="Give a number between 0 and 1, as 0.1")
    classes: dict[int, list[str]] = {}
    for file in files:
        classes.setdefault(file.label, []).append(file.name)
    held: set[str] = set()
    for names in classes.values():
        if len(names) == 1:
            raise DataError(
                f"{names[0]} is the only picture of its class, so none can be held out for testing",
                remedy="Give each class at least two pictures",
            )
        count = min(max(1, round(len(names) * share)), len(names) - 1)
        held.update(sorted(names, key=lambda name: _rank(name, seed))[:count])
    return [file for file in files if file.name not in held], [file for file in files if file.name in held]


def mixed(files: Sequence[PictureFile]) -> list[PictureFile]:
    """The pictures in an order that has nothing to do with their classes, so that the first n are a fair sample."""
    return sorted(files, key=lambda file: _rank(file.name, 0))


def check_apart(layout: FolderLayout, train: Sequence[PictureFile], test: Sequence[PictureFile]) -> None:
    """Refuse a picture that is in both parts under one name: it would be tested on what it was trained with.

    Two pictures of one name with different content are fine, as where each part numbers its own.

    Raises:
        DataError: Naming both.
    """
    if layout.test is None:
        return
    below = layout.train.relative_to(layout.root).as_posix(), layout.test.relative_to(layout.root).as_posix()
    known = {(file.name.removeprefix(f"{below[0]}/"), file.size): file.name for file in train}
    for file in test:
        twin = known.get((file.name.removeprefix(f"{below[1]}/"), file.size))
        if twin is not None and _same(layout.root / twin, layout.root / file.name):
            raise DataError(
                f"{layout.root / file.name} is the same picture as {layout.root / twin}, which is trained with",
                remedy="Delete one of the two",
            )


def _same(first: Path, second: Path) -> bool:
    try:
        return filecmp.cmp(first, second, shallow=False)
    except OSError as error:
        raise DataError(f"{first} or {second} can't be read: {one_line(error)}", remedy="Check permissions") from error


def _rank(name: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}/{name}".encode(errors="surrogateescape")).digest()


def _parts(root: Path) -> tuple[Path, Path | None, str]:
    """The training part, the test part, and the name of a part that is left out."""
    folders, _ = _entries(root)
    names = [folder.name for folder in folders]
    tests = [name for name in TEST if name in names]
    if TRAIN not in names or not _entries(root / TRAIN)[0]:
        if names and set(names) <= {TRAIN, *TEST}:
            raise DataError(f"{root} has {' and '.join(names)}, but no classes in {TRAIN}", remedy=_LAYOUT)
        return root, None, ""
    if not tests and (others := [name for name in names if name != TRAIN]):
        raise DataError(
            f"{root} has {TRAIN} and {others[0]!r}, but no {' or '.join(reversed(TEST))}",
            remedy=f"Call the folder to test with {TEST[1]}, or move the other folders away from {TRAIN}",
        )
    return root / TRAIN, root / tests[0] if tests else None, "".join(tests[1:])


def _classes(part: Path) -> tuple[str, ...]:
    folders, files = _entries(part)
    if loose := [file for file in files if _is_picture(file.name)]:
        raise DataError(
            f"{part} holds the picture {loose[0].name}, which is in no class", remedy="Move it into a class folder"
        )
    return tuple(folder.name for folder in folders)


def _check_same_classes(train: Path, labels: tuple[str, ...], test: Path, others: tuple[str, ...]) -> None:
    for there, missing in ((train, set(others) - set(labels)), (test, set(labels) - set(others))):
        if missing:
            name = min(missing)
            what = "is a file, not a class folder" if (there / name).exists() else "is missing"
            raise DataError(
                f"{there / name} {what}; {train.name} and {test.name} must have the same classes",
                remedy=f"Make it a folder with pictures, or delete the class {name!r} from the other part",
            )


def _walk(
    root: Path, folder: Path, label: int, seen: dict[tuple[int, int], Path], *, depth: int = 1
) -> list[PictureFile]:
    """The pictures below a folder; links are followed, but no folder is listed twice."""
    here = _status(folder)
    if (twin := seen.setdefault((here.st_dev, here.st_ino), folder)) is not folder:
        raise DataError(f"{folder} leads to {twin} again", remedy="Remove the link, so that each picture counts once")
    if depth > limit("name-parts"):
        raise DataError(f"{folder} lies more than {limit('name-parts')} folders deep", remedy="Move it up")
    folders, files = _entries(folder)
    found, below = [], folder.relative_to(root).as_posix()
    for file in (entry for entry in files if _is_picture(entry.name)):
        status = _status(file)
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{file} is not a plain file", remedy="Remove it")
        found.append(PictureFile(f"{below}/{file.name}", label, status.st_size, status.st_mtime_ns))
    for deeper in folders:
        found += _walk(root, deeper, label, seen, depth=depth + 1)
    return found


def _is_picture(name: str) -> bool:
    return name.lower().endswith((*ENDINGS, *_OTHER_ENDINGS))


def _entries(folder: Path) -> tuple[list[Path], list[Path]]:
    """Folders and other entries of a folder by name, without the hidden ones."""
    folders: list[Path] = []
    files: list[Path] = []
    try:
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if not entry.name.startswith("."):
                    (folders if entry.is_dir() else files).append(folder / entry.name)
    except OSError as error:
        raise DataError(
            f"{folder} can't be read: {one_line(error)}", remedy="Check its permissions, and its links if it has some"
        ) from error
    return folders, files


def _status(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise DataError(
            f"{path} can't be read: {one_line(error)}", remedy="Check its permissions, or remove a link to nowhere"
        ) from error
