"""Archives of torch and numpy: sizes, names, pickles and code are validated before a reader opens them."""

from __future__ import annotations

import ast
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from bnexport.errors import REBUILD, BadInput, BundleError, DataError, ModelError, UsageError
from bnexport.files import Refusal
from bnexport.optional import no_warnings, one_line
from bnexport.validation.exported_program import check_code, check_exported
from bnexport.validation.limits import count_elements, limit, refusing, shown
from bnexport.validation.paths import check_regular
from bnexport.validation.pickles import (
    CHECKPOINT,
    TORCHSCRIPT,
    WEIGHTS_ALONE,
    Made,
    Storage,
    Vocabulary,
    read_one_pickle,
    read_pickle,
)
from bnexport.validation.zip_directory import DEFLATED, MAGIC, Entry, read_directory, read_entry, read_start

NPY_MAGIC = b"\x93NUMPY"
#: Element types of plain numbers: byte order, kind, bytes. Objects ("O"), records, texts and dates do not match.
_PLAIN = re.compile(r"[<>=|]?(?:b1|[iu][1248]|f[248]|c8|c16)")


def check_header(start: bytes, size: int) -> None:
    """Refuse a .npy header that declares objects (pickles), or an array of another size than the file's."""
    if start[:6] != NPY_MAGIC or len(start) < 12 or start[6] not in (1, 2, 3):
        raise Refusal("is not a complete .npy file")
    wide = start[6] > 1
    length = int.from_bytes(start[8:12] if wide else start[8:10], "little")
    begin = 12 if wide else 10
    if length > limit("npy-header"):
        raise Refusal(f"has a header of {length} bytes, more than {limit('npy-header')}")
    header = _parsed(start[begin : begin + length])
    kind, shape = header.get("descr"), header.get("shape")
    if not isinstance(kind, str) or _PLAIN.fullmatch(kind) is None:
        raise Refusal(f"holds an array of {shown(str(kind))}, not of plain numbers")
    if not isinstance(shape, tuple):
        raise Refusal("is not a complete .npy file: its header has no shape")
    needed = count_elements(shape) * int("".join(filter(str.isdigit, kind)))
    if needed != size - begin - length:
        raise Refusal(f"declares an array of {needed} bytes, but has {size - begin - length}")


def _parsed(text: bytes) -> dict[str, Any]:
    try:
        with no_warnings:  # the compiler warns about odd texts; errors are raised
            header = ast.literal_eval(text.decode("latin-1").strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError) as error:
        raise Refusal("is not a complete .npy file: its header can't be read") from error
    if not isinstance(header, dict):
        raise Refusal("is not a complete .npy file: its header is not a dictionary")
    return header


#: Number of pickles at the start of a file of torch before 1.6: magic number, version, system, object, storages.
_OLD_PICKLES = 5
_OLD_NUMBER = 0x1950A86A20F9469CFC6C
#: The magic number as a step of the first pickle.
OLD_TORCH = b"\x8a\x0a" + _OLD_NUMBER.to_bytes(10, "little")
_PICKLE = b"\x80"


@dataclass(frozen=True)
class _Archive:
    """An archive with a valid table of contents."""

    file: BinaryIO  # The open file
    entries: dict[str, Entry]  # Name inside the archive's one folder -> its entry; the whole name for .npz

    def read(self, name: str, max_bytes: int) -> bytes:
        if name not in self.entries:
            raise Refusal(f"has no {name} inside")
        return read_entry(self.file, self.entries[name], max_bytes)


@dataclass(frozen=True)
class ArchiveKind:
    """A row of ARCHIVES."""

    title: str  # Name of the kind of file, with its article
    error: type[BadInput]  # Class of the raised error
    remedy: str  # Second sentence of the error
    inflated: str  # Row of LIMITS for the total of unpacked bytes
    check: Callable[[_Archive], object]  # Validates the contents


def validate_archive(path: str | Path, kind: str, *, error: type[BadInput] | None = None) -> None:
    """Refuse an archive that could harm the process that opens it. It is not unpacked, and nothing in it runs.

    The validation covers declared and real sizes, names, nesting, the steps and names of pickles, TorchScript's code,
    expressions in a .pt2 file, and object arrays in an .npz file. Weights are not read, so gigabytes take milliseconds.

    ``kind`` is a row of ARCHIVES, which has the class of the error for a missing or refused file; ``error`` replaces it.
    """
    if kind not in ARCHIVES:
        raise UsageError(f"the kind of archive {kind!r} is unknown", remedy=f"Choose one of {', '.join(ARCHIVES)}")
    row = ARCHIVES[kind]
    raised = error or row.error
    try:
        with refusing(f"{path} is not {row.title} that bnexport opens: it", raised, remedy=row.remedy):
            check_regular(Path(path))
            with Path(path).open("rb") as file:
                row.check(_open_archive(file, row))
    except OSError as problem:
        what = "does not exist" if isinstance(problem, FileNotFoundError) else f"can't be read: {one_line(problem)}"
        raise raised(f"{path} {what}", remedy=row.remedy) from problem


