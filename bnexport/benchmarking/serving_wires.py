"""The same image to one server after another: how each wants to be asked, and where its answer has the logits."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bnexport.errors import ProofError
from bnexport.files import Refusal
from bnexport.protobuf_wire import read_fields
from bnexport.tensors import Array

#: Where models/bn_lenet answers the Open Inference Protocol, over HTTP and over gRPC.
INFER = "/v2/models/bn_lenet/infer"
GRPC_INFER = "/inference.GRPCInferenceService/ModelInfer"
_JSON = {"content-type": "application/json"}


@dataclass(frozen=True)
class Request:
    """What is posted.

    Attributes:
        path: Of the URL.
        headers: Beside the length.
        body: For gRPC one message behind its prefix (gRPC over HTTP/2, "Length-Prefixed-Message").
    """

    path: str
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class Wire:
    """A row of WIRES.

    Attributes:
        request: The request for an image, (1, 1, 28, 28).
        logits: From the answer's headers, in lower case, and its body to the logits, (10,); for gRPC the message alone. None
            where an answer holds none.
        grpc: Whether it goes over gRPC.
    """

    request: Callable[[Array], Request]
    logits: Callable[[Mapping[str, str], bytes], Array] | None
    grpc: bool = False


def read_logits(wire: Wire, headers: Mapping[str, str], body: bytes) -> Array | None:
    """The logits of an answer; None where it holds none by design.

    Raises:
        ProofError: The answer can't be read.
    """
    if wire.logits is None:
        return None
    try:
        return wire.logits(headers, body)
    except (ValueError, KeyError, IndexError, TypeError, Refusal) as error:
        raise ProofError(
            f"an answer can't be read: {type(error).__name__} in {body[:80]!r}", remedy="Look at that server's log"
        ) from error


def _described(image: Array, **extra: Any) -> dict[str, Any]:
    return {"name": "input", "shape": list(image.shape), "datatype": "FP32", **extra}


def _json_request(image: Array) -> Request:
    body = {"inputs": [_described(image, data=image.reshape(-1).tolist())]}
    return Request(INFER, _JSON, json.dumps(body).encode())


def _json_logits(_: Mapping[str, str], body: bytes) -> Array:
    return np.array(json.loads(body)["outputs"][0]["data"], np.float32).reshape(-1)


def _binary_request(image: Array) -> Request:
    described = _described(image, parameters={"binary_data_size": image.nbytes})
    head = json.dumps({"inputs": [described], "parameters": {"binary_data_output": True}}).encode()
    headers = {"content-type": "application/octet-stream", "inference-header-content-length": str(len(head))}
    return Request(INFER, headers, head + image.tobytes())


def _binary_logits(headers: Mapping[str, str], body: bytes) -> Array:
    return np.frombuffer(body, np.float32, offset=int(headers["inference-header-content-length"]))


def _rows_request(image: Array) -> Request:
    return Request("/predict", _JSON, json.dumps({"image": image[0].tolist()}).encode())


def _rows_logits(_: Mapping[str, str], body: bytes) -> Array:
    return np.array(json.loads(body)["logits"], np.float32)


def _grpc_request(image: Array) -> Request:
    shape = _field(3, b"".join(map(_varint, image.shape)))
    described = _field(1, b"input") + _field(2, b"FP32") + shape
    message = _field(1, b"bn_lenet") + _field(5, described) + _field(7, image.tobytes())
    headers = {"content-type": "application/grpc", "te": "trailers"}
    return Request(GRPC_INFER, headers, b"\0" + len(message).to_bytes(4, "big") + message)


def _grpc_logits(_: Mapping[str, str], body: bytes) -> Array:
    (raw,) = [field for field in read_fields(body, 0, len(body)) if field.number == 6]
    return np.frombuffer(body[raw.start : raw.end], np.float32)


def _field(number: int, content: bytes) -> bytes:
    """A field of bytes in protobuf's wire format (protobuf.dev, "Encoding"), with a number below 16."""
    return bytes([number << 3 | 2]) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    low = b""
    while value > 0x7F:
        low += bytes([value & 0x7F | 0x80])
        value >>= 7
    return low + bytes([value])


#: Name -> wire. The numbers are those of ModelInferRequest and ModelInferResponse (Open Inference Protocol, "GRPC").
WIRES: dict[str, Wire] = {
    "oip-json": Wire(_json_request, _json_logits),
    "oip-binary": Wire(_binary_request, _binary_logits),
    "oip-grpc": Wire(_grpc_request, _grpc_logits, grpc=True),
    "rows-json": Wire(_rows_request, _rows_logits),
    "echo": Wire(_binary_request, None),
}
