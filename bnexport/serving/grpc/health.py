"""gRPC's Health Checking Protocol: "" is the server, and each model goes by its name."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from google.protobuf.message import DecodeError

from bnexport.errors import RequestError
from bnexport.screening.refusal import shown
from bnexport.serving import describing
from bnexport.serving.grpc.call import Call, read_message
from bnexport.serving.grpc.schema import HEALTH_ENUMERATIONS, PACKAGE, classes
from bnexport.serving.state import ServerState

STATUSES = HEALTH_ENUMERATIONS["HealthCheckResponse.ServingStatus"]
#: Names that stand for the whole server.
_SERVER = ("", f"{PACKAGE}.GRPCInferenceService")
#: Seconds between looks for one who watches.
_LOOK = 0.1


def status_of_service(state: ServerState, service: str) -> int:
    """A value of STATUSES."""
    if service in _SERVER:
        return STATUSES["NOT_SERVING" if describing.why_not_ready(state) else "SERVING"]
    try:
        reason = describing.why_model_not_ready(state, service)
    except RequestError:
        return STATUSES["SERVICE_UNKNOWN"]
    return STATUSES["NOT_SERVING" if reason else "SERVING"]


async def check(state: ServerState, _call: Call, request: Any) -> Any:
    """The state of a service at this moment.

    Raises:
        RequestError: It is not known (404).
    """
    status = status_of_service(state, request.service)
    if status == STATUSES["SERVICE_UNKNOWN"]:
        raise RequestError(
            f"there is no service {shown(request.service)}", remedy='Ask for "" or a model\'s name', status=404
        )
    return classes()["HealthCheckResponse"](status=status)


async def watch(state: ServerState, context: Any, closing: Callable[[], bool]) -> None:
    """Tell the state of a service now and whenever it changes, until the server closes.

    Raises:
        RequestError: The request is malformed.
    """
    data = await read_message(context, state.settings.limits.body_seconds)
    try:
        service = classes()["HealthCheckRequest"].FromString(data).service
    except DecodeError as error:
        raise RequestError("the message is no HealthCheckRequest", remedy="Name a service") from error
    told = -1
    while not closing():
        status = status_of_service(state, service)
        if status != told:
            await context.write(classes()["HealthCheckResponse"](status=status).SerializeToString())
            told = status
        await asyncio.sleep(_LOOK)
