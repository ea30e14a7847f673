"""The table of routes as an OpenAPI document (OpenAPI Specification 3.1.0), for clients, generators and fuzzers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from bnexport import __version__
from bnexport.serving.http.openapi_schemas import SCHEMAS
from bnexport.serving.http.route import Route

#: Status -> what it means here. Those of an answer that is an error; each has a schema "Error".
ERRORS: dict[int, str] = {
    400: "The request is malformed, or does not fit the model.",
    401: "The request shows no token, or another one.",
    403: "The server was not started with --allow-load.",
    404: "There is no such model, version or report.",
    408: "The request did not arrive in time.",
    413: "The request is larger than a limit.",
    415: "The content-type or content-encoding is another one.",
    431: "The headers are larger than the limit.",
    501: "The server lacks a package that this needs.",
    503: "The model is not ready, or too many requests wait. Try again.",
    504: "The answer was not there before the deadline.",
}
#: Of any request, before a route is looked for.
_ALWAYS = (400, 408, 431)
_WORK = (404, 413, 415, 503, 504)
_JSON, _BINARY, _HTML = "application/json", "application/octet-stream", "text/html; charset=utf-8"
_BYTES: dict[str, Any] = {}
#: What goes for a parameter of a path.
_PARAMETERS = {
    "name": {"type": "string", "pattern": "^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$"},
    "version": {"type": "string", "pattern": "^[1-9][0-9]{0,17}$"},
}


class Told(NamedTuple):
    """What is told of one route beside its handler's own words.

    Attributes:
        schema: Name of the answer's schema in SCHEMAS; "" for an answer that is no JSON.
        errors: Statuses of errors beside those of every route.
        body: Media type -> schema of the request's body; None without one.
        media: Of the answer where it is no JSON, or JSON and another.
        unready: Whether a 503 is an answer of the same schema and no error.
        optional: Whether the body may be missing.
    """

    schema: str = ""
    errors: tuple[int, ...] = ()
    body: dict[str, dict[str, Any]] | None = None
    media: str = _JSON
    unready: bool = False
    optional: bool = False


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


_OBJECT: dict[str, dict[str, Any]] = {_JSON: {"type": "object"}}
_READY: dict[str, dict[str, Any]] = {_JSON: {"type": "object", "properties": {"ready": {"type": "boolean"}}}}
_NO_PARAMETERS: dict[str, dict[str, Any]] = {
    _JSON: {"type": "object", "properties": {"parameters": {"type": "object", "maxProperties": 0}}}
}
_FORM = {"type": "object", "additionalProperties": {"type": "string", "contentMediaType": "image/png"}}
#: (method, pattern) of a route -> what is told of it.
TOLD: dict[tuple[str, str], Told] = {
    ("GET", "v2/health/live"): Told("Live"),
    ("GET", "v2/health/ready"): Told("Ready", unready=True),
    ("GET", "v2"): Told("ServerMetadata"),
    ("GET", "v2/models/stats"): Told("Statistics"),
    ("GET", "v2/models/{name}[/versions/{version}]"): Told("ModelMetadata", (404, 503)),
    ("GET", "v2/models/{name}[/versions/{version}]/ready"): Told("ModelReady", (404,), unready=True),
    ("GET", "v2/models/{name}[/versions/{version}]/config"): Told("ModelConfig", (404, 503)),
    ("GET", "v2/models/{name}[/versions/{version}]/stats"): Told("Statistics", (404, 503)),
    ("POST", "v2/models/{name}[/versions/{version}]/infer"): Told(
        "InferResponse", _WORK, {_JSON: _ref("InferRequest"), _BINARY: _BYTES}, media=_BINARY
    ),
    ("POST", "v2/models/{name}[/versions/{version}]/classify"): Told(
        "Predictions", (*_WORK, 501), {"image/png": _BYTES, "image/jpeg": _BYTES, "multipart/form-data": _FORM}
    ),
    ("POST", "v2/repository/index"): Told("Index", (413, 415, 503), _READY, optional=True),
    ("POST", "v2/repository/models/{name}/load"): Told(
        "Done", (403, 404, 413, 415, 503), _NO_PARAMETERS, optional=True
    ),
    ("POST", "v2/repository/models/{name}/unload"): Told("Done", (403, 404, 413, 415, 503), _OBJECT, optional=True),
    ("GET", "v2/openapi.json"): Told("Document"),
    ("GET", "metrics"): Told(media="text/plain; version=0.0.4; charset=utf-8"),
    ("GET", ""): Told(media=_HTML),
    ("GET", "models"): Told("Models"),
    ("GET", "models/{name}/versions/{version}/report"): Told(errors=(404, 503), media=_HTML),
}


def document(routes: Iterable[Route]) -> dict[str, Any]:
    """The OpenAPI document of a table of routes.

    Args:
        routes: Each with a row in TOLD; a pattern with a part that may be missing makes two paths.
    """
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        before, _, rest = route.pattern.partition("[")
        inside, _, after = rest.partition("]")
        for path in dict.fromkeys((before + after, before + inside + after)):
            paths.setdefault(f"/{path}", {})[route.method.lower()] = _operation(route, path)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "bnexport serve",
            "version": __version__,
            "description": "The Open Inference Protocol, version 2, and what bnexport adds. A token is asked for where the "
            "server was started with --token-file.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {
            "schemas": SCHEMAS,
            "responses": {f"Error{status}": _error(meaning) for status, meaning in ERRORS.items()},
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(route: Route, path: str) -> dict[str, Any]:
    told = TOLD[route.method, route.pattern]
    words = (route.handler.__doc__ or "").strip()
    version = "_version" if "{version}" in path and "[" in route.pattern else ""
    value: dict[str, Any] = {
        "operationId": f"{route.handler.__name__}{version}{'_all' if path == 'v2/models/stats' else ''}",
        "summary": words.partition("\n")[0],
        "responses": _responses(told, route),
        "security": [] if route.probe else [{}, {"token": []}],
    }
    if captured := re.findall(r"{(\w+)}", path):
        value["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": _PARAMETERS[name]} for name in captured
        ]
    if told.body is not None:
        content = {media: {"schema": schema} if schema else {} for media, schema in told.body.items()}
        value["requestBody"] = {"required": not told.optional, "content": content}
    return value


def _responses(told: Told, route: Route) -> dict[str, Any]:
    content: dict[str, Any] = {_JSON: {"schema": _ref(told.schema)}} if told.schema else {}
    if told.media != _JSON:
        content[told.media] = {}
    found: dict[str, Any] = {"200": {"description": "Done.", "content": content}}
    if told.unready:
        found["503"] = {"description": "Not ready, and why.", "content": content}
    for status in (*_ALWAYS, *(() if route.probe else (401,)), *told.errors):
        found[str(status)] = {"$ref": f"#/components/responses/Error{status}"}
    return dict(sorted(found.items()))


def _error(meaning: str) -> dict[str, Any]:
    return {"description": meaning, "content": {_JSON: {"schema": _ref("Error")}}}
