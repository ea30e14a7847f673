"""The contract with uvicorn: its private parts that the adapter uses exist, and without one of them the server still serves."""

import asyncio
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from support.bundles import write_bundle
from support.serving import binary, logits_of, serving
from uvicorn.protocols.http import httptools_impl

from bnexport.serving.http import fast_lane, uvicorn_adapter
from bnexport.serving.http.uvicorn_adapter import ATTRIBUTES, METHODS, REQUEST_ATTRIBUTES, DrainingServer, missing_part

ROOT = Path(__file__).parents[3]


async def application(_scope: Any, _receive: Any, _send: Any) -> None:
    """Do nothing."""


def test_every_private_name_exists() -> None:
    assert missing_part() is None
    config = uvicorn.Config(application, lifespan="off", log_config=None)
    server = uvicorn.Server(config)

    async def made() -> Any:
        config.load()
        return httptools_impl.HttpToolsProtocol(config=config, server_state=server.server_state, app_state={})

    connection = asyncio.run(made())
    assert [name for name in (*METHODS, *ATTRIBUTES) if not hasattr(connection, name)] == []
    assert {"write_paused", "read_paused"} <= set(httptools_impl.FlowControl.__init__.__code__.co_names)
    assert [name for name in ("connections", "tasks", "total_requests") if not hasattr(server.server_state, name)] == []
    server_names = ("should_exit", "force_exit", "startup", "shutdown", "on_tick", "handle_exit")
    assert [name for name in server_names if not hasattr(server, name)] == []
    assert "servers" in uvicorn.Server.startup.__code__.co_names
    assert issubclass(DrainingServer, uvicorn.Server)
    assert [
        name for name in ("timeout_graceful_shutdown", "http_protocol_class", "ssl") if not hasattr(config, name)
    ] == []


def test_a_fast_call_stands_in_for_a_request_of_uvicorn() -> None:
    assert [name for name in REQUEST_ATTRIBUTES if not hasattr(fast_lane.FastCall, name)] == []


def test_the_version_is_bounded() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    (bound,) = [text for text in extras["serve"] if text.startswith("uvicorn")]
    low, high = (tuple(map(int, found.split("."))) for found in re.findall(r"[\d.]+", bound))
    assert low <= tuple(map(int, uvicorn.__version__.split(".")[:2])) < high


@pytest.mark.parametrize(
    ("kind", "name"), [("HttpToolsProtocol", "send_400_response"), ("HttpToolsProtocol", "on_header")]
)
def test_a_missing_method_is_found(monkeypatch: pytest.MonkeyPatch, kind: str, name: str) -> None:
    monkeypatch.delattr(getattr(httptools_impl, kind), name)
    assert missing_part() == f"{kind}.{name}"


def test_a_missing_attribute_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uvicorn_adapter, "REQUEST_ATTRIBUTES", (*REQUEST_ATTRIBUTES, "renamed"))
    assert missing_part() == "RequestResponseCycle.renamed"


#: bnexport with a uvicorn that has another name for a private method.
BROKEN = """
import sys
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
HttpToolsProtocol.renamed = HttpToolsProtocol.send_400_response
del HttpToolsProtocol.send_400_response
from bnexport.cli.main import main
main()
"""


def test_with_a_part_missing_the_plain_application_serves(tmp_path: Path) -> None:
    models = tmp_path / "models"
    write_bundle(models / "bn_lenet" / "1")
    image = np.random.default_rng(0).normal(size=(2, 1, 28, 28)).astype(np.float32)
    body, headers = binary(image, parameters={"binary_data_output": True})
    with serving(models, tmp_path / "plain.log", program=(sys.executable, "-c", BROKEN)) as server:
        plain = logits_of(server.ask("POST", "/v2/models/bn_lenet/infer", body, headers))
        assert server.ask("GET", "/v2/models/unknown").status == 404
        assert server.stop() == 0
        logged = [event for event in server.events() if event.get("event") == "plain connections"]
    assert [event["reason"] for event in logged] == [
        f"uvicorn {uvicorn.__version__} has no HttpToolsProtocol.send_400_response, so the fast lane and the limits on "
        "headers are off"
    ]
    with serving(models, tmp_path / "fast.log") as server:
        fast = logits_of(server.ask("POST", "/v2/models/bn_lenet/infer", body, headers))
        assert [event for event in server.events() if event.get("event") == "plain connections"] == []
    np.testing.assert_array_equal(plain, fast)
