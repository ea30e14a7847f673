"""The gRPC server: the table of methods, their handlers, and the sending, logging and counting of answers.

The health service has the service "" for the server, and one service per model, with the model's name.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import grpc.aio
from google.protobuf import json_format
from google.protobuf.message import DecodeError

from bnexport.errors import BnexportError, NotServing, RequestError, UsageError
from bnexport.optional import one_line
from bnexport.proto_messages import HEALTH, INFERENCE
from bnexport.serving.grpc.inference import Call, classes, code_of, infer, read_message
from bnexport.serving.listener import resolved
from bnexport.serving.protocol.messages import sentence_of
from bnexport.serving.serving_limits import ServingLimits, above_limit
from bnexport.serving.state import SERVER_METADATA, ServerState
from bnexport.validation.limits import shown

#: Names of the service for the whole server.
_SERVER = ("", f"{INFERENCE}.GRPCInferenceService")
#: Seconds between the checks of Watch.
_LOOK = 0.1


def _ready(state: ServerState, model: str, version: str) -> bool | None:
    """Return True if a model answers; None for an unknown one."""
    try:
        return not state.why_model_not_ready(model, version or None)
    except RequestError:
        return None


def status_of_service(state: ServerState, service: str) -> str:
    """Return a service's state, a name of HealthCheckResponse.ServingStatus."""
    ready = not state.why_not_ready() if service in _SERVER else _ready(state, service, "")
    return "SERVICE_UNKNOWN" if ready is None else "SERVING" if ready else "NOT_SERVING"


def check(state: ServerState, request: Any) -> dict[str, Any]:
    """Return the current state of a service."""
    status = status_of_service(state, request.service)
    if status == "SERVICE_UNKNOWN":
        raise RequestError(
            f"the server has no service {shown(request.service)}", remedy='Name "" or a model', status=404
        )
    return {"status": status}


async def watch(state: ServerState, context: Any, closing: Callable[[], bool]) -> None:
    """Send the state of a service at once and after each change, until the server closes."""
    data = await read_message(context, state.settings.limits.body_seconds)
    try:
        service = classes()["HealthCheckRequest"].FromString(data).service
    except DecodeError as error:
        raise RequestError("the message is not a HealthCheckRequest", remedy="Name a service") from error
    sent = ""
    while not closing():
        status = status_of_service(state, service)
        if status != sent:
            await context.write(classes()["HealthCheckResponse"](status=status).SerializeToString())
            sent = status
        await asyncio.sleep(_LOOK)


def _named(request: Any) -> str:
    """Return the model's name; KServe's message has it in the field for Triton's repository name."""
    return str(request.model_name or request.repository_name)


class Method(NamedTuple):
    """One row of METHODS."""

    messages: str  # Name of its messages without "Request" and "Response"
    # (state, request message) -> the answer's fields as plain JSON values; None for ModelInfer, which takes bytes
    handler: Callable[[ServerState, Any], Any] | None
    probe: bool = False  # A health probe: needs no token, and a stop does not wait for it

    async def answer(self, state: ServerState, call: Call, data: bytes) -> bytes:
        """Answer a message."""
        if self.handler is None:
            return bytes((await infer(state, call, data)).SerializeToString())
        value = self.handler(state, _parsed(f"{self.messages}Request", data, state.settings.limits.header_json_bytes))
        fields: Mapping[str, Any] = await value if inspect.isawaitable(value) else value
        answer = json_format.ParseDict(fields, classes()[f"{self.messages}Response"]())
        return bytes(answer.SerializeToString())


def _parsed(name: str, data: bytes, most: int) -> Any:
    if len(data) > most:
        raise above_limit(f"the message has {len(data)} bytes", most, remedy="Send a name and a version")
    kind = classes()[name]
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise RequestError(
            f"the message can't be parsed as {kind.DESCRIPTOR.full_name}",
            remedy="Write it with a client of the protocol",
        ) from error


_SERVICE = f"/{INFERENCE}.GRPCInferenceService/"
STREAM = f"{_SERVICE}ModelStreamInfer"
WATCH = f"/{HEALTH}.Health/Watch"
_METHODS = (
    Method("ModelInfer", None),
    Method("ServerLive", lambda _state, _request: {"live": True}, probe=True),
    Method("ServerReady", lambda state, _request: {"ready": not state.why_not_ready()}, probe=True),
    Method("ModelReady", lambda state, model: {"ready": bool(_ready(state, model.name, model.version))}, probe=True),
    Method("ServerMetadata", lambda _state, _request: SERVER_METADATA),
    Method("ModelMetadata", lambda state, model: state.model_metadata(model.name, model.version or None)),
    Method("ModelConfig", lambda state, model: {"config": state.model_config(model.name, model.version or None)}),
    Method("ModelStatistics", lambda state, model: state.statistics(model.name or None, model.version or None)),
    Method("RepositoryIndex", lambda state, index: {"models": state.repository.index(only_ready=index.ready)}),
    Method("RepositoryModelLoad", lambda state, model: state.load(_named(model), parameters=bool(model.parameters))),
    Method("RepositoryModelUnload", lambda state, model: state.unload(_named(model))),
)
#: Path -> method. ``GrpcServer`` handles the two streaming methods, STREAM and WATCH.
METHODS: dict[str, Method] = {f"{_SERVICE}{method.messages}": method for method in _METHODS}
METHODS[f"/{HEALTH}.Health/Check"] = Method("HealthCheck", check, probe=True)

