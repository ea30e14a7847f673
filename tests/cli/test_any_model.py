"""Any network through the command line: by name, with many inputs and outputs, in any size; and one sentence where it can't."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from cases import randomise

import bnexport
from bnexport.bundle import MODEL_ONNX, MODEL_TORCHSCRIPT
from bnexport.cli.main import run
from bnexport.loading.sources import load_source

Run = Callable[..., tuple[int, str, str]]

MODELS = """
import ctypes
from dataclasses import dataclass
from typing import NamedTuple, Optional

import numpy as np
import torch
from torch import nn

torch.manual_seed(0)

class Base(nn.Module):
    def __init__(self, width=4, name="x"):
        super().__init__()
        self.conv, self.bn, self.items = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), []
        self.bn.running_mean.copy_(torch.linspace(-1, 1, width))
        self.bn.running_var.copy_(torch.linspace(0.1, 9, width))
        nn.init.normal_(self.bn.weight)
    def feat(self, x):
        return self.bn(self.conv(x)).mean((2, 3))

class TwoInputs(Base):
    def forward(self, image, side):
        return torch.relu(self.feat(image)) + side

class Prints(Base):
    def forward(self, x):
        print("the sum is", x.sum())
        return self.feat(x)

@dataclass
class Result:
    scores: torch.Tensor
    maps: list
    loss: Optional[torch.Tensor] = None

class Data(Base):
    def forward(self, x):
        y = self.bn(self.conv(x))
        return Result(y.mean((2, 3)), [y, y.relu()])

class Named(NamedTuple):
    mean: torch.Tensor
    relu: torch.Tensor

class Tuple(Base):
    def forward(self, x):
        y = self.feat(x)
        return Named(y, torch.relu(y))

class DataIf(Base):
    def forward(self, x):
        y = self.feat(x)
        if y.sum() > 0:  # here
            y = y * 2
        return y

class Numpy(Base):
    def forward(self, x):
        y = self.feat(x)
        return torch.from_numpy(np.tanh(y.numpy()))  # here

class Item(Base):
    def forward(self, x):
        y = self.feat(x)
        for _ in range(int(y.abs().max().item())):  # here
            y = y + 1
        return y

class Library(Base):
    def forward(self, x):
        y = self.feat(x)
        ctypes.memmove(y.data_ptr(), x.data_ptr(), 4)  # here
        return y

class Odd:
    def __init__(self, y):
        self.y = y

class OddOutput(Base):
    def forward(self, x):  # here
        return Odd(self.feat(x))

class Remembers(Base):
    def forward(self, x):  # here
        self.items.append(1)
        return self.feat(x) + len(self.items)

class OneBatch(Base):
    def forward(self, x):
        return self.feat(x).reshape(2, 4)  # here

class Raises(Base):
    def forward(self, x):
        raise ValueError("only on Tuesdays")  # here

class Values(Base):
    def forward(self, x):
        y = self.feat(x)
        assert (y < 1e9).all()  # here
        return y

class Sparse(Base):
    def forward(self, x):
        return self.feat(x).to_sparse()  # here

@torch.library.custom_op("bnexport_test::sin", mutates_args=())
def sin(x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.sin(x.numpy()))

class Custom(Base):
    def forward(self, x):
        return sin(self.feat(x))  # here

class Keyword(Base):
    def forward(self, *, x):  # here
        return self.feat(x)

class Flat(Base):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4 * 64, 3)
    def forward(self, x):
        return self.fc(self.bn(self.conv(x)).flatten(1))  # here

class Text(Base):
    def forward(self, x):
        return self.feat(x), "done"

class Squeezes(Base):
    def forward(self, x):
        y = nn.functional.adaptive_avg_pool2d(self.bn(self.conv(x)), 1)
        return y.squeeze()  # here

