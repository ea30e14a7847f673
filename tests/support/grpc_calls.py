"""A gRPC client that sends any bytes, malformed or not."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import grpc
import numpy as np
from support.serving import PATIENCE, Server

from bnexport.serving.grpc.inference import classes

SERVICE = "/inference.GRPCInferenceService/"
HEALTH = "/grpc.health.v1.Health/"
#: Larger than any limit of the server, so that it is the server that refuses.
_UNLIMITED = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]


class Reply(NamedTuple):
    """An answer: the name of the code, the sentence, the bytes and the trailing metadata."""

    code: str
    message: str
    data: bytes
    metadata: dict[str, Any]


@contextlib.contextmanager
def channel_to(server: Server, certificate: bytes | None = None) -> Iterator[grpc.Channel]:
    address = f"127.0.0.1:{server.grpc_port}"
    # Each has a separate subchannel, so that a broken connection affects one test alone.
    options = [*_UNLIMITED, ("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
    if certificate is None:
        made = grpc.insecure_channel(address, options)
    else:
        made = grpc.secure_channel(address, grpc.ssl_channel_credentials(certificate), options)
    with made as channel:
        yield channel


def call(channel: grpc.Channel, path: str, *messages: bytes, timeout: float = PATIENCE, **options: Any) -> Reply:
    """Send byte strings as they are, each as one message; return the answer."""
    try:
        answer, done = channel.stream_unary(path).with_call(iter(messages), timeout=timeout, **options)
    except grpc.RpcError as error:
        return Reply(error.code().name, error.details() or "", b"", dict(error.trailing_metadata() or ()))
    return Reply("OK", "", answer, dict(done.trailing_metadata() or ()))


def ask(channel: grpc.Channel, method: str, answer: str, message: Any, **options: Any) -> Any:
    """Make a call that must succeed; return its answer as a message."""
    reply = call(channel, method if method[0] == "/" else SERVICE + method, message.SerializeToString(), **options)
    assert reply.code == "OK", reply
    return classes()[answer].FromString(reply.data)


def infer_request(array: np.ndarray, *, name: str = "input", datatype: str = "FP32", **fields: Any) -> Any:
    """A good request with its tensor as raw bytes."""
    request = classes()["ModelInferRequest"](**{"model_name": "bn_lenet", **fields})
    request.inputs.add(name=name, datatype=datatype, shape=array.shape)
    request.raw_input_contents.append(array.tobytes())
    return request


def logits_of_message(data: bytes) -> np.ndarray:
    """The first output of an answer."""
    answer = classes()["ModelInferResponse"].FromString(data)
    (raw,) = answer.raw_output_contents
    assert answer.outputs[0].datatype == "FP32"
    return np.frombuffer(raw, np.float32).reshape(answer.outputs[0].shape)


def infer(channel: grpc.Channel, array: np.ndarray, **options: Any) -> np.ndarray:
    reply = call(channel, SERVICE + "ModelInfer", infer_request(array).SerializeToString(), **options)
    assert reply.code == "OK", reply
    return logits_of_message(reply.data)
