"""The steps of a pickle, one after the other: only those that weights need, and without doing them.

``pickletools.genops`` would read every step that Python knows, with warnings and errors of its own kinds on the way.
Source: pickletools.py of Python 3.11, protocol 2.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterator
from typing import Any

from bnexport.screening.refusal import Refusal


def read_steps(stream: io.BytesIO) -> Iterator[tuple[str, Any]]:
    """Name and argument of each step, up to the end of one pickle.

    Raises:
        Refusal: A step that weights do not need, or one that is cut off.
    """
    while True:
        code = _take(stream, 1)
        if code not in _STEPS:
            raise Refusal(f"holds a pickle with the step {code!r}, which weights do not need")
        name, read = _STEPS[code]
        yield name, read(stream)
        if name == "STOP":
            return


def _take(stream: io.BytesIO, count: int) -> bytes:
    content = stream.read(count)
    if len(content) < count:
        raise Refusal("holds a damaged pickle: it ends inside a step")
    return content


def _nothing(_: io.BytesIO) -> None:
    return None


def _number(form: str) -> Callable[[io.BytesIO], Any]:
    size = struct.calcsize(form)
    return lambda stream: struct.unpack(form, _take(stream, size))[0]


def _text(form: str) -> Callable[[io.BytesIO], str]:
    """A text with its length in front."""
    length = _number(form)

    def read(stream: io.BytesIO) -> str:
        count = length(stream)
        if count < 0:
            raise Refusal("holds a damaged pickle: it has a text of negative length")
        return _decoded(_take(stream, count))

    return read


def _whole(stream: io.BytesIO) -> int:
    return int.from_bytes(_take(stream, _take(stream, 1)[0]), "little", signed=True)


def _name(stream: io.BytesIO) -> str:
    """Module and name, each on a line of its own."""
    lines = [stream.readline(), stream.readline()]
    if not all(line.endswith(b"\n") for line in lines):
        raise Refusal("holds a damaged pickle: it ends inside a name")
    return ".".join(_decoded(line[:-1]) for line in lines)


def _decoded(content: bytes) -> str:
    # Texts may hold any bytes (a shared constant of a network): what is no UTF-8 is only looked at, never used.
    return content.decode("utf-8", "replace")


#: Byte -> name and the reader of its argument: what ``weights_only`` and TorchScript know, and no more.
_STEPS: dict[bytes, tuple[str, Callable[[io.BytesIO], Any]]] = {
    b"\x80": ("PROTO", _number("B")),
    b".": ("STOP", _nothing),
    b"(": ("MARK", _nothing),
    b")": ("EMPTY_TUPLE", _nothing),
    b"]": ("EMPTY_LIST", _nothing),
    b"}": ("EMPTY_DICT", _nothing),
    b"\x8f": ("EMPTY_SET", _nothing),
    b"N": ("NONE", _nothing),
    b"\x88": ("NEWTRUE", _nothing),
    b"\x89": ("NEWFALSE", _nothing),
    b"J": ("BININT", _number("<i")),
    b"K": ("BININT1", _number("B")),
    b"M": ("BININT2", _number("<H")),
    b"\x8a": ("LONG1", _whole),
    b"G": ("BINFLOAT", _number(">d")),
    b"X": ("BINUNICODE", _text("<I")),
    b"T": ("BINSTRING", _text("<i")),
    b"U": ("SHORT_BINSTRING", _text("B")),
    b"q": ("BINPUT", _number("B")),
    b"r": ("LONG_BINPUT", _number("<I")),
    b"h": ("BINGET", _number("B")),
    b"j": ("LONG_BINGET", _number("<I")),
    b"t": ("TUPLE", _nothing),
    b"\x85": ("TUPLE1", _nothing),
    b"\x86": ("TUPLE2", _nothing),
    b"\x87": ("TUPLE3", _nothing),
    b"a": ("APPEND", _nothing),
    b"e": ("APPENDS", _nothing),
    b"s": ("SETITEM", _nothing),
    b"u": ("SETITEMS", _nothing),
    b"c": ("GLOBAL", _name),
    b"R": ("REDUCE", _nothing),
    b"\x81": ("NEWOBJ", _nothing),
    b"b": ("BUILD", _nothing),
    b"Q": ("BINPERSID", _nothing),
}
