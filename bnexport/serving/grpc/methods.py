"""The table of gRPC methods and their handlers: the protocol's, and gRPC's Health Checking Protocol.

The health service has the service "" for the server, and one service per model, with the model's name.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple

from google.protobuf import json_format
from google.protobuf.message import DecodeError

from bnexport.errors import RequestError
from bnexport.proto_messages import HEALTH, INFERENCE
from bnexport.serving.grpc.inference import Call, classes, infer, read_message
from bnexport.serving.state import SERVER_METADATA, ServerState
from bnexport.validation.limits import shown

#: Name of a service's state -> its number.
STATUSES: dict[str, int] = dict(classes()["HealthCheckResponse"].ServingStatus.items())
#: Names of the service for the whole server.
_SERVER = ("", f"{INFERENCE}.GRPCInferenceService")
#: Seconds between the checks of Watch.
_LOOK = 0.1


def status_of_service(state: ServerState, service: str) -> int:
    """Return a service's state, a value of STATUSES."""
    if service in _SERVER:
        return STATUSES["NOT_SERVING" if state.why_not_ready() else "SERVING"]
    try:
        reason = state.why_model_not_ready(service)
    except RequestError:
        return STATUSES["SERVICE_UNKNOWN"]
    return STATUSES["NOT_SERVING" if reason else "SERVING"]


async def check(state: ServerState, _call: Call, request: Any) -> Any:
    """Return the current state of a service."""
    status = status_of_service(state, request.service)
    if status == STATUSES["SERVICE_UNKNOWN"]:
        raise RequestError(
            f"the server has no service {shown(request.service)}", remedy='Name "" or a model', status=404
        )
    return classes()["HealthCheckResponse"](status=status)


async def watch(state: ServerState, context: Any, closing: Callable[[], bool]) -> None:
    """Send the state of a service at once and after each change, until the server closes."""
    data = await read_message(context, state.settings.limits.body_seconds)
    try:
        service = classes()["HealthCheckRequest"].FromString(data).service
    except DecodeError as error:
        raise RequestError("the message is not a HealthCheckRequest", remedy="Name a service") from error
    sent = -1
    while not closing():
        status = status_of_service(state, service)
        if status != sent:
            await context.write(classes()["HealthCheckResponse"](status=status).SerializeToString())
            sent = status
        await asyncio.sleep(_LOOK)


#: (state, call, request message) -> answer message.
Handler = Callable[[ServerState, Call, Any], Awaitable[Any]]


class Method(NamedTuple):
    """One row of METHODS."""

    request: str  # Name of the request message's class; "" for a handler that takes bytes
    handler: Handler  # Function that answers
    probe: bool = False  # A health probe: needs no token, and a stop does not wait for it

    async def answer(self, state: ServerState, call: Call, data: bytes) -> bytes:
        """Answer a message."""
        limit = state.settings.limits.header_json_bytes
        message = _parsed(self.request, data, limit) if self.request else data
        return bytes((await self.handler(state, call, message)).SerializeToString())


def _parsed(name: str, data: bytes, most: int) -> Any:
    if len(data) > most:
        raise RequestError(
            f"the message has {len(data)} bytes, but the limit is {most}",
            remedy="Send a name and a version",
            status=413,
        )
    kind = classes()[name]
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise RequestError(
            f"the message can't be parsed as {kind.DESCRIPTOR.full_name}",
            remedy="Write it with a client of the protocol",
        ) from error


def _filled(name: str, value: Mapping[str, Any]) -> Any:
    return json_format.ParseDict(dict(value), classes()[name]())


async def server_live(_state: ServerState, _call: Call, _request: Any) -> Any:
    """Report that the process answers."""
    return classes()["ServerLiveResponse"](live=True)


async def server_ready(state: ServerState, _call: Call, _request: Any) -> Any:
    """Report if clients should send requests to this server."""
    return classes()["ServerReadyResponse"](ready=not state.why_not_ready())


async def model_ready(state: ServerState, _call: Call, request: Any) -> Any:
    """Report if a model answers; False for an unknown one."""
    try:
        ready = not state.why_model_not_ready(request.name, request.version or None)
    except RequestError:
        ready = False
    return classes()["ModelReadyResponse"](ready=ready)


async def server_metadata(_state: ServerState, _call: Call, _request: Any) -> Any:
    """Return name, version and extensions."""
    return _filled("ServerMetadataResponse", SERVER_METADATA)


async def model_metadata(state: ServerState, _call: Call, request: Any) -> Any:
    """Return inputs, outputs and versions."""
    return _filled("ModelMetadataResponse", state.model_metadata(request.name, request.version or None))


async def model_config(state: ServerState, _call: Call, request: Any) -> Any:
    """Return Triton's model configuration."""
    config = state.repository.resolve(request.name, request.version or None).config()
    return _filled("ModelConfigResponse", {"config": config})


async def model_statistics(state: ServerState, _call: Call, request: Any) -> Any:
    """Return the counters of one model, or of all."""
    return _filled("ModelStatisticsResponse", state.statistics(request.name or None, request.version or None))


async def repository_index(state: ServerState, _call: Call, request: Any) -> Any:
    """List every model version with its state, or only ready ones."""
    return _filled("RepositoryIndexResponse", {"models": state.repository.index(only_ready=request.ready)})


async def load(state: ServerState, _call: Call, request: Any) -> Any:
    """Load a model's versions from disk."""
    state.permit_loading()
    if request.parameters:
        raise RequestError("a model is loaded from disk as it is, without parameters", remedy="Send no parameters")
    await state.repository.reload(_model_named(request))
    return classes()["RepositoryModelLoadResponse"]()


async def unload(state: ServerState, _call: Call, request: Any) -> Any:
    """Close a model's versions."""
    state.permit_loading()
    state.repository.unload(_model_named(request))
    return classes()["RepositoryModelUnloadResponse"]()


def _model_named(request: Any) -> str:
    """Return the model's name; KServe's message has it in the field for Triton's repository name."""
    return str(request.model_name or request.repository_name)


_SERVICE = f"/{INFERENCE}.GRPCInferenceService/"
INFER, STREAM = f"{_SERVICE}ModelInfer", f"{_SERVICE}ModelStreamInfer"
WATCH = f"/{HEALTH}.Health/Watch"
#: Path -> method. grpc_server.py handles the two streaming methods, STREAM and WATCH.
METHODS: dict[str, Method] = {
    INFER: Method("", infer),
    f"{_SERVICE}ServerLive": Method("ServerLiveRequest", server_live, probe=True),
    f"{_SERVICE}ServerReady": Method("ServerReadyRequest", server_ready, probe=True),
    f"{_SERVICE}ModelReady": Method("ModelReadyRequest", model_ready, probe=True),
    f"{_SERVICE}ServerMetadata": Method("ServerMetadataRequest", server_metadata),
    f"{_SERVICE}ModelMetadata": Method("ModelMetadataRequest", model_metadata),
    f"{_SERVICE}ModelConfig": Method("ModelConfigRequest", model_config),
    f"{_SERVICE}ModelStatistics": Method("ModelStatisticsRequest", model_statistics),
    f"{_SERVICE}RepositoryIndex": Method("RepositoryIndexRequest", repository_index),
    f"{_SERVICE}RepositoryModelLoad": Method("RepositoryModelLoadRequest", load),
    f"{_SERVICE}RepositoryModelUnload": Method("RepositoryModelUnloadRequest", unload),
    f"/{HEALTH}.Health/Check": Method("HealthCheckRequest", check, probe=True),
}
