"""The page at / and its data, without a browser. tests/browser has the rest."""

import base64
import hashlib
import json
import re
from pathlib import Path

import pytest
from support.bundles import copy_bundle, reseal
from support.serving import Server, serving

from bnexport.bundle import REPORT, Bundle

REPORT_PATH = "/models/bn_lenet/versions/1/report"


def policy(headers: dict[str, str]) -> dict[str, list[str]]:
    parts = [part.split() for part in headers["content-security-policy"].split(";")]
    return {name: values for name, *values in parts}


def test_the_page_is_one_file_whose_policy_lets_nothing_else_in(server: Server) -> None:
    answer = server.ask("GET", "/")
    assert (answer.status, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
    found = policy(answer.headers)
    assert found["default-src"] == ["'none'"]
    assert found["connect-src"] == ["'self'"]
    for tag in ("script", "style"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>".encode(), answer.body, re.DOTALL)
        assert found[f"{tag}-src"] == [f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'"]
    outside = re.findall(
        rb'(?:src|href|url|action)\s*[=(]\s*["\']?(?!data:|#)[^"\'\s)]+', answer.body.split(b"<script>")[0]
    )
    assert outside == []
    assert server.ask("HEAD", "/").status == 200


def test_models_state_what_the_page_shows(server: Server) -> None:
    (model,) = server.ask("GET", "/models").json["models"]
    assert model == {
        "name": "bn_lenet",
        "version": "1",
        "state": "READY",
        "reason": "",
        "newest": True,
        "inputs": [{"name": "input", "datatype": "FP32", "shape": [-1, 1, 28, 28], "smallest": [1, 1, 28, 28]}],
        "outputs": [{"name": "logits", "datatype": "FP32", "shape": [-1, 10]}],
        "labels": list("0123456789"),
        "image": {"channels": 1, "height": 28, "width": 28},
        "verdict": None,
        "report": False,
    }
    answer = server.ask("GET", REPORT_PATH)
    assert (answer.status, "has no report" in answer.error) == (404, True)


@pytest.mark.parametrize(
    ("state", "want"),
    [
        ({"passed": True, "summary": "PASS: 3 rows"}, {"passed": True, "summary": "PASS: 3 rows"}),
        ({"passed": "yes", "summary": ["x"] * 1000}, {"passed": False, "summary": str(["x"] * 1000)[:500]}),
        ({}, None),
    ],
)
def test_verdicts_and_reports_of_bundles(models: Path, tmp_path: Path, state: dict[str, object], want: object) -> None:
    folder = tmp_path / "m" / "bn_lenet"
    for version in ("1", "2"):
        copy = copy_bundle(Bundle.open(models / "bn_lenet" / "1"), folder / version)
        (copy / REPORT).write_text("<script>alert(1)</script><p>all well")
        reseal(copy, verification=state)
    (folder / "2" / "model.onnx").write_bytes(b"spoiled")
    with serving(tmp_path / "m", tmp_path / "log") as server:
        good, bad = server.ask("GET", "/models").json["models"]
        assert (good["verdict"], good["report"], good["newest"]) == (want, True, True)
        assert (bad["state"], bad["inputs"], bad["report"]) == ("UNAVAILABLE", [], False)
        assert "model.onnx has 7 bytes" in bad["reason"]
        answer = server.ask("GET", REPORT_PATH)
        assert (answer.status, answer.body) == (200, b"<script>alert(1)</script><p>all well")
        found = policy(answer.headers)
        assert found["sandbox"] == []
        assert "script-src" not in found
        assert found["default-src"] == ["'none'"]
        assert server.ask("GET", "/models/bn_lenet/versions/2/report").status == 503
        (folder / "1" / REPORT).write_text("<p>all very well, and not what was sealed")
        answer = server.ask("GET", REPORT_PATH)
        assert (answer.status, "was changed" in answer.error) == (503, True)
        (folder / "1" / REPORT).unlink()
        assert server.ask("GET", REPORT_PATH).status == 503


def test_the_token_guards_models_and_reports_but_not_the_page(models: Path, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(token := "correct-horse-battery-staple")
    with serving(models, tmp_path / "log", "--token-file", str(tmp_path / "token")) as server:
        assert server.ask("GET", "/").status == 200
        for path in ("/models", REPORT_PATH):
            assert server.ask("GET", path).status == 401
        named = {"authorization": f"Bearer {token}"}
        assert json.loads(server.ask("GET", "/models", None, named).body)["models"][0]["name"] == "bn_lenet"
