"""Stored tensors of an ONNX file: the elements that they say against the bytes that are there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bnexport.optional import one_line
from bnexport.screening.limits import limit
from bnexport.screening.onnx_messages import ELEMENTS, TYPED, Element
from bnexport.screening.paths import name_problem, place_problem
from bnexport.screening.refusal import Refusal, shown
from bnexport.screening.tensor_sizes import count_elements
from bnexport.screening.wire import BYTES, FIXED32, FIXED64, VARINT, Field, read_fields, read_packed

_EXTERNAL = 1
_FIXED = {4: (FIXED32, 4), 10: (FIXED64, 8)}
_LAST_BYTES = bytes(range(0x80))


@dataclass(frozen=True)
class Outside:
    """What holds for data in other files.

    Attributes:
        folder: Where they lie; None: the model has no folder of its own, so its reader will refuse them.
        refused: Whether none is allowed at all.
    """

    folder: Path | None
    refused: bool


def check(content: bytes, found: Mapping[int, list[Field]], name: str, outside: Outside) -> None:
    """Refuse a tensor whose sizes, type and data do not belong together.

    Args:
        content: The whole file.
        found: The tensor's fields.
        name: The tensor's.
        outside: What holds for data in other files.

    Raises:
        Refusal: Why.
    """
    elements = count_elements(numbers(content, found.get(1, [])))
    number = found[2][0].value if 2 in found else 0
    kind = ELEMENTS.get(number)
    if kind is None:
        raise Refusal(f"has the tensor {shown(name)} of the unknown element type {number}")
    if 3 in found:
        raise Refusal(f"has the tensor {shown(name)} in segments, which no reader puts together")
    typed = sum(_entries(content, number, found[number]) for number in TYPED if number in found)
    location = found[14][0].value if 14 in found else 0
    if location == _EXTERNAL or (13 in found and location):
        if 9 in found or typed:
            raise Refusal(f"has the tensor {shown(name)} inside and in another file")
        _check_outside(content, found.get(13, []), name, (elements * kind.bits + 7) // 8, outside)
    elif 9 in found:
        if typed:
            raise Refusal(f"has the tensor {shown(name)} with its data twice")
        _check_raw(found[9][0], kind, elements, name)
    elif typed != _needed_entries(kind, elements) or (
        typed and not all(n in (kind.field,) for n in TYPED if n in found)
    ):
        raise Refusal(f"says that the tensor {shown(name)} has {elements} elements; {typed} entries of data are there")


def numbers(content: bytes, fields: Sequence[Field]) -> list[int]:
    """A repeated int64 as far as a tensor may have dimensions, and one more."""
    values: list[int] = []
    for field in fields:
        for value in read_packed(content, field):
            values.append(value)
            if len(values) > limit("onnx-rank"):
                return values
    return values


def _needed_entries(kind: Element, elements: int) -> int:
    return -(-elements // kind.elements) * kind.entries


def _check_raw(field: Field, kind: Element, elements: int, name: str) -> None:
    there, needed = field.end - field.start, (elements * kind.bits + 7) // 8
    if not kind.bits:
        raise Refusal(f"has the tensor {shown(name)} of texts as raw bytes")
    if there != needed:
        raise Refusal(f"says that the tensor {shown(name)} has {needed} bytes; {there} are there")


def _entries(content: bytes, number: int, fields: Sequence[Field]) -> int:
    """How many values a repeated field holds."""
    wire, width = _FIXED.get(number, (VARINT, 0))
    if number == 6:
        return len(fields)
    total = 0
    for field in fields:
        length = field.end - field.start
        if field.wire == wire:
            total += 1
        elif width:
            if length % width:
                raise Refusal("has a tensor whose packed numbers are cut off")
            total += length // width
        else:
            # Each number ends with a byte below 128; taking those out counts them without a loop.
            total += length - len(content[field.start : field.end].translate(None, _LAST_BYTES))
    return total


def _check_outside(content: bytes, fields: Sequence[Field], name: str, needed: int, outside: Outside) -> None:
    if outside.refused:
        raise Refusal(f"keeps {shown(name)} in another file")
    entries = _texts(content, fields, name)
    location = entries.get("location", "")
    what = f"keeps {shown(name)} in the file {shown(location)}"
    if location.startswith("/") or ".." in location.split("/"):
        raise Refusal(f"{what}, which is not inside its folder")
    if (problem := name_problem(location)) is not None:
        raise Refusal(f"{what}, which {problem}")
    offset, length = _whole(entries.get("offset", "0"), what), _whole(entries.get("length", str(needed)), what)
    if length != needed:
        raise Refusal(f"{what}, of which it says {length} bytes; its sizes need {needed}")
    if outside.folder is None:
        return
    try:
        if (found := place_problem(outside.folder, location)) is not None:
            raise Refusal(f"{what}, which is not inside its folder as a plain file: {found}")
        place = outside.folder / location
        if place.exists() and offset + length > place.stat().st_size:
            raise Refusal(f"{what}, which can't be used: the file is shorter than the model says")
    except OSError as error:
        raise Refusal(f"{what}, which can't be read: {one_line(error)}") from error


def _texts(content: bytes, fields: Sequence[Field], name: str) -> dict[str, str]:
    """Key -> value; the same key twice means one file to one reader and another to the next."""
    entries: dict[str, str] = {}
    for field in fields:
        parts = {
            inner.number: content[inner.start : inner.end]
            for inner in read_fields(content, field.start, field.end)
            if inner.wire == BYTES
        }
        try:
            key, value = parts.get(1, b"").decode("utf-8"), parts.get(2, b"").decode("utf-8")
        except UnicodeDecodeError as error:
            raise Refusal(f"keeps {shown(name)} in a file whose name is not UTF-8") from error
        if key in entries:
            raise Refusal(f"keeps {shown(name)} in another file and tells {shown(key)} twice")
        entries[key] = value
    return entries


def _whole(text: str, what: str) -> int:
    if not (text.isascii() and text.isdigit()) or len(text) > limit("json-digits"):
        raise Refusal(f"{what}, with the odd number {shown(text)}")
    return int(text)
