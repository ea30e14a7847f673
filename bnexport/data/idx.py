"""Reader of IDX files, the format of MNIST and its successors (LeCun, Cortes and Burges, "The MNIST database").

Two zero bytes, a byte for the element type, a byte for the number of dimensions, each dimension as a big-endian 32-bit
number, then the elements, big-endian, in C order.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from bnexport.errors import DataError
from bnexport.optional import one_line
from bnexport.tensors import Array
from bnexport.validation.limits import limit, refusing
from bnexport.validation.paths import check_regular

#: The third byte of the file -> numpy's name of the element type in the file.
ELEMENT_TYPES: dict[int, str] = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
#: No file may unpack to more than this: 20 times the largest known set, and far below a machine's memory.
MAX_BYTES = limit("array-bytes")
GZIP_MAGIC = b"\x1f\x8b"
_MAX_DIMS = 8
_REMEDY = "Copy or download the file again"


def read_idx(path: str | Path, *, max_bytes: int = MAX_BYTES) -> Array:
    """Read an IDX file, packed with gzip or not; its content decides, not its name.

    Returns:
        An array of the file's shape, in the machine's byte order.
    """
    file = Path(path)
    try:
        with refusing(file, DataError, remedy=_REMEDY):
            check_regular(file)
        with file.open("rb") as raw:
            packed = raw.read(2) == GZIP_MAGIC
            raw.seek(0)
            if not packed:
                return _read(raw, file, max_bytes)
            with gzip.GzipFile(fileobj=raw) as unpacked:
                return _read(unpacked, file, max_bytes)  # type: ignore[arg-type]
    except EOFError as error:
        raise DataError(f"{file} is truncated: its gzip stream has no end", remedy=_REMEDY) from error
    except (OSError, zlib.error) as error:
        what = "does not exist" if isinstance(error, FileNotFoundError) else f"can't be read: {one_line(error)}"
        raise DataError(f"{file} {what}", remedy=_REMEDY) from error


def _read(stream: BinaryIO, file: Path, max_bytes: int) -> Array:
    dtype, shape = _header(stream, file)
    size = math.prod(shape) * dtype.itemsize
    if size > max_bytes:
        raise DataError(
            f"{file} says that it holds {size} bytes, above the limit of {max_bytes}",
            remedy="Check where it comes from",
        )
    content = stream.read(size + 1)
    if len(content) < size:
        raise DataError(f"{file} is truncated: {len(content)} of {size} bytes are there", remedy=_REMEDY)
    if len(content) > size:
        raise DataError(f"{file} is longer than its header says ({size} bytes)", remedy=_REMEDY)
    return np.frombuffer(content, dtype).reshape(shape).astype(dtype.newbyteorder("="))


def _header(stream: BinaryIO, file: Path) -> tuple[np.dtype[np.generic], tuple[int, ...]]:
    magic = stream.read(4)
    if len(magic) < 4:
        what = "is empty" if not magic else f"is truncated: it has {len(magic)} bytes"
        raise DataError(f"{file} {what}", remedy=_REMEDY)
    if magic[:2] != b"\0\0" or magic[2] not in ELEMENT_TYPES or not 1 <= magic[3] <= _MAX_DIMS:
        raise DataError(f"{file} is not an IDX file (it starts with {magic.hex()})", remedy=_REMEDY)
    dims = stream.read(4 * magic[3])
    if len(dims) < 4 * magic[3]:
        raise DataError(f"{file} is truncated inside its header", remedy=_REMEDY)
    return np.dtype(ELEMENT_TYPES[magic[2]]), tuple(int(dim) for dim in np.frombuffer(dims, ">u4"))
