"""Cache of decoded images: a file of pixels that is mapped into memory.

A cache entry is a folder with the raw pixels and an index in JSON. Its name is a hash of everything that the pixels depend on:
the images' names, sizes and times, the requested size and channels, the version of Pillow, and VERSION. So an entry can be
outdated, but not wrong.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import numpy as np

from bnexport import interrupts
from bnexport.data.dataset_table import Images
from bnexport.data.images import channels_first, read_picture_file
from bnexport.data.locate import cache_folder
from bnexport.data.preprocessing import Preprocessing
from bnexport.errors import DataError, OutputError
from bnexport.files import input_errors, output_errors, staged_directory
from bnexport.optional import require

#: Called after each image with the number of decoded images and the total number.
PictureProgress = Callable[[int, int], None]
#: Action for an image that can't be read.
OnBad = Literal["stop", "skip"]

#: Version of the decoding and of the format of entries; a new version outdates all entries.
VERSION = 1
PIXELS, INDEX = "pixels.bin", "index.json"
_BLOCK = 64  # images between two checks for an interrupt, and the limit of decoded images that are not written yet
_MOST_THREADS = 8  # each thread may have an image of 50 million pixels in memory


class PictureFile(NamedTuple):
    """One image file."""

    name: str  # Path below the folder, with "/"
    label: int  # Number of its class
    size: int  # Size in bytes
    mtime_ns: int  # Time of its last change


@dataclass(frozen=True)
class PictureSet:
    """Images to decode, with the requested size and channels."""

    root: Path  # The folder to which their names are relative
    part: str  # "train" or "test"
    files: Sequence[PictureFile]  # In the order of the result
    preprocessing: Preprocessing  # Size and channels of the result
    on_bad: OnBad = "stop"  # Action for an image that can't be read

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the result."""
        return self.preprocessing.channels, self.preprocessing.height, self.preprocessing.width

    @property
    def state(self) -> str:
        """Hash of the images' names, classes, sizes and times."""
        digest = hashlib.sha256(f"{VERSION} {require('PIL', purpose='reading images').__version__}\n".encode())
        for file in self.files:
            line = f"{file.name}\0{file.label}\0{file.size}\0{file.mtime_ns}\n"
            digest.update(line.encode(errors="surrogateescape"))
        return digest.hexdigest()[:32]


@dataclass(frozen=True)
class Decoded:
    """Decoded images."""

    images: Images  # uint8 (n, channels, height, width), a read-only map of a file
    files: tuple[PictureFile, ...]  # The files of ``images``
    skipped: tuple[tuple[str, str], ...]  # Name and reason of each image that is left out


def decode_once(
    wanted: PictureSet, *, cache_dir: Path | None = None, progress: PictureProgress | None = None
) -> Decoded:
    """Return images from the cache, or decode them into it; only one process at a time decodes a folder.

    A build removes the outdated entries of the same part of the same folder (entries of another size stay while the images are
    unchanged), and the files of a killed build. A process that has mapped a removed entry keeps its pixels.
    """
    lock = require("filelock", purpose="reading a folder of images")
    place = hashlib.sha256(os.fsencode(os.path.realpath(wanted.root))).hexdigest()[:16]
    shelf = (cache_dir or cache_folder()) / "folders" / place
    entry = shelf / f"{wanted.part}-{wanted.state}-{'x'.join(map(str, wanted.shape))}"
    with output_errors(shelf):
        shelf.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        with output_errors(shelf):
            stack.enter_context(lock.FileLock(shelf.with_suffix(".lock")))
        if (found := _read(entry, wanted)) is None:
            _tidy(shelf, lambda name: name.startswith("."))  # first: the files of a killed build use disk space
            _build(entry, wanted, progress)
            current = f"{wanted.part}-{wanted.state}-"
            _tidy(shelf, lambda name: name.startswith(f"{wanted.part}-") and not name.startswith(current))
            found = _read(entry, wanted)
    if found is None:
        raise OutputError(f"{entry} can't be read back", remedy="Check the disk, or choose another cache folder")
    if found.skipped and wanted.on_bad == "stop":
        name, reason = found.skipped[0]
        raise DataError(reason, remedy=_bad_remedy(name))
    return found