#: Calls of Watch at a time: they need no token, and count as open calls.
_MOST_WATCHERS = 256
#: Milliseconds after which a connection without calls is closed; clients connect again by themselves.
_IDLE_MS = 300_000
#: Seconds without a refused call after which a closing server is shut, and the longest time until then.
_SILENCE, _FAREWELL = 0.5, 1.5


class GrpcServer(grpc.GenericRpcHandler):  # type: ignore[misc]
    """The protocol's service and gRPC's health service, on the running event loop. Host, port and TLS as in ServerSettings."""

    def __init__(
        self, state: ServerState, host: str, port: int, tls: tuple[Path, Path] | None, *, reuse_port: bool
    ) -> None:
        self.state, self.port = state, port
        self._host, self._tls, self._reuse_port = host, tls, reuse_port
        self._closing, self._refused_at = False, 0.0
        self._handlers = {path: self._unary(path, method) for path, method in METHODS.items()}
        self._handlers[STREAM] = grpc.stream_stream_rpc_method_handler(self._stream)
        self._handlers[WATCH] = grpc.stream_stream_rpc_method_handler(self._watch)
        self._idle: set[asyncio.Task[Any]] = set()
        self._watching = 0
        self._server: Any = None

    async def start(self) -> None:
        """Listen."""
        # gRPC's Python part logs errors to standard error that clients can cause.
        logging.getLogger("grpc").setLevel(logging.CRITICAL + 1)
        server = grpc.aio.server(
            options=_options(self.state.settings.limits, reuse=self._reuse_port),
            maximum_concurrent_rpcs=self.state.settings.limits.connections,
        )
        server.add_generic_rpc_handlers((self,))
        try:
            # gRPC would listen at every address of a name; HTTP listens at one.
            host = resolved(self._host, self.port)[1][0]
            address = f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"
            if self._tls is None:
                self.port = server.add_insecure_port(address)
            else:
                certificate, key = (file.read_bytes() for file in self._tls)
                pair = (key, certificate)
                self.port = server.add_secure_port(address, grpc.ssl_server_credentials((pair,)))
        except (RuntimeError, OSError, ValueError) as error:
            raise UsageError(
                f"{self._host} port {self.port} can't be used by gRPC: {one_line(error)}",
                remedy="Choose another --host or --grpc-port",
            ) from error
        await server.start()
        self._server = server

    async def stop(self, grace: float | None) -> None:
        """Answer accepted calls, refuse new ones, and close."""
        self._closing = True
        for task in self._idle:
            task.cancel()
        if self._server is None:
            return
        # gRPC would cancel calls that arrive while it stops, without a reason.
        start = self._refused_at = time.monotonic()
        while grace is not None and time.monotonic() < min(self._refused_at + _SILENCE, start + min(_FAREWELL, grace)):
            await asyncio.sleep(0.01)
        await self._server.stop(None if grace is None else max(grace - (time.monotonic() - start), 0.0))

    def is_closing(self) -> bool:
        """Return True if the server refuses new calls."""
        return self._closing

    def service(self, details: Any) -> Any:
        """Return the handler of a call, as grpc.GenericRpcHandler requires."""
        found = self._handlers.get(details.method)
        return found if found is not None else self._unary(details.method, None)

    def _unary(self, path: str, method: Method | None) -> Any:
        """Make a handler of calls with one message.

        They are declared as calls with a stream of messages, because gRPC starts such a handler before the first message
        arrives. So the token is checked first, the message has its own time limit, and all open calls are counted.
        """

        async def answer(_messages: Any, context: Any) -> bytes:
            call = self._call(path, context)
            context.set_trailing_metadata((("x-request-id", call.id),))
            return _finished(
                context, await self._measured(call, self._answer(method, call), counted=method is not None)
            )

        return grpc.stream_unary_rpc_method_handler(answer)

    async def _answer(self, method: Method | None, call: Call) -> bytes:
        if method is None:
            raise RequestError(
                f"the server has no method {shown(call.path, 200)}",
                remedy="docs/serving_reference.md has the table of methods",
                status=501,
            )
        if not method.probe:
            self._let_in(call)
        state = self.state
        data = await read_message(call.context, state.settings.limits.body_seconds)
        call.bytes_in = len(data)
        state.hold(call, len(data))
        return await method.answer(state, call, data)

    async def _stream(self, _messages: Any, context: Any) -> None:
        """Answer ModelStreamInfer: one answer per request, in order. An error ends a request but not the stream."""
        call = self._call(STREAM, context)
        try:
            self._let_in(call)
        except BnexportError as error:
            _finished(context, error)
            return
        while (data := await self._next(context)) is not None:
            one = self._call(STREAM, context)
            one.bytes_in = len(data)
            answer = await self._measured(one, self._streamed(one, data), counted=True)
            if isinstance(answer, BnexportError):
                answer = _failed(one, answer)
            await context.write(answer)
        if self.is_closing():
            _finished(context, _stopping())

    async def _streamed(self, call: Call, data: bytes) -> bytes:
        self.state.last_work = time.monotonic()
        self.state.hold(call, len(data))
        response = await infer(self.state, call, data)
        response.parameters["triton_final_response"].bool_param = True
        return bytes(classes()["ModelStreamInferResponse"](infer_response=response).SerializeToString())

    async def _next(self, context: Any) -> bytes | None:
        """Return the next message of a stream; None at its end or if the server closes."""
        if self.is_closing():
            return None
        task = asyncio.current_task()
        assert task is not None
        self._idle.add(task)
        try:
            data = await context.read()
        except asyncio.CancelledError:
            if not self.is_closing():
                raise
            return None
        finally:
            self._idle.discard(task)
        return data if isinstance(data, bytes) else None

    async def _watch(self, _messages: Any, context: Any) -> None:
        self._watching += 1
        try:
            if self._watching > _MOST_WATCHERS:
                raise RequestError(
                    f"{_MOST_WATCHERS} clients are watching already, which is the limit",
                    remedy="Call Check regularly instead",
                    status=413,
                )
            await watch(self.state, context, self.is_closing)
        except BnexportError as error:
            _finished(context, error)
        finally:
            self._watching -= 1

    def _let_in(self, call: Call) -> None:
        shown_tokens = [value for name, value in call.context.invocation_metadata() if name == "authorization"]
        # Of several values, two programs could use different ones.
        self.state.let_in(shown_tokens[0].encode() if len(shown_tokens) == 1 else b"")
        if self.is_closing():
            self._refused_at = time.monotonic()
            raise _stopping()

    def _call(self, path: str, context: Any) -> Call:
        metadata = dict(context.invocation_metadata() or ())
        return Call(path, context, metadata, self.state.id_of(str(metadata.get("x-request-id", ""))))

    async def _measured(self, call: Call, work: Awaitable[bytes], *, counted: bool) -> bytes | BnexportError:
        """Await the answer to a call, count and log it; return the answer or the error."""
        state, start = self.state, time.perf_counter_ns()
        state.active += 1
        state.calls_active += 1
        code: grpc.StatusCode = grpc.StatusCode.CANCELLED
        answer: bytes | BnexportError = b""
        try:
            answer = await work
            code = grpc.StatusCode.OK
        except Exception as error:
            answer = state.failure(call, error)
            code = code_of(answer)
        finally:
            state.release(call, call.held)
            state.active -= 1
            state.calls_active -= 1
            state.calls[call.path if counted else "none", code.name] += 1
            ns, size = time.perf_counter_ns() - start, len(answer) if isinstance(answer, bytes) else 0
            state.answered(call, code.name, ns, size, ok=code is grpc.StatusCode.OK)
        return answer


