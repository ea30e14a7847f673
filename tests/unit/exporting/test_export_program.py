"""model.pt2: torch.export.load reads it without bnexport, and it computes the folded network bit for bit, on every case."""

import json
import math
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from cases import CASES, Case
from torch import Tensor, nn
from torch.nn import functional

import bnexport
from bnexport.errors import ExportError
from bnexport.exporting import signature as module_under_test
from bnexport.exporting.export_request import ExportRequest
from bnexport.exporting.formats import FORMATS, export_program
from bnexport.exporting.signature import ExportJob, signature_of
from bnexport.folding.torch_backend.trace import size_shapes
from bnexport.runtimes.torch_outputs import flatten
from bnexport.validation import validate_archive

#: A warning of torch 2.11 about its own buffers.
pytestmark = pytest.mark.filterwarnings("ignore:The given buffer is not writable")
#: torch.export can't trace it at all: its first dimension is not a batch.
BATCHED = tuple(case for case in CASES if case.name != "unbatched-conv1d")
#: Drawn anew in every call.
RANDOM = ("monte-carlo-dropout",)
CONV = next(case for case in CASES if case.name == "conv2d")


def write(case: Case, file: Path) -> torch.fx.GraphModule:
    inputs = case.inputs()
    folded = bnexport.fold(case.model(), inputs, max_growth=case.max_growth, clamps=case.clamps).model
    names = tuple(f"x{index}" for index in range(len(inputs)))
    export_program(ExportJob(folded, inputs, signature_of(folded, inputs, input_names=names)), file)
    return folded


def same(program: torch.nn.Module, folded: torch.nn.Module, inputs: tuple[Tensor, ...]) -> bool:
    torch.manual_seed(0)
    found = flatten(program(*inputs))
    torch.manual_seed(0)
    wanted = flatten(folded(*inputs))
    return len(found) == len(wanted) and all(map(torch.equal, found, wanted))


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.sampled(9)
@pytest.mark.parametrize("case", BATCHED, ids=lambda case: case.name)
def test_every_case_loads_and_agrees_bit_for_bit_in_every_batch_size(case: Case, tmp_path: Path) -> None:
    folded = write(case, file := tmp_path / "model.pt2")
    program = torch.export.load(str(file)).module()
    for batch in (2, 5) if case.name not in RANDOM else (2,):
        assert same(program, folded, case.inputs(batch=batch)), batch
    validate_archive(file, "pt2")
    assert not re.search(rb"/(home|root|tmp|work|Users)/|site-packages|\.py\b", file.read_bytes())


def test_nested_outputs_are_flat_and_in_order(tmp_path: Path) -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 6, 3)

        def forward(self, x: Tensor) -> dict[str, object]:
            y = self.conv(x)
            return {"z": y, "a": (y + 1, [y.mean((2, 3)), None])}

    inputs = (torch.randn(2, 3, 8, 8),)
    folded = bnexport.fold(Nested().eval(), inputs).model
    export_program(ExportJob(folded, inputs, signature_of(folded, inputs, input_names=("x",))), tmp_path / "m.pt2")
    found = torch.export.load(str(tmp_path / "m.pt2")).module()(*inputs)
    assert isinstance(found, tuple | list)
    assert [item.shape for item in found] == [(2, 6, 6, 6), (2, 6, 6, 6), (2, 6)]
    assert torch.equal(found[1], found[0] + 1)


def test_only_the_sizes_named_in_the_signature_vary(tmp_path: Path) -> None:
    model, inputs = CONV.model(), (torch.randn(2, 3, 16, 16),)
    folded = bnexport.fold(model, inputs, dynamic_shapes=size_shapes(model, inputs)).model
    signature = signature_of(folded, inputs, input_names=("x",), dynamic_size=True)
    assert signature.inputs[0].shape == ("batch", 3, "height", "width")
    export_program(ExportJob(folded, inputs, signature), tmp_path / "varies.pt2")
    other = (torch.randn(3, 3, 11, 19),)
    assert same(torch.export.load(str(tmp_path / "varies.pt2")).module(), folded, other)
    fixed = write(CONV, tmp_path / "fixed.pt2")
    assert fixed(*other).shape == (3, 6, 9, 17)
    with pytest.raises((AssertionError, RuntimeError)):
        torch.export.load(str(tmp_path / "fixed.pt2")).module()(*other)


class SamePadding(nn.Module):
    """Pads as TensorFlow does: a step of 2 gives half the size, rounded up."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        rows = max((math.ceil(height / 2) - 1) * 2 + 3 - height, 0)
        columns = max((math.ceil(width / 2) - 1) * 2 + 3 - width, 0)
        y = self.conv(functional.pad(x, [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2]))
        return y[:, :, : math.floor(height / 3)]


def test_rounded_quotients_of_sizes_are_written_and_exact(tmp_path: Path) -> None:
    """torch.export's file format does not support math.ceil."""
    model, inputs = SamePadding().eval(), (torch.randn(2, 3, 32, 32),)
    folded = bnexport.fold(model, inputs, dynamic_shapes=size_shapes(model, inputs)).model
    signature = signature_of(folded, inputs, input_names=("x",), dynamic_size=True)
    export_program(ExportJob(folded, inputs, signature), tmp_path / "m.pt2")
    program = torch.export.load(str(tmp_path / "m.pt2")).module()
    validate_archive(tmp_path / "m.pt2", "pt2")
    for height, width in ((32, 32), (33, 32), (35, 47), (40, 41)):
        x = torch.randn(3, 3, height, width)
        assert program(x).shape == (3, 6, height // 3, -(-width // 2))
        assert torch.equal(program(x), model(x))


def test_the_bytes_are_the_same_in_every_process(tmp_path: Path) -> None:
    write(CONV, tmp_path / "here.pt2")
    path = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
    code = f"import sys; sys.path[:0] = {path!r}; from test_export_program import *; write(CONV, Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "there.pt2")], check=True, capture_output=True)
    assert (tmp_path / "here.pt2").read_bytes() == (tmp_path / "there.pt2").read_bytes()


def test_nothing_is_unpickled_and_nothing_names_the_machine(tmp_path: Path) -> None:
    write(CONV, file := tmp_path / "model.pt2")
    with zipfile.ZipFile(file) as archive:
        names = {name.partition("/")[2]: name for name in archive.namelist()}
        assert archive.read(names["data/sample_inputs/model.pt"]) == b""
        model = json.loads(archive.read(names["models/model.json"]))
        config = json.loads(archive.read(names["data/weights/model_weights_config.json"]))
        assert {item.date_time[0] for item in archive.infolist()} == {1980}
    assert not [node for node in model["graph_module"]["graph"]["nodes"] if node["metadata"]]
    assert model["guards_code"] == []
    assert not any(entry["use_pickle"] for entry in config["config"].values())


def test_a_refusal_names_the_other_formats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no operator\nfor this")

    monkeypatch.setattr(module_under_test, "export_flat", broken)
    with pytest.raises(ExportError, match="can't write the folded graph: no operator for this") as caught:
        write(CONV, tmp_path / "model.pt2")
    assert "--format onnx --format torchscript" in caught.value.remedy
    assert list(tmp_path.iterdir()) == []


def test_all_formats_are_written_by_default() -> None:
    assert ExportRequest().formats == tuple(row.name for row in FORMATS)