def _read(entry: Path, wanted: PictureSet) -> Decoded | None:
    """Return an entry; None if it is missing or damaged."""
    try:
        index = json.loads((entry / INDEX).read_text(encoding="ascii"))
        skipped = tuple((str(name), str(reason)) for name, reason in index["skipped"])
        left_out = {name for name, _ in skipped}
        files = tuple(file for file in wanted.files if file.name not in left_out)
        shape = (len(files), *wanted.shape)
        if not files or (entry / PIXELS).stat().st_size != np.prod(shape, dtype=np.int64):
            return None
        return Decoded(np.memmap(entry / PIXELS, np.uint8, mode="r", shape=shape), files, skipped)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _build(entry: Path, wanted: PictureSet, progress: PictureProgress | None) -> None:
    """Decode all images into a new entry, which is complete or absent."""
    need = len(wanted.files) * int(np.prod(wanted.shape))
    if (free := shutil.disk_usage(entry.parent).free) < need:
        raise OutputError(
            f"the decoded images need {need / 1e9:.2f} GB in {entry.parent}, which has {free / 1e9:.2f} GB left",
            remedy="Free some space, choose another cache folder (XDG_CACHE_HOME, cache_dir), or smaller images",
        )
    with staged_directory(entry, force=True) as stage:
        with (stage / PIXELS).open("wb") as file:
            skipped = _write_pixels(file, wanted, progress)
        index = {"folder": str(wanted.root), "shape": wanted.shape, "skipped": skipped}
        (stage / INDEX).write_text(json.dumps(index), encoding="ascii")


def _write_pixels(target: BinaryIO, wanted: PictureSet, progress: PictureProgress | None) -> list[tuple[str, str]]:
    """Write the images one after the other; return name and reason of each image that can't be read."""
    skipped = []
    with contextlib.closing(_decode(wanted)) as pictures:  # ends its threads
        for index, (file, picture) in enumerate(pictures, start=1):
            if isinstance(picture, DataError):
                if wanted.on_bad == "stop":
                    raise DataError(picture.message, remedy=_bad_remedy(file.name)) from picture
                skipped.append((file.name, picture.message))
            else:
                target.write(channels_first(picture).tobytes())
            if progress is not None:
                progress(index, len(wanted.files))
    if len(skipped) == len(wanted.files):
        raise DataError(f"no image of {wanted.root} can be read: {skipped[0][1]}", remedy=_bad_remedy(skipped[0][0]))
    return skipped


def _decode(wanted: PictureSet) -> Generator[tuple[PictureFile, Images | DataError]]:
    """Yield each file with its pixels or its error; Pillow decodes and resizes without the GIL."""

    def decode(file: PictureFile) -> Images | DataError:
        try:
            return read_picture_file(wanted.root / file.name, wanted.preprocessing)
        except DataError as error:
            return error

    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        for start in range(0, len(wanted.files), _BLOCK):
            interrupts.check()
            block = wanted.files[start : start + _BLOCK]
            yield from zip(block, pool.map(decode, block), strict=True)


def _bad_remedy(name: str) -> str:
    return f'Replace or delete {name}, or skip unreadable images with on_bad="skip"'


def _tidy(shelf: Path, outdated: Callable[[str], bool]) -> None:
    """Remove entries by their names; an entry that can't be removed (open files on Windows) stays until the next call."""
    with input_errors(shelf, OutputError, remedy="Choose another cache folder"):
        entries = [entry for entry in shelf.iterdir() if outdated(entry.name)]
    for entry in entries:
        shutil.rmtree(entry, ignore_errors=True)
