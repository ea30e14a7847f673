"""The ASGI application: the table of routes, their handlers, and the sending, logging and counting of answers."""

from __future__ import annotations

import asyncio
import functools
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from bnexport import __version__
from bnexport.errors import NotServing, RequestError
from bnexport.serving.http.classify import classify
from bnexport.serving.http.exchange import (
    BINARY,
    JSON,
    TEXT,
    Disconnected,
    Exchange,
    Receive,
    Reply,
    check_headers,
    error_reply,
    header_length,
    json_reply,
    packed,
    read_body,
    reply_headers,
)
from bnexport.serving.http.page import models, page, report
from bnexport.serving.http.prometheus import render
from bnexport.serving.protocol.decoding import load_json
from bnexport.serving.protocol.messages import InferRequest, InferResponse, encode_response
from bnexport.serving.served_model import ServedModel
from bnexport.serving.serving_limits import above_limit
from bnexport.serving.state import SERVER_METADATA, ServerState
from bnexport.validation.limits import shown

Handler = Callable[..., Awaitable[Reply]]


class Route(NamedTuple):
    """One row of ROUTES."""

    method: str  # HTTP's
    pattern: str  # Segments of the path; {..} matches any one segment, and the part in [..] is optional
    handler: Handler  # (state, exchange, *captured segments) -> reply
    probe: bool = False  # A health probe or the page: needs no token, and a stop does not wait for it


_INFER_TYPES = (b"", b"application/json", b"application/octet-stream")


def _replying(value_of: Callable[..., Any]) -> Handler:
    """Return a handler that replies with the JSON value of ``value_of(state, *captured segments)``."""

    @functools.wraps(value_of)
    async def handler(state: ServerState, _exchange: Exchange, *captured: str) -> Reply:
        return json_reply(value_of(state, *captured))

    return handler


async def live(_state: ServerState, _exchange: Exchange) -> Reply:
    """Report that the process answers."""
    return json_reply({"live": True})


async def ready(state: ServerState, _exchange: Exchange) -> Reply:
    """Report if clients should send requests to this server, and the reason if not."""
    if reason := state.why_not_ready():
        return json_reply({"ready": False, "reason": reason}, 503)
    problems = state.repository.problems()
    return json_reply({"ready": True, "problems": problems} if problems else {"ready": True})


async def server_metadata(_state: ServerState, _exchange: Exchange) -> Reply:
    """Return the protocol's "Server Metadata"."""
    return json_reply(SERVER_METADATA)


async def model_ready(state: ServerState, _exchange: Exchange, name: str, version: str | None = None) -> Reply:
    """Report if a model answers; 404 for an unknown one."""
    reason = state.why_model_not_ready(name, version)
    value: dict[str, Any] = {"name": name, "ready": not reason}
    return json_reply(value | {"reason": reason}, 503) if reason else json_reply(value)


async def infer(state: ServerState, exchange: Exchange, name: str, version: str | None = None) -> Reply:
    """Decode, queue, encode. Short requests take the fast lane (fast_lane.py), in the same three steps."""
    infer_target(state, exchange, name, version)  # before reading the body, which may be large
    body = await read_body(state, exchange)
    model = infer_target(state, exchange, name, version)  # the model may have been replaced meanwhile
    return infer_reply(await model.infer(infer_request(model, exchange, body)))


def infer_target(state: ServerState, exchange: Exchange, name: str, version: str | None = None) -> ServedModel:
    """Return the model of an inference request."""
    exchange.model = model = state.repository.resolve(name, version)
    kind = exchange.headers.get(b"content-type", b"")
    if kind not in _INFER_TYPES and kind.partition(b";")[0].strip().lower() not in _INFER_TYPES:
        raise RequestError(
            f"the content-type {shown(kind.decode('latin-1'))} is not a content-type of the protocol",
            remedy="Send application/json, or application/octet-stream with binary tensors",
            status=415,
        )
    return model


