"""docs/serving.md and serving_reference.md match the code: the blocks of the guide run, the tables are those of the code."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from PIL import Image
from support.serving import ROOT, Server

from bnexport.cli.main import run
from bnexport.cli.serve import command
from bnexport.serving.grpc.grpc_server import METHODS, STREAM, WATCH
from bnexport.serving.grpc.inference import CODES
from bnexport.serving.http.app import ROUTES
from bnexport.serving.serving_limits import rows

GUIDE, REFERENCE = (
    (ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("serving.md", "serving_reference.md")
)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", GUIDE, re.DOTALL | re.MULTILINE)


def table(first: str) -> list[list[str]]:
    lines = REFERENCE[REFERENCE.index(f"| {first} |") :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]


def write_pictures(pixels: np.ndarray, folder: Path) -> None:
    for name, image in (("shoe", pixels[0]), ("shirt", pixels[1])):
        Image.fromarray(image).save(folder / f"{name}.png")


def test_the_shell_blocks_run(server: Server, pixels: np.ndarray, tmp_path: Path) -> None:
    write_pictures(pixels, tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").symlink_to(sys.executable)
    environ = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    outputs = []
    for block in blocks("sh"):
        script = "set -e\n" + block.replace("localhost:8000", f"127.0.0.1:{server.port}")
        words = ["bash", "-c", script]
        done = subprocess.run(
            words, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=240, check=False
        )
        assert done.returncode == 0, (block, done.stdout, done.stderr)
        outputs.append(done.stdout)
    assert '"ready":true' in outputs[0]
    assert outputs[1].count('"probability"') == 3
    assert '"model_name":"bn_lenet"' in outputs[2]


@pytest.mark.slow
def test_the_python_blocks_run(python: Path, server: Server, tmp_path: Path) -> None:
    sources = [source for source in blocks("python") if "localhost" in source]
    assert [port in source for source, port in zip(sources, ("8000", "8001"), strict=True)] == [True, True]
    for source in sources:
        here = source.replace("localhost:8000", f"127.0.0.1:{server.port}")
        here = here.replace("localhost:8001", f"127.0.0.1:{server.grpc_port}")
        words = [str(python), "-c", here]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stderr
        assert len(re.findall(r"b'[-\d.]+:\d:\d'", done.stdout)) == 3


def test_the_python_block_without_a_server_runs(pixels: np.ndarray, tmp_path: Path) -> None:
    write_pictures(pixels, tmp_path)
    (tmp_path / "models").symlink_to(ROOT / "models")
    (source,) = (source for source in blocks("python") if "localhost" not in source)
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", source]
    done = subprocess.run(words, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["shoe.png", "shirt.png", "(5,"]


def test_the_deploy_lines_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").symlink_to(ROOT / "models")
    monkeypatch.chdir(tmp_path)
    lines = [line[2:] for block in blocks("console") for line in block.splitlines() if line.startswith("$ ")]
    deploys = [shlex.split(line)[1:] for line in lines if line.startswith("bnexport deploy")]
    assert [words[1] for words in deploys] == ["triton", "kserve"]
    assert [run(words) for words in deploys] == [0, 0]
    others = [line for line in lines if not line.startswith("bnexport deploy")]
    assert all(line.startswith("bnexport serve models/") for line in others), "test_lifecycle starts servers like these"


def test_routes_are_those_of_the_code() -> None:
    names = {"{name}": "NAME", "{version}": "V"}
    assert {row[0] for row in table("route")} == {
        f"{r.method} {re.sub(r'{name}|{version}', lambda m: names[m[0]], r.pattern) or '/'}" for r in ROUTES
    }


def test_methods_are_those_of_the_code() -> None:
    paths = [path.replace("grpc.health.v1.Health/", "Health/") for path in (*METHODS, STREAM, WATCH)]
    assert {row[0] for row in table("method")} == {
        path.removeprefix("/inference.GRPCInferenceService").strip("/") for path in paths
    }


@pytest.mark.parametrize("code", sorted({code.name for code in CODES.values()}))
def test_codes_are_documented(code: str) -> None:
    assert f"{code} " in REFERENCE.split("\n## gRPC")[1].split("\n## ")[0].replace("\n", " ")


def test_limits_are_those_of_the_code() -> None:
    found = [(name, value.replace(",", ""), what, why) for name, value, what, why in table("limit")]
    assert found == [
        (name, f"{value:g}" if isinstance(value, float) else str(value), what, why) for name, value, what, why in rows()
    ]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 408, 413, 415, 431, 503, 504])
def test_statuses_are_documented(status: int) -> None:
    assert f"{status} " in REFERENCE.split("## Errors and limits")[1].split("\n## ")[0]


def test_options_are_those_of_the_command() -> None:
    found = {name: default for name, default, _ in table("option")}
    options = {option.opts[0]: option for option in command.params if isinstance(option, click.Option)}
    assert found.keys() == options.keys()
    for name, option in options.items():
        default: Any = option.default
        if option.is_flag:
            default = "on" if default is True else "off"
        elif not isinstance(default, int | float | str):
            default = ""
        assert found[name] == (f"{default:g}" if isinstance(default, float) else str(default)), name


def test_metrics_are_those_of_the_server(server: Server) -> None:
    text = server.ask("GET", "/metrics").body.decode()
    types = dict(re.findall(r"^# TYPE (bnexport_\S+) (\S+)$", text, re.MULTILINE))
    found = {name: kind for name, kind, _ in table("metric")}
    assert found.pop("bnexport_process_starts_total") == "counter", "only several processes have it"
    assert found == types
