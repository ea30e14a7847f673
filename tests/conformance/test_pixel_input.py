"""Bundles whose files take pixels: what the graph contains, that every part follows, and that each fault of it fails."""

import asyncio
import copy
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from support.bundles import copy_bundle, reseal
from support.grpc_calls import SERVICE, call, channel_to, infer_request, logits_of_message
from support.int8 import PIXELS, folded, residual
from support.models import randomise
from support.serving import binary, logits_of, serving, tensor
from support.shared import made_once
from torch import Tensor, nn

from bnexport.bundle import MODEL_FLOAT32, MODEL_ONNX, MODEL_TORCHSCRIPT, Bundle, Manifest
from bnexport.cli.main import run
from bnexport.data.preprocessing import PixelPreprocessing, Preprocessing, preprocessing_of
from bnexport.errors import BadInput, BundleError, DataError, UsageError
from bnexport.evaluating.evaluate import evaluate
from bnexport.exporting.export_request import ExportRequest
from bnexport.exporting.triton_config import triton_config
from bnexport.folding.fold import fold
from bnexport.folding.onnx_backend.onnx_fold import fold_onnx
from bnexport.folding.pixel_input import pixel_model, pixel_module
from bnexport.nn.calling import to_eval_mode
from bnexport.onnx_files.float64 import Float64Evaluator
from bnexport.onnx_files.models import read_model
from bnexport.onnx_pipeline import fold_and_export_onnx
from bnexport.pipeline import fold_and_export
from bnexport.quantization.codes import Coding
from bnexport.serving.predictor import Predictor, predict_images
from bnexport.serving.served_model import ServingSettings, open_served
from bnexport.tensors import Array
from bnexport.verification.scope import Scope
from bnexport.verification.self_test.copies import Copy, FaultTarget
from bnexport.verification.self_test.faults import PIXEL_FAULTS, spoil_pixels
from bnexport.verification.self_test.tester import self_test
from bnexport.verification.verify import verify

RUNTIME = "onnxruntime-cpu"
IMAGE = Preprocessing(3, 8, 8, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.25))
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
REQUEST = ExportRequest(input_type="uint8", inputs=("3x16x16",), mean=PIXELS["mean"], std=PIXELS["std"])


