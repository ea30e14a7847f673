"""Models and versions come, change and go, and a version that was not verified is never served."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.bundles import another, copy_bundle, flip_bit, fold_by_hand, network, reseal, write_onnx
from support.serving import Server, logits_of, serving, tensor, until
from support.serving_clients import Clients

from bnexport.bundle import MODEL_ONNX, Bundle


def spoil(folder: Path, how: str) -> None:
    if how == "hash":
        flip_bit(folder / MODEL_ONNX)
    else:  # a fault whose hashes hold: a shift is visible, while a dropped eps of one BatchNorm would not be
        state = fold_by_hand(network())
        state["conv1.bias"] = state["conv1.bias"] + 1e-3
        write_onnx(folder / MODEL_ONNX, state)
        reseal(folder)


@pytest.mark.parametrize("how", ["hash", "golden"])
def test_a_bundle_that_differs_from_the_verified_one_is_not_ready(
    models: Path, tmp_path: Path, images: np.ndarray, how: str
) -> None:
    spoil(another(models, tmp_path / "m" / "bn_lenet" / "1", 1), how)
    reason = {"hash": "model.onnx was changed", "golden": "of scale on the golden vectors"}[how]
    with serving(tmp_path / "m", tmp_path / "log") as server:
        for path in ("/v2/health/ready", "/v2/models/bn_lenet/ready", "/v2/models/bn_lenet/versions/1/ready"):
            answer = server.ask("GET", path)
            assert (answer.status, answer.json["ready"]) == (503, False)
            assert reason in answer.json["reason"]
        assert server.ask("GET", "/v2/health/live").status == 200
        refused = server.infer({"inputs": [tensor(images)]})
        assert (refused.status, reason in refused.error, refused.headers["retry-after"]) == (503, True, "1")
        (index,) = server.ask("POST", "/v2/repository/index").json
        assert (index["state"], reason in index["reason"]) == ("UNAVAILABLE", True)
        assert [reason in event["reason"] for event in server.events() if event["event"] == "model not loaded"] == [
            True
        ]


def test_the_newest_version_answers_unless_one_is_named(models: Path, tmp_path: Path, images: np.ndarray) -> None:
    for version, factor in ((1, 1.0), (2, 2.0), (10, 3.0)):
        another(models, tmp_path / "m" / "bn_lenet" / str(version), version, factor)
    with serving(tmp_path / "m", tmp_path / "log") as server:
        assert server.ask("GET", "/v2/models/bn_lenet").json["versions"] == ["1", "2", "10"]
        answer = server.infer({"inputs": [tensor(images)]})
        newest = logits_of(answer)
        assert answer.json["model_version"] == "10"
        for version, factor in ((1, 1.0), (2, 2.0), (10, 3.0)):
            named = server.infer({"inputs": [tensor(images)]}, f"/v2/models/bn_lenet/versions/{version}/infer")
            assert named.json["model_version"] == str(version)
            assert np.allclose(logits_of(named) * 3 / factor, newest, rtol=1e-4, atol=1e-4)


@pytest.fixture
def polled(models: Path, tmp_path: Path) -> Iterator[tuple[Server, Path]]:
    another(models, tmp_path / "m" / "bn_lenet" / "1", 1)
    with serving(tmp_path / "m", tmp_path / "log", "--poll", "0.2") as server:
        yield server, tmp_path / "m" / "bn_lenet"


def versions(server: Server) -> list[str]:
    return server.ask("GET", "/v2/models/bn_lenet").json["versions"]


def test_versions_come_change_and_go_without_a_lost_request(
    polled: tuple[Server, Path], models: Path, tmp_path: Path, images: np.ndarray, logits: np.ndarray
) -> None:
    server, folder = polled
    with Clients(server, images, logits) as clients:
        until(lambda: len(clients.answers) > 20)
        another(models, tmp_path / "new", 2, 2.0).rename(folder / "2")
        until(lambda: versions(server) == ["1", "2"])
        until(lambda: clients.answers[-1][0] == "2")
        another(models, tmp_path / "other", 2, 4.0)
        (folder / "2").rename(tmp_path / "old")
        (tmp_path / "other").rename(folder / "2")
        until(lambda: clients.answers[-1][1] > 3.9)
        shutil.rmtree(folder / "2")
        until(lambda: versions(server) == ["1"])
        count = len(clients.answers)
        until(lambda: len(clients.answers) > count + 20)
    assert clients.failures == []
    rounded = {(version, round(factor)) for version, factor in clients.answers}
    assert rounded == {("1", 1), ("2", 2), ("2", 4)}
    closing = [event["version"] for event in server.events() if event.get("event") == "model closing"]
    assert closing == ["2", "2"]


def test_a_bad_version_does_not_replace_a_good_one(
    polled: tuple[Server, Path], models: Path, tmp_path: Path, images: np.ndarray
) -> None:
    server, folder = polled
    bad = another(models, tmp_path / "bad", 2)
    spoil(bad, "golden")
    bad.rename(folder / "2")
    problems = until(lambda: server.ask("GET", "/v2/health/ready").json.get("problems"))
    assert "of scale on the golden vectors" in problems["bn_lenet/2"]
    assert server.infer({"inputs": [tensor(images)]}).json["model_version"] == "1"
    assert server.ask("GET", "/v2/models/bn_lenet/versions/2/ready").status == 503
    shutil.rmtree(folder / "2")
    another(models, tmp_path / "good", 2).rename(folder / "2")
    until(lambda: server.infer({"inputs": [tensor(images)]}).json["model_version"] == "2")
    assert server.ask("GET", "/v2/health/ready").json == {"ready": True}


def test_a_model_that_was_unloaded_does_not_take_the_others_out(models: Path, tmp_path: Path) -> None:
    """A balancer would send no more requests to the server. A model that can't be loaded differs."""
    for name in ("one", "other"):
        reseal(copy_bundle(Bundle.open(models / "bn_lenet" / "1"), tmp_path / "m" / name / "1"), name=name)
    with serving(tmp_path / "m", tmp_path / "log", "--allow-load") as server:
        assert server.ask("POST", "/v2/repository/models/one/unload", b"{}").status == 200
        ready = server.ask("GET", "/v2/health/ready")
        assert (ready.status, ready.json) == (200, {"ready": True, "problems": {"one/1": "unloaded"}})
        assert server.ask("GET", "/v2/models/one").error == "model 'one' is not ready: unloaded. Load it again"
        assert server.ask("POST", "/v2/repository/models/other/unload", b"{}").status == 200
        assert server.ask("GET", "/v2/health/ready").status == 503, "nothing answers any more"


