"""One gRPC call: its context, its message, and gRPC's codes for errors."""

from __future__ import annotations

import asyncio
import functools
from typing import Any
from urllib.parse import unquote

import grpc
import grpc.aio

from bnexport.errors import BnexportError, RequestError
from bnexport.proto_messages import message_classes
from bnexport.serving.protocol.messages import status_of
from bnexport.serving.state import RequestContext

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
