"""The row of a hostile file: its reader, how it is made, and words of the refusal."""

import hashlib
import json
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Good:
    """Valid files, to be spoiled in copies."""

    bundle: Path  # A sealed bundle
    exported: Path  # A .pt2 file
    checkpoint: Path  # A state dict of torch.save
    old_checkpoint: Path  # One in the format before torch 1.6
    onnx: Path  # An ONNX file with a BatchNorm
    network: str  # ``file.py:build`` of the checkpoint's network
    picture: Path  # A PNG that the bundle can label


@dataclass(frozen=True)
class Hostile:
    """One hostile file."""

    reader: str  # Row of READERS in test_corpus.py
    # Given an empty folder and the good files, makes it; gives the path of the file, or of the bundle
    build: Callable[[Path, Good], Path]
    words: str  # Part of the sentence that refuses it


def hostile(reader: str, rows: dict[str, tuple[Callable[[Path, Good], Path], str]]) -> dict[str, Hostile]:
    """Return rows of one reader: name -> (``Hostile.build``, ``Hostile.words``)."""
    return {name: Hostile(reader, *row) for name, row in rows.items()}


def forge(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Change a bundle's manifest and give it a digest that holds, as an attacker would."""
    value = json.loads((folder / "manifest.json").read_bytes())
    change(value)
    value.pop("digest")
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    value["digest"] = hashlib.sha256(canonical).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(value))
    return folder


def reseal_file(folder: Path, name: str, content: bytes) -> Path:
    """Replace one file of a bundle, with hash and size in the manifest that fit."""
    (folder / name).write_bytes(content)
    entry = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    return forge(folder, lambda value: value["files"].update({name: entry}))


@dataclass
class Member:
    """One file of an archive, with every field that can be declared wrongly."""

    name: str
    data: bytes
    method: int = 0
    flags: int = 0x0800
    size: int | None = None
    packed: bytes | None = None
    central_name: str | None = None
    local_size: int | None = None
    header: int | None = None
    attributes: int = 0
    extra: bytes = b""
    stored: bytes = field(init=False)

    def __post_init__(self) -> None:
        deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
        self.stored = self.data if self.method != 8 else deflate.compress(self.data) + deflate.flush()
        if self.packed is not None:
            self.stored = self.packed


def write_zip(
    path: Path, members: list[Member], *, front: bytes = b"", behind: bytes = b"", comment: bytes = b"",
    count: int | None = None, table_size: int | None = None, gap: bytes = b"",
) -> Path:  # fmt: skip
    """Write an archive byte by byte, so that each field can be wrong."""
    body, table = bytearray(front), bytearray()
    for member in members:
        place = len(body) if member.header is None else member.header
        crc, size = zlib.crc32(member.data), len(member.data) if member.size is None else member.size
        local = size if member.local_size is None else member.local_size
        name = member.name.encode()
        shown = (member.central_name or member.name).encode()
        # torch maps tensors in place, so their bytes start at multiples of 64; the rest of the extra field is room.
        room = -(len(body) + 30 + len(name) + 4) % 64
        extra = struct.pack("<2sH", b"FB", room) + b"Z" * room
        body += struct.pack("<4s5H3I2H", b"PK\x03\x04", 20, member.flags, member.method, 0, 0, crc, len(member.stored),
                            local, len(name), len(extra)) + name + extra + member.stored  # fmt: skip
        table += struct.pack("<4s6H3I5H2I", b"PK\x01\x02", 20, 20, member.flags, member.method, 0, 0, crc,
                             len(member.stored), size, len(shown), len(member.extra), 0, 0, 0, member.attributes,
                             place) + shown + member.extra  # fmt: skip
    body += gap
    number = len(members) if count is None else count
    if number > 0xFFFF:
        wide = struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, number, number, len(table), len(body))
        table += wide + struct.pack("<4sIQI", b"PK\x06\x07", 0, len(body) + len(table), 1)
        number, table_size = 0xFFFF, len(table) - 76
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, number, number, len(table) if table_size is None else table_size,
                      len(body), len(comment))  # fmt: skip
    path.write_bytes(bytes(body) + bytes(table) + end + comment + behind)
    return path


def members_of(path: Path) -> list[Member]:
    """The files of a good archive."""
    with zipfile.ZipFile(path) as archive:
        return [Member(item.filename, archive.read(item), item.compress_type) for item in archive.infolist()]


def replaced(members: list[Member], ending: str, data: bytes) -> list[Member]:
    """The same files with the content of one replaced."""
    assert any(member.name.endswith(ending) for member in members)
    return [
        Member(member.name, data if member.name.endswith(ending) else member.data, member.method) for member in members
    ]


def zeros_deflated(count: int) -> bytes:
    """A stream that unpacks to ``count`` zeros (a multiple of 4 MiB), made fast: one packed block, repeated."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = deflate.compress(bytes(4 * 2**20)) + deflate.flush(zlib.Z_FULL_FLUSH)
    return block * (count // (4 * 2**20)) + b"\x03\x00"
