"""One gRPC call, and ModelInfer, which decodes a message to a request that fits its model and encodes the answer.

The wire format is split before protobuf parses anything. Two bytes of a message can encode an empty tensor that takes seventy
bytes in memory, so the bytes outside raw tensors are limited first. The raw tensors are not copied. The rest of the message
describes them; clients repeat it, so its parsed form is cached.

Source: Protocol Buffers, "Encoding".
"""

from __future__ import annotations

import asyncio
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import unquote

import grpc
import grpc.aio
import numpy as np
from google.protobuf.message import DecodeError

from bnexport.errors import BnexportError, RequestError
from bnexport.files import Refusal
from bnexport.proto_messages import message_classes
from bnexport.protobuf_wire import BYTES, FIXED32, FIXED64, VARINT, read_varint
from bnexport.serving.protocol.decoding import SHORT, Decoder
from bnexport.serving.protocol.messages import DATATYPES, InferRequest, InferResponse, binary_texts, status_of
from bnexport.serving.serving_limits import BoundedCache
from bnexport.serving.state import RequestContext, ServerState
from bnexport.tensors import ELEMENT_TYPES
from bnexport.validation.limits import shown

#: HTTP status of an error -> gRPC's code ("Status codes and their use in gRPC").
CODES: dict[int, grpc.StatusCode] = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    500: grpc.StatusCode.INTERNAL,
    501: grpc.StatusCode.UNIMPLEMENTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}


@functools.cache
def classes() -> dict[str, Any]:
    """Return the message classes of both services, by name."""
    return message_classes("bnexport serve --grpc-port")


class Call(RequestContext):
    """One call, or one message of a stream."""

    __slots__ = ("context", "message_id", "metadata")

    def __init__(self, path: str, context: Any, metadata: dict[str, Any], request_id: str) -> None:
        super().__init__(path, request_id)
        self.context = context  # gRPC's
        self.metadata = metadata  # Lower-case name -> value
        self.message_id = ""  # The id in its message, once it is known

    def origin(self) -> tuple[str, str, str]:
        """Return "gRPC", the client's address without its port ("127.0.0.1"), and ``traceparent`` or ""."""
        address = unquote(self.context.peer()).partition(":")[2].rpartition(":")[0]  # of "ipv4:127.0.0.1:5000"
        return "gRPC", address.strip("[]"), str(self.metadata.get("traceparent", ""))


async def read_message(context: Any, seconds: float) -> bytes:
    """Read the message of a call."""
    try:
        async with asyncio.timeout(seconds):
            message = await context.read()
    except TimeoutError as error:
        raise RequestError(
            f"the message did not arrive within {seconds:g} seconds", remedy="Send it faster", status=408
        ) from error
    if not isinstance(message, bytes):
        raise RequestError("the call has no readable message", remedy="Send one message within the limits")
    return message


def code_of(error: BnexportError) -> grpc.StatusCode:
    """Return gRPC's code for an error."""
    return CODES.get(status_of(error), grpc.StatusCode.INTERNAL)


#: Tags (number and wire type) of ModelInferRequest's id and raw_input_contents.
_ID, _RAW = 3 << 3 | BYTES, 7 << 3 | BYTES
#: Raw tensors of one request.
_MOST_RAW = 1024
BROKEN = "the message is not an inference.ModelInferRequest"
_REMEDY = "Write it with a client of the protocol"

#: Start and number of bytes.
Span = tuple[int, int]


class Split(NamedTuple):
    """The parts of a request."""

    header: bytes  # The message without the id and the raw tensors
    id: str  # Id of the request
    raw: list[Span]  # The raw tensors in the message


def split(message: bytes, *, most: int) -> Split:
    """Split a message that has at most ``most`` bytes besides raw tensors."""
    raw: list[Span] = []
    pieces: list[bytes] = []
    request_id, position, end, size = "", 0, len(message), 0
    try:
        while position < end:
            start = position
            tag, position = read_varint(message, start, end)
            kind = tag & 7
            if kind == BYTES:
                length, position = read_varint(message, position, end)
                begin, position = position, position + length
                if tag == _RAW:
                    raw.append((begin, length))
                    if len(raw) > _MOST_RAW:
                        raise RequestError(
                            f"the request has more than {_MOST_RAW} raw tensors", remedy="Send one for each input"
                        )
                    continue
                if tag == _ID:
                    request_id = message[begin:position].decode()
                    continue
            elif kind == VARINT:
                _, position = read_varint(message, position, end)
            elif kind in (FIXED64, FIXED32):
                position += 8 if kind == FIXED64 else 4
            else:
                raise RequestError(BROKEN, remedy=_REMEDY)
            if position > end:
                break
            size += position - start
            if size > most:
                raise RequestError(
                    f"the message has more than {most} bytes besides raw tensors",
                    remedy="Send the tensors as raw_input_contents",
                    status=413,
                )
            pieces.append(message[start:position])
    except UnicodeDecodeError as error:
        raise RequestError("the id is not UTF-8", remedy="Send UTF-8, or no id") from error
    except Refusal as error:
        raise RequestError(BROKEN, remedy=_REMEDY) from error
    if position != end:
        raise RequestError(f"{BROKEN}: it ends too early", remedy=_REMEDY)
    return Split(b"".join(pieces), request_id, raw)


