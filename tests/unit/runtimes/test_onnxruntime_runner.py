import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from bnexport.bundle import MODEL_ONNX, Bundle
from bnexport.errors import BundleError, RuntimeUnavailable
from bnexport.runtimes.base import CONV_SEARCHES, OPTIMISATIONS, RunSettings
from bnexport.runtimes.onnxruntime import OnnxRuntimeRunner, problem
from bnexport.runtimes.onnxruntime_session import CUDA, LEVELS, direct_run, provider_options
from bnexport.tensors import Signature, TensorSpec

X = np.random.default_rng(0).random((5, 1, 28, 28), dtype=np.float32)


def signature(*, classes: int = 10, **changes: object) -> Signature:
    given = {"name": "input", "dtype": "float32", "shape": ("batch", 1, 28, 28)} | changes
    return Signature((TensorSpec(**given),), (TensorSpec("logits", "float32", ("batch", classes)),))  # type: ignore[arg-type]


def test_the_description_states_what_really_ran(bundle: Bundle, capfd: pytest.CaptureFixture[str]) -> None:
    settings = RunSettings(threads=1)
    with OnnxRuntimeRunner(bundle.file(MODEL_ONNX), bundle.manifest.signature, settings=settings) as runner:
        assert runner.run({"input": X})["logits"].shape == (5, 10)
        assert runner.effective_device == "cpu"
        assert runner.description["threads"] == 1
        assert runner.description["optimisation"] == "all"
        assert list(runner.description["nodes"]) == ["CPUExecutionProvider"]
        assert runner.description["nodes"]["CPUExecutionProvider"] >= 10
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("level", OPTIMISATIONS)
@pytest.mark.parametrize("binding", [False, True])
def test_every_setting_gives_the_same_answer(bundle: Bundle, level: str, binding: bool) -> None:
    """This includes every batch size: memory that was bound for another size must not be used again."""
    file, signature = bundle.file(MODEL_ONNX), bundle.manifest.signature
    with OnnxRuntimeRunner(file, signature) as runner:
        expected = runner.run({"input": X})["logits"]
    settings = RunSettings(optimisation=level, binding=binding)
    with OnnxRuntimeRunner(file, signature, settings=settings) as runner:
        assert runner.description["optimisation"] == level
        assert runner.description["memory"].startswith("bound" if binding else "copied")
        for size in (5, 1, 0, 3, 5):
            answer = runner.run({"input": X[:size]})["logits"]
            assert answer.shape == (size, 10)
            np.testing.assert_allclose(answer, expected[:size], rtol=0, atol=1e-5 * np.abs(expected).max())
        answer[:] = 7  # the caller's own memory
        np.testing.assert_array_equal(runner.run({"input": X[:1]})["logits"] == 7, False)


def test_outputs_of_a_session_on_the_cpu_are_in_new_memory_without_a_copy(tmp_path: Path) -> None:
    """An output that is an input, or a constant of the file, is the caller's own too."""
    names, shape = ("relu", "same", "constant"), (2, 3)
    constant = np.arange(6, dtype=np.float32).reshape(2, 3)
    graph = helper.make_graph(
        [helper.make_node("Relu", ["input"], ["relu"]), helper.make_node("Identity", ["input"], ["same"])],
        "outputs",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in names],
        [numpy_helper.from_array(constant, "constant")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), tmp_path / "m.onnx")
    outputs = tuple(TensorSpec(name, "float32", shape) for name in names)
    feed = np.ones((2, 3), np.float32)
    with OnnxRuntimeRunner(tmp_path / "m.onnx", Signature((TensorSpec("input", "float32", shape),), outputs)) as runner:
        assert runner._new_outputs
        first = runner.run({"input": feed})
        for array in first.values():
            assert array.flags.c_contiguous
            assert array.flags.writeable
            array[:] = 7
        second = runner.run({"input": feed})
    assert (feed == 1).all()
    assert all((array == 7).all() for array in first.values())
    np.testing.assert_array_equal(second["constant"], constant)
    np.testing.assert_array_equal(second["same"], feed)


def test_the_direct_run_is_that_of_the_session(bundle: Bundle) -> None:
    """It uses a private attribute of onnxruntime, and falls back to the public method without it."""
    with OnnxRuntimeRunner(bundle.file(MODEL_ONNX), bundle.manifest.signature) as runner:
        session, feeds = runner._session, {"input": X}
        assert direct_run(session) == session._sess.run
        (expected,) = session.run(["logits"], feeds)
        (found,) = direct_run(session)(["logits"], feeds, None)
        np.testing.assert_array_equal(found, expected)
        plain = SimpleNamespace(run=session.run)
        assert direct_run(plain) == session.run


def test_the_levels_are_really_different_graphs(bundle: Bundle) -> None:
    nodes = {}
    for level in OPTIMISATIONS:
        settings = RunSettings(optimisation=level)
        with OnnxRuntimeRunner(bundle.file(MODEL_ONNX), bundle.manifest.signature, settings=settings) as runner:
            nodes[level] = runner._session.get_session_options().graph_optimization_level.name
    assert nodes == LEVELS


def test_the_options_passed_to_cuda() -> None:
    assert provider_options(CUDA, RunSettings())["use_tf32"] == "0"
    assert provider_options(CUDA, RunSettings("tf32"))["use_tf32"] == "1"
    found = [provider_options(CUDA, RunSettings(conv_search=name))["cudnn_conv_algo_search"] for name in CONV_SEARCHES]
    assert found == ["HEURISTIC", "DEFAULT", "EXHAUSTIVE"]


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "not an? "), (b"hello world\n" * 50, "not an? "), ("half", "not an? "), (None, "can't be read")],
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
        (signature(name="image"), r"has the inputs \['input'\], the manifest states \['image'\]"),
        (signature(dtype="float64"), "is float32, the manifest states float64"),
        (signature(shape=("batch", 3, 28, 28)), "the manifest states batchx3x28x28"),
        (signature(shape=("batch", 1, 784)), "the manifest states batchx1x784"),
        (signature(shape=(1, 1, 28, 28)), "the manifest states 1x1x28x28"),
        (signature(classes=7), "the manifest states batchx7"),
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
    with pytest.raises(BundleError, match="in another file"):
        OnnxRuntimeRunner(file, bundle.manifest.signature)


def test_cuda_never_answers_from_the_cpu(bundle: Bundle, capfd: pytest.CaptureFixture[str]) -> None:
    """Without a GPU the error names the missing part. With a GPU every node is on it."""
    if problem("cuda") is None:
        with OnnxRuntimeRunner(bundle.file(MODEL_ONNX), bundle.manifest.signature, device="cuda") as runner:
            assert runner.effective_device == "cuda:0"
            assert runner.description["placement"] == "3 shape nodes on the CPU"
        return
    with pytest.raises(RuntimeUnavailable, match=r"onnxruntime-cuda can't run here: .") as caught:
        OnnxRuntimeRunner(bundle.file(MODEL_ONNX), bundle.manifest.signature, device="cuda")
    assert "\n" not in caught.value.message
    assert capfd.readouterr() == ("", "")


def test_an_onnxruntime_without_cuda_reports_it(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(RuntimeUnavailable, match="built without CUDA"):
        OnnxRuntimeRunner(bundle.file(MODEL_ONNX), bundle.manifest.signature, device="cuda")
