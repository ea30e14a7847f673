"""Pictures decoded once into a file of pixels that is mapped into memory.

A cache entry is a folder with the pixels, raw, and an index in JSON. Its name is a hash of what the pixels depend on: the
pictures' names, sizes and times, the size and channels asked for, the version of Pillow, and VERSION. So an entry is
never wrong, only outdated.
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
from bnexport.data.images import read_picture_file
from bnexport.data.locate import cache_folder
from bnexport.data.prepare import channels_first
from bnexport.data.preprocessing import Preprocessing
from bnexport.errors import DataError, OutputError
from bnexport.files import output_errors, staged_directory
from bnexport.optional import one_line, require

#: Told after each picture: pictures done, pictures in all.
PictureProgress = Callable[[int, int], None]
#: What to do with a picture that can't be read.
OnBad = Literal["stop", "skip"]

#: Of the way pictures are decoded and kept; another one makes every entry outdated.
VERSION = 1
PIXELS, INDEX = "pixels.bin", "index.json"
_BLOCK = 64  # pictures between two looks for an interrupt, and at most so many decoded ones wait to be written
_MOST_THREADS = 8  # each may hold a picture of 50 million pixels


class PictureFile(NamedTuple):
    """One picture."""

    name: str  # Path below the folder, with "/"
    label: int  # The number of its class
    size: int  # In bytes
    mtime_ns: int  # Time of its last change


@dataclass(frozen=True)
class PictureSet:
    """Pictures to decode, and the wanted size and channels."""

    root: Path  # The folder that their names are relative to
    part: str  # "train" or "test"
    files: Sequence[PictureFile]  # In the order of the result
    preprocessing: Preprocessing  # Size and channels of the result
    on_bad: OnBad = "stop"  # "stop" or "skip" at a picture that can't be read

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return self.preprocessing.channels, self.preprocessing.height, self.preprocessing.width

    @property
    def state(self) -> str:
        """A hash of the pictures' names, classes, sizes and times."""
        digest = hashlib.sha256(f"{VERSION} {require('PIL', purpose='reading images').__version__}\n".encode())
        for file in self.files:
            line = f"{file.name}\0{file.label}\0{file.size}\0{file.mtime_ns}\n"
            digest.update(line.encode(errors="surrogateescape"))
        return digest.hexdigest()[:32]


@dataclass(frozen=True)
class Decoded:
    """Pictures as pixels."""

    images: Images  # uint8 (n, channels, height, width), a read-only map of a file
    files: tuple[PictureFile, ...]  # The pictures in ``images``
    skipped: tuple[tuple[str, str], ...]  # Name and reason of each picture that is not


def decode_once(
    wanted: PictureSet, *, cache_dir: Path | None = None, progress: PictureProgress | None = None
) -> Decoded:
    """Take pictures from the cache, or decode them into it; other processes wait for the one that decodes the same folder.

    A build removes the outdated entries of the same part of the same folder (entries of another size stay while the
    pictures are unchanged), and the rest of a killed build. A process that has mapped a removed entry keeps its pixels.
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
            _tidy(shelf, lambda name: name.startswith("."))  # first: what a killed build left takes room
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
    """Return a whole entry; None if it is missing or damaged."""
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
    """Decode all pictures into a new entry, which appears whole or not at all."""
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
    """Write the pictures one behind the other; return name and reason of those that can't be read."""
    skipped = []
    with contextlib.closing(_decode(wanted)) as pictures:  # its threads end here, not at some later time
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
        raise DataError(f"no picture of {wanted.root} can be read: {skipped[0][1]}", remedy=_bad_remedy(skipped[0][0]))
    return skipped


def _decode(wanted: PictureSet) -> Generator[tuple[PictureFile, Images | DataError]]:
    """Yield each picture with its pixels or its error. Pillow decodes and resizes without Python's lock."""

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
    return f'Mend or delete {name}, or leave out what can\'t be read with on_bad="skip"'


def _tidy(shelf: Path, outdated: Callable[[str], bool]) -> None:
    """Remove entries by their names; one that can't be removed (Windows keeps open files) stays for the next time."""
    try:
        entries = [entry for entry in shelf.iterdir() if outdated(entry.name)]
    except OSError as error:
        raise OutputError(f"{shelf} can't be read: {one_line(error)}", remedy="Choose another cache folder") from error
    for entry in entries:
        shutil.rmtree(entry, ignore_errors=True)