class Net(nn.Module):
    """A network whose forward is a function of its layers, with one named input, as torch.onnx.export's dynamic shapes need."""

    def __init__(self, forward: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


def conv(channels: int = 6, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(3, channels, 3, padding=1, **options)


#: Name -> the network, and whether a Mul stays because a reader of the input can't take the scale.
NETWORKS: dict[str, tuple[Callable[[], Net], bool]] = {
    "padded convolution": (lambda: Net(lambda m, x: m.b(m.a(x)).relu().mean((2, 3)), a=conv(), b=nn.BatchNorm2d(6)), False),
    "depthwise": (lambda: Net(lambda m, x: m.b(m.a(x)).mean((2, 3)), a=conv(groups=3), b=nn.BatchNorm2d(6)), False),
    "fully connected": (lambda: Net(lambda m, x: m.b(m.a(x.flatten(1))), a=nn.Linear(192, 5), b=nn.BatchNorm1d(5)), False),
    "two readers": (lambda: Net(lambda m, x: (m.a(x).relu() + m.b(x)).mean((2, 3)), a=conv(), b=nn.Conv2d(3, 6, 1)), False),
    "BatchNorm first": (lambda: Net(lambda m, x: m.a(m.b(x)).mean((2, 3)), a=conv(), b=nn.BatchNorm2d(3)), False),
    "skip from the input": (lambda: Net(lambda m, x: (m.a(x) + x).sigmoid().mean((2, 3)), a=conv(3)), True),
    "sigmoid first": (lambda: Net(lambda m, x: m.a(x.sigmoid()).mean((2, 3)), a=conv()), True),
    "one convolution called twice": (lambda: Net(lambda m, x: (m.a(x) + m.a(x.flip(3))).mean((2, 3)), a=conv()), True),
}  # fmt: skip


def in_float64(network: nn.Module, x: Tensor) -> Array:
    with torch.no_grad():
        return np.asarray(copy.deepcopy(network).double()(x).numpy())


def original(network: nn.Module, pixels: Array) -> Array:
    """Return the outputs of the network in float64 for (x / 255 - mean) / std."""
    x = torch.from_numpy(pixels).double() / 255
    mean, std = (torch.tensor(values, dtype=torch.float64).reshape(3, 1, 1) for values in (IMAGE.mean, IMAGE.std))
    return in_float64(network, (x - mean) / std)


def pixel_batch() -> Array:
    """Return random pixels, and images of one value, of which the darkest and brightest have the largest error at a border."""
    rng = np.random.default_rng(5)
    noise = rng.integers(0, 256, (4, 3, 8, 8), np.uint8)
    return np.concatenate([noise, np.zeros((1, 3, 8, 8), np.uint8), np.full((1, 3, 8, 8), 255, np.uint8)])


def error(found: Array, exact: Array) -> float:
    return float(np.abs(found - exact).max() / np.abs(exact).max())


@pytest.mark.parametrize("name", NETWORKS)
def test_the_graph_takes_pixels_and_computes_the_same(name: str, tmp_path: Path) -> None:
    make, multiplies = NETWORKS[name]
    network, pixels = to_eval_mode(randomise(make())), pixel_batch()
    exact = original(network, pixels)
    result = fold(network, (torch.randn(2, 3, 8, 8),))
    before = {key: tensor.clone() for key, tensor in result.model.state_dict().items()}
    module = pixel_module(result.model, IMAGE)
    with torch.no_grad():
        assert error(module(torch.from_numpy(pixels)).numpy(), exact) < 1e-6
    assert all(torch.equal(tensor, before[key]) for key, tensor in result.model.state_dict().items()), (
        "the source changed"
    )

    batch = ({0: torch.export.Dim("n")},)
    torch.onnx.export(
        network, (torch.randn(2, 3, 8, 8),), tmp_path / "net.onnx", input_names=["input"], dynamic_shapes=batch,
        dynamo=True, verbose=False, external_data=False,
    )  # fmt: skip
    model = pixel_model(fold_onnx(tmp_path / "net.onnx").model, IMAGE, {})
    onnx.checker.check_model(model, full_check=True)
    assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    (found,) = Float64Evaluator(model).evaluate({"input": pixels}).values()
    assert error(found, exact) < 1e-6
    wanted = ["Cast", "Sub", "Mul"] if multiplies else ["Cast", "Sub"]
    assert [node.op_type for node in model.graph.node][: len(wanted)] == wanted
    assert multiplies or "Mul" not in {node.op_type for node in model.graph.node}


def test_a_mean_of_zero_is_not_subtracted() -> None:
    image = replace(IMAGE, mean=(0.0, 0.0, 0.0))
    network = to_eval_mode(randomise(NETWORKS["padded convolution"][0]()))
    module = pixel_module(fold(network, (torch.randn(2, 3, 8, 8),)).model, image)
    targets = [node.target for node in module.graph.nodes if node.op == "call_function"]
    assert targets[:2] == [torch.ops.aten.to.dtype, torch.ops.aten.conv2d.default]


def test_a_factor_that_float16_weights_cannot_hold_stays_a_multiplication() -> None:
    network = to_eval_mode(randomise(NETWORKS["padded convolution"][0]()))
    with torch.no_grad():
        network.a.weight.mul_(1e-3)
        network.b.running_var.fill_(1.0)
        network.b.weight.fill_(1.0)
    folded_network = fold(network, (torch.randn(2, 3, 8, 8),)).model
    for stored, multiplies in ((torch.float32, False), (torch.bfloat16, False), (torch.float16, True)):
        targets = {node.target for node in pixel_module(folded_network, IMAGE, stored).graph.nodes}
        assert (torch.ops.aten.mul.Tensor in targets) == multiplies


# --- bundles ---

#: Name -> the options of the export.
KINDS: dict[str, ExportRequest] = {
    "float32": REQUEST,
    "plain": replace(REQUEST, **PLAIN),
    "float16": replace(REQUEST, precision="float16"),
    "int8": replace(REQUEST, precision="int8"),
    "int8 codes": replace(REQUEST, precision="int8", **PLAIN),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    def make(kind: str) -> Bundle:
        def export(folder: Path) -> None:
            result = fold_and_export(residual(), folder / "net" / "1", request=KINDS[kind])
            assert result.bundle is not None, result.verification.failures

        return Bundle.open(made_once(tmp_path_factory, f"pixels {kind}", export) / "net" / "1")

    return make


@pytest.fixture(scope="module")
def images() -> Array:
    """Images with structure, so that their scores differ: uint8 (n, height, width, channels)."""
    coarse = np.random.default_rng(4).integers(0, 256, (24, 4, 4, 3), dtype=np.uint8)
    return np.ascontiguousarray(coarse.repeat(4, 1).repeat(4, 2))


def expected(bundle: Bundle, images: Array) -> Array:
    """Return the original network's logits in float64, of the float preprocessing."""
    assert bundle.manifest.preprocessing is not None
    X = torch.from_numpy(Preprocessing.from_json(bundle.manifest.preprocessing).apply(images)).double()
    return in_float64(residual(), X)


@pytest.mark.parametrize("kind", ["float32", pytest.param("float16", marks=pytest.mark.slow), "int8 codes"])
def test_a_bundle_is_written_and_verified_on_pixels(made: Callable[[str], Bundle], kind: str) -> None:
    bundle = made(kind)
    (spec,) = bundle.manifest.signature.inputs
    assert (spec.dtype, spec.shape) == ("uint8", ("batch", 3, 16, 16))
    assert bundle.manifest.onnx["input_type"] == "uint8"
    golden = bundle.golden()[0]["input"]
    assert golden.dtype == np.uint8
    assert {0, 255} <= set(golden.min(axis=(1, 2, 3))) | set(golden.max(axis=(1, 2, 3)))
    assert golden.max(axis=(1, 2, 3)).min() == 0, "one golden image is black"
    report = verify(
        bundle, module=residual(), runtimes=[RUNTIME, "torch-cpu"], scope=Scope(max_samples=16, drift=False)
    )
    assert report.passed, report.failures
    assert {"noise", "zeros", "ones", "one-hot"} <= {row.case for row in report.rows if row.stage == "file-proof"}
    text = triton_config("net", bundle.manifest.signature)
    assert "data_type: TYPE_UINT8" in text
    assert text == (bundle.path.parent / "config.pbtxt").read_text()
    if kind != "int8 codes":
        with torch.no_grad():
            file = torch.jit.load(str(bundle.path / MODEL_TORCHSCRIPT))
            assert file(torch.from_numpy(golden)).dtype == torch.float32


def test_float16_keeps_every_pixel(made: Callable[[str], Bundle]) -> None:
    model = read_model(made("float16").path / MODEL_ONNX)
    casts = [node for node in model.graph.node if node.op_type == "Cast" and node.input[0] == "input"]
    assert [node.attribute[0].i for node in casts] == [onnx.TensorProto.FLOAT16]
    every = np.arange(256, dtype=np.uint8)
    assert (every.astype(np.float16).astype(np.int64) == every).all()


def test_the_inputs_of_the_verification_are_pixels(made: Callable[[str], Bundle]) -> None:
    from bnexport.verification.budget import Work, budget_of
    from bnexport.verification.inputs import build_suite

    bundle = made("float32")
    suite = build_suite(bundle.manifest, bundle.golden()[0], data_dir=None, seed=0, budget=budget_of(Work(10**6)))
    found = {batch.name: batch.feeds["input"] for batch in suite.batches}
    assert {array.dtype for array in found.values()} == {np.dtype(np.uint8)}
    assert len(np.unique(found["noise"])) == 256
    assert (set(np.unique(found["zeros"])), set(np.unique(found["ones"]))) == ({0}, {255})
    assert [(sample == 255).sum() for sample in found["one-hot"]] == [1] * len(found["one-hot"])
    assert set(np.unique(found["one-hot"])) == {0, 255}


@pytest.mark.parametrize("fault", PIXEL_FAULTS)
def test_each_fault_fails_in_the_proof_and_on_the_runtime(
    made: Callable[[str], Bundle], tmp_path: Path, fault: str
) -> None:
    bundle = made("float32")
    copied = Copy(FaultTarget(bundle, residual(), 1e-6, {}), copy_bundle(bundle, tmp_path / "net" / "1"))
    spoil_pixels(copied, PIXEL_FAULTS[fault])
    scope = Scope(("float32",), max_samples=8, drift=False)
    report = verify(Bundle.open(copied.folder), module=residual(), runtimes=[RUNTIME], scope=scope)
    assert {"file-proof", "strict", "golden"} <= {row.stage for row in report.failures}
    worst = max(row.error or 0 for row in report.failures if row.stage == "file-proof")
    assert worst > 0.01
    assert "integrity" not in {row.stage for row in report.failures}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["float32", "int8", "int8 codes"])
def test_the_self_test_misses_nothing(made: Callable[[str], Bundle], kind: str) -> None:
    results = self_test(made(kind), module=residual())
    assert not [result for result in results if result.outcome == "missed"]
    tried = {result.fault for result in results if result.outcome == "caught"}
    assert "scale of the pixels dropped" in tried
    assert (set(PIXEL_FAULTS) <= tried) == (kind != "int8 codes"), "without a mean there is nothing to spoil"


@pytest.mark.parametrize("kind", ["float32", "int8 codes"])
def test_an_onnx_file_becomes_the_same_kind_of_bundle(
    made: Callable[[str], Bundle], tmp_path: Path, images: Array, kind: str
) -> None:
    source = tmp_path / "source.onnx"
    onnx.save(folded(residual(), tmp_path), source)
    request = replace(KINDS[kind], calibrate=None if kind == "float32" else str(tmp_path / "images.npy"))
    np.save(tmp_path / "images.npy", images)
    result = fold_and_export_onnx(source, tmp_path / "net" / "1", request=request)
    assert result.bundle is not None, result.verification.failures
    assert verify(result.bundle, runtimes=[RUNTIME]).passed
    with Predictor(result.bundle) as predictor:
        bound = 1e-5 if kind == "float32" else 0.2
        assert error(predictor.logits(images), expected(made(kind), images)) < bound


def test_int8_takes_the_pixels_as_codes(
    made: Callable[[str], Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = made("int8 codes")
    model = read_model(bundle.path / MODEL_ONNX)
    readers = [node.op_type for node in model.graph.node if "input" in node.input]
    assert readers == ["DequantizeLinear"]
    assert "Cast" not in {node.op_type for node in model.graph.node}
    assert "Cast" in {node.op_type for node in read_model(bundle.path / MODEL_FLOAT32).graph.node}

    monkeypatch.setattr(Coding, "is_plain", property(lambda self: False))  # with Cast and QuantizeLinear
    plain = fold_and_export(residual(), tmp_path / "net" / "1", request=KINDS["int8 codes"]).bundle
    assert plain is not None
    assert "Cast" in {node.op_type for node in read_model(plain.path / MODEL_ONNX).graph.node}
    feeds = {"input": np.random.default_rng(0).integers(0, 256, (8, 3, 16, 16), np.uint8)}
    answers = [
        onnxruntime.InferenceSession(str(path / MODEL_ONNX), providers=["CPUExecutionProvider"]).run(None, feeds)[0]
        for path in (bundle.path, plain.path)
    ]
    assert (answers[0] == answers[1]).all()


def test_int8_for_tensorrt_and_with_a_mean_quantises_the_pixels(made: Callable[[str], Bundle], tmp_path: Path) -> None:
    request = replace(KINDS["int8 codes"], target="tensorrt")
    signed = fold_and_export(residual(), tmp_path / "net" / "1", request=request).bundle
    assert signed is not None
    for path in (signed.path, made("int8").path):
        model = read_model(path / MODEL_ONNX)
        assert "QuantizeLinear" in [node.op_type for node in model.graph.node][:3]
    ranges = made("int8").manifest.onnx["quantization"]["ranges"]
    (pixels,) = [found for found in ranges.values() if found["source"] == "pixels"]
    assert pixels["low"] == pytest.approx(-255 * max(PIXELS["mean"]))
    assert pixels["high"] == pytest.approx(255 * (1 - min(PIXELS["mean"])))


def test_the_file_proof_of_codes_notices_another_scale_of_the_pixels(
    made: Callable[[str], Bundle], tmp_path: Path
) -> None:
    bundle = made("int8 codes")
    folder = copy_bundle(bundle, tmp_path / "net" / "1")
    model = read_model(folder / MODEL_ONNX)
    (node,) = [node for node in model.graph.node if "input" in node.input]
    for at, array in ((1, np.array(1.0000001, np.float32)), (2, np.array(1, np.uint8))):
        spoiled = onnx.ModelProto()
        spoiled.CopyFrom(model)
        stored = next(item for item in spoiled.graph.initializer if item.name == node.input[at])
        stored.CopyFrom(onnx.numpy_helper.from_array(array, stored.name))
        (folder / MODEL_ONNX).write_bytes(spoiled.SerializeToString())
        report = verify(reseal(folder), module=residual(), runtimes=[RUNTIME], scope=Scope(max_samples=8, drift=False))
        failed = {row.case: row.reason for row in report.failures if row.stage == "quantization"}
        assert "with another scale than 1 or another zero than 0" in failed["ranges"]


# --- prediction and serving ---


def test_prediction_converts_nothing_on_the_host(made: Callable[[str], Bundle], images: Array, tmp_path: Path) -> None:
    bundle = made("float32")
    image = preprocessing_of(bundle.manifest)
    assert isinstance(image, PixelPreprocessing)
    assert image.apply(images).dtype == np.uint8
    grey = PixelPreprocessing(1, 28, 28)
    pixels = np.zeros((2, 28, 28), np.uint8)
    assert np.shares_memory(grey.apply(pixels), pixels)
    with pytest.raises(DataError, match="expected uint8"):
        image.apply(images.astype(np.float32))
    with Predictor(bundle) as predictor:
        assert error(predictor.logits(images), expected(bundle, images)) < 1e-5
    np.save(tmp_path / "stack.npy", images)
    found = predict_images(bundle, tmp_path / "stack.npy")
    assert [item.index for item in found] == expected(bundle, images).argmax(1).tolist()


def test_predictions_of_many_images_follow(made: Callable[[str], Bundle], images: Array, tmp_path: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    bundle = made("float32")
    np.save(tmp_path / "stack.npy", images)
    words = ["predict", str(bundle.path), str(tmp_path / "stack.npy"), "--out", str(tmp_path / "out"), "--logits"]
    assert run([*words, "--workers", "1", "--shard-rows", "10"]) == 0
    written = np.array(pq.read_table(tmp_path / "out").to_pydict()["logits"])
    assert error(written, expected(bundle, images)) < 1e-5


def test_a_served_model_labels_pictures(made: Callable[[str], Bundle], images: Array) -> None:
    async def served() -> Array:
        model = open_served("net", "1", made("int8 codes").path, ServingSettings(workers=1))
        try:
            assert model.config()["input"][0]["data_type"] == "TYPE_UINT8"
            return await model.logits(images)
        finally:
            await model.close()

    assert error(asyncio.run(served()), expected(made("plain"), images)) < 0.2


def test_a_server_takes_pixels_over_every_protocol(
    made: Callable[[str], Bundle], images: Array, tmp_path: Path
) -> None:
    bundle = made("float32")
    pixels, exact = images.transpose(0, 3, 1, 2)[:2], expected(bundle, images)[:2]
    with serving(bundle.path.parents[1], tmp_path / "log", "--grpc-port", "0") as server:
        path = "/v2/models/net"
        stated = server.ask("GET", path).json["inputs"][0]
        assert (stated["datatype"], stated["shape"]) == ("UINT8", [-1, 3, 16, 16])
        item = tensor(pixels, datatype="UINT8")
        assert error(logits_of(server.infer({"inputs": [item]}, f"{path}/infer")), exact) < 1e-5
        body, headers = binary(np.ascontiguousarray(pixels))
        body = body.replace(b'"FP32"', b'"UINT8"')
        headers["inference-header-content-length"] = str(len(body) - pixels.nbytes)
        assert error(logits_of(server.ask("POST", f"{path}/infer", body, headers)), exact) < 1e-5
        for value in (256, -1, 0.5, "1"):
            refused = server.infer({"inputs": [{**item, "data": [value, *item["data"][1:]]}]}, f"{path}/infer")
            assert refused.status == 400, value
        floats = server.infer({"inputs": [tensor(pixels.astype(np.float32))]}, f"{path}/infer")
        assert floats.status == 400
        assert "UINT8" in floats.error
        stream = io.BytesIO()
        Image.fromarray(images[0]).save(stream, "PNG")
        answer = server.ask("POST", f"{path}/classify", stream.getvalue(), {"content-type": "image/png"})
        assert answer.json["predictions"][0]["logits"] == pytest.approx(exact[0].tolist(), abs=1e-4)
        assert b"UINT8" in server.ask("GET", "/").body
        with channel_to(server) as channel:
            request = infer_request(np.ascontiguousarray(pixels), datatype="UINT8", model_name="net")
            answered = call(channel, SERVICE + "ModelInfer", request.SerializeToString())
            assert error(logits_of_message(answered.data), exact) < 1e-5


def test_evaluation_counts_the_same_labels(tmp_path: Path) -> None:
    layers = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 784, 10)
    network = to_eval_mode(randomise(nn.Sequential(*layers)))
    counts = {}
    for kind in ("float32", "uint8"):
        request = ExportRequest(input_type=kind, dataset="digits", mean=(0.2,), std=(0.3,), allow_low_accuracy=True)
        result = fold_and_export(network, tmp_path / kind / "1", request=request, input=(1, 28, 28))
        assert result.bundle is not None, result.verification.failures
        assert "images" in {row.case for row in result.verification.rows}
        found = evaluate(tmp_path / kind / "1", dataset="digits")
        counts[kind] = found.confusion.tolist()
    assert counts["uint8"] == counts["float32"]


def test_samples_are_pixels(made: Callable[[str], Bundle], images: Array, tmp_path: Path) -> None:
    scope = Scope(("float32",), max_samples=8, drift=False)

    def verified(array: Array) -> Any:
        np.save(tmp_path / "samples.npy", array)
        return verify(
            made("float32"), module=residual(), runtimes=[RUNTIME], samples=tmp_path / "samples.npy", scope=scope
        )

    for array in (images, images.transpose(0, 3, 1, 2)):
        report = verified(array)
        assert report.passed, report.failures
        assert "reach" not in report.inputs
    with pytest.raises(DataError, match="float32, expected uint8"):
        verified(images.transpose(0, 3, 1, 2).astype(np.float32))


# --- the command line and bad input ---


def export(tmp_path: Path, *words: str) -> tuple[int, Path]:
    source = tmp_path / "code.py"
    source.write_text(
        "from support.int8 import residual\n"
        "from torch import nn\n"
        "class Two(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.net = residual()\n"
        "    def forward(self, a, b):\n"
        "        return self.net(a + b)\n"
        "def make():\n    return residual()\n"
        "def two():\n    return Two()\n"
        "def flat():\n    return nn.Sequential(nn.Linear(7, 3), nn.BatchNorm1d(3))\n"
        "def bytes_in():\n"
        "    class Bytes(nn.Module):\n"
        "        def __init__(self):\n"
        "            super().__init__()\n"
        "            self.net = residual()\n"
        "        def forward(self, x):\n"
        "            return self.net(x.float() / 255)\n"
        "    return Bytes()\n"
    )
    out = tmp_path / "models" / "net" / "1"
    code = run(["fold-and-export", words[0].replace("CODE", str(source)), "--out", str(out), *words[1:], "--quiet"])
    return code, out


MEAN = ("--mean", "0.5,0.4,0.3", "--std", "0.5,0.25,0.2")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("CODE:make", "--input", "3x16x16"), "the preprocessing is unknown"),
        (("CODE:two", "--input", "a=3x16x16", "--input", "b=3x16x16"), "the network has 2 inputs"),
        (("CODE:flat", "--input", "7"), "'input' has the shape 7, expected channels, height and width"),
        (("CODE:bytes_in", "--input", "3x16x16:uint8", *MEAN), "'input' takes uint8, not float32"),
        (("CODE:make", "--input", "3x16x16:float64", *MEAN), "'input' takes float64, not float32"),
    ],
)
def test_unfit_networks_are_refused_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], reason: str
) -> None:
    code, out = export(tmp_path, *words, "--input-type", "uint8")
    message = capsys.readouterr().err.strip()
    assert code == 2, message
    assert reason in message
    assert "--input-type uint8" in message
    assert "Traceback" not in message
    assert not out.exists()
    assert not (tmp_path / "models" / "net" / "config.pbtxt").exists()