#: The protocol's element type -> its field of InferTensorContents, and numpy's element type. Others are sent raw only.
CONTENTS: dict[str, tuple[str, str]] = {
    row.datatype: (row.contents, name) for name, row in ELEMENT_TYPES.items() if row.contents
}
#: Header of a request -> name and version of its model.
_known: BoundedCache[bytes, tuple[str, str]] = BoundedCache(256)


async def infer(state: ServerState, call: Call, message: bytes) -> Any:
    """Return the ModelInferResponse of a request. This is the hot path: decode, queue, encode."""
    parts = split(message, most=state.settings.limits.header_json_bytes)
    call.message_id = parts.id
    name, version = _known.get(parts.header) or _named(parts.header)
    model = call.model = state.repository.resolve(name, version or None)
    request = decode(model.decoder, message, parts, patience=call.context.time_remaining())
    call.rows = request.rows
    # Concurrent requests queue, so that they form one batch.
    arrays = model.batcher.run_now(request.inputs, request.rows) if state.active == 1 else None
    response = await model.infer(request) if arrays is None else model.response(request, arrays)
    return encoded(response)


def decode(decoder: Decoder, message: bytes, parts: Split, *, patience: float | None = None) -> InferRequest:
    """Decode a request."""
    body, spans, key = message, parts.raw, parts.header
    if not spans:
        body, spans = _typed(_parsed(parts.header), decoder)
        key = b""
    describe = functools.partial(_described, parts.header, decoder, spans, typed=not parts.raw)
    return decoder.decode_parts(body, spans, describe=describe, key=key, request_id=parts.id, patience=patience)


def encoded(response: InferResponse) -> Any:
    """Return a ModelInferResponse with raw tensors."""
    made = classes()["ModelInferResponse"](model_name=response.model, model_version=response.version, id=response.id)
    for tensor in response.outputs:
        made.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        data = tensor.data
        raw = data.tobytes() if isinstance(data, np.ndarray) else binary_texts(list(data))
        made.raw_output_contents.append(raw)
    return made


def _named(header: bytes) -> tuple[str, str]:
    """Return name and version of a request's model."""
    message = _parsed(header)
    found = message.model_name, message.model_version
    if len(header) <= SHORT:
        _known[header] = found
    return found


def _parsed(header: bytes) -> Any:
    try:
        return classes()["ModelInferRequest"].FromString(header)
    except DecodeError as error:
        raise RequestError(BROKEN, remedy=_REMEDY) from error


def _described(header: bytes, decoder: Decoder, spans: Sequence[Span], *, typed: bool) -> dict[str, Any]:
    """Return a request's description in the form of the protocol's JSON with binary tensors."""
    message = _parsed(header)
    decoder.check_count(len(message.inputs))
    if len(spans) != len(message.inputs):
        raise RequestError(
            f"the request has {len(spans)} raw_input_contents for {len(message.inputs)} inputs",
            remedy="Send the bytes of each input, in the order of the inputs",
        )
    if not typed and any(item.contents.ListFields() for item in message.inputs):
        raise RequestError(
            "the request has both contents and raw_input_contents", remedy="Send all tensors as one of the two"
        )
    return {
        "parameters": _values(message.parameters) | {"binary_data_output": True},
        "inputs": [
            {
                "name": item.name,
                "datatype": item.datatype,
                "shape": list(item.shape),
                "parameters": _values(item.parameters) | {"binary_data_size": size},
            }
            for item, (_, size) in zip(message.inputs, spans, strict=True)
        ],
        "outputs": [
            {"name": item.name, "parameters": _values(item.parameters) | {"binary_data": True}}
            for item in message.outputs
        ],
    }


def _values(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: getattr(parameter, choice) if (choice := parameter.WhichOneof("parameter_choice")) else None
        for name, parameter in parameters.items()
    }


def _typed(message: Any, decoder: Decoder) -> tuple[bytes, list[Span]]:
    """Return the typed contents of all inputs as consecutive bytes, and the span of each."""
    decoder.check_count(len(message.inputs))
    chunks = [_bytes_of(item) for item in message.inputs]
    ends = list(itertools.accumulate(map(len, chunks), initial=0))
    return b"".join(chunks), [(start, len(chunk)) for start, chunk in zip(ends, chunks, strict=False)]


def _bytes_of(item: Any) -> bytes:
    """Return the typed contents of one input as bytes; the decoder compares the element type with the model's."""
    if item.datatype not in DATATYPES.values():
        return b""
    name = f"input {shown(item.name)}"
    if item.datatype not in CONTENTS:
        raise RequestError(
            f"{name} is {item.datatype}, which the field contents can't hold", remedy="Send raw_input_contents"
        )
    field, dtype = CONTENTS[item.datatype]
    filled = [found.name for found, _ in item.contents.ListFields()]
    if filled != [field]:
        raise RequestError(
            f"{name} has {'no data' if not filled else ' and '.join(filled)}",
            remedy=f"Send {item.datatype} as {field}, or all tensors as raw_input_contents",
        )
    values = getattr(item.contents, field)
    kind = np.dtype(dtype).kind
    wide = np.fromiter(values, np.int64 if kind in "iu" else dtype, len(values))
    if kind in "iu" and not np.iinfo(dtype).min <= wide.min() <= wide.max() <= np.iinfo(dtype).max:
        raise RequestError(f"{name} contains a number outside the range of {dtype}", remedy="Send smaller numbers")
    return wide.astype(dtype).tobytes()
