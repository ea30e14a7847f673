"""Decoding and encoding without HTTP and without an engine."""

import json
import struct
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.serving.conftest import LIMITS, TWO, of, sample

from bnexport.errors import RequestError
from bnexport.serving.protocol.decoding import Decoder, array_from_json, load_json
from bnexport.serving.protocol.messages import (
    DATATYPES,
    InferRequest,
    InferResponse,
    RequestedOutput,
    answer,
    classify,
    encode_response,
)
from bnexport.serving.serving_limits import BoundedCache, ServingLimits, limits_from, rows
from bnexport.tensors import DTYPES, Signature, TensorSpec

KEYS = ("inputs", "outputs", "parameters", "id", "name", "shape", "datatype", "data", "binary_data_size", "timeout")


def message(array: np.ndarray, datatype: str, *, binary: bool) -> tuple[bytes, int | None]:
    item: dict[str, Any] = {"name": "x", "shape": list(array.shape), "datatype": datatype}
    if not binary:
        return json.dumps({"inputs": [item | {"data": array.tolist()}]}).encode(), None
    item["parameters"] = {"binary_data_size": array.nbytes}
    head = json.dumps({"inputs": [item]}).encode()
    return head + array.tobytes(), len(head)


@pytest.mark.parametrize("binary", [True, False])
def test_a_tensor_below_the_smallest_size_is_refused(binary: bool) -> None:
    """The engine would compute something; requests that fit skip the runner's check."""
    spec = TensorSpec("x", "float32", ("batch", 2, "height"), {"height": 5})
    decoder = Decoder(Signature((spec,), (spec,)), LIMITS)
    fitting = np.ones((1, 2, 5), np.float32)
    assert decoder.decode(*message(fitting, "FP32", binary=binary)).inputs["x"].shape == (1, 2, 5)
    with pytest.raises(RequestError, match="input 'x' has height = 4, the model needs at least 5"):
        decoder.decode(*message(fitting[:, :, :4], "FP32", binary=binary))


def test_every_element_type_has_a_datatype() -> None:
    assert set(DATATYPES) == set(DTYPES)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("binary", [True, False])
def test_every_element_type_there_and_back(dtype: str, binary: bool) -> None:
    array = sample(dtype)
    decoder = Decoder(of(dtype), LIMITS)
    for _ in range(2):  # the second time from memory
        request = decoder.decode(*message(array, DATATYPES[dtype], binary=binary))
        assert request.inputs["x"].dtype == np.dtype(dtype)
        assert np.array_equal(request.inputs["x"], array)
        assert request.rows == 2
    wanted = (RequestedOutput("y", DATATYPES[dtype], binary),)
    body, length = encode_response(InferResponse("m", "1", answer({"y": array}, wanted, None), "i"))
    value = json.loads(body[:length])
    assert (value["model_name"], value["model_version"], value["id"]) == ("m", "1", "i")
    (output,) = value["outputs"]
    assert (output["datatype"], output["shape"]) == (DATATYPES[dtype], [2, 4])
    got = np.frombuffer(body[length:], dtype) if binary else np.array(output["data"], dtype)
    assert np.array_equal(got.reshape(2, 4), array)


TOO_LARGE = [
    ("uint8", 256), ("uint8", -1), ("int8", 128), ("int64", 2**63), ("int32", 1.5), ("bool", 1), ("float16", 70000),
    ("float32", -4e38),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "value"), TOO_LARGE)
def test_numbers_that_the_type_can_not_hold(dtype: str, value: float) -> None:
    data = [0 if dtype != "bool" else False] * 3 + [value]
    item = {"name": "x", "shape": [1, 4], "datatype": DATATYPES[dtype], "data": data}
    with pytest.raises(RequestError):
        Decoder(of(dtype), LIMITS).decode(json.dumps({"inputs": [item]}).encode())


def test_a_binary_flag_is_0_or_1() -> None:
    body, length = message(np.array([[0, 1, 2, 0]], np.uint8), "BOOL", binary=True)
    with pytest.raises(RequestError, match="neither 0 nor 1"):
        Decoder(of("bool"), LIMITS).decode(body, length)


