from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from bnexport.bundle import MODEL_ONNX, Bundle
from bnexport.errors import BundleError, RuntimeUnavailable
from bnexport.runtimes.onnxruntime import OnnxRuntimeRunner, problem
from bnexport.tensors import Signature, TensorSpec

X = np.random.default_rng(0).random((5, 1, 28, 28), dtype=np.float32)


def signature(
    *,
    name: str = "input",
    dtype: str = "float32",
    shape: tuple[int | str, ...] = ("batch", 1, 28, 28),
    classes: int = 10,
) -> Signature:
    return Signature((TensorSpec(name, dtype, shape),), (TensorSpec("logits", "float32", ("batch", classes)),))


def test_it_says_what_really_ran(bundle: Bundle, capfd: pytest.CaptureFixture[str]) -> None:
    with OnnxRuntimeRunner(bundle.file(MODEL_ONNX), bundle.manifest.signature, threads=1) as runner:
        assert runner.run({"input": X})["logits"].shape == (5, 10)
        assert runner.effective_device == "cpu"
        assert list(runner.description["nodes"]) == ["CPUExecutionProvider"]
        assert runner.description["nodes"]["CPUExecutionProvider"] >= 10
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "not a model"), (b"hello world\n" * 50, "not a model"), ("half", "not a model"), (None, "can't be read")],
    ids=["empty", "foreign", "truncated", "missing"],
)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_bad_file_is_one_sentence(
    bundle: Bundle,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    content: bytes | str | None,
    words: str,
    device: str,
) -> None:
    if device == "cuda" and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime is built without CUDA, which is refused before the file is read")
    file = tmp_path / "model.onnx"
    if content is not None:
        whole = bundle.file(MODEL_ONNX).read_bytes()
        file.write_bytes(whole[: len(whole) // 2] if isinstance(content, str) else content)
    with pytest.raises(BundleError, match=words) as caught:
        OnnxRuntimeRunner(file, bundle.manifest.signature, device=device)
    assert "\n" not in caught.value.message
    assert str(file) in caught.value.message
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (signature(name="image"), r"has the inputs \['input'\], the manifest says \['image'\]"),
        (signature(dtype="float64"), "is float32, the manifest says float64"),
        (signature(shape=("batch", 3, 28, 28)), "the manifest says batchx3x28x28"),
        (signature(shape=("batch", 1, 784)), "the manifest says batchx1x784"),
        (signature(shape=(1, 1, 28, 28)), "the manifest says 1x1x28x28"),
        (signature(classes=7), "the manifest says batchx7"),
        (Signature(signature().inputs, ()), "has the outputs"),
    ],
)
def test_a_file_with_another_signature_is_refused(bundle: Bundle, other: Signature, words: str) -> None:
    with pytest.raises(BundleError, match=words):
        OnnxRuntimeRunner(bundle.file(MODEL_ONNX), other)


def test_a_fixed_batch_in_the_file_is_refused_where_the_manifest_promises_any(bundle: Bundle, tmp_path: Path) -> None:
    model = onnx.load(bundle.file(MODEL_ONNX))
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    onnx.save(model, file := tmp_path / "model.onnx")
    with pytest.raises(BundleError, match="4x1x28x28"):
        OnnxRuntimeRunner(file, bundle.manifest.signature)


def test_weights_in_another_file_are_not_followed(bundle: Bundle, tmp_path: Path) -> None:
    shutil.copy(bundle.file(MODEL_ONNX), file := tmp_path / "model.onnx")
    model = onnx.load(file)
    onnx.save(model, file, save_as_external_data=True, location="beside.data", size_threshold=16)
    with pytest.raises(BundleError, match="not a model that onnxruntime can load"):
        OnnxRuntimeRunner(file, bundle.manifest.signature)


def test_cuda_never_answers_from_the_cpu(bundle: Bundle, capfd: pytest.CaptureFixture[str]) -> None:
    """Here without a GPU: an error that names what is missing. With one: every node on it."""
    if problem("cuda") is None:
        with OnnxRuntimeRunner(bundle.file(MODEL_ONNX), bundle.manifest.signature, device="cuda") as runner:
            assert runner.effective_device == "cuda:0"
            assert list(runner.description["nodes"]) == ["CUDAExecutionProvider"]
        return
    with pytest.raises(RuntimeUnavailable, match=r"onnxruntime-cuda can't run here: .") as caught:
        OnnxRuntimeRunner(bundle.file(MODEL_ONNX), bundle.manifest.signature, device="cuda")
    assert "\n" not in caught.value.message
    assert capfd.readouterr() == ("", "")


def test_the_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    from bnexport.runtimes import cuda_libraries

    said = {"cuda": "libcurand.so.10: cannot open shared object file", "libcuda": None, "shared": None}
    monkeypatch.setattr(cuda_libraries, "preload", lambda ort: "")
    monkeypatch.setattr(
        cuda_libraries,
        "_load",
        lambda library, *, globally=False: said["cuda" if "providers_cuda" in library else "libcuda"],
    )
    found = cuda_libraries.reason(onnxruntime)
    assert found == "onnxruntime's CUDA provider can't be loaded (libcurand.so.10: cannot open shared object file)"
    said["cuda"] = None
    assert cuda_libraries.reason(onnxruntime) is None


def test_an_onnxruntime_without_cuda_says_so(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(RuntimeUnavailable, match="built without CUDA"):
        OnnxRuntimeRunner(bundle.file(MODEL_ONNX), bundle.manifest.signature, device="cuda")


def test_nodes_on_another_provider_are_a_fall_back(bundle: Bundle) -> None:
    with OnnxRuntimeRunner(bundle.file(MODEL_ONNX), bundle.manifest.signature) as runner:
        with pytest.raises(RuntimeUnavailable, match="fell back: nodes run on cpu, cuda:0"):
            runner._device_of({"CUDAExecutionProvider": 11, "CPUExecutionProvider": 1}, "cuda")
        assert runner._device_of({"CUDAExecutionProvider": 11}, "cuda") == "cuda:0"