def _finished(context: Any, answer: bytes | BnexportError) -> bytes:
    """Return the bytes of an answer; for an error, set its code and sentence and return none."""
    if isinstance(answer, BnexportError):
        context.set_code(code_of(answer))
        context.set_details(sentence_of(answer))
        return b""
    return answer


def _failed(call: Call, error: BnexportError) -> bytes:
    """Return the error answer to a request of a stream, with the request's id as Triton does."""
    message = classes()["ModelStreamInferResponse"](error_message=sentence_of(error))
    message.infer_response.id = call.message_id
    return bytes(message.SerializeToString())


def _stopping() -> NotServing:
    return NotServing(
        "the server is stopping and takes no more requests", remedy="Try another server, or this one later"
    )


def _options(limits: ServingLimits, *, reuse: bool) -> list[tuple[str, Any]]:
    """Return the options for limits that gRPC itself enforces."""
    return [
        ("grpc.so_reuseport", int(reuse)),
        ("grpc.max_receive_message_length", min(limits.body_bytes, limits.inflated_bytes, 2**31 - 1)),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_metadata_size", limits.head_bytes),
        ("grpc.absolute_max_metadata_size", limits.head_bytes),
        ("grpc.max_concurrent_streams", limits.connections),
        ("grpc.server_handshake_timeout_ms", int(limits.head_seconds * 1000)),
        ("grpc.max_connection_idle_ms", _IDLE_MS),
    ]
