import json
from pathlib import Path

import pytest

from bnexport.auditing.tool_table import TOOLS
from bnexport.cli.main import run

NETWORKS = """
import torch
from torch import nn


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        print("chatter in forward")
        return self.bn(self.conv(x)).tanh() + self.conv(x).tanh()


def trained(network):
    torch.manual_seed(0)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
            layer.running_mean.normal_(), layer.running_var.uniform_(0.1, 3)
    return network.eval()


def plain():
    return trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))


def twice():
    return trained(Twice())


def broken():
    network = plain()
    network[0].weight.data.fill_(float("nan"))
    return network
"""
INPUT = ["--input", "3x8x8"]


@pytest.fixture
def networks(tmp_path: Path) -> str:
    (tmp_path / "networks.py").write_text(NETWORKS)
    return str(tmp_path / "networks.py")


def test_right_tools_are_exit_0(networks: str, capsys: pytest.CaptureFixture[str]) -> None:
    tools = ["--tool", "torch.jit.freeze", "--tool", "bnexport", "--tool", "onnxruntime-all"]
    assert run(["audit", f"{networks}:plain", *INPUT, *tools]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1] == "right: 3 tools"
    assert captured.err.split() == [
        word
        for name in ("torch.eager", "torch.jit.freeze", "onnxruntime-all", "bnexport")
        for word in ("running", name)
    ]


def test_a_wrong_tool_is_exit_1_and_named(networks: str, capsys: pytest.CaptureFixture[str]) -> None:
    # torch.fx folds the BatchNorm into both calls of the convolution (torch 2.11 to 2.15).
    assert run(["audit", f"{networks}:twice", *INPUT, "--tool", "torch.fx.fuse", "--tool", "torch.jit.freeze"]) == 1
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1] == "wrong: 1 of 2 tools: torch.fx.fuse"
    assert "first wrong at BatchNorm bn" in " ".join(captured.out.split())
    assert "chatter" not in captured.out


def test_json_is_alone_on_standard_output(networks: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["audit", f"{networks}:twice", *INPUT, "--tool", "torch.jit.freeze", "--seed", "5", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert [row["tool"] for row in value["tools"]] == ["torch.eager", "torch.jit.freeze"]
    assert (value["passed"], value["seed"]) == (True, 5)


def test_without_a_compiler_the_row_states_it(
    networks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run(["audit", f"{networks}:plain", *INPUT, "--tool", "torch.compile-freezing"]) == 0
    assert "not run: torch.compile-freezing: no C++ compiler" in " ".join(capsys.readouterr().out.split())


def test_bad_input_is_exit_2(networks: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["audit", f"{networks}:plain", *INPUT, "--tool", "torch"]) == 2
    printed = capsys.readouterr().err
    assert all(tool.name in printed for tool in TOOLS)
    for arguments, message in (
        ([f"{networks}:plain"], "the shape of the network's input is not known"),
        ([f"{networks}:plain", "--input", "4x8x8"], "the network can't run on a batch of 2"),
        ([f"{networks}:broken", *INPUT], "holds NaN"),
        (["nowhere.py:plain", *INPUT], "does not exist"),
    ):
        assert run(["audit", *arguments]) == 2
        printed = capsys.readouterr().err
        assert message in printed
        assert len(printed.splitlines()) == 2
