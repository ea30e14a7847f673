from pathlib import Path

import numpy as np
import onnx
import pytest

from bnexport.bundle import MODEL_ONNX, Bundle
from bnexport.errors import BundleError, RuntimeUnavailable
from bnexport.onnx_files.emulation import Emulator
from bnexport.onnx_files.float64 import Float64Evaluator
from bnexport.runtimes import openvino
from bnexport.runtimes.base import RunSettings
from bnexport.runtimes.openvino import OpenVinoRunner, own_reason
from bnexport.tensors import Signature, TensorSpec

pytestmark = pytest.mark.needs("openvino")

X = np.random.default_rng(0).random((33, 1, 28, 28), dtype=np.float32)


def opened(bundle: Bundle, precision: str = "float32", threads: int | None = None) -> OpenVinoRunner:
    settings = RunSettings(precision, threads=threads)
    return OpenVinoRunner(bundle.file(MODEL_ONNX), bundle.manifest.signature, settings=settings)


def has_bfloat16() -> bool:
    import openvino as engine

    return "BF16" in engine.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def test_strict_is_float32_in_every_layer(bundle: Bundle, capfd: pytest.CaptureFixture[str]) -> None:
    with opened(bundle, threads=1) as runner:
        settings = runner.description
    assert settings["precision"] == "float32"
    assert list(settings["layers"]) == ["float32"]
    assert settings["layers"]["float32"] >= 7  # two convolutions, two poolings, three products
    assert settings["execution mode"] == "accuracy"
    assert settings["threads"] == 1
    assert settings["version"]
    assert capfd.readouterr() == ("", "")


def test_the_serving_precision_is_reported_and_its_error_is_as_predicted(bundle: Bundle) -> None:
    """Bfloat16 where the CPU has it: the only coarse precision that a CPU really serves with."""
    exact = Float64Evaluator(bundle.file(MODEL_ONNX)).evaluate({"input": X})["logits"]
    with opened(bundle, "bfloat16") as runner:
        settings, found = runner.description, runner.run({"input": X})["logits"]
    error = np.abs(found - exact).max() / np.abs(exact).max()
    if not has_bfloat16():
        assert settings["precision"] == "float32"
        assert error < 1e-5
        return
    assert settings["precision"] == "bfloat16"
    assert settings["layers"]["bfloat16"] >= 5
    predicted = Emulator(bundle.file(MODEL_ONNX), "bfloat16").evaluate({"input": X})["logits"]
    noise = np.abs(predicted - exact).max() / np.abs(exact).max()
    assert noise / 3 < error < noise * 3
    assert error > 1e-4


def test_layers_left_in_half_precision_are_refused(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OpenVinoRunner, "_layers", lambda self: {"float32": 5, "bfloat16": 2})
    with pytest.raises(
        RuntimeUnavailable, match="float32 was requested from openvino-cpu, but it reports 2 layers in bfloat16"
    ):
        opened(bundle)


def test_an_engine_that_keeps_its_default_is_refused(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(openvino._HINTS, "float32", ("bf16", "PERFORMANCE"))
    if not has_bfloat16():
        pytest.skip("this CPU has no bfloat16")
    with pytest.raises(
        RuntimeUnavailable, match=r"float32 was requested from openvino-cpu, but it reports (\d+ layers in )?bfloat16"
    ):
        opened(bundle)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "image"}, r"has the inputs \['input'\], the manifest states \['image'\]"),
        ({"dtype": "float64"}, "is float32, the manifest states float64"),
        ({"shape": ("batch", 3, 28, 28)}, "the manifest states batchx3x28x28"),
        ({"shape": (4, 1, 28, 28)}, "the manifest states 4x1x28x28"),
    ],
    ids=str,
)
def test_a_file_with_another_signature_is_refused(bundle: Bundle, change: dict[str, object], words: str) -> None:
    given = {"name": "input", "dtype": "float32", "shape": ("batch", 1, 28, 28)} | change
    signature = Signature((TensorSpec(**given),), bundle.manifest.signature.outputs)  # type: ignore[arg-type]
    with pytest.raises(BundleError, match=words):
        OpenVinoRunner(bundle.file(MODEL_ONNX), signature)


def test_an_operator_that_it_lacks_is_one_sentence(bundle: Bundle, tmp_path: Path) -> None:
    model = onnx.load(bundle.file(MODEL_ONNX))
    model.graph.node[-1].op_type = "NoSuchOperator"
    onnx.save(model, file := tmp_path / "model.onnx")
    with pytest.raises(BundleError, match=r"is not a model that OpenVINO can load: .*NoSuchOperator") as caught:
        OpenVinoRunner(file, bundle.manifest.signature)
    assert "\n" not in caught.value.message
    assert "src/" not in caught.value.message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Exception from src/a.cpp:105:\nException from src/b.cpp:188:\nUnable to read.\n\n", "Unable to read"),
        ("plain", "plain"),
        ("Exception from src/a.cpp:1:\n", "Exception from src/a.cpp:1:"),
    ],
)  # fmt: skip
def test_its_own_reason_is_the_sentence_without_places_in_its_source(text: str, expected: str) -> None:
    assert own_reason(RuntimeError(text)) == expected
