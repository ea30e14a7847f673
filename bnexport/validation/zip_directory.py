"""The table of contents of a zip archive, read strictly: every parser must see the same files in it.

Python's ``zipfile`` and the reader inside torch tolerate different faults (bytes in front, comments, two sizes that differ), so
one may read a file differently from the other. An archive whose records disagree is refused here.
Source: PKWARE's APPNOTE.TXT 6.3.10.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import BinaryIO

from bnexport.files import Refusal
from bnexport.validation.limits import limit, shown
from bnexport.validation.paths import check_name, check_twins

MAGIC = b"PK\x03\x04"
STORED, DEFLATED = 0, 8
_END, _LOCATOR, _END64 = b"PK\x05\x06", b"PK\x06\x07", b"PK\x06\x06"
_CENTRAL = b"PK\x01\x02"
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF
#: Bits that may be set: strength of packing, sizes after the data, names in UTF-8. Others mean encryption or patches.
_FLAGS = 0x0006 | 0x0008 | 0x0800
_SYMLINK, _KIND = 0o120000, 0o170000


@dataclass(frozen=True)
class Entry:
    """One file of an archive."""

    name: str  # Name as written, UTF-8
    method: int  # STORED or DEFLATED
    crc: int  # CRC-32 of the unpacked bytes
    packed: int  # Bytes in the archive
    size: int  # Bytes unpacked
    header: int  # Start of its local header
    start: int = 0  # Start of its bytes


@dataclass(frozen=True)
class _Table:
    """Place of the table of contents."""

    count: int
    start: int
    size: int


def read_directory(file: BinaryIO) -> list[Entry]:
    """Return every file of an archive, in the order of the table of contents. Only the tables are read, never the data."""
    size = file.seek(0, 2)
    table = _find_table(file, size)
    file.seek(table.start)
    entries = list(_central_entries(file.read(table.size), table.count))
    if not entries:
        raise Refusal("is an empty archive")
    check_twins(entry.name for entry in entries)
    return _placed(file, entries, table.start)


def read_entry(file: BinaryIO, entry: Entry, max_bytes: int) -> bytes:
    """Return the unpacked bytes of one file, checked against its size and its CRC."""
    if entry.size > max_bytes:
        raise Refusal(f"has {entry.size} bytes in {shown(entry.name)}, more than {max_bytes}")
    file.seek(entry.start)
    content = file.read(entry.packed)
    if entry.method == DEFLATED:  # one byte more than declared: this detects a longer stream without unpacking a bomb
        content = _unpacked(content, entry, entry.size + 1)
    if len(content) != entry.size or zlib.crc32(content) != entry.crc:
        raise Refusal(f"is damaged: {shown(entry.name)} does not have its declared size and checksum")
    return content


def read_start(file: BinaryIO, entry: Entry, count: int) -> bytes:
    """Return the first unpacked bytes of one file, at most ``count``."""
    file.seek(entry.start)
    if entry.method == STORED:
        return file.read(min(count, entry.packed))
    return _unpacked(file.read(min(entry.packed, count + 4096)), entry, count)


def _unpacked(content: bytes, entry: Entry, most: int) -> bytes:
    """Return at most ``most`` unpacked bytes."""
    try:
        return zlib.decompressobj(-15).decompress(content, most)
    except zlib.error as error:
        raise Refusal(f"is damaged: {shown(entry.name)} can't be unpacked") from error


def _find_table(file: BinaryIO, size: int) -> _Table:
    """Find the table by the end record, which must be the last bytes of the file, and by a 64-bit end record if present."""
    tail_size = min(size, 98)
    file.seek(size - tail_size)
    tail = file.read(tail_size)
    if len(tail) < 22 or tail[-22:-18] != _END:
        raise Refusal("is not a complete zip archive: its end is missing, or something follows it")
    disk, first_disk, here, count, length, start, comment = struct.unpack("<4H2IH", tail[-18:])
    if disk or first_disk or here != count or comment:
        raise Refusal("is an archive in several parts, or one with a comment")
    end = size - 22
    if tail[-42:-38] == _LOCATOR:
        end, table = _wide_table(tail, size)
        declared = ((count, table.count, _FULL16), (length, table.size, _FULL32), (start, table.start, _FULL32))
        if any(short not in (wide, full) for short, wide, full in declared):
            raise Refusal("is an archive whose two end records differ")
    else:
        table = _Table(count, start, length)
    if table.count > limit("archive-files"):
        raise Refusal(f"holds {table.count} files, more than {limit('archive-files')}")
    if table.size > limit("archive-directory"):
        raise Refusal(f"has a table of contents of {table.size} bytes, more than {limit('archive-directory')}")
    if table.start + table.size != end:
        raise Refusal("is an archive whose table of contents is not at the place in its end record")
    return table


def _wide_table(tail: bytes, size: int) -> tuple[int, _Table]:
    disk, place, disks = struct.unpack("<IQI", tail[-38:-22])
    if len(tail) < 98 or tail[-98:-94] != _END64 or place != size - 98 or disk or disks != 1:
        raise Refusal("is an archive whose 64-bit end record is not where it should be")
    length, _, _, disk, first_disk, here, count, bytes_, start = struct.unpack("<Q2H2I4Q", tail[-94:-42])
    if length != 44 or disk or first_disk or here != count:
        raise Refusal("is an archive with an invalid 64-bit end record")
    return place, _Table(count, start, bytes_)


def _central_entries(table: bytes, count: int) -> Iterator[Entry]:
    at = 0
    for _ in range(count):
        fixed = table[at : at + 46]
        if len(fixed) < 46 or fixed[:4] != _CENTRAL:
            raise Refusal("is an archive whose table of contents is cut off or damaged")
        fields = struct.unpack("<6H3I5H2I", fixed[4:])
        flags, method, crc, packed, size = fields[2], fields[3], *fields[6:9]
        name_size, extra_size, comment_size, disk = fields[9:13]
        attributes, header = fields[14:16]
        end = at + 46 + name_size + extra_size
        name = _name(table[at + 46 : at + 46 + name_size])
        _check_kind(name, flags, method, attributes >> 16)
        sizes = _widened(name, table[at + 46 + name_size : end], size, packed, header)
        if disk or comment_size or end > len(table):
            raise Refusal(f"is an archive with an invalid entry for {shown(name)}")
        if method == STORED and sizes[0] != sizes[1]:
            raise Refusal(f"is an archive in which {shown(name)} has two sizes")
        yield Entry(name, method, crc, sizes[1], sizes[0], sizes[2])
        at = end
    if at != len(table):
        raise Refusal("is an archive whose table of contents has more entries than its end record declares")


def _name(raw: bytes) -> str:
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Refusal("is an archive with a file name that is not UTF-8") from error
    check_name(name)
    return name


def _check_kind(name: str, flags: int, method: int, mode: int) -> None:
    if flags & ~_FLAGS:
        what = "is encrypted" if flags & 0x2041 else f"has the odd flags {flags:#06x}"
        raise Refusal(f"is an archive in which {shown(name)} {what}")
    if method not in (STORED, DEFLATED):
        raise Refusal(f"is an archive in which {shown(name)} is compressed by method {method}; supported are 0 and 8")
    if mode & _KIND == _SYMLINK:
        raise Refusal(f"is an archive in which {shown(name)} is a symbolic link")


def _widened(name: str, extra: bytes, size: int, packed: int, header: int) -> tuple[int, int, int]:
    """Return sizes and place, from the 64-bit extra field if a 32-bit field is full (APPNOTE 4.5.3)."""
    wide, at = b"", 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            if wide or at + 4 + length > len(extra):
                raise Refusal(f"is an archive with an invalid 64-bit size of {shown(name)}")
            wide = extra[at + 4 : at + 4 + length]
        at += 4 + length
    values, used = [], 0
    for value in (size, packed, header):
        if value == _FULL32:
            if used + 8 > len(wide):
                raise Refusal(f"is an archive with an invalid 64-bit size of {shown(name)}")
            value = struct.unpack_from("<Q", wide, used)[0]
            used += 8
        values.append(value)
    return values[0], values[1], values[2]


def _placed(file: BinaryIO, entries: list[Entry], end: int) -> list[Entry]:
    """Return the entries with the start of their bytes; refuse overlaps, and bytes before the first entry."""
    order = sorted(entries, key=lambda entry: entry.header)
    if order[0].header != 0:
        raise Refusal("is an archive with extra bytes before its first file")
    starts = {}
    for entry, follower in zip(order, [*order[1:], None], strict=True):
        start = _local_start(file, entry)
        if start + entry.packed > (end if follower is None else follower.header):
            raise Refusal(f"is an archive in which {shown(entry.name)} overlaps the next file")
        starts[entry.name] = start
    return [replace(entry, start=starts[entry.name]) for entry in entries]


def _local_start(file: BinaryIO, entry: Entry) -> int:
    """Return the start of an entry's bytes; its local header must agree with the table of contents."""
    file.seek(entry.header)
    fixed = file.read(30)
    if len(fixed) < 30 or fixed[:4] != MAGIC:
        raise Refusal(f"is an archive in which {shown(entry.name)} is not at the place in the table of contents")
    _, flags, method, _, _, _, packed, size, name_size, extra_size = struct.unpack("<5H3I2H", fixed[4:])
    if flags & ~_FLAGS or method != entry.method or file.read(name_size) != entry.name.encode():
        raise Refusal(f"is an archive that describes {shown(entry.name)} in two ways")
    behind = bool(flags & 0x0008) and packed == size == 0  # the sizes follow the data
    for local, central in ((packed, entry.packed), (size, entry.size)):
        if local not in (central, _FULL32) and not behind:
            raise Refusal(f"is an archive that declares two sizes of {shown(entry.name)}")
    return entry.header + 30 + int(name_size) + int(extra_size)
