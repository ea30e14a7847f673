"""A request to infer taken apart on the wire, before protobuf builds anything of it.

Two bytes of a message can be an empty tensor that takes seventy in memory, so what is not a raw tensor is counted first. The
raw tensors are not copied. What is left, the description, is the same again and again and can be remembered.

Source: Protocol Buffers, "Encoding".
"""

from __future__ import annotations

from typing import NamedTuple

from bnexport.errors import RequestError

#: Tags (number and wire type) of ModelInferRequest's id and raw_input_contents.
_ID, _RAW = 3 << 3 | 2, 7 << 3 | 2
_VARINT, _EIGHT, _SIZED, _FOUR = 0, 1, 2, 5
#: Raw tensors of one request.
_MOST_RAW = 1024
BROKEN = "the message is no inference.ModelInferRequest"
_REMEDY = "Let a client of the protocol write it"


#: Where bytes begin, and how many they are.
Span = tuple[int, int]


class Split(NamedTuple):
    """A request in parts.

    Attributes:
        header: The message without the other two.
        id: The request's.
        raw: Where each raw tensor begins in the message, and its bytes.
    """

    header: bytes
    id: str
    raw: list[Span]


def split(message: bytes, *, most: int) -> Split:
    """Take a message apart.

    Args:
        message: As it came.
        most: Bytes of the header.

    Raises:
        RequestError: It is no message, or its header is too large.
    """
    raw: list[Span] = []
    pieces: list[bytes] = []
    request_id, position, end, size = "", 0, len(message), 0
    try:
        while position < end:
            start = position
            tag, position = _varint(message, start)
            kind = tag & 7
            if kind == _SIZED:
                length, position = _varint(message, position)
                begin, position = position, position + length
                if tag == _RAW:
                    raw.append((begin, length))
                    if len(raw) > _MOST_RAW:
                        raise RequestError(
                            f"the request has more than {_MOST_RAW} raw tensors", remedy="Send one for each input"
                        )
                    continue
                if tag == _ID:
                    request_id = message[begin:position].decode()
                    continue
            elif kind == _VARINT:
                _, position = _varint(message, position)
            elif kind in (_EIGHT, _FOUR):
                position += 8 if kind == _EIGHT else 4
            else:
                raise RequestError(BROKEN, remedy=_REMEDY)
            if position > end:
                break
            size += position - start
            if size > most:
                raise RequestError(
                    f"the message has more than {most} bytes beside raw tensors",
                    remedy="Send the tensors as raw_input_contents",
                    status=413,
                )
            pieces.append(message[start:position])
    except UnicodeDecodeError as error:
        raise RequestError("the id is not UTF-8", remedy="Send a text, or none") from error
    except IndexError as error:
        raise RequestError(BROKEN, remedy=_REMEDY) from error
    if position != end:
        raise RequestError(f"{BROKEN}: it ends too early", remedy=_REMEDY)
    return Split(b"".join(pieces), request_id, raw)


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """A number and the place after it; most have one byte."""
    byte = data[position]
    position += 1
    if byte < 0x80:
        return byte, position
    value, shift = byte & 0x7F, 7
    while byte >= 0x80:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if shift > 70:
            raise RequestError(BROKEN, remedy=_REMEDY)
    return value, position
