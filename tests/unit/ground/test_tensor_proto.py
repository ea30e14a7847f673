"""Tensors read without onnx, against onnx itself: the same values, the same bytes, and no other exception than a refusal."""

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from onnx import TensorProto, helper, numpy_helper

from bnexport.files import Refusal
from bnexport.protobuf_wire import message
from bnexport.tensor_proto import read_tensor, write_tensor
from bnexport.tensors import DTYPES, ELEMENT_TYPES

TYPES = sorted(ELEMENT_TYPES)
ANY_ARRAY = st.sampled_from(TYPES).flatmap(
    lambda dtype: arrays.arrays(dtype, arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


def same(have: np.ndarray, want: np.ndarray) -> bool:
    """Type, shape and every bit: NaN with its payload, and the sign of zero."""
    return (have.dtype, have.shape, have.tobytes()) == (want.dtype, want.shape, want.tobytes())


def number_of(dtype: str) -> int:
    return int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


def test_every_element_type_of_a_signature_can_be_read() -> None:
    assert set(TYPES) == set(DTYPES)
    for dtype, row in ELEMENT_TYPES.items():
        assert number_of(dtype) == row.onnx


@settings(max_examples=300, deadline=None, derandomize=True)
@given(array=ANY_ARRAY, name=NAMES)
def test_raw_bytes_as_onnx_writes_them(array: np.ndarray, name: str) -> None:
    content = numpy_helper.from_array(array, name).SerializeToString(deterministic=True)
    have_name, have = read_tensor(content)
    assert have_name == name
    assert same(have, array)
    assert have.flags.writeable
    assert write_tensor(array, name) == content


@settings(max_examples=300, deadline=None, derandomize=True)
@given(array=ANY_ARRAY)
def test_numbers_one_by_one_as_onnx_writes_them(array: np.ndarray) -> None:
    values = array.reshape(-1)
    if array.dtype.kind == "f":
        values = np.nan_to_num(values)  # onnx's helper warns of what is not finite
    proto = helper.make_tensor("x", number_of(array.dtype.name), array.shape, values.tolist())
    _, have = read_tensor(proto.SerializeToString())
    assert same(have, numpy_helper.to_array(proto))
    assert same(have, values.reshape(array.shape))


@pytest.mark.parametrize("dtype", ["int8", "int64", "float32", "float64"])
def test_numbers_that_are_not_packed(dtype: str) -> None:
    """proto2 writes each number of a repeated field by itself; a reader must take both."""
    number = number_of(dtype)
    field = {"int8": 5, "int64": 7, "float32": 4, "float64": 10}[dtype]
    if dtype.startswith("float"):
        wire, width = (5, "<f4") if dtype == "float32" else (1, "<f8")
        data = b"".join(bytes([field << 3 | wire]) + np.array(value, width).tobytes() for value in (1.5, -0.0))
    else:
        data = bytes([field << 3, 7, field << 3]) + b"\xff" * 9 + b"\x01"  # 7 and -1
    content = message((1, 2), (2, number)) + data
    want = numpy_helper.to_array(TensorProto.FromString(content))
    assert same(read_tensor(content)[1], want)


def test_foreign_byte_order_is_written_right() -> None:
    array = np.arange(4, dtype=">f4")
    assert same(read_tensor(write_tensor(array, "x"))[1], array.astype("<f4"))


def raw(number: int, data: bytes, *sizes: int) -> bytes:
    return message(*((1, size) for size in sizes), (2, number), (9, data))


REFUSED = {
    "empty": (b"", "unknown element type 0"),
    "text": (b"hello, I am no tensor", ""),
    "no type": (message((1, 1), (9, b"\0" * 4)), "unknown element type 0"),
    "a type that does not exist": (raw(99, b"\0" * 4, 1), "unknown element type 99"),
    "bfloat16": (raw(16, b"\0" * 2, 1), "type 16, which bnexport does not read"),
    "texts": (message((1, 1), (2, 8), (6, b"x")), "type 8, which bnexport does not read"),
    "too few bytes": (raw(1, b"\0" * 7, 2), "declares 8 bytes for the tensor '', but has 7"),
    "too many bytes": (raw(1, b"\0" * 9, 2), "declares 8 bytes for the tensor '', but has 9"),
    "no data": (message((1, 2), (2, 1)), "declares 2 elements for the tensor '', but has 0 entries"),
    "data twice": (message((1, 1), (2, 1), (9, b"\0" * 4)) + b"\x25\0\0\0\0", "data twice"),
    "raw bytes twice": (message((1, 1), (2, 1), (9, b"\0" * 4), (9, b"\0" * 4)), "twice"),
    "cut off": (raw(1, b"\0" * 8, 2)[:-1], "cut off"),
    "a negative size": (message((1, 2**64 - 1), (2, 1)), "negative size"),
    "sizes beyond 64 bits": (raw(1, b"", 2**62, 2**62), "beyond 64 bits"),
    "a bool of 2": (raw(9, b"\x02", 1), "neither 0 nor 1"),
    "a listed bool of 2": (message((1, 1), (2, 9), (5, 2)), "neither 0 nor 1"),
    "an int8 of 300": (message((1, 1), (2, 3), (5, 300)), "outside of int8"),
    "a float16 of 17 bits": (message((1, 1), (2, 10), (5, 65536)), "outside of float16"),
    "numbers in another field": (message((1, 1), (2, 7), (5, 1)), "entries of data"),
    "in another file": (message((1, 1), (2, 1), (14, 1)), "in another file"),
    "a name that is not UTF-8": (message((1, 0), (2, 1), (8, b"\xff\xfe")), "not UTF-8"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_are_not_tensors_are_refused(name: str) -> None:
    content, words = REFUSED[name]
    with pytest.raises(Refusal) as caught:
        read_tensor(content)
    assert words in str(caught.value)


@settings(max_examples=1000, deadline=None, derandomize=True)
@given(data=st.data())
def test_damaged_tensors_are_refused_or_read_as_onnx_reads_them(data: st.DataObject) -> None:
    content = bytearray(write_tensor(data.draw(ANY_ARRAY), data.draw(NAMES)))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content)))
        content[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    try:
        _, have = read_tensor(bytes(content))
    except Refusal:
        return
    assert same(have, numpy_helper.to_array(onnx.TensorProto.FromString(bytes(content))))


def test_a_damaged_number_in_a_field_that_is_not_read_is_refused() -> None:
    content = bytearray(write_tensor(np.array(False), "\x80"))
    content[2] = 7 << 3 | 2  # the name's two bytes become int64_data whose number does not end
    with pytest.raises(Refusal, match="does not end"):
        read_tensor(bytes(content))


@settings(max_examples=500, deadline=None, derandomize=True)
@given(content=st.binary(max_size=60))
def test_any_bytes_are_refused_or_read_as_onnx_reads_them(content: bytes) -> None:
    try:
        _, have = read_tensor(content)
    except Refusal:
        return
    assert same(have, numpy_helper.to_array(onnx.TensorProto.FromString(content)))


@given(value=st.integers(0, 2**64 - 1), text=NAMES, content=st.binary(max_size=300))
def test_messages_are_protobuf(value: int, text: str, content: bytes) -> None:
    proto = TensorProto.FromString(message((1, value), (8, text), (9, content)))
    assert (proto.dims[0] % 2**64, proto.name, proto.raw_data) == (value, text, content)
