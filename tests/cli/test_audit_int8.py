"""``bnexport audit`` on int8 files: a saturating one is found and repaired, a safe one passes, bad input is one sentence."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from PIL import Image

from bnexport.auditing.int8_audit import _samples, audit_int8
from bnexport.cli.main import run
from bnexport.environment import int8_instructions
from bnexport.errors import ModelError
from bnexport.onnx_files.float64 import Float64Evaluator
from bnexport.quantization.integer_emulation import IntegerEmulator, int8_layers
from bnexport.quantization.quantize import Calibration, quantise
from bnexport.quantization.writer import as_qdq, repaired
from bnexport.tensors import Array

CLASSES = 10


def network() -> ModelProto:
    """Return a network whose convolutions sum large weights of one sign, on bright images, so that pairs saturate."""
    rng = np.random.default_rng(0)
    one = rng.uniform(0.6, 1.0, (8, 4, 3, 3)) * np.sign(rng.normal(size=(8, 1, 1, 1)))
    two = rng.normal(size=(12, 8, 3, 3)) * rng.uniform(0.2, 1.0, (12, 1, 1, 1))
    tensors = {
        "w1": one, "b1": -18 * np.sign(one[:, 0, 0, 0]), "w2": two, "b2": rng.normal(size=12),
        "w3": rng.normal(size=(CLASSES, 12)), "b3": np.zeros(CLASSES),
    }  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], name="conv1", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], name="conv2"),
        helper.make_node("Relu", ["c2"], ["r2"]),
        helper.make_node("GlobalAveragePool", ["r2"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "w3", "b3"], ["y"], name="head", transB=1),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "net", [value("x", TensorProto.FLOAT, ["n", 4, 12, 12])], [value("y", TensorProto.FLOAT, ["n", CLASSES])],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in tensors.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    centre = -Float64Evaluator(model).evaluate({"x": images(64)})["y"].mean(axis=0)  # so that every class occurs
    model.graph.initializer[-1].CopyFrom(numpy_helper.from_array(centre.astype(np.float32), "b3"))
    return model


def images(n: int, seed: int = 0) -> Array:
    rng = np.random.default_rng(seed)
    return np.asarray((rng.random((n, 4, 1, 1)) + rng.random((n, 4, 12, 12))) / 2, np.float32)


class Reader(CalibrationDataReader):
    def __init__(self) -> None:
        self._left: Iterator[Array] = iter(images(64, seed=1)[:, None])

    def get_next(self) -> Any:
        found = next(self._left, None)
        return None if found is None else {"x": found}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the float32 file, int8 files of onnxruntime in both forms, and samples."""
    folder = tmp_path_factory.mktemp("int8")
    onnx.save(network(), folder / "net.onnx")
    for form in (QuantFormat.QDQ, QuantFormat.QOperator):
        quantize_static(
            folder / "net.onnx", folder / f"{form.name}.onnx", Reader(), quant_format=form, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        )  # fmt: skip
    calibration = Calibration({"x": images(64, seed=1)}, "64 images")
    ours = quantise(network(), {"x": images(2)}, lambda _feeds: [], calibration=calibration)
    onnx.save(ours.model, folder / "ours.onnx")
    np.save(folder / "x.npy", images(48, seed=2))
    np.save(folder / "other.npy", np.zeros((20, 3, 12, 12), np.float32))
    np.save(folder / "nan.npy", np.full((20, 4, 12, 12), np.nan, np.float32))
    return folder