class Masked(Base):
    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.full((64, 64), float("-inf")).triu(1))
        self.table = nn.Parameter(torch.zeros(64, 64))
        self.table.data[5, 3] = float("-inf")
    def train(self, mode=True):
        super().train(mode)
        self.bn.eval()
    def forward(self, x):
        y = self.bn(self.conv(x)).flatten(2).transpose(1, 2)
        return (torch.softmax(y @ y.transpose(1, 2) + self.mask + self.table, -1) @ y).mean(1)

class Branches(Base):
    def forward(self, x):
        if x.shape[2] % 2:
            x = nn.functional.pad(x, (0, 0, 0, 1))
        return self.bn(self.conv(x))
"""


@pytest.fixture
def export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs fold-and-export in a separate folder: exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BNEXPORT_DATA", raising=False)
    Path("nets.py").write_text(MODELS)

    def invoke(*arguments: str) -> tuple[int, str, str]:
        code = run(["fold-and-export", "--out", "m/x/1", *arguments])
        shown = capfd.readouterr()
        assert "Traceback" not in shown.err
        return code, shown.out, shown.err.strip()

    return invoke


def weights(source: str, **options: object) -> str:
    """A state dict with random statistics, in a file of the current folder."""
    torch.manual_seed(0)
    module = randomise(load_source(source, options=options).module)
    for parameter in module.parameters():  # equal tensors, such as biases of zeros, would hide a mix-up
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    torch.save(module.state_dict(), "weights.pt")
    return "weights.pt"


def bundle() -> bnexport.Bundle:
    return bnexport.Bundle.open("m/x/1")


def shapes(kind: str = "outputs") -> dict[str, tuple[int | str, ...]]:
    return {spec.name: spec.shape for spec in getattr(bundle().manifest.signature, kind)}


def in_both_files(*inputs: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Outputs of ONNX Runtime and TorchScript, side by side."""
    session = onnxruntime.InferenceSession(bundle().file(MODEL_ONNX), providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_inputs()]
    scripted = torch.jit.load(bundle().file(MODEL_TORCHSCRIPT))(*map(torch.from_numpy, inputs))
    scripted = [scripted] if isinstance(scripted, torch.Tensor) else scripted
    there = session.run(None, dict(zip(names, inputs, strict=True)))
    return [(one, other.numpy()) for one, other in zip(there, scripted, strict=True)]


@pytest.mark.parametrize(
    ("size", "formats"), [(40, ("--format", "onnx")), pytest.param(64, (), marks=pytest.mark.slow)], ids=["onnx", "all"]
)
def test_torchvision_classifier_is_exported_and_rebuilt(
    export: Run, capfd: pytest.CaptureFixture[str], size: int, formats: tuple[str, ...]
) -> None:
    given = ("--weights", weights("torchvision:resnet18", num_classes=10), "--model-option", "num_classes=10")
    code, out, err = export("torchvision:resnet18", *given, "--input", f"3x{size}x{size}", *formats)
    assert code == 0, out + err
    manifest = bundle().manifest
    assert manifest.network == {"source": "torchvision:resnet18", "options": {"num_classes": 10}}
    assert manifest.preprocessing is not None
    assert (manifest.preprocessing["height"], manifest.preprocessing["mean"]) == (size, [0.485, 0.456, 0.406])
    assert shapes() == {"logits": ("batch", 10)}
    assert run(["verify", "m/x/1", "--runtime", "onnxruntime-cpu"]) == 0  # by itself, from the unfolded weights
    assert "torchvision:resnet18 rebuilt from weights.safetensors" in " ".join(capfd.readouterr().out.split())


