"""Metadata, readiness and statistics of a server and its models, as plain data for HTTP and gRPC."""

from __future__ import annotations

from typing import Any

from bnexport import __version__
from bnexport.errors import NotServing
from bnexport.serving.state import ServerState

EXTENSIONS = (
    "binary_tensor_data",
    "classification",
    "model_configuration",
    "model_repository",
    "schedule_policy",
    "statistics",
)
_STOPPING = "the server is stopping"


def server_metadata() -> dict[str, Any]:
    """Return the protocol's "Server Metadata"."""
    return {"name": "bnexport", "version": __version__, "extensions": EXTENSIONS}


def model_metadata(state: ServerState, name: str, version: str | None = None) -> dict[str, Any]:
    """Return the protocol's "Model Metadata"."""
    model = state.repository.resolve(name, version)
    versions = [number for number, entry in state.repository.models[name].items() if entry.served is not None]
    return model.metadata(sorted(versions, key=int) if version is None else [version])


def statistics(state: ServerState, name: str | None = None, version: str | None = None) -> dict[str, Any]:
    """Return the counters of one model, or of all (Triton, "Statistics Extension")."""
    if name is not None:
        state.repository.resolve(name, version)
    entries = [
        found.statistics.to_json(model, number)
        for (model, number), found in state.totals().models.items()
        if found.statistics is not None and name in (None, model) and version in (None, number)
    ]
    return {"model_stats": entries}


def why_not_ready(state: ServerState) -> str:
    """Return the reason for sending no requests to this server; "" if it is ready."""
    if state.draining:
        return _STOPPING
    if state.repository.ready():
        return ""
    problems = state.repository.problems()
    return "; ".join(f"{name}: {text}" for name, text in problems.items()) or "the server has no model"


def why_model_not_ready(state: ServerState, name: str, version: str | None = None) -> str:
    """Return the reason why a model does not answer; "" if it answers."""
    try:
        state.repository.resolve(name, version)
    except NotServing as error:
        return error.sentence
    return _STOPPING if state.draining else ""
