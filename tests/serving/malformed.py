"""The table of requests that must be refused, each with the status and a part of the reason."""

import copy
import gzip
import json
import struct
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

INFER = "/v2/models/bn_lenet/infer"
CLASSIFY = "/v2/models/bn_lenet/classify"
_ONE = np.linspace(0, 1, 784, dtype=np.float32).reshape(1, 1, 28, 28)
JSON = {"content-type": "application/json"}
OCTETS = {"content-type": "application/octet-stream"}


class Case(NamedTuple):
    """One request: its fault, the status, a part of the reason, and its bytes."""

    name: str
    status: int
    reason: str
    data: bytes


def http(method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "host: test", f"content-length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def good() -> dict[str, Any]:
    item = {"name": "input", "shape": [1, 1, 28, 28], "datatype": "FP32", "data": _ONE.reshape(-1).tolist()}
    return {"inputs": [item]}


def changed(change: Callable[[dict[str, Any]], object]) -> bytes:
    """Return a good request with one change."""
    value = copy.deepcopy(good())
    change(value)
    return http("POST", INFER, json.dumps(value).encode(), JSON)


def given(**item: Any) -> bytes:
    """Return a good request with other values in its input; None removes a key."""

    def change(value: dict[str, Any]) -> None:
        value["inputs"][0] |= item
        for key in [key for key, found in item.items() if found is None]:
            del value["inputs"][0][key]

    return changed(change)


def text(body: str | bytes) -> bytes:
    return http("POST", INFER, body.encode() if isinstance(body, str) else body, JSON)


def values(literal: str) -> bytes:
    """Return a good request with one number written in another way."""
    body = json.dumps(good()).replace('"data": [0.0', f'"data": [{literal}')
    assert literal in body
    return text(body)


def binary(size: Any = 3136, data: bytes = _ONE.tobytes(), length: str | None = None, **headers: str) -> bytes:
    item = {"name": "input", "shape": [1, 1, 28, 28], "datatype": "FP32", "parameters": {"binary_data_size": size}}
    head = json.dumps({"inputs": [item]}).encode()
    named = {"inference-header-content-length": str(len(head)) if length is None else length}
    return http("POST", INFER, head + data, OCTETS | named | {k.replace("_", "-"): v for k, v in headers.items()})


def outputs(*wanted: Any) -> bytes:
    return changed(lambda value: value.update(outputs=list(wanted)))


def parameters(**found: Any) -> bytes:
    return changed(lambda value: value.update(parameters=found))


def packed(body: bytes, coding: str) -> bytes:
    return http("POST", INFER, body, JSON | {"content-encoding": coding})


def with_nan(value: float) -> bytes:
    array = _ONE.copy()
    array[0, 0, 3, 3] = value
    return array.tobytes()


def form(body: bytes, kind: str = "multipart/form-data; boundary=b") -> bytes:
    return http("POST", CLASSIFY, body, {"content-type": kind})


def part(content: bytes, head: bytes = b'content-disposition: form-data; name="a"; filename="a.png"') -> bytes:
    return b"--b\r\n" + head + b"\r\n\r\n" + content + b"\r\n"


def png(content: bytes) -> bytes:
    return http("POST", CLASSIFY, content, {"content-type": "image/png"})


def plain(*headers: str, body: bytes = b"") -> bytes:
    """Return a request to infer with only these headers."""
    return "\r\n".join([f"POST {INFER} HTTP/1.1", "host: x", *headers]).encode() + b"\r\n\r\n" + body


CHUNKED, LENGTH = "transfer-encoding: chunked", "inference-header-content-length"
_BODY = json.dumps(good()).encode()
_BOMB = gzip.compress(b"[" * 200_000_000, 1)
_PNG = b"\x89PNG\r\n\x1a\n"
_WIDE_PNG = _PNG + b"\0\0\0\rIHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
_WIDE_PNG += struct.pack(">I", zlib.crc32(_WIDE_PNG[12:])) + struct.pack(">I", 0) + b"IDAT"
_INPUT = good()["inputs"][0]

CASES: tuple[Case, ...] = (
    # JSON
    Case("no body", 400, "not JSON", text("")),
    Case("no JSON", 400, "not JSON", text("hello")),
    Case("JSON cut short", 400, "not JSON", text(_BODY[:-9])),
    Case("two JSON values", 400, "not JSON", text(_BODY + b"{}")),
    Case("not UTF-8", 400, "not JSON", text(b'{"inputs": "\xff\xfe"}')),
    Case("a single surrogate", 400, "not JSON", text(r'{"id": "\ud800", "inputs": []}')),
    Case("JSON 100,000 levels deep", 400, "not JSON", text("[" * 100_000 + "]" * 100_000)),
    Case("a million lists", 413, "lists and objects", text("[" + ",".join(["[]"] * 1_000_000) + "]")),
    Case("20 MB of JSON", 413, "the limit is", text(_BODY + b" " * 20_000_000)),
    Case("a list for an object", 400, "not a JSON object", text("[]")),
    Case("null", 400, "not a JSON object", text("null")),
    Case("no inputs", 400, '"inputs"', text("{}")),
    Case("inputs are an object", 400, '"inputs"', text('{"inputs": {"name": "input"}}')),
    Case("no input at all", 400, '"inputs"', text('{"inputs": []}')),
    Case("an input is a text", 400, "not a JSON object", text('{"inputs": ["input"]}')),
    Case("id is a number", 400, '"id"', changed(lambda value: value.update(id=7))),
    Case("id of 10,000 characters", 400, '"id"', changed(lambda value: value.update(id="x" * 10_000))),
    Case("parameters are a list", 400, '"parameters"', changed(lambda value: value.update(parameters=[1]))),
    Case("NaN", 400, "not JSON", values("NaN")),
    Case("Infinity", 400, "not JSON", values("-Infinity")),
    Case("1e999", 400, "not JSON", values("1e999")),
    Case("beyond float32", 400, "NaN or infinity", values("1e39")),
    Case("hexadecimal", 400, "not JSON", values("0x10")),
    Case("true for a number", 400, "other values", values("true")),
    Case("null for a number", 400, "other values", values("null")),
    Case("a text for a number", 400, "other values", values('"1"')),
    Case("a list for a number", 400, "does not have the shape", values("[1]")),
    # Names
    Case("an unknown input", 400, "no input 'x'", given(name="x")),
    Case("a name that is a number", 400, "no input", given(name=3)),
    Case("a name of 100,000 characters", 400, "no input", given(name="n" * 100_000)),
    Case("a name with control characters", 400, "no input", given(name="\u001b[2J\n")),
    Case("an input twice", 400, "2 inputs", changed(lambda value: value["inputs"].append(_INPUT))),
    Case("1,000 inputs", 400, "1000 inputs", changed(lambda value: value.update(inputs=[_INPUT] * 1000))),
    Case("no name", 400, "no input", given(name=None)),
    # Shapes
    Case("no shape", 400, "no shape", given(shape=None)),
    Case("a shape of texts", 400, "no shape", given(shape=["1", "1", "28", "28"])),
    Case("a negative size", 400, "no shape", given(shape=[-1, 1, 28, 28])),
    Case("a batch of none", 400, "no shape", given(shape=[0, 1, 28, 28], data=[])),
    Case("a fraction", 400, "no shape", given(shape=[1.0, 1, 28, 28])),
    Case("true for a size", 400, "no shape", given(shape=[True, 1, 28, 28])),
    Case("too few dimensions", 400, "the shape '1x784'", given(shape=[1, 784])),
    Case("1,000 dimensions", 400, "the shape", given(shape=[1] * 1000)),
    Case("another size", 400, "the shape '1x1x28x29'", given(shape=[1, 1, 28, 29])),
    Case("10^12 samples of nothing", 413, "the batch is", given(shape=[10**12, 1, 28, 28], data=[])),
    Case("2^63 samples", 413, "the batch is", given(shape=[2**63, 1, 28, 28], data=[])),
    Case("sizes whose product overflows", 400, "the shape", given(shape=[1, 2**32, 2**32, 2**32], data=[])),
    Case("10^40 samples", 400, "no shape", given(shape=[10**40, 1, 28, 28], data=[])),
    # Data
    Case("no data", 400, "no data", given(data=None)),
    Case("data is a text", 400, "is not a list", given(data="AAAA")),
    Case("data is an object", 400, "is not a list", given(data={"0": 1})),
    Case("one value too few", 400, "does not have the shape", given(data=[0.0] * 783)),
    Case("one value too many", 400, "does not have the shape", given(data=[0.0] * 785)),
    Case("ragged rows", 400, "does not have the shape", given(data=[[[[0.0] * 28] * 27 + [[0.0] * 27]]])),
    Case("nested too deep", 400, "does not have the shape", given(data=[[[[[0.0] * 784]]]])),
    Case("another datatype", 400, "datatype 'INT64'", given(datatype="INT64")),
    Case("FP64 for FP32", 400, "datatype 'FP64'", given(datatype="FP64")),
    Case("BYTES", 400, "datatype 'BYTES'", given(datatype="BYTES", data=["x"])),
    Case("no datatype", 400, "datatype", given(datatype=None)),
    Case("data and binary size", 400, "both data", given(parameters={"binary_data_size": 3136})),
    Case("shared memory", 400, "shared memory", given(parameters={"shared_memory_region": "/dev/shm/x"})),
    # Outputs and parameters
    Case("an unknown output", 400, "no output 'x'", outputs({"name": "x"})),
    Case("an output twice", 400, '"outputs"', outputs({"name": "logits"}, {"name": "logits"})),
    Case("an output is a text", 400, "not a JSON object", outputs("logits")),
    Case("outputs are a text", 400, '"outputs"', changed(lambda value: value.update(outputs="logits"))),
    Case("-1 classes", 400, "classified", outputs({"name": "logits", "parameters": {"classification": -1}})),
    Case("many classes as a text", 400, "classified", outputs({"name": "logits", "parameters": {"classification": "3"}})),
    Case("binary_data is 1", 400, "binary_data", outputs({"name": "logits", "parameters": {"binary_data": 1}})),
    Case("a timeout that is a text", 400, "timeout", parameters(timeout="soon")),
    Case("a negative timeout", 400, "timeout", parameters(timeout=-5)),
    # Binary tensors
    Case("binary NaN", 400, "NaN or infinity", binary(data=with_nan(np.nan))),
    Case("binary infinity", 400, "NaN or infinity", binary(data=with_nan(-np.inf))),
    Case("binary size too small", 400, "binary_data_size", binary(size=3132)),
    Case("binary size is 10^15", 400, "binary_data_size", binary(size=10**15)),
    Case("binary size is negative", 400, "binary_data_size", binary(size=-3136)),
    Case("binary size is a text", 400, "binary_data_size", binary(size="3136")),
    Case("bytes are missing", 400, "3132 bytes follow", binary(data=_ONE.tobytes()[:-4])),
    Case("bytes are left over", 400, "3137 bytes follow", binary(data=_ONE.tobytes() + b"x")),
    Case("a header length beyond the body", 400, "Content-Length is 999999", binary(length="999999")),
    Case("a negative header length", 400, "is not a whole number", binary(length="-1")),
    Case("a header length that is a word", 400, "is not a whole number", binary(length="many")),
    Case("a header length of 100 digits", 400, "is not a whole number", binary(length="9" * 100)),
    Case("a header length into the JSON", 400, "not JSON", binary(length="20")),
    Case("raw data that is no whole sample", 400, "one sample", binary(length="0")),
    # Packed bodies
    Case("gzip that is none", 400, "is not gzip data", packed(b"hello", "gzip")),
    Case("gzip cut short", 400, "is truncated", packed(gzip.compress(_BODY)[:-20], "gzip")),
    Case("gzip with more behind", 400, "followed by other bytes", packed(gzip.compress(_BODY) + b"x", "gzip")),
    Case("a gzip bomb", 413, "unpacks to more", packed(_BOMB, "gzip")),
    Case("a deflate bomb", 413, "unpacks to more", packed(zlib.compress(bytes(10**8), 1), "deflate")),
    Case("deflate without its header", 400, "is not deflate data", packed(zlib.compress(_BODY)[2:], "deflate")),
    Case("an unknown coding", 415, "content-encoding", packed(_BODY, "zstd")),
    Case("two codings", 415, "content-encoding", packed(gzip.compress(gzip.compress(_BODY)), "gzip, gzip")),
    # Content types and methods
    Case("XML", 415, "content-type", http("POST", INFER, _BODY, {"content-type": "text/xml"})),
    Case("a form", 415, "content-type", http("POST", INFER, _BODY, {"content-type": "multipart/form-data"})),
    Case("GET of infer", 405, "does not take GET", http("GET", INFER)),
    Case("DELETE of a model", 405, "does not take DELETE", http("DELETE", "/v2/models/bn_lenet")),
    Case("PUT of health", 405, "does not take PUT", http("PUT", "/v2/health/live", b"x")),
    # Paths
    Case("an unknown path", 404, "has no route", http("GET", "/v3")),
    Case("an unknown model", 404, "no model 'x'", http("POST", "/v2/models/x/infer", _BODY, JSON)),
    Case("an unknown version", 404, "no version '9'", http("POST", "/v2/models/bn_lenet/versions/9/infer", _BODY, JSON)),
    Case("a version that is none", 404, "no version", http("GET", "/v2/models/bn_lenet/versions/latest")),
    Case("an empty name", 404, "has no route", http("POST", "/v2/models//infer", _BODY, JSON)),
    Case("dots for a name", 404, "no model '..'", http("GET", "/v2/models/..")),
    Case("quoted slashes in a name", 404, "has no route", http("GET", "/v2/models/..%2f..%2fetc%2fpasswd")),
    Case("a quoted zero byte in a name", 404, "no model", http("GET", "/v2/models/bn_lenet%00")),
    Case("backslashes in a name", 404, "no model", http("GET", "/v2/models/..%5c..%5cx/ready")),
    Case("no UTF-8 in a name", 404, "no model", http("GET", "/v2/models/%ff%fe")),
    Case("a name of 8,000 characters", 404, "no model", http("GET", "/v2/models/" + "n" * 8000)),
    # The index
    Case("an index of a list", 400, "not a JSON object", http("POST", "/v2/repository/index", b"[]", JSON)),
    Case("an index of nonsense", 400, "not JSON", http("POST", "/v2/repository/index", b"{ready}", JSON)),
    Case("ready is a text", 400, "ready", http("POST", "/v2/repository/index", b'{"ready": "yes"}', JSON)),
    Case("an index of 2 MB", 413, "the limit", http("POST", "/v2/repository/index", b" " * 2_000_000, JSON)),
    # HTTP
    Case("headers too large", 431, "headers", http("GET", "/v2", b"", {"x-filler": "x" * 40_000})),
    Case("10,000 headers", 431, "headers", http("GET", "/v2", b"", {f"x-{index}": "y" for index in range(10_000)})),
    Case("a path too long", 431, "headers", http("GET", "/" + "x" * 60_000)),
    Case("no HTTP", 400, "HTTP/1.1", b"hello there\r\n\r\n"),
    Case("a TLS hello", 400, "HTTP/1.1", bytes.fromhex("16030100a5010000a10303") + bytes(60)),
    Case("no length that is a number", 400, "HTTP/1.1", plain("content-length: x")),
    Case("a length of 10^30", 400, "HTTP/1.1", plain("content-length: 1" + "0" * 30)),
    Case("a length of 1 TB", 413, "the limit", plain("content-length: 1000000000000", "expect: 100-continue")),
    Case("two lengths", 400, "HTTP/1.1", plain("content-length: 3", "content-length: 4", body=b"abcd")),
    Case("a length and chunks", 400, "HTTP/1.1", plain("content-length: 3", CHUNKED, body=b"0\r\n\r\n")),
    Case("a chunk that is none", 400, "HTTP/1.1", plain(CHUNKED, body=b"zz\r\n")),
    Case("no host", 400, "Host is missing", b"GET /v2 HTTP/1.1\r\n\r\n"),
    Case("no host to infer", 400, "Host is missing", b"POST %s HTTP/1.1\r\ncontent-length: 0\r\n\r\n" % INFER.encode()),
    Case("two hosts", 400, "host was sent more than once", plain("content-length: 0", "Host: other")),
    Case("two content types", 400, "more than once", plain("content-type: application/json", "Content-Type: text/xml")),
    Case("two header lengths", 400, "more than once", plain(f"{LENGTH}: 3", f"{LENGTH}: 4", "content-length: 0")),
    # Pictures
    Case("no picture", 400, "not a PNG", png(b"hello")),
    Case("an empty picture", 400, "empty", png(b"")),
    Case("a picture cut short", 400, "can't be read", png(_PNG + b"\0\0\0\rIHDR\0\0")),
    Case("a picture of 60,000 x 60,000", 400, "pixels", png(_WIDE_PNG)),
    Case("a GIF", 400, "not a PNG", png(b"GIF89a" + bytes(20))),
    Case("text for a picture", 415, "is not that of a picture", http("POST", CLASSIFY, b"x", {"content-type": "text/plain"})),
    Case("a form without boundary", 400, "boundary", form(part(b"x"), "multipart/form-data")),
    Case("another boundary", 400, "boundary", form(b"--c\r\n\r\n\r\nx\r\n--c--\r\n")),
    Case("a form that does not end", 400, "last boundary", form(part(b"x") + b"--b\r\n")),
    Case("a part without headers", 400, "no headers", form(b"--b\r\nx\r\n--b--\r\n")),
    Case("an empty part", 400, "empty", form(part(b"") + b"--b--\r\n")),
    Case("a part in base64", 400, "coded", form(part(b"eA==", b"content-transfer-encoding: base64") + b"--b--\r\n")),
    Case("1,000 parts", 413, "more than", form(part(b"x") * 1000 + b"--b--\r\n")),
    Case("parts that are no pictures", 400, "a.png is not a PNG", form(part(b"x") + b"--b--\r\n")),
)  # fmt: skip