def audit(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any]]:
    code = run(["audit", *map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("form", ["QDQ", "QOperator"])
def test_a_saturating_file_is_wrong_by_the_emulation_on_every_machine(
    files: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = audit(capsys, files / f"{form}.onnx", "--samples", files / "x.npy", "--reference", files / "net.onnx")
    assert code == 1
    assert not found["passed"]
    name = "conv1" if form == "QDQ" else "conv1_quant"
    assert found["layers"][0] == {"name": name, "channels": 8, "saturating": 8}
    assert found["saturating_channels"] >= 16
    effect = found["differences"]["int8-saturating"]
    assert effect["labels"] > 0
    assert effect["rms"] > 3 * found["bound"]
    wrong = [check["name"] for check in found["checks"] if check["verdict"] == "wrong"]
    assert "saturation (emulated)" in wrong
    if "which saturates" in int8_instructions():
        assert "default kernels here" in wrong
    assert found["differences"]["precise kernels here"]["rms"] <= found["bound"]
    snr = {name: entry["snr"] for name, entry in found["differences"].items() if name.startswith("reference: ")}
    assert snr["reference: int8"] > snr["reference: int8-saturating"] + 6


@pytest.mark.parametrize("form", ["QDQ", "QOperator"])
@pytest.mark.parametrize("samples", [True, False])
def test_the_repaired_file_can_not_saturate_and_is_as_near_to_the_reference(
    files: Path, form: str, samples: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = files / f"{form}.onnx", tmp_path / "repaired.onnx"
    given = ["--samples", files / "x.npy"] if samples else []
    assert audit(capsys, source, *given, "--repair", out)[0] == 1
    onnx.checker.check_model(out, full_check=True)
    code, found = audit(capsys, out, "--samples", files / "x.npy", "--reference", files / "net.onnx")
    assert (code, found["passed"], found["saturating_channels"]) == (0, True, 0)
    assert found["summary"] == "right: no channel can saturate"
    assert len(int8_layers(onnx.load(out))) == 3
    feeds = {"x": images(48, seed=2)}
    exact = Float64Evaluator(network()).evaluate(feeds)["y"]
    before = IntegerEmulator(as_qdq(onnx.load(source))).evaluate(feeds)["y"]
    after = IntegerEmulator(onnx.load(out)).evaluate(feeds)["y"]
    flips = [(values.argmax(axis=1) != exact.argmax(axis=1)).sum() for values in (before, after)]
    noise = [float(np.sqrt(((values - exact) ** 2).mean())) for values in (before, after)]
    assert flips[1] <= flips[0] + 2
    assert noise[1] < 1.5 * noise[0]  # one bit less for the largest weights, where the other file saturates


def test_a_float_layer_that_the_engine_rounds_is_named_and_repaired(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The user of another tool has kept conv2, whose weight has an outlier, in float."""
    source, out = tmp_path / "kept.onnx", tmp_path / "repaired.onnx"
    wild = network()
    (weight,) = (tensor for tensor in wild.graph.initializer if tensor.name == "w2")
    array = numpy_helper.to_array(weight).copy()
    array[0] *= 50
    weight.CopyFrom(numpy_helper.from_array(array, "w2"))
    onnx.save(wild, tmp_path / "wild.onnx")
    quantize_static(
        tmp_path / "wild.onnx", source, Reader(), quant_format=QuantFormat.QDQ, per_channel=True, reduce_range=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, nodes_to_exclude=["conv2"],
    )  # fmt: skip
    code, found = audit(capsys, source, "--samples", files / "x.npy", "--repair", out)
    text = next(check["text"] for check in found["checks"] if check["name"] == "float layers")
    assert (code, found["saturating_channels"], text.endswith(": conv2")) == (1, 0, True)
    assert [check["name"] for check in found["checks"] if check["verdict"] == "wrong"] == ["default kernels here"]
    code, found = audit(capsys, out, "--samples", files / "x.npy")
    assert (code, found["summary"]) == (0, "right: no channel can saturate")
    assert "float layers" not in {check["name"] for check in found["checks"]}


def test_labels_of_every_output_count(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An output that saturation does not reach, in front of the others, does not hide them."""
    file = onnx.load(files / "QDQ.onnx")
    file.graph.node.extend([
        helper.make_node("ReduceMax", ["x"], ["m"], axes=[2, 3], keepdims=0),
    ])  # fmt: skip
    outputs = [helper.make_tensor_value_info("m", TensorProto.FLOAT, ["n", 4]), *file.graph.output]
    del file.graph.output[:]
    file.graph.output.extend(outputs)
    onnx.save(file, tmp_path / "two.onnx")
    code, found = audit(capsys, tmp_path / "two.onnx", "--samples", files / "x.npy")
    assert (code, found["differences"]["int8-saturating"]["labels"] > 0) == (1, True)


def test_codes_of_16_bits_do_not_saturate(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quantize_static(
        files / "net.onnx", tmp_path / "wide.onnx", Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt16, weight_type=QuantType.QInt8, extra_options={"UseQDQContribOps": False},
    )  # fmt: skip
    file = onnx.load(tmp_path / "wide.onnx")
    for node in file.graph.node:
        node.domain = ""
    file.opset_import[0].version = 21
    onnx.save(file, tmp_path / "wide.onnx")
    code, found = audit(capsys, tmp_path / "wide.onnx", "--samples", files / "x.npy")
    assert (code, found["saturating_channels"], len(found["layers"])) == (0, 0, 3)


def test_dynamic_scales_with_uint8_weights_have_the_fixed_bound(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quantize_dynamic(files / "net.onnx", tmp_path / "d.onnx", weight_type=QuantType.QUInt8)
    code, found = audit(capsys, tmp_path / "d.onnx", "--samples", files / "x.npy")
    assert (code, found["bound"], found["largest"]) == (0, 0.0075, None)


def test_openvino_alone_does_not_decide(files: Path) -> None:
    model = onnx.load(files / "ours.onnx")
    feeds = {"x": images(16, seed=2)}

    def wrong(given: Any) -> dict[str, Array]:
        return {"y": IntegerEmulator(model).evaluate(given)["y"] * 2}

    found = audit_int8(model, {"OpenVINO here": wrong}, feeds, unavailable={"default kernels here": "no kernel"})
    assert (found.wrong, found.differences["OpenVINO here"].error > 0.5) == ((), True)
    assert audit_int8(model, {"default kernels here": wrong}, feeds).wrong


def test_a_repaired_file_that_the_engine_can_not_open_is_not_written(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*arguments: Any) -> ModelProto:
        result = repaired(*arguments)
        result.graph.node[0].op_type = "Unknown"
        return result

    monkeypatch.setattr("bnexport.auditing.int8_audit.repaired", broken)
    assert run(["audit", str(files / "QDQ.onnx"), "--repair", str(tmp_path / "r.onnx")]) == 2
    assert "ONNX Runtime can't load the repaired file" in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []


def test_our_own_file_is_right(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = audit(capsys, files / "ours.onnx", "--samples", files / "x.npy", "--reference", files / "net.onnx")
    assert (code, found["saturating_channels"], found["summary"]) == (0, 0, "right: no channel can saturate")
    assert found["differences"]["default kernels here"]["rms"] <= found["bound"]
    assert found["differences"]["reference: int8"]["snr"] > 25
    assert "int8-saturating" not in found["differences"]
    last = next(check["text"] for check in found["checks"] if check["name"] == "last layer")
    assert "stays in float" in last


def test_the_table_names_layers_instructions_edges_and_clipped_ranges(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "bright.npy", 2 * images(20))
    assert run(["audit", str(files / "QDQ.onnx"), "--samples", str(tmp_path / "bright.npy")]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    for text in ("conv1 (8 of 8)", "AVX-512", "not with VNNI", "rounded to", "compared on 20 samples of bright.npy"):
        assert text in shown, text
    assert "0 of 6 ranges" not in shown
    assert shown.rstrip().splitlines()[-1].rpartition("wrong: ")[2].startswith("saturation (emulated)")


def test_dynamic_scales_are_counted_and_measured_on_this_machine(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quantize_dynamic(files / "net.onnx", tmp_path / "dynamic.onnx", weight_type=QuantType.QInt8, per_channel=True)
    _, found = audit(capsys, tmp_path / "dynamic.onnx", "--samples", files / "x.npy")
    assert found["saturating_channels"] > 0
    assert "int8-saturating" not in found["differences"]
    assert "measured on this machine only" in found["checks"][0]["text"]
    with pytest.raises(ModelError, match="run time"):
        repaired(onnx.load(tmp_path / "dynamic.onnx"))


def test_a_file_that_the_engine_can_not_load_is_judged_by_the_emulation(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quantize_static(  # onnxruntime has no QGemm for signed activations
        files / "net.onnx", tmp_path / "s8.onnx", Reader(), quant_format=QuantFormat.QOperator, per_channel=True,
        activation_type=QuantType.QInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    code, found = audit(capsys, tmp_path / "s8.onnx", "--samples", files / "x.npy")
    assert (code, found["saturating_channels"]) == (1, 30)
    assert "QGemm" in next(check["text"] for check in found["checks"] if check["name"] == "default kernels here")
    with pytest.raises(ModelError, match="neither be emulated nor run"):
        model = onnx.load(tmp_path / "s8.onnx")
        model.graph.node[-1].op_type = "Unknown"
        audit_int8(model, {}, {"x": images(16)}, unavailable={"default kernels here": "no kernel"})


def test_uint8_weights_are_exempt(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quantize_static(
        files / "net.onnx",
        tmp_path / "u8u8.onnx",
        Reader(),
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QUInt8,
    )
    code, found = audit(capsys, tmp_path / "u8u8.onnx", "--samples", files / "x.npy")
    assert (code, found["saturating_channels"], found["unread_layers"]) == (0, 0, 0)
    assert "3 layers have uint8 weights" in found["checks"][0]["text"]


def test_a_wrong_kernel_is_found_where_nothing_can_saturate(files: Path) -> None:
    model = onnx.load(files / "ours.onnx")
    emulator = IntegerEmulator(model)

    def wrong(feeds: Any) -> dict[str, Array]:
        return {name: 1.1 * array for name, array in emulator.evaluate(feeds).items()}

    found = audit_int8(model, {"kernel": wrong}, {"x": images(16)})
    assert [check.name for check in found.wrong] == ["kernel"]
    assert not audit_int8(model, {"kernel": emulator.evaluate}, {"x": images(16)}).wrong


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["absent.onnx"], "absent.onnx"),
        (["net.onnx"], "is not an int8 file"),
        (["QDQ.onnx", "--samples", "other.npy"], "other.npy"),
        (["QDQ.onnx", "--samples", "nan.npy"], "nan.npy"),
        (["QDQ.onnx", "--samples", "absent.npy"], "absent.npy"),
        (["QDQ.onnx", "--samples", "."], "--mean and --std"),
        (["QDQ.onnx", "--reference", "absent.onnx"], "absent.onnx"),
        (["QDQ.onnx", "--repair", "ours.onnx"], "exists already"),
        (["QDQ.onnx", "--repair", "QDQ.onnx", "--force"], "is the audited file"),
        (["ours.onnx", "--repair", "new.onnx"], "nothing to repair"),
        (["QDQ.onnx", "--weights", "x.npy"], "--weights does not go with"),
        (["torchvision:resnet18", "--samples", "x.npy"], "--samples does not go with"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence_and_writes_nothing(
    files: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files)
    before = {path.name: path.read_bytes() for path in files.iterdir()}
    assert run(["audit", *arguments]) == 2
    printed = capsys.readouterr()
    assert words in printed.err
    assert "Traceback" not in printed.err
    assert printed.out == ""
    assert {path.name: path.read_bytes() for path in files.iterdir()} == before


def node(kind: str, inputs: list[str], output: str, **settings: Any) -> onnx.NodeProto:
    return helper.make_node(kind, inputs, [output], **settings)


CONV, ENCODED = node("Conv", ["in", "w"], "c"), node("QuantizeLinear", ["c", "step", "zero"], "c_codes")
DECODED = node("DequantizeLinear", ["c_codes", "step", "zero"], "y")
#: Files that break ONNX's rules around an int8 convolution: its operators between the decoded input "x_float" and "y".
BROKEN: dict[str, list[onnx.NodeProto]] = {
    "operators in a circle before it": [
        node("Reshape", ["b", "shape"], "in"), node("Reshape", ["in", "shape"], "b"), CONV, ENCODED, DECODED,
    ],
    "an operator that reads itself": [node("Reshape", ["in", "shape"], "in"), CONV, ENCODED, DECODED],
    "operators in a circle behind it": [
        node("Conv", ["x_float", "w"], "c"), node("Reshape", ["c", "e"], "d"), node("Reshape", ["d", "shape"], "e"),
        node("Identity", ["x"], "y"),
    ],
    "padding without sizes": [node("Pad", ["x_float", "none"], "in"), CONV, ENCODED, DECODED],
    "padding with one number": [node("Pad", ["x_float", "one"], "in"), CONV, ENCODED, DECODED],
    "padding without a value": [node("Pad", ["x_float", "sizes", "none"], "in"), CONV, ENCODED, DECODED],
    "padding without an input": [node("Pad", [], "in", pads=[0] * 8), CONV, ENCODED, DECODED],
    "a reshape without an input": [node("Reshape", [], "in"), CONV, ENCODED, DECODED],
    "an encoder without a scale": [
        node("Conv", ["x_float", "w"], "c"), node("QuantizeLinear", ["c"], "c_codes"), DECODED,
    ],
}  # fmt: skip


@pytest.mark.timeout(60)
@pytest.mark.parametrize("broken", BROKEN)
def test_a_graph_that_breaks_the_rules_ends_with_one_sentence(
    broken: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = {
        "step": np.float32(0.1), "zero": np.uint8(0), "w_zero": np.int8(0), "shape": np.array([1, 4, 4, 4]),
        "w_codes": np.full((8, 4, 1, 1), 100, np.int8), "none": np.zeros(0, np.int64), "one": np.int64(1),
        "sizes": np.zeros(8, np.int64),
    }  # fmt: skip
    nodes = [
        node("QuantizeLinear", ["x", "step", "zero"], "x_codes"),
        node("DequantizeLinear", ["x_codes", "step", "zero"], "x_float"),
        node("DequantizeLinear", ["w_codes", "step", "w_zero"], "w"),
        *BROKEN[broken],
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "g", [value("x", 1, [1, 4, 4, 4])], [value("y", 1, None)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in stored.items()],
    )  # fmt: skip
    opset = [helper.make_opsetid("", 17)]
    (tmp_path / "net.onnx").write_bytes(helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString())
    assert run(["audit", str(tmp_path / "net.onnx")]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("Error: ")
    assert "Traceback" not in printed.err
    assert printed.out == ""


def test_openvino_is_a_third_column(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("openvino")
    _, found = audit(capsys, files / "ours.onnx", "--samples", files / "x.npy", "--reference", files / "net.onnx")
    named = [check["name"] for check in found["checks"] if check["name"].endswith("here")]
    kernels = ["default kernels here", "precise kernels here", "OpenVINO here"]
    assert named == kernels + [f"reference, {name}" for name in kernels]
    assert found["differences"]["reference: OpenVINO here"]["snr"] > 20


def test_the_table_fits_80_columns(
    files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    run(["audit", str(files / "QDQ.onnx"), "--samples", str(files / "x.npy"), "--reference", str(files / "net.onnx")])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[:-1])) <= 80
    assert any(line.startswith("bounds of the kernels: rms") for line in lines)


def test_operators_with_the_channels_last_are_emulated(files: Path, tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    onnxruntime.InferenceSession(files / "QDQ.onnx", options, providers=["CPUExecutionProvider"])
    optimised = onnx.load(tmp_path / "optimised.onnx")
    last = {
        node.op_type for node in optimised.graph.node if any(item.name == "channels_last" for item in node.attribute)
    }
    assert {"QLinearConv", "QLinearGlobalAveragePool"} <= last
    plain = as_qdq(optimised)
    assert len(int8_layers(plain)) == 3
    feeds = {"x": images(8, seed=3)}
    exact = IntegerEmulator(as_qdq(onnx.load(files / "QDQ.onnx"))).evaluate(feeds)["y"]
    assert np.abs(IntegerEmulator(plain).evaluate(feeds)["y"] - exact).max() < 0.02 * np.abs(exact).max()


def in_opset_11(files: Path, folder: Path) -> Path:
    model = network()
    model.opset_import[0].version = 11
    onnx.save(model, folder / "net11.onnx")
    quantize_static(
        folder / "net11.onnx", folder / "q11.onnx", Reader(), activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )  # fmt: skip
    assert onnx.load(folder / "q11.onnx").opset_import[0].version == 11
    return folder / "q11.onnx"


def test_a_file_of_an_older_operator_set_is_converted_for_the_repair(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _ = audit(
        capsys, in_opset_11(files, tmp_path), "--samples", files / "x.npy", "--repair", tmp_path / "new.onnx"
    )
    assert code == 1
    new = onnx.load(tmp_path / "new.onnx")
    onnx.checker.check_model(new, full_check=True)
    assert new.opset_import[0].version == 13
    code, found = audit(capsys, tmp_path / "new.onnx", "--samples", files / "x.npy")
    assert (code, found["saturating_channels"]) == (0, 0)


def test_a_folder_with_one_folder_per_class_is_read(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / name / "0.png")
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3, 8, 8]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", ends[:1], ends[1:])
    feeds = _samples(helper.make_model(graph), tmp_path, (0.0,) * 3, (1.0,) * 3)
    assert feeds["x"].shape == (2, 3, 8, 8)
