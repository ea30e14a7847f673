"""Numbers of JSON as arrays: the quick way and the careful one agree, bit by bit and in what they refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnexport.errors import RequestError
from bnexport.serving.protocol.decoding import Decoder, array_from_json
from bnexport.serving.serving_limits import ServingLimits
from bnexport.tensors import Signature, TensorSpec

FLOATS = ("float16", "float32", "float64")
NUMBERS = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False),
    st.floats(width=16, allow_nan=False, allow_infinity=False),
    st.integers(-(2**63), 2**64 - 1),
)


def spec(dtype: str) -> TensorSpec:
    return TensorSpec("x", dtype, ("batch", "n"))


def outcome(data: list[Any], dtype: str, *, booleans: bool) -> bytes | str:
    try:
        array = array_from_json(data, spec(dtype), (1, len(data)), booleans=booleans)
    except RequestError as error:
        return str(error)
    assert (array.dtype, array.shape) == (np.dtype(dtype), (1, len(data)))
    return array.tobytes()


@given(st.lists(NUMBERS, min_size=1, max_size=20), st.sampled_from(FLOATS))
def test_both_ways_give_the_same(data: list[Any], dtype: str) -> None:
    read = orjson.loads(orjson.dumps(data))
    assert outcome(read, dtype, booleans=False) == outcome(read, dtype, booleans=True)


@pytest.mark.parametrize("value", ["1", None, {}, [1.0]], ids=str)
@pytest.mark.parametrize("booleans", [False, True])
def test_other_values_than_numbers_are_refused(value: Any, booleans: bool) -> None:
    message = outcome([1.0, value, 2.0], "float32", booleans=booleans)
    assert isinstance(message, str)
    assert "contains other values than numbers" in message


@pytest.mark.parametrize("word", ["true", "false"])
def test_a_boolean_is_not_a_number(word: str) -> None:
    signature = Signature((spec("float32"),), (spec("float32"),))
    text = '{"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1.5, %s]}]}' % word  # noqa: UP031
    with pytest.raises(RequestError, match="contains other values than numbers"):
        Decoder(signature, ServingLimits()).decode(text.encode())


@pytest.mark.parametrize("dtype", ["int32", "bool", "uint8"])
def test_other_types_are_looked_at_one_by_one(dtype: str) -> None:
    wrong = [0, 1.5] if dtype != "bool" else [True, 1]
    for booleans in (False, True):
        assert "contains other values" in str(outcome(wrong, dtype, booleans=booleans))
