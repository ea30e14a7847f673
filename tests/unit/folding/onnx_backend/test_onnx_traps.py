"""Files that are hostile, broken or odd, names that must stay, numbers that must not appear; the torch backend agrees."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torchvision
from cases import randomise
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnx.external_data_helper import convert_model_to_external_data
from onnx_table import CASES
from support.onnx_builder import Builder
from torch import nn

import bnexport
from bnexport.errors import ModelError, ProofError, UsageError
from bnexport.folding.fold import AMPLIFIES
from bnexport.folding.onnx_backend.onnx_constants import Shapes, node_evaluator
from bnexport.folding.onnx_backend.onnx_writer import OnnxWriter

_MODELS = {case.name: case for case in CASES}


def model(name: str = "conv") -> ModelProto:
    return _MODELS[name].model()


def stored(given: ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in given.graph.initializer}


def refusal(source: Any) -> str:
    with pytest.raises(ModelError) as caught:
        bnexport.fold_onnx(source)
    assert caught.value.remedy
    assert "\n" not in caught.value.message
    return caught.value.message


# --- names and numbers ------------------------------------------------------------------------------------------------


def test_weights_keep_their_names_and_statistics_do_not_travel_on():
    folded = bnexport.fold_onnx(model()).model
    assert set(stored(folded)) == {"conv.w", "conv.b"}
    assert [node.name for node in folded.graph.node] == ["conv", "sigmoid2"]


def test_a_bias_is_named_after_its_layer():
    assert set(stored(bnexport.fold_onnx(model("conv-no-bias")).model)) == {"conv.w", "conv_bias"}


def test_a_shared_weight_keeps_its_numbers_and_the_fold_gets_a_copy():
    before = model("shared-weight-copied")
    result = bnexport.fold_onnx(before, max_growth=2.0)
    assert result.report.growth > 1
    assert np.array_equal(stored(result.model)["w"], stored(before)["w"])
    assert [list(node.input)[1] for node in result.model.graph.node[:2]] == ["w_folded", "w"]


def test_a_weight_shared_by_equal_norms_is_folded_once():
    folded = bnexport.fold_onnx(model("shared-alike")).model
    assert {node.input[1] for node in folded.graph.node if node.op_type == "Conv"} == {"w"}


def test_the_producer_takes_over_an_output_name():
    folded = bnexport.fold_onnx(model("output-taken-over")).model
    assert folded.graph.output[0].name == "answer"
    assert folded.graph.node[-1].output[0] == "answer"


def test_initializers_listed_as_inputs_stay_so_before_ir_4():
    folded = bnexport.fold_onnx(model("opset-9-ir-3")).model
    assert [value.name for value in folded.graph.input] == ["x", "conv.w", "conv.b"]


def test_parts_outside_the_fold_stay_unchanged():
    before = model("gather-some-twice")
    before.metadata_props.add(key="author", value="A. Author")
    before.doc_string = "kept"
    result = bnexport.fold_onnx(before)
    assert not result.changed
    assert result.model == before
    other = model()
    other.metadata_props.add(key="author", value="A. Author")
    folded = bnexport.fold_onnx(other).model
    assert folded.metadata_props == other.metadata_props
    assert folded.producer_name == "test"


def test_subnormal_results_are_flushed():
    given = model()
    for tensor in given.graph.initializer:
        if tensor.name in ("bn.gamma", "bn.beta"):
            tensor.CopyFrom(numpy_helper.from_array(np.full(6, 1e-41, np.float32), tensor.name))
    numbers = stored(bnexport.fold_onnx(given).model)
    for name in ("conv.w", "conv.b"):
        size = np.abs(numbers[name])
        assert ((size == 0) | (size >= np.finfo(np.float32).tiny)).all()
        assert (size == 0).any()


def test_half_precision_files_keep_one_type():
    folded = bnexport.fold_onnx(model("half")).model
    assert {tensor.data_type for tensor in folded.graph.initializer} == {TensorProto.FLOAT16}


def test_bfloat16():
    given = model("opset-22")
    for tensor in given.graph.initializer:
        array = torch.from_numpy(numpy_helper.to_array(tensor).copy()).bfloat16()
        raw = array.view(torch.uint8).numpy().tobytes()
        tensor.CopyFrom(TensorProto(name=tensor.name, dims=tensor.dims, data_type=TensorProto.BFLOAT16, raw_data=raw))
    for value in (*given.graph.input, *given.graph.output):
        value.type.tensor_type.elem_type = TensorProto.BFLOAT16
    result = bnexport.fold_onnx(given)
    assert [row.outcome for row in result.report.rows] == ["backward"]
    assert {tensor.data_type for tensor in result.model.graph.initializer} == {TensorProto.BFLOAT16}
    assert result.report.error <= 1e-12


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_path_bytes_and_a_model_are_one(tmp_path: Path):
    file = tmp_path / "model.onnx"
    file.write_bytes(model().SerializeToString())
    results = [bnexport.fold_onnx(source).model for source in (file, str(file), file.read_bytes(), model())]
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize(
    ("content", "of_file", "of_bytes"),
    [
        (b"this is no model", "is not an ONNX model", "is not an ONNX model"),
        (b"", "is empty", "without nodes"),
        (ModelProto(ir_version=8).SerializeToString(), "without nodes", "without nodes"),
    ],
)
def test_broken_files_are_one_sentence(tmp_path: Path, content: bytes, of_file: str, of_bytes: str):
    file = tmp_path / "model.onnx"
    file.write_bytes(content)
    assert of_file in refusal(file)
    assert of_bytes in refusal(content)


def test_missing_files_and_folders(tmp_path: Path):
    assert "can't be read" in refusal(tmp_path / "none.onnx")
    assert "is a folder" in refusal(tmp_path)


def test_invalid_models():
    circular, old, negative = model(), model("opset-7"), model()
    circular.graph.node[0].input[0] = circular.graph.node[-1].output[0]
    assert "is not valid ONNX" in refusal(circular)
    old.opset_import[0].version = 6
    assert "operator set 6" in refusal(old)
    negative.graph.initializer[0].dims[0] = -6
    assert "is not valid ONNX" in refusal(negative)


def test_attributes_that_contradict_each_other_are_left_alone():
    given = model("gather-channels")
    node = next(node for node in given.graph.node if node.op_type == "Gather")
    node.attribute[0].i = 17
    result = bnexport.fold_onnx(given)
    assert [row.outcome for row in result.report.rows] == ["kept"]
    assert not result.changed


def test_growth_below_one():
    with pytest.raises(UsageError):
        bnexport.fold_onnx(model(), max_growth=0.5)


def external(folder: Path) -> ModelProto:
    given = model()
    convert_model_to_external_data(given, location="weights.bin", size_threshold=0)
    onnx.save(given, folder / "model.onnx")
    return onnx.load(folder / "model.onnx", load_external_data=False)


def test_external_data_next_to_the_file(tmp_path: Path):
    external(tmp_path)
    result = bnexport.fold_onnx(tmp_path / "model.onnx")
    assert [row.outcome for row in result.report.rows] == ["backward"]
    assert result.model == bnexport.fold_onnx(model()).model


@pytest.mark.parametrize("where", ["../weights.bin", "/etc/hostname", "link.bin"])
def test_external_data_elsewhere_is_not_read(tmp_path: Path, where: str):
    folder = tmp_path / "inner"
    folder.mkdir()
    given = external(folder)
    (folder / "weights.bin").rename(tmp_path / "weights.bin")
    (folder / "link.bin").symlink_to(tmp_path / "weights.bin")
    for tensor in given.graph.initializer:
        tensor.external_data[0].value = where
    (folder / "model.onnx").write_bytes(given.SerializeToString())
    assert "not inside its folder" in refusal(folder / "model.onnx")
    assert "the folder is unknown" in refusal(given)


def test_external_data_that_is_short_or_gone(tmp_path: Path):
    external(tmp_path)
    content = (tmp_path / "weights.bin").read_bytes()
    (tmp_path / "weights.bin").write_bytes(content[:-4])
    assert "shorter than the model declares" in refusal(tmp_path / "model.onnx")
    (tmp_path / "weights.bin").unlink()
    assert "does not exist" in refusal(tmp_path / "model.onnx")


def test_a_file_that_can_not_be_evaluated_gets_a_warning():
    given = model()
    given.opset_import.append(helper.make_opsetid("elsewhere", 1))
    given.graph.node.append(helper.make_node("Strange", [given.graph.output[0].name], ["strange"], domain="elsewhere"))
    given.graph.output.append(helper.make_tensor_value_info("strange", TensorProto.FLOAT, [None] * 4))
    result = bnexport.fold_onnx(given)
    assert [row.outcome for row in result.report.rows] == ["backward"]
    assert result.report.error is None
    assert "could not be evaluated" in result.report.warnings[0]


# --- shapes and operators ---------------------------------------------------------------------------------------------


def test_sizes_that_vary_are_expressions():
    g = Builder()
    y = g.conv(g.input("n", 3, "h", "w"), 3, 6, strides=[2, 2], pads=[1] * 4)
    flat = g.node("Reshape", y, g.init("shape", value=[0, 6, -1]))
    g.output(g.node("Reshape", flat, g.init("back", value=[-1, 6])), rank=2)
    shapes = Shapes(g.model())
    names = {str(size) for size in shapes.of("x") or ()}
    assert names == {"n", "3", "h", "w"}
    assert [str(size) for size in shapes.of(y) or ()] == ["n", "6", "h/2", "w/2"]
    assert [str(size) for size in shapes.of(flat) or ()][:2] == ["n", "6"]


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_transposed_convolution_is_torchs(groups: int, dims: int):
    layer = nn.ConvTranspose2d if dims == 2 else (nn.ConvTranspose1d if dims == 1 else nn.ConvTranspose3d)
    module = layer(4, 12, 3, stride=2, padding=1, output_padding=1, groups=groups, dilation=2).double()
    x = torch.randn(2, 4, *[5, 4, 3][:dims], dtype=torch.float64)
    g = Builder(dtype="float64")
    pads = [1] * dims * 2
    g.node(
        "ConvTranspose", "x", "w", "b", outputs=("y",), group=groups, strides=[2] * dims, pads=pads,
        output_padding=[1] * dims, dilations=[2] * dims,
    )  # fmt: skip
    given = helper.make_model(helper.make_graph([], "g", [], []), opset_imports=g.opsets)
    (found,) = node_evaluator(g.nodes, given, ["x", "w", "b"], "y").run(
        None, {"x": x.numpy(), "w": module.weight.detach().numpy(), "b": module.bias.detach().numpy()}
    )
    assert np.allclose(found, module(x).detach().numpy(), atol=1e-12)


@pytest.mark.parametrize("counted", [0, 1])
def test_average_pooling_is_torchs(counted: int):
    x = torch.randn(2, 3, 7, 9, dtype=torch.float64)
    g = Builder()
    g.node("AveragePool", "x", outputs=("y",), kernel_shape=[3, 2], strides=[2, 1], pads=[1, 1, 1, 1],
           count_include_pad=counted)  # fmt: skip
    given = helper.make_model(helper.make_graph([], "g", [], []), opset_imports=g.opsets)
    (found,) = node_evaluator(g.nodes, given, ["x"], "y").run(None, {"x": x.numpy()})
    expected = nn.functional.avg_pool2d(x, (3, 2), (2, 1), 1, count_include_pad=bool(counted))
    assert np.allclose(found, expected.numpy(), atol=1e-12)


# --- compared with the torch backend -----------------------------------------------------------------------------------


def small_densenet() -> nn.Module:
    return torchvision.models.DenseNet(growth_rate=4, block_config=(2, 2), num_init_features=8, num_classes=5)


def small_shufflenet() -> nn.Module:
    return torchvision.models.ShuffleNetV2([1, 2, 1], [8, 16, 24, 32, 48], num_classes=5)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("build", [small_densenet, small_shufflenet])
def test_it_folds_as_many_as_the_torch_backend(build: Any):
    network = randomise(build()).eval()
    inputs = (torch.randn(2, 3, 64, 64),)
    exported = torch.onnx.export(
        network, inputs, dynamo=True, optimize=False, external_data=False, verbose=False, opset_version=18,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )  # fmt: skip
    given = exported.model_proto
    ours, theirs = bnexport.fold_onnx(given).report, bnexport.fold(network, inputs).report
    count = sum(node.op_type == "BatchNormalization" for node in given.graph.node)
    assert len(ours.rows) == len(theirs.rows) == count > 0
    assert [row.outcome for row in ours.rows] == [row.outcome for row in theirs.rows]
    assert not ours.warnings
    assert ours.error <= 1e-9


@pytest.mark.parametrize(("factor", "decides"), [(1e3, True), (1e9, False)])
def test_rounding_that_the_file_amplifies_excuses_no_wrong_fold(
    factor: float, decides: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    g = Builder(dtype="float64")
    y = g.node("GlobalAveragePool", g.bn(g.conv(g.input("n", 3, 16, 16), 3, 6), 6))
    g.output(g.node("Sin", g.node("Mul", y, g.init("factor", value=np.float64(factor)))), rank=4)
    report = bnexport.fold_onnx(g.model()).report
    assert [row.outcome for row in report.rows] == ["backward"]
    assert (report.error <= 1e-9, report.warnings) == ((True, ()) if decides else (False, (AMPLIFIES,)))
    write = OnnxWriter.write

    def wrong(self: OnnxWriter, *options: Any) -> Any:
        found = write(self, *options)
        self.exact = {name: value * (1 + 1e-9) for name, value in self.exact.items()}
        return found

    monkeypatch.setattr(OnnxWriter, "write", wrong)
    with pytest.raises(ProofError, match="a fold that is not exact"):
        bnexport.fold_onnx(g.model())