def two(x: np.ndarray, mask: np.ndarray) -> list[dict[str, Any]]:
    return [
        {"name": "mask", "shape": list(mask.shape), "datatype": "BOOL", "data": mask.tolist()},
        {"name": "x", "shape": list(x.shape), "datatype": "FP32", "data": x.reshape(-1).tolist()},
    ]


def test_several_inputs_and_outputs() -> None:
    x, mask = np.ones((2, 3), np.float32), np.zeros((2, 5), bool)
    decoder = Decoder(TWO, LIMITS)
    request = decoder.decode(json.dumps({"inputs": two(x, mask)}).encode())
    assert (set(request.inputs), request.rows) == ({"x", "mask"}, 2)
    assert [want.name for want in request.outputs] == ["y", "n"]
    chosen = decoder.decode(json.dumps({"inputs": two(x, mask), "outputs": [{"name": "n"}]}).encode())
    assert [want.name for want in chosen.outputs] == ["n"]
    with pytest.raises(RequestError, match=r"batches of \[2, 3\]"):
        decoder.decode(json.dumps({"inputs": two(x, np.zeros((3, 5), bool))}).encode())
    with pytest.raises(RequestError, match="'mask' is missing"):
        decoder.decode(json.dumps({"inputs": two(x, mask)[1:]}).encode())
    with pytest.raises(RequestError, match="no raw binary"):
        decoder.decode(b"abc", 0)


def test_json_and_binary_mixed_in_any_order() -> None:
    x, mask = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones((2, 2), bool)
    first, second = two(x, mask)
    del second["data"]
    second["parameters"] = {"binary_data_size": x.nbytes}
    for items in ([first, second], [second, first]):
        head = json.dumps({"inputs": items}).encode()
        request = Decoder(TWO, LIMITS).decode(head + x.tobytes(), len(head))
        assert np.array_equal(request.inputs["x"], x)
        assert np.array_equal(request.inputs["mask"], mask)


def test_a_remembered_header_is_checked_against_each_body() -> None:
    decoder = Decoder(of("float32"), LIMITS)
    body, length = message(sample("float32"), "FP32", binary=True)
    decoder.decode(body, length)
    with pytest.raises(RequestError, match="bytes follow the JSON"):
        decoder.decode(body[:-4], length)
    spoiled = body[:-4] + np.float32(np.nan).tobytes()
    with pytest.raises(RequestError, match="NaN or infinity"):
        decoder.decode(spoiled, length)
    for index in range(2000):
        decoder.decode(*message(sample("float32")[: 1 + index % 2], "FP32", binary=True))
        head, _ = message(sample("float32"), "FP32", binary=True)
        text = head[:length].replace(b"{", b'{"id": "%d", ' % index, 1)
        assert decoder.decode(text + head[length:], len(text)).id == str(index)
    assert len(decoder._plans) <= 256


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["x", "FP32", [1, 4]]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=6),
    max_leaves=25,
)


@settings(max_examples=400, deadline=None)
@given(value=JSON, key=st.sampled_from(KEYS), place=st.integers(0, 3), tail=st.binary(max_size=20))
def test_no_json_gets_beyond_a_refusal(value: Any, key: str, place: int, tail: bytes) -> None:
    """With any value in place of one value of a good request, the request is decoded or refused."""
    request: dict[str, Any] = {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [0.0] * 4}]}
    places: list[dict[str, Any]] = [request, request["inputs"][0], request["inputs"][0], {}]
    places[place][key] = value
    text = json.dumps(value if place == 3 else request).encode()
    for length in (None, len(text)):
        outcome = decoded(text + (b"" if length is None else tail), length)
        if isinstance(outcome, RequestError):
            assert outcome.message
            assert outcome.remedy
            assert 400 <= outcome.status < 500
        else:
            assert np.isfinite(outcome.inputs["x"]).all()


def decoded(body: bytes, length: int | None) -> InferRequest | RequestError:
    try:
        return Decoder(of("float32"), LIMITS).decode(body, length)
    except RequestError as error:
        return error


@pytest.mark.parametrize("text", ["", "[1, 2", "nan", '{"a": Infinity}', "1e400", "\x00", "'a'"])
def test_text_that_is_not_json(text: str) -> None:
    with pytest.raises(RequestError, match="not JSON"):
        load_json(text.encode(), brackets=10)


