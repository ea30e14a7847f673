"""Reader and writer of ONNX tensors in ``.pb`` files, without onnx and protobuf.

Serving machines have neither package, and they read golden vectors. Source: TensorProto in onnx.proto
(IR version 13), and protobuf.dev, "Encoding".
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

import numpy as np

from bnexport.files import Refusal
from bnexport.protobuf_wire import Field, message, read_fields, read_packed
from bnexport.tensors import ELEMENT_TYPES, Array
from bnexport.validation.onnx_file import ELEMENTS, validate_tensor

#: TensorProto.DataType -> numpy's name.
_NAMES: Mapping[int, str] = {row.onnx: name for name, row in ELEMENT_TYPES.items()}
_DIMS, _TYPE, _NAME, _RAW = 1, 2, 8, 9
#: Field -> type of its fixed-width numbers; the numbers of other fields have variable length.
_FIXED: Mapping[int, str] = {4: "<f4", 10: "<f8"}
#: int32_data, int64_data and uint64_data.
_WHOLE_NUMBERS = frozenset({5, 7, 11})
#: Type whose bits are stored as an integer in int32_data.
_BITS: Mapping[str, str] = {"float16": "uint16"}


def read_tensor(content: bytes) -> tuple[str, Array]:
    """Read a serialised TensorProto, after its validation: its name, and a writable array in native byte order.

    Raises:
        Refusal: The file is damaged, its sizes do not fit its bytes, its type is not in ELEMENT_TYPES, or a number does not fit
            its type.
    """
    validate_tensor(content)
    found: dict[int, list[Field]] = {}
    for field in read_fields(content, 0, len(content)):
        found.setdefault(field.number, []).append(field)
    number = found[_TYPE][0].value if _TYPE in found else 0
    if (dtype := _NAMES.get(number)) is None:
        raise Refusal(f"has elements of the type {number}, which bnexport does not read")
    shape = [size for field in found.get(_DIMS, []) for size in read_packed(content, field)]
    for unread in _WHOLE_NUMBERS & found.keys() - ({ELEMENTS[number].field} if _RAW not in found else set()):
        for field in found[unread]:  # protobuf refuses a file with a damaged number in any field
            deque(read_packed(content, field), maxlen=0)
    if _RAW in found:
        raw = found[_RAW][0]
        values = np.frombuffer(content[raw.start : raw.end], np.dtype(dtype).newbyteorder("<"))
    else:
        values = _typed(content, found.get(ELEMENTS[number].field, []), ELEMENTS[number].field, dtype)
    name = b"".join(content[field.start : field.end] for field in found.get(_NAME, [])).decode()  # validated as UTF-8
    return name, _plain(values, dtype).reshape(shape)


def _typed(content: bytes, fields: list[Field], number: int, dtype: str) -> Array:
    """Return the numbers in a typed field of the tensor, packed or not."""
    if number in _FIXED:
        data = b"".join(content[field.start : field.end] for field in fields)
        return np.frombuffer(data, _FIXED[number])
    whole = [value for field in fields for value in read_packed(content, field)]
    bits = _BITS.get(dtype, "uint8" if dtype == "bool" else dtype)
    low, high = np.iinfo(bits).min, np.iinfo(bits).max
    if whole and not low <= min(whole) <= max(whole) <= high:
        raise Refusal(f"has a number outside of {dtype}")
    return np.array(whole, bits).view(dtype) if dtype in _BITS else np.array(whole, bits)


def _plain(values: Array, dtype: str) -> Array:
    """Return a copy of the values; Refusal for a bool that is not stored as 0 or 1."""
    if dtype == "bool" and values.size and int(values.view(np.uint8).max()) > 1:
        raise Refusal("has a bool that is neither 0 nor 1")
    return values.astype(dtype)


def write_tensor(array: Array, name: str) -> bytes:
    """Serialise an array in the form of onnx.numpy_helper: sizes, type, name, raw bytes."""
    raw = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()
    sizes = ((_DIMS, size) for size in array.shape)
    named = ((_NAME, name),) if name else ()
    return message(*sizes, (_TYPE, ELEMENT_TYPES[array.dtype.name].onnx), *named, (_RAW, raw))
