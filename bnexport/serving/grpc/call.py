"""One gRPC call: the data that its log line needs, its message, and gRPC's codes for errors."""

from __future__ import annotations

import asyncio
import functools
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import grpc
import grpc.aio

from bnexport.errors import BnexportError, RequestError
from bnexport.proto_messages import message_classes
from bnexport.serving.protocol.messages import status_of

if TYPE_CHECKING:
    from bnexport.serving.served_model import ServedModel

#: Status of an error of the tree -> gRPC's code ("Status codes and their use in gRPC").
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
    """Return the classes of the messages of both services, by name."""
    return message_classes("bnexport serve --grpc-port")


class Call:
    """One call; of a stream, one message of it.

    Attributes:
        path: "/package.Service/Method".
        context: gRPC's.
        metadata: Lower-case name -> value, of those that are text.
        id: Id of the request, the client's or a new one.
        message_id: The id in its message; "" until that is known.
        model: The answering model, once it is known.
        rows: Samples, once they are known.
        bytes_in: Bytes of the message.
    """

    __slots__ = ("bytes_in", "context", "id", "message_id", "metadata", "model", "path", "rows")

    def __init__(self, path: str, context: Any, metadata: dict[str, Any], request_id: str) -> None:
        self.path, self.context, self.metadata, self.id = path, context, metadata, request_id
        self.model: ServedModel | None = None
        self.rows = self.bytes_in = 0
        self.message_id = ""

    @property
    def client(self) -> str:
        """Client's address without its port: "127.0.0.1" of "ipv4:127.0.0.1:5000"."""
        address = unquote(self.context.peer()).partition(":")[2].rpartition(":")[0]
        return address.strip("[]")


async def read_message(context: Any, seconds: float) -> bytes:
    """Read the message of a call that has one."""
    try:
        async with asyncio.timeout(seconds):
            message = await context.read()
    except TimeoutError as error:
        raise RequestError(
            f"the message was not there after {seconds:g} seconds", remedy="Send it faster", status=408
        ) from error
    if not isinstance(message, bytes):
        raise RequestError("the call came without a message that can be read", remedy="Send one, within the limits")
    return message


def code_of(error: BnexportError) -> grpc.StatusCode:
    """Return gRPC's code for an error."""
    return CODES.get(status_of(error), grpc.StatusCode.INTERNAL)