def test_brackets_are_counted_before_anything_is_built() -> None:
    assert load_json(b"[" * 10 + b"]" * 10, brackets=10)
    with pytest.raises(RequestError, match="more than 10 lists"):
        load_json(b"[" * 11 + b"]" * 11, brackets=10)


def test_classes_are_ordered_and_ties_go_to_the_first() -> None:
    scores = np.array([[1.0, 3.0, 3.0, -2.0], [0.5, 0.25, 4.0, 4.5]], np.float32)
    texts, shape = classify(scores, 2, ("a", "b", "c"))
    assert (texts, shape) == (["3.000000:1:b", "3.000000:2:c", "4.500000:3", "4.000000:2:c"], (2, 2))
    assert classify(scores, 9, None)[1] == (2, 4)


def test_texts_in_binary() -> None:
    wanted = (RequestedOutput("y", "FP32", binary=True, classes=1),)
    arrays = {"y": np.array([[0.0, 1.0]], np.float32)}
    body, length = encode_response(InferResponse("m", "1", answer(arrays, wanted, ("é", "ü")), ""))
    text = "1.000000:1:ü".encode()
    assert body[length:] == struct.pack("<I", len(text)) + text
    assert json.loads(body[:length])["outputs"][0]["parameters"] == {"binary_data_size": len(text) + 4}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_answer_that_is_not_finite_is_an_error(value: float) -> None:
    wanted = (RequestedOutput("y", "FP32"),)
    with pytest.raises(RequestError, match="contains NaN or infinity"):
        answer({"y": np.array([[0.0, value]], np.float32)}, wanted, None)


def test_answers_keep_every_bit_in_json() -> None:
    array = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32) * np.float32(1e-30)
    body, _ = encode_response(InferResponse("m", "1", answer({"y": array}, (RequestedOutput("y", "FP32"),), None)))
    assert np.array_equal(np.array(orjson.loads(body)["outputs"][0]["data"], np.float32).reshape(4, 4), array)


def test_a_full_cache_is_emptied_before_it_grows() -> None:
    cache: BoundedCache[int, str] = BoundedCache(3)
    for key in range(3):
        cache[key] = str(key)
    assert dict(cache) == {0: "0", 1: "1", 2: "2"}
    cache[1] = "again"
    assert dict(cache) == {0: "0", 1: "again", 2: "2"}, "a known key needs no room"
    cache[3] = "3"
    assert dict(cache) == {3: "3"}
    for key in range(1000):
        cache[key] = "x"
        assert len(cache) <= 3


def test_limits_are_read_by_name() -> None:
    limits = limits_from(["batch=7", "deadline=0.5"])
    assert (limits.batch, limits.deadline, limits.queue) == (7, 0.5, ServingLimits().queue)
    assert all(value > 0 and what and reason for _, value, what, reason in rows())


#: The fast conversion of JSON's numbers and the careful one agree, bit by bit and in what they refuse.
NUMBERS = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False),
    st.floats(width=16, allow_nan=False, allow_infinity=False),
    st.integers(-(2**63), 2**64 - 1),
)


def outcome(data: list[Any], dtype: str, *, booleans: bool) -> bytes | str:
    try:
        array = array_from_json(data, TensorSpec("x", dtype, ("batch", "n")), (1, len(data)), booleans=booleans)
    except RequestError as error:
        return str(error)
    assert (array.dtype, array.shape) == (np.dtype(dtype), (1, len(data)))
    return array.tobytes()


@given(st.lists(NUMBERS, min_size=1, max_size=20), st.sampled_from(("float16", "float32", "float64")))
def test_both_conversions_give_the_same(data: list[Any], dtype: str) -> None:
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
    text = '{"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1.5, 2, 3, %s]}]}' % word  # noqa: UP031
    with pytest.raises(RequestError, match="contains other values than numbers"):
        Decoder(of("float32"), LIMITS).decode(text.encode())


@pytest.mark.parametrize("dtype", ["int32", "bool", "uint8"])
def test_values_of_other_types_are_checked_one_by_one(dtype: str) -> None:
    wrong = [0, 1.5] if dtype != "bool" else [True, 1]
    for booleans in (False, True):
        assert "contains other values" in str(outcome(wrong, dtype, booleans=booleans))