def test_loading_by_request(models: Path, tmp_path: Path, images: np.ndarray) -> None:
    another(models, tmp_path / "m" / "bn_lenet" / "1", 1)
    with serving(tmp_path / "m", tmp_path / "log", "--allow-load") as server:
        unload = "/v2/repository/models/bn_lenet/unload"
        for origin in ("http://elsewhere.example", "null"):
            assert server.ask("POST", unload, b"{}", {"origin": origin}).status == 403
        assert server.infer({"inputs": [tensor(images)]}).status == 200
        assert server.ask("POST", unload, b"{}", {"origin": f"http://127.0.0.1:{server.port}"}).status == 200
        assert server.infer({"inputs": [tensor(images)]}).status == 503
        assert server.ask("GET", "/v2/health/ready").json["reason"] == "bn_lenet/1: unloaded"
        assert server.ask("POST", "/v2/repository/index", b'{"ready": true}').json == []
        assert server.ask("POST", "/v2/repository/index", b'{"ready": false}').json[0]["state"] == "UNAVAILABLE"
        for parameters in (b'{"config": "{}"}', b"0", b"[]"):
            other = server.ask("POST", "/v2/repository/models/bn_lenet/load", b'{"parameters": %s}' % parameters)
            assert (other.status, "without parameters" in other.error) == (400, True)
        assert server.ask("POST", "/v2/repository/models/bn_lenet/load", b"{}").status == 200
        assert server.infer({"inputs": [tensor(images)]}).status == 200
        spoil(tmp_path / "m" / "bn_lenet" / "1", "hash")
        answer = server.ask("POST", "/v2/repository/models/bn_lenet/load", b"{}")
        assert (answer.status, "was changed" in answer.error) == (400, True)
        assert server.infer({"inputs": [tensor(images)]}).status == 200, "the served version still answers"
        for what in ("load", "unload"):
            assert server.ask("POST", f"/v2/repository/models/unknown/{what}", b"{}").status == 404
