"""The wires of the servers: the request for the same image, and the position of the logits in the answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bnexport.errors import ProofError
from bnexport.serving.grpc.inference import classes
from bnexport.tensors import ELEMENT_TYPES, Array

#: Addresses of models/bn_lenet in the Open Inference Protocol, over HTTP and over gRPC.
INFER = "/v2/models/bn_lenet/infer"
GRPC_INFER = "/inference.GRPCInferenceService/ModelInfer"
JSON = {"content-type": "application/json"}
#: Header with the length of the JSON in front of binary tensors.
LENGTH = "inference-header-content-length"
Headers = Mapping[str, str]


@dataclass(frozen=True)
class WireRequest:
    """A posted request; the body of gRPC is one message after its prefix ("Length-Prefixed-Message")."""

    path: str
    headers: Headers  # without the length
    body: bytes


@dataclass(frozen=True)
class Wire:
    """A row of WIRES."""

    request: Callable[[Array], WireRequest]  # for an image, (1, 1, 28, 28)
    #: Headers, in lower case, and body of the answer (for gRPC the message alone) -> logits, (10,); None without logits.
    logits: Callable[[Headers, bytes], Array] | None
    grpc: bool = False


def read_logits(wire: Wire, headers: Headers, body: bytes) -> Array | None:
    """Return the logits of an answer; None if the wire has none. ProofError: the answer can't be read."""
    if wire.logits is None:
        return None
    try:
        return wire.logits(headers, body)
    except Exception as error:  # JSON, numpy and protobuf have their own classes
        problem = f"an answer can't be read: {type(error).__name__} in {body[:80]!r}"
        raise ProofError(problem, remedy="Look at that server's log") from error


def tensor(images: Array, name: str, **extra: Any) -> dict[str, Any]:
    """Return an input tensor of the Open Inference Protocol."""
    datatype = ELEMENT_TYPES[images.dtype.name].datatype
    return {"name": name, "shape": list(images.shape), "datatype": datatype, **extra}


def json_body(images: Array, name: str) -> bytes:
    """Return the JSON of a request for images."""
    return json.dumps({"inputs": [tensor(images, name, data=images.reshape(-1).tolist())]}).encode()


def binary_request(images: Array, name: str) -> tuple[dict[str, str], bytes]:
    """Return headers and body of a request with binary tensors in both directions."""
    described = tensor(images, name, parameters={"binary_data_size": images.nbytes})
    head = json.dumps({"inputs": [described], "parameters": {"binary_data_output": True}}).encode()
    return {"content-type": "application/octet-stream", LENGTH: str(len(head))}, head + images.tobytes()


def binary_logits(headers: Headers, body: bytes) -> Array:
    """Return the float32 values after the JSON of a binary answer."""
    return np.frombuffer(body, np.float32, offset=int(headers[LENGTH]))


def json_logits(_: Headers, body: bytes) -> Array:
    """Return the values of the first output of an answer in JSON."""
    return np.array(json.loads(body)["outputs"][0]["data"], np.float32).reshape(-1)


def _binary(image: Array) -> WireRequest:
    return WireRequest(INFER, *binary_request(image, "input"))


def _rows_request(image: Array) -> WireRequest:
    return WireRequest("/predict", JSON, json.dumps({"image": image[0].tolist()}).encode())


def _grpc_request(image: Array) -> WireRequest:
    named = {"name": "input", "datatype": "FP32", "shape": image.shape}
    message = classes()["ModelInferRequest"](
        model_name="bn_lenet", inputs=[named], raw_input_contents=[image.tobytes()]
    )
    body = message.SerializeToString()
    headers = {"content-type": "application/grpc", "te": "trailers"}
    return WireRequest(GRPC_INFER, headers, b"\0" + len(body).to_bytes(4, "big") + body)


def _grpc_logits(_: Headers, body: bytes) -> Array:
    (raw,) = classes()["ModelInferResponse"].FromString(body).raw_output_contents
    return np.frombuffer(raw, np.float32)


#: Name -> wire.
WIRES: dict[str, Wire] = {
    "oip-json": Wire(lambda image: WireRequest(INFER, JSON, json_body(image, "input")), json_logits),
    "oip-binary": Wire(_binary, binary_logits),
    "oip-grpc": Wire(_grpc_request, _grpc_logits, grpc=True),
    "rows-json": Wire(_rows_request, lambda _, body: np.array(json.loads(body)["logits"], np.float32)),
    "echo": Wire(_binary, None),
}
