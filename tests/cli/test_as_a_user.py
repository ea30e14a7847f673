"""Mistakes of a new user with their own networks: one clear sentence, the right exit code, nothing left behind."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bnexport.bundle import Bundle, seal
from bnexport.cli.main import run

NETWORKS = """
import sys
import torch
from torch import nn

print("chatter on import")


def trained(kind):
    torch.manual_seed(0)
    network = kind()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
            layer.running_mean.normal_(), layer.running_var.uniform_(0.1, 3)
    return network.eval()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.conv(x)).mean((2, 3))


class Pixels(Net):
    def forward(self, x):
        return super().forward(x.float() / 255)


class Through(nn.Module):
    def forward(self, x):
        return x, 2 * x


class Control(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Overflow(Net):
    def forward(self, x):
        return super().forward(x).exp().exp().exp()


class Pool(Net):
    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return super().forward(x)


def net():
    print("chatter in the factory")
    return trained(Net)


def pixels():
    return trained(Pixels)


def through():
    return Through()


def control():
    return Control()


def overflow():
    network = trained(Overflow)
    network.bn.weight.data.mul_(5)
    return network


def region():
    return trained(Pool)


def in_training():
    network = trained(Net)
    network.bn.train()
    return network
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "nets.py").write_text(NETWORKS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def export(network: str, *options: str, shape: str = "3x8x8") -> int:
    return run(["fold-and-export", f"nets.py:{network}", "--input", shape, "--out", f"models/{network}/1", *options])


def test_prints_of_a_factory_do_not_break_the_json(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export("net", "--json", "--format", "onnx") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["verification"]["passed"] is True
    assert "chatter in the factory" in captured.err


def test_pixels_cast_in_forward_can_be_exported(here: Path) -> None:
    assert export("pixels", shape="3x8x8:uint8") == 0


def test_an_input_as_an_output(here: Path) -> None:
    assert export("through", shape="5") == 0


def test_a_batch_norm_in_a_region_is_kept_in_the_file(here: Path) -> None:
    assert export("region", "--format", "onnx") == 0
    assert Bundle.open("models/region/1").manifest.fold["remaining"] == 1


@pytest.mark.parametrize(
    ("network", "options", "sentence"),
    [
        ("net", ("--labels", "labels.txt"), "2 labels, but the network returns 4 scores"),
        ("net", ("--input", "4"), "does not take 2 inputs"),
        ("in_training", (), "bn is a BatchNorm2d in training mode"),
        ("control", (), "can't trace Control at nets.py:"),
    ],
)
def test_refusals(
    here: Path, capfd: pytest.CaptureFixture[str], network: str, options: tuple[str, ...], sentence: str
) -> None:
    (here / "labels.txt").write_text("a\nb\n")
    assert export(network, *options) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("chatter")]
    assert len(lines) == 2, lines  # the fault and the remedy; torch's own dump of the graph would be more
    assert sentence in lines[0]
    assert not (here / "models").exists()


@pytest.mark.parametrize(
    ("shape", "sentence"), [("logits=3x8x8", "names an input and an output"), ("3x99999x99999999", "example input")]
)
def test_inputs_that_can_not_be(here: Path, capfd: pytest.CaptureFixture[str], shape: str, sentence: str) -> None:
    assert export("net", shape=shape) == 2
    assert sentence in capfd.readouterr().err


def test_a_failed_verdict_leaves_no_folder_and_no_flood(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert export("overflow") == 1
    captured = capfd.readouterr()
    assert captured.out.count("\nFAIL ") <= 10
    assert "more failed comparisons: --json lists them" in captured.out
    assert "Warning" not in captured.err
    assert not (here / "models").exists()


@pytest.mark.parametrize(
    ("source", "sentence"),
    [("nets.py", "nets.py does not name a factory"), (":", "':' does not exist"), ("nets:", "nets: does not exist")],
)
def test_sources_without_a_factory(here: Path, capfd: pytest.CaptureFixture[str], source: str, sentence: str) -> None:
    assert run(["fold-and-export", source, "--input", "3x8x8", "--out", "models/x/1"]) == 2
    assert sentence in capfd.readouterr().err


def test_sentences_end_once(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["fold-and-export", "nets.py:net", "--input", "3", "--out", "models/a b/1"]) == 2
    assert "a version from 1 upwards.\n" in capfd.readouterr().err
    (here / "models" / "m" / "1").mkdir(parents=True)
    (here / "models" / "m" / "1" / "manifest.json").write_text("{}")
    assert run(["predict", "models/m", "nets.py"]) == 2
    assert capfd.readouterr().err.endswith("Did you mean models/m/1?\n")


@pytest.mark.skipif(sys.platform == "win32", reason="pipes of a POSIX shell")
@pytest.mark.parametrize("options", [(), pytest.param(("--json", "-"), marks=pytest.mark.slow)])
def test_the_verdict_outlives_the_reader(here: Path, options: tuple[str, ...]) -> None:
    """``verify | head`` must not turn PASS into 1, nor FAIL into 0."""
    assert export("net", "--format", "onnx") == 0
    bundle = Bundle.open("models/net/1")
    command = [sys.executable, "-m", "bnexport", "verify", "models/net/1", "--runtime", "onnxruntime-cpu", *options]
    assert _without_reader(command) == 0
    (bundle.path / "unlisted").write_text("x")
    assert _without_reader(command) == 1
    (bundle.path / "unlisted").unlink()
    seal(bundle.path, bundle.manifest)


def _without_reader(command: list[str]) -> int:
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        process.stdout.close()
        return process.wait(timeout=120)


@pytest.mark.skipif(not Path("/dev/stdout").exists(), reason="needs /dev/stdout")
def test_a_result_for_the_standard_output_follows_the_table(tmp_path: Path) -> None:
    """A new file in place of the one behind the device would lose the table."""
    command = "from bnexport.cli.output import write_json; print('table'); write_json('/dev/stdout', {'a': 1})"
    with (tmp_path / "out").open("w") as out:
        subprocess.run([sys.executable, "-c", command], stdout=out, check=True)
    assert (tmp_path / "out").read_text().splitlines() == ["table", "{", ' "a": 1', "}"]


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs /dev/full")
def test_standard_output_on_a_full_disk(here: Path) -> None:
    assert export("net", "--format", "onnx") == 0
    command = [sys.executable, "-m", "bnexport", "inspect", "models/net/1"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert "No space left" in done.stderr
    assert "fault in bnexport" not in done.stderr
