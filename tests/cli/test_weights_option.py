"""--weights and --weights-key on the command line: the choice is printed, refusals exit with 2 and one message."""

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from cases import randomise
from torch import nn

from bnexport.cli.main import run

NETWORK = """
from torch import nn
def build():
    features = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    return nn.Sequential(*features, nn.Linear(16, 10))
"""
EXPORT = ("fold-and-export", "net.py:build", "--input", "1x12x12", "--format", "onnx")


def state(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    space: dict[str, object] = {}
    exec(NETWORK, space)
    build = space["build"]
    assert callable(build)
    module: nn.Module = build()
    return dict(randomise(module, seed).state_dict())


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NETWORK)
    stored = {"epoch": 3, "best": np.float64(0.5), "state_dict": state(3), "state_dict_ema": state(4)}
    torch.save(stored, "last.pth.tar")
    torch.save({"generator": state(3), "discriminator": state(4)}, "gan.pth")


def test_the_choice_is_printed_and_a_key_changes_it(capfd: pytest.CaptureFixture[str]) -> None:
    assert run([*EXPORT, "--weights", "last.pth.tar", "--out", "models/a/1"]) == 0
    assert "state_dict was taken" in (shown := capfd.readouterr().out)
    assert "--weights-key takes state_dict_ema" in shown
    assert "state_dict was taken" in Path("models/a/1/report.html").read_text()
    for key, seed in (("state_dict", 3), ("state_dict_ema", 4)):
        assert run([*EXPORT, "--weights", "last.pth.tar", "--weights-key", key, "--out", f"models/{key}/1"]) == 0
        assert "was taken" not in capfd.readouterr().out
        written = safetensors.torch.load_file(f"models/{key}/1/weights.safetensors")
        assert all(torch.equal(value, written[name]) for name, value in state(seed).items())


def test_refusals_exit_with_2_and_list_what_was_found(capfd: pytest.CaptureFixture[str]) -> None:
    for words, part in (
        (("--weights", "last.pth.tar", "--weights-key", "ema"), "Found: state_dict (tensors: 9), state_dict_ema"),
        (("--weights", "gan.pth"), "Found: generator (tensors: 9), discriminator"),
        (("--weights-key", "ema"), "needs a weights file"),
    ):
        assert run([*EXPORT, *words, "--out", "models/a/1"]) == 2
        printed = capfd.readouterr().err
        assert part in printed
        assert len(printed.strip().splitlines()) == 2
        assert not Path("models").exists()


def test_audit_evaluate_and_recalibrate_take_the_key(capfd: pytest.CaptureFixture[str]) -> None:
    audit = ("audit", "net.py:build", "--weights", "last.pth.tar", "--input", "1x12x12", "--tool", "torch.jit.freeze")
    assert run(list(audit)) in (0, 1)
    assert "state_dict was taken" in capfd.readouterr().err
    assert run([*audit, "--weights-key", "state_dict_ema"]) in (0, 1)
    assert "was taken" not in capfd.readouterr().err
    common = ("last.pth.tar", "--source", "net.py:build", "--dataset", "digits")
    assert run(["evaluate", *common]) == 0
    assert "state_dict was taken" in capfd.readouterr().out
    assert run(["recalibrate", *common, "--samples", "64", "--weights-key", "state_dict_ema"]) == 0
    assert "was taken" not in capfd.readouterr().out
    assert run(["recalibrate", *common, "--samples", "64", "--force"]) == 0
    assert "state_dict was taken" in capfd.readouterr().out
    for command in (("evaluate",), ("recalibrate", "--force")):
        assert run([*command, "last.pth.tar"]) == 2
        assert "Name its code with --source" in capfd.readouterr().err