@pytest.mark.slow
def test_segmentation_in_any_size(export: Run) -> None:
    source = "torchvision:lraspp_mobilenet_v3_large"
    given = ("--weights", weights(source, num_classes=3), "--model-option", "num_classes=3")
    code, out, err = export(source, *given, "--input", "3x32x48", "--dynamic-size")
    assert code == 0, out + err
    assert shapes("inputs") == {"input": ("batch", 3, "height", "width")}
    assert shapes() == {"out": ("batch", 3, "height", "width")}
    assert "dims: [ 3, -1, -1 ]" in Path("m/x/config.pbtxt").read_text()
    cases = {row["case"] for row in bundle().manifest.verification["rows"]}
    assert "noise 39x61" in cases
    image = np.random.default_rng(0).standard_normal((1, 3, 70, 41), dtype=np.float32)
    original = load_source(source, weights=Path("weights.pt"), options={"num_classes": 3}).module.double()
    with torch.no_grad():
        want = original(torch.from_numpy(image).double())["out"].numpy()
    for have in in_both_files(image)[0]:
        assert have.shape == (1, 3, 70, 41)
        np.testing.assert_allclose(have, want, atol=1e-4 * np.abs(want).max())


@pytest.mark.slow
def test_timm(export: Run, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = export(
        "timm:repvgg_a0", "--weights", weights("timm:repvgg_a0"), "--input", "3x32x32", "--format", "onnx"
    )
    assert code == 0, out + err
    monkeypatch.setattr("bnexport.loading.zoo.installed", lambda _name: False)
    assert run(["verify", "m/x/1"]) == 0  # without timm: by the golden vectors, which the output states
    shown = " ".join(capfd.readouterr().out.split())
    assert "the bundle's golden vectors, not the original network, timm:repvgg_a0" in shown
    assert "pip install 'bnexport[timm]'" in shown


def test_two_inputs_and_factory_options(export: Run, capfd: pytest.CaptureFixture[str]) -> None:
    inputs = ("--input", "image=3x8x8", "--input", "side=6", "--model-option", "width=6", "--format", "onnx")
    assert export("nets.py:TwoInputs", *inputs)[0] == 0
    assert shapes("inputs") == {"image": ("batch", 3, 8, 8), "side": ("batch", 6)}
    assert run(["verify", "m/x/1", "--source", "nets.py:TwoInputs", "--runtime", "onnxruntime-cpu"]) == 0
    assert "the original module, in float64" in capfd.readouterr().out


def test_dataclass_in_any_size(export: Run) -> None:
    code, out, err = export("nets.py:Data", "--input", "3x8x8", "--dynamic-size")
    assert code == 0, out + err
    image = ("batch", 4, "height", "width")
    assert shapes() == {"scores": ("batch", 4), "maps.0": image, "maps.1": image}
    for one, other in in_both_files(np.random.default_rng(0).standard_normal((3, 3, 11, 5), dtype=np.float32)):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_named_tuple(export: Run) -> None:
    assert export("nets.py:Tuple", "--input", "3x8x8", "--format", "onnx")[0] == 0
    assert list(shapes()) == ["mean", "relu"]  # "relu" is the name of a value inside the file, too


def test_prints_of_a_network_are_not_in_the_json(export: Run) -> None:
    code, out, err = export("nets.py:Prints", "--input", "3x8x8", "--json", "--format", "onnx")
    assert code == 0
    assert json.loads(out)
    assert "the sum is" in err


def test_masks_and_train_that_returns_nothing(export: Run) -> None:
    code, _, err = export("nets.py:Masked", "--input", "3x8x8")
    assert code == 2
    assert "table holds infinity (at [5, 3])" in err
    assert "--allow-nonfinite table" in err
    code, out, err = export("nets.py:Masked", "--input", "3x8x8", "--allow-nonfinite", "table")
    assert code == 0, out + err
    assert [row["outcome"] for row in bundle().manifest.fold["rows"]] == ["backward"]
    for one, other in in_both_files(np.random.default_rng(0).standard_normal((3, 3, 8, 8), dtype=np.float32)):
        np.testing.assert_allclose(one, other, atol=1e-4)
    assert run(["verify", "m/x/1", "--source", "nets.py:Masked", "--runtime", "onnxruntime-cpu"]) == 0


def line_of(name: str) -> int:
    lines = MODELS.split("\n")
    start = next(at for at, line in enumerate(lines) if line.startswith(f"class {name}("))
    return next(at for at, line in enumerate(lines) if at > start and line.endswith("# here")) + 1


REFUSED = {
    "DataIf": "needs the value of a tensor",
    "Numpy": "becomes a numpy array",
    "Item": "needs the value of a tensor",
    "Values": "needs the value of a tensor",
    "Library": "handed to code that is not torch's",
    "OddOutput": "an object whose tensors can't be seen",
    "Remembers": "it keeps items between calls",
    "OneBatch": "takes a batch of 2, but fails on a batch of 1",
    "Squeezes": "drops a batch of 1",
    "Raises": "only on Tuesdays",
    "Sparse": "does not support the operator",
    "Custom": "does not declare its output shape",
    "Keyword": "does not take 1 inputs",
}


@pytest.mark.parametrize("name", REFUSED)
def test_code_that_can_not_be_traced_gets_one_sentence_and_its_line(export: Run, name: str) -> None:
    code, _, err = export(f"nets.py:{name}", "--input", "3x8x8")
    assert code == 2, err
    first, second = err.splitlines()
    assert REFUSED[name] in first
    assert f"{name}" in first
    assert f"nets.py:{line_of(name)}" in first
    assert len(first) < 400
    assert len(second) < 200
    assert not Path("m").exists()


REFUSALS = [
    (("nets.py:TwoInputs", "--input", "3x8x8"), "does not take 1 inputs"),
    (("nets.py:Tuple", "--input", "3x8x8", "--input", "4"), "does not take 2 inputs"),
    (("nets.py:Tuple", "--input", "5x8x8"), "fails on an example input of shape 2x5x8x8"),
    (("nets.py:Flat", "--input", "3x9x9"), f"nets.py:{line_of('Flat')}: mat1 and mat2"),
    (("nets.py:Flat", "--input", "3x8x8", "--dynamic-size"), "the height of the input of Flat is pinned to 8"),
    (("nets.py:Text", "--input", "3x8x8"), "'output_1' is a str"),
    (("nets.py:Tuple", "--input", "3x8x8", "--model-option", "depth=4"), "unexpected keyword argument 'depth'"),
    (("nets.py:Tuple", "--input", "3x8x8", "--model-option", "depth"), "not of the form KEY=VALUE"),
    (("nets.py:Tuple", "--input", "3x8x8", "--model-option", "a=1", "--model-option", "a=1"), "given twice"),
    (("torchvision:resnet81", "--allow-untrained"), "no model 'resnet81'"),
    (("torchvision:resnet18",), "torchvision:resnet18 has random weights"),
    (("torchvision:resnet18", "--model-option", "colour=4"), "takes no option 'colour'"),
    (("torchvision:fasterrcnn_resnet50_fpn", "--allow-untrained"), "takes a list of images"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "part"), REFUSALS)
def test_other_refusals(export: Run, arguments: tuple[str, ...], part: str) -> None:
    code, _, err = export(*arguments)
    assert code == 2
    assert part in err
    assert len(err.splitlines()) == 2
    assert not Path("m").exists()


def test_a_path_that_depends_on_the_size_is_refused(export: Run) -> None:
    code, _, err = export("nets.py:Branches", "--input", "3x8x8", "--dynamic-size")
    assert code == 2
    assert "forward of Branches takes another branch at nets.py:" in err
    assert not Path("m").exists()


def test_a_path_that_depends_on_the_size_fails_the_verdict(export: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the refusal, torch.export takes the branch of the example; at an odd height the original takes the other."""
    monkeypatch.setattr("bnexport.folding.torch_backend.trace.refuse_forks", lambda *_: None)
    code, out, _ = export("nets.py:Branches", "--input", "3x8x8", "--dynamic-size", "--format", "onnx")
    assert code == 1
    assert "noise 15x21" in out
    assert not Path("m/x/1").exists()


def test_without_timm_its_extra_is_named(export: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    code, _, err = export("timm:repvgg_a0", "--allow-untrained")
    assert code == 3
    assert "pip install 'bnexport[timm]'" in err
