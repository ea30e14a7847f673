"""The header of a .npy file: a plain array whose bytes are all there."""

from __future__ import annotations

import ast
import re
from typing import Any

from bnexport.optional import no_warnings
from bnexport.screening.limits import limit
from bnexport.screening.refusal import Refusal, shown
from bnexport.screening.tensor_sizes import count_elements

MAGIC = b"\x93NUMPY"
#: Plain numbers: byte order, kind, bytes. Objects ("O"), records, texts and dates are none.
_PLAIN = re.compile(r"[<>=|]?(?:b1|[iu][1248]|f[248]|c8|c16)")


def check_header(start: bytes, size: int) -> None:
    """Refuse an array of objects, which are pickles, and one that says it is larger than it is.

    Args:
        start: The file's first bytes, at least its whole header if that has no more than the limit.
        size: Bytes of the whole file.

    Raises:
        Refusal: It is damaged, or holds no plain numbers.
    """
    if start[:6] != MAGIC or len(start) < 12 or start[6] not in (1, 2, 3):
        raise Refusal("is not a whole .npy file")
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
        raise Refusal("is not a whole .npy file: its header has no shape")
    needed = count_elements(shape) * int("".join(filter(str.isdigit, kind)))
    if needed != size - begin - length:
        raise Refusal(f"says that its array has {needed} bytes; {size - begin - length} are there")


def _parsed(text: bytes) -> dict[str, Any]:
    try:
        with no_warnings:  # the compiler remarks on odd texts; what matters is raised
            header = ast.literal_eval(text.decode("latin-1").strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError) as error:
        raise Refusal("is not a whole .npy file: its header can't be read") from error
    if not isinstance(header, dict):
        raise Refusal("is not a whole .npy file: its header is no table")
    return header