@dataclass(frozen=True)
class Saved:
    """The value of a file of torch.save as data. Nothing that the file names was called."""

    value: Any  # Numbers, texts, ``pickles.Made`` and ``pickles.Name``
    bytes_of: Callable[[Storage], bytes]  # Returns the bytes of a storage; the file must still be open
    swapped: bool  # True if the bytes are in big-endian order


def validate_weights(file: BinaryIO) -> None:
    """Refuse a torch state dict, in an archive or in the older format, that holds more than tensors."""
    read_saved(file, WEIGHTS_ALONE)


def read_saved(file: BinaryIO, vocabulary: Vocabulary = CHECKPOINT) -> Saved:
    """Read a file of torch.save: weights, and plain values next to them. Refuse a file that names code."""
    file.seek(0)
    start = file.read(4)
    if start == MAGIC:
        return _from_archive(_open_archive(file, ARCHIVES["checkpoint"]), vocabulary)
    if start[:1] == _PICKLE:
        return _from_old_format(file, vocabulary)
    raise Refusal("is neither safetensors nor a file of torch.save")


def names_in(file: BinaryIO) -> frozenset[str]:
    """Return the names of the files inside a zip archive, without their common folder; empty for any other file."""
    try:
        entries = read_directory(file)
        folder = _common_folder(entries)
    except Refusal:
        return frozenset()
    return frozenset(entry.name.removeprefix(folder) for entry in entries)


def _open_archive(file: BinaryIO, kind: ArchiveKind) -> _Archive:
    file.seek(0)
    start = file.read(4)
    if start != MAGIC:
        raise Refusal("is not a zip archive" if start else "is empty")
    entries = read_directory(file)
    _check_growth(entries, limit(kind.inflated))
    folder = "" if kind.inflated == "npz-inflated" else _common_folder(entries)
    return _Archive(file, {entry.name.removeprefix(folder): entry for entry in entries})


def _check_growth(entries: Sequence[Entry], most: int) -> None:
    """Refuse packed data whose unpacked size or growth is above its limit."""
    packed = [entry for entry in entries if entry.method == DEFLATED]
    total = sum(entry.size for entry in packed)
    if total > most:
        raise Refusal(f"unpacks to {total} bytes, more than {most}")
    for entry in packed:
        if entry.size > limit("ratio-free") and entry.size > limit("archive-ratio") * entry.packed:
            raise Refusal(f"unpacks {shown(entry.name)} to {entry.size // max(entry.packed, 1)} times its size")
    if total > limit("ratio-free") and total > limit("archive-ratio") * sum(entry.packed for entry in packed):
        raise Refusal(f"unpacks to more than {limit('archive-ratio')} times its size")


def _common_folder(entries: Sequence[Entry]) -> str:
    """Return the common folder of all files; torch applies the first file's folder to all, so there must be only one."""
    folder = entries[0].name.partition("/")[0] + "/"
    for entry in entries:
        if not entry.name.startswith(folder):
            raise Refusal(f"is an archive in which {shown(entry.name)} lies outside its folder {shown(folder)}")
    return folder


def _check_script(archive: _Archive) -> None:
    for name in archive.entries:
        if name.endswith(".py") and name.startswith("code/"):
            check_code(archive.read(name, limit("code-bytes")))
        elif name.endswith("pkl"):
            pickle = archive.read(name, limit("pickle-bytes"))
            folder = {"data.pkl": "data", "constants.pkl": "constants"}.get(name, "data")
            _check_storages(archive, read_pickle(pickle, TORCHSCRIPT)[1], folder)
        elif name.partition("/")[0] not in _SCRIPT_FILES:
            raise Refusal(f"holds {shown(name)}, which is not part of a TorchScript file")
    for name in ("data.pkl", "constants.pkl"):
        if name not in archive.entries:
            raise Refusal(f"is not a TorchScript file: it has no {name}")


#: Files and folders in addition to the pickles and the code. ``extra`` contains files of its author, which are not read.
_SCRIPT_FILES = frozenset(
    {"data", "constants", "version", "byteorder", ".data", "extra", ".format_version", ".storage_alignment"}
)


