"""Protobuf's wire format without protobuf: a bounded reader of fields from untrusted bytes, and a writer of messages.

Source: protobuf.dev, "Encoding". Groups are refused, because ONNX does not use them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from bnexport.files import Refusal

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
_WIDTH = {FIXED64: 8, FIXED32: 4}
_MAX_VARINT = 10


class Field(NamedTuple):
    """One field of a message."""

    number: int  # Number of the field
    wire: int  # VARINT, FIXED64, BYTES or FIXED32
    value: int  # The number of a VARINT, else 0
    start: int  # Start of its bytes
    end: int  # End of its bytes


def read_fields(content: bytes, start: int, end: int) -> Iterator[Field]:
    """Yield the fields between two offsets."""
    at = start
    while at < end:
        tag, at = read_varint(content, at, end)
        number, wire = tag >> 3, tag & 7
        value = 0
        if wire == VARINT:
            begin = at
            value, at = read_varint(content, at, end)
        elif wire == BYTES:
            length, begin = read_varint(content, at, end)
            at = begin + length
        elif wire in _WIDTH:
            begin, at = at, at + _WIDTH[wire]
        else:
            raise Refusal(f"is damaged at byte {at}: protobuf has no field of the kind {wire} here")
        if at > end or not 0 < number < 2**29:
            raise Refusal(f"is damaged or cut off: a field at byte {begin} reaches beyond the end of its message")
        yield Field(number, wire, value, begin, at)


def read_varint(content: bytes, at: int, end: int) -> tuple[int, int]:
    """Return a number of variable length and the offset after it."""
    if at < end and (first := content[at]) < 0x80:  # nearly all numbers have one byte
        return first, at + 1
    value = 0
    for place in range(at, min(end, at + _MAX_VARINT)):
        byte = content[place]
        value |= (byte & 0x7F) << (7 * (place - at))
        if byte < 0x80:
            if value >= 2**64:
                break
            return value, place + 1
    raise Refusal(f"is damaged or cut off: a number at byte {at} does not end")


def signed(value: int) -> int:
    """Return a 64-bit number as a signed int64."""
    return value - 2**64 if value >= 2**63 else value


def read_packed(content: bytes, field: Field) -> Iterator[int]:
    """Yield the numbers of one occurrence of a repeated int64, packed or not."""
    if field.wire == VARINT:
        yield signed(field.value)
        return
    at = field.start
    while at < field.end:
        value, at = read_varint(content, at, field.end)
        yield signed(value)


def message(*fields: tuple[int, int | str | bytes]) -> bytes:
    """Serialise a message from its fields in order: non-negative numbers, texts, bytes or inner messages."""
    return b"".join(_written_field(number, value) for number, value in fields)


def _written_field(number: int, value: int | str | bytes) -> bytes:
    if isinstance(value, int):
        return _written_varint(number << 3 | VARINT) + _written_varint(value)
    content = value.encode() if isinstance(value, str) else value
    return _written_varint(number << 3 | BYTES) + _written_varint(len(content)) + content


def _written_varint(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*parts, value))