def infer_request(model: ServedModel, exchange: Exchange, body: bytes) -> InferRequest:
    """Decode a request's body."""
    request = model.decoder.decode(body, header_length(exchange.headers))
    exchange.rows = request.rows
    return request


def infer_reply(response: InferResponse) -> Reply:
    """Encode an answer."""
    content, length = encode_response(response)
    if length is None:
        return Reply(200, content, JSON)
    return Reply(200, content, BINARY, ((b"inference-header-content-length", b"%d" % length),))


async def repository_index(state: ServerState, exchange: Exchange) -> Reply:
    """List every model version with its state, or only ready ones (Triton, "Model Repository Extension")."""
    ready = (await _optional_object(state, exchange)).get("ready", False)
    if not isinstance(ready, bool):
        raise RequestError('"ready" is neither true nor false', remedy="Send true or false, or leave it out")
    return json_reply(state.repository.index(only_ready=ready))


async def load(state: ServerState, exchange: Exchange, name: str) -> Reply:
    """Load a model's versions from disk."""
    parameters = (await _optional_object(state, exchange)).get("parameters", {})
    _refuse_other_origin(exchange)
    return json_reply(await state.load(name, parameters=parameters != {}))


async def unload(state: ServerState, exchange: Exchange, name: str) -> Reply:
    """Close a model's versions."""
    await _optional_object(state, exchange)
    _refuse_other_origin(exchange)
    return json_reply(state.unload(name))


def _refuse_other_origin(exchange: Exchange) -> None:
    """Refuse a request of a web page of another origin."""
    origin = exchange.headers.get(b"origin")
    if origin is not None and origin.partition(b"://")[2] != exchange.headers.get(b"host"):
        raise RequestError(
            "a web page of another origin may not load or unload models",
            remedy="Send the request from a program",
            status=403,
        )


async def _optional_object(state: ServerState, exchange: Exchange) -> dict[str, Any]:
    """Return the JSON object in a request's body; {} without a body."""
    limits = state.settings.limits
    body = await read_body(state, exchange)
    if len(body) > limits.header_json_bytes:
        raise above_limit(f"the body has {len(body)} bytes", limits.header_json_bytes, remedy="Send {}")
    value = load_json(body, brackets=limits.brackets) if body else {}
    if not isinstance(value, dict):
        raise RequestError("the request is not a JSON object", remedy="Send {}, or no body")
    return value


async def metrics(state: ServerState, _exchange: Exchange) -> Reply:
    """Return the counters in Prometheus's text format."""
    return Reply(200, render(state), TEXT)


async def openapi(_state: ServerState, _exchange: Exchange) -> Reply:
    """Return the OpenAPI document of the routes."""
    return json_reply(openapi_document())


@functools.cache
def openapi_document() -> dict[str, Any]:
    """Read ``openapi.json`` (OpenAPI 3.1), which describes every row of ROUTES, and insert the version."""
    document: dict[str, Any] = orjson.loads(Path(__file__).with_name("openapi.json").read_bytes())
    document["info"]["version"] = __version__
    return document


_MODEL = "v2/models/{name}[/versions/{version}]"
ROUTES: tuple[Route, ...] = (
    Route("GET", "v2/health/live", live, probe=True),
    Route("GET", "v2/health/ready", ready, probe=True),
    Route("GET", "v2", server_metadata),
    Route("GET", "v2/models/stats", _replying(ServerState.statistics)),
    Route("GET", _MODEL, _replying(ServerState.model_metadata)),
    Route("GET", f"{_MODEL}/ready", model_ready, probe=True),
    Route("GET", f"{_MODEL}/config", _replying(ServerState.model_config)),
    Route("GET", f"{_MODEL}/stats", _replying(ServerState.statistics)),
    Route("POST", f"{_MODEL}/infer", infer),
    Route("POST", f"{_MODEL}/classify", classify),
    Route("POST", "v2/repository/index", repository_index),
    Route("POST", "v2/repository/models/{name}/load", load),
    Route("POST", "v2/repository/models/{name}/unload", unload),
    Route("GET", "v2/openapi.json", openapi),
    Route("GET", "metrics", metrics),
    Route("GET", "", page, probe=True),
    Route("GET", "models", models),
    Route("GET", "models/{name}/versions/{version}/report", report),
)