def _from_archive(archive: _Archive, vocabulary: Vocabulary) -> Saved:
    value, storages = read_pickle(archive.read("data.pkl", limit("pickle-bytes")), vocabulary)
    _check_storages(archive, storages, "data")
    order = archive.read("byteorder", 16) if "byteorder" in archive.entries else b"little"

    def bytes_of(storage: Storage) -> bytes:
        name = f"data/{storage.key}"
        return storage.cut(archive.read(name, archive.entries[name].size)) if storage.numel else b""

    return Saved(value, bytes_of, order == b"big")


def _check_storages(archive: _Archive, storages: Sequence[Storage], folder: str) -> None:
    """Refuse a storage whose file is missing or smaller than the pickle declares."""
    for storage in storages:
        entry = archive.entries.get(f"{folder}/{storage.key}")
        needed = storage.numel * storage.itemsize
        if entry is None and needed:
            raise Refusal(f"has no data for the tensor storage {shown(storage.key)}")
        if entry is not None and entry.size < needed:
            raise Refusal(f"declares a tensor storage of {needed} bytes; {shown(entry.name)} has {entry.size}")


def _check_exported(archive: _Archive) -> None:
    def pickled(name: str) -> None:
        """Check a file that torch will unpickle."""
        validate_weights(io.BytesIO(archive.read(name, limit("npz-inflated"))))

    sizes = {name: entry.size for name, entry in archive.entries.items()}
    check_exported(sizes, archive.read, pickled)


def _check_arrays(archive: _Archive) -> None:
    for name, entry in archive.entries.items():
        check_header(read_start(archive.file, entry, limit("npy-header") + 12), entry.size)
        if not name.endswith(".npy"):
            raise Refusal(f"holds {shown(name)}, which is not an array")


def _from_old_format(file: BinaryIO, vocabulary: Vocabulary) -> Saved:
    """Read the format of torch before 1.6: five pickles, then the bytes of the storages."""
    size = file.seek(0, 2)
    file.seek(0)
    start = io.BytesIO(file.read(limit("pickle-bytes")))
    storages: list[Storage] = []
    values: list[Any] = []
    for _ in range(_OLD_PICKLES):
        value, found = read_one_pickle(start, vocabulary)
        values.append(value)
        storages += found
        if values[0] != _OLD_NUMBER:
            raise Refusal("is a pickle, and not a file of torch.save")
    # A storage is named once for each tensor in it. In the file, 8 bytes before it contain its number of elements.
    places = {storage.key: storage for storage in storages}
    needed = sum(8 + storage.numel * storage.itemsize for storage in places.values())
    if needed > size - start.tell():
        raise Refusal(f"declares tensors of {needed} bytes, but has {size - start.tell()}")
    system, order = values[2], values[4]
    swapped = isinstance(system, Made) and ("little_endian", False) in system.pairs()
    return Saved(values[3], _old_storages(file, start.tell(), places, order), swapped)


def _old_storages(file: BinaryIO, start: int, places: Mapping[str, Storage], order: Any) -> Callable[[Storage], bytes]:
    """Return the reader of consecutive storages in the order of the last pickle."""
    starts: dict[str, int] = {}
    for key in order.items if isinstance(order, Made) else ():
        if (storage := places.get(key) if isinstance(key, str) else None) is None:
            break  # the places of the following storages are unknown
        starts[key] = start + 8
        start += 8 + storage.numel * storage.itemsize

    def bytes_of(storage: Storage) -> bytes:
        if storage.key not in starts:
            raise Refusal(f"has no data for the tensor storage {shown(storage.key)}")
        file.seek(starts[storage.key] - 8)
        count, whole = int.from_bytes(file.read(8), "little"), places[storage.key]
        if count != whole.numel:
            raise Refusal(f"declares a tensor storage of {whole.numel} elements; its data have {count}")
        return storage.cut(file.read(whole.numel * whole.itemsize))

    return bytes_of


#: Remedy for a weights file with more than tensors.
SAVE_WEIGHTS = "Save the weights alone: torch.save(model.state_dict(), FILE), or safetensors.torch.save_file"
ARCHIVES: dict[str, ArchiveKind] = {
    "torchscript": ArchiveKind("a TorchScript file", BundleError, REBUILD, "archive-inflated", _check_script),
    "pt2": ArchiveKind("a file of torch.export (.pt2)", BundleError, REBUILD, "archive-inflated", _check_exported),
    "checkpoint": ArchiveKind(
        "a file of torch.save", ModelError, SAVE_WEIGHTS, "archive-inflated",
        lambda archive: _from_archive(archive, WEIGHTS_ALONE),
    ),
    "npz": ArchiveKind(
        "an .npz file", DataError, "Save plain arrays again with numpy.savez", "npz-inflated", _check_arrays
    ),
}  # fmt: skip