def test_unfit_files_and_options_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "source.onnx"
    onnx.save(folded(residual(), tmp_path), source)
    out = tmp_path / "models" / "net" / "1"
    assert run(["fold-and-export", str(source), "--out", str(out), "--input-type", "uint8", "--quiet"]) == 2
    assert "the preprocessing is unknown" in capsys.readouterr().err
    assert run(["fold-and-export", str(source), "--out", str(tmp_path / "x.onnx"), "--input-type", "uint8"]) == 2
    assert "--input-type applies to a bundle only" in capsys.readouterr().err
    assert not out.exists()
    assert not (tmp_path / "x.onnx").exists()
    with pytest.raises(UsageError, match="the input type 'int4' is not known"):
        ExportRequest(input_type="int4")
    with pytest.raises(BadInput, match=r"the shape 3x16x16, expected 1 channels"):
        request = ExportRequest(input_type="uint8", preprocessing=Preprocessing(1, 16, 16))
        fold_and_export(residual(), out, request=request, input=(3, 16, 16))


def test_the_command_line_states_the_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = export(tmp_path, "CODE:make", "--input", "3x16x16", *MEAN, "--input-type", "uint8", "--format", "onnx")
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert "Input: pixels as uint8" in printed.out
    assert "pixels, converted by the files" in (out / "report.html").read_text()
    assert run(["inspect", str(out)]) == 0
    assert "take pixels as uint8" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"onnx": {"input_type": "int4"}}, "unknown input type 'int4'"),
        ({"preprocessing": None}, "has no preprocessing or not one image input of uint8"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(
    made: Callable[[str], Bundle], change: dict[str, Any], reason: str
) -> None:
    value = json.loads((made("float32").path / "manifest.json").read_text())
    value.pop("digest")
    with pytest.raises(BundleError, match=reason):
        Manifest.from_json({**value, **change})
