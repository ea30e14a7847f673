"""Messages between a runner's two processes: one line of JSON, then the plain bytes of its arrays. Nothing is unpickled."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np

from bnexport.tensors import DTYPES, Array

#: A message's JSON is a request, a description or an error: small.
_MAX_HEAD = 2**26
_ARRAYS = "arrays"


def send(stream: BinaryIO, head: Mapping[str, Any], arrays: Mapping[str, Array] | None = None) -> None:
    """Write one message.

    Args:
        stream: A pipe.
        head: Plain JSON values.
        arrays: By name, of an element type in DTYPES.

    Raises:
        OSError: The other side is gone.
    """
    contiguous = {name: np.asarray(array, order="C") for name, array in (arrays or {}).items()}
    table = [[name, array.dtype.name, list(array.shape)] for name, array in contiguous.items()]
    text = json.dumps({**head, _ARRAYS: table}).encode()
    stream.write(len(text).to_bytes(8, "little") + text)
    for array in contiguous.values():
        stream.write(array.reshape(-1).view(np.uint8).data)
    stream.flush()


def receive(stream: BinaryIO) -> tuple[dict[str, Any], dict[str, Array]]:
    """Read one message; its arrays have memory of their own.

    Raises:
        EOFError: The other side is gone.
        ValueError: Not a message.
    """
    size = int.from_bytes(_exactly(stream, 8), "little")
    if size > _MAX_HEAD:
        raise ValueError(f"a message of {size} bytes")
    head = json.loads(bytes(_exactly(stream, size)))
    arrays = {}
    for name, dtype, shape in head.pop(_ARRAYS):
        if dtype not in DTYPES:
            raise ValueError(f"an array of the type {dtype!r}")
        content = _exactly(stream, math.prod(shape) * np.dtype(dtype).itemsize)
        arrays[str(name)] = np.frombuffer(content, dtype).reshape(shape)
    return head, arrays


def _exactly(stream: BinaryIO, size: int) -> bytearray:
    content = bytearray(size)
    view, at = memoryview(content), 0
    while at < size:
        count = stream.readinto(view[at:])  # type: ignore[attr-defined]
        if not count:
            raise EOFError
        at += count
    return content