class FoundRoute(NamedTuple):
    """A route with the captured segments of the path; ``name`` is the key of its counters."""

    name: str
    handler: Handler
    captured: tuple[str, ...]
    probe: bool


def _paths(pattern: str) -> re.Pattern[str]:
    """Return the paths of a route as a regular expression with a group for each captured segment."""
    text = pattern.replace(".", r"\.").replace("[", "(?:").replace("]", ")?")
    return re.compile(re.sub(r"{\w+}", "([^/]+)", text))


_PATHS = [(_paths(route.pattern), route) for route in ROUTES]


@functools.lru_cache(1024)
def find_route(method: str, path: str) -> FoundRoute:
    """Return the handler of a path."""
    wanted = "GET" if method == "HEAD" else method
    methods = []
    for paths, route in _PATHS:
        if (match := paths.fullmatch(path.removeprefix("/"))) is not None:
            if route.method == wanted:
                return FoundRoute(route.pattern, route.handler, tuple(filter(None, match.groups())), route.probe)
            methods.append(route.method)
    if methods:
        allow = tuple(dict.fromkeys(["GET", "HEAD"] if "GET" in methods else methods))
        raise RequestError(f"{path[:200]} does not take {method}", remedy=f"Send {allow[0]}", status=405, allow=allow)
    raise RequestError(
        f"the server has no route {shown(path, 200)}", remedy="GET v2/openapi.json lists the routes", status=404
    )


Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class App:
    """An ASGI application (version 3.0) that serves a repository."""

    def __init__(self, state: ServerState) -> None:
        self.state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        state = self.state
        start = time.perf_counter_ns()
        pairs = scope["headers"]
        headers = dict(pairs)
        client = (scope.get("client") or ("",))[0]
        exchange = Exchange(scope["method"], scope["path"], headers, receive, self.id_of(headers), client)
        state.active += 1
        route = ""
        try:
            check_headers(headers, pairs, scope["http_version"])
            found = find_route(exchange.method, exchange.path)
            route = found.name
            if not found.probe:
                state.let_in(headers.get(b"authorization", b""))
            reply = await found.handler(state, exchange, *found.captured)
        except Disconnected:
            return
        except asyncio.CancelledError:
            reply = error_reply(NotServing("the server stopped before it could answer", remedy="Try again"))
        except Exception as error:
            reply = error_reply(state.failure(exchange, error))
        finally:
            state.active -= 1
            state.release(exchange, exchange.held)
        # The time counts from the last byte, as in the fast lane: a slow client must not look like a slow server.
        reply = self.finished(exchange, route, reply, exchange.arrived_ns or start)
        headers_out = reply_headers(reply, exchange, close=state.draining)
        await send({"type": "http.response.start", "status": reply.status, "headers": headers_out})
        await send({"type": "http.response.body", "body": reply.body})

    def finished(self, exchange: Exchange, route: str, reply: Reply, start_ns: int) -> Reply:
        """Compress a reply if the client accepts that, count it, and log it."""
        if exchange.model is not None and (accepted := exchange.headers.get(b"accept-encoding")) is not None:
            reply = packed(reply, accepted)
        ns = time.perf_counter_ns() - start_ns
        self.state.requests[route, reply.status] += 1
        self.state.answered(exchange, reply.status, ns, len(reply.body), ok=reply.status < 400)
        return reply

    def refused(self, client: str, status: int, reason: str) -> None:
        """Count and log input that was refused before it became a request: malformed, too slow, too large, too many."""
        self.state.requests["", status] += 1
        if self.state.log.access:
            self.state.log.request({"time": time.time(), "client": client, "status": status, "reason": reason})

    def id_of(self, headers: dict[bytes, bytes]) -> str:
        """Return a request's id."""
        given = headers.get(b"x-request-id")
        return self.state.id_of(None if given is None else given.decode("latin-1"))
