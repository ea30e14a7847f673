import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.bundles import SIGNATURE, copy_bundle, network, reseal, tuned_copy

from bnexport.bundle import MODEL_ONNX, Bundle
from bnexport.data.datasets import load_dataset
from bnexport.data.preprocessing import Preprocessing
from bnexport.errors import BundleError, DataError, UsageError
from bnexport.serving import served_model
from bnexport.serving.predictor import Predictor, labelled, predict_images
from bnexport.serving.repository import Repository
from bnexport.serving.served_model import ServingSettings, open_served
from bnexport.tensors import Signature, TensorSpec

IMAGES = load_dataset("digits").test_images[:20]


def expected(images: np.ndarray) -> np.ndarray:
    """Logits of the original network."""
    with torch.no_grad():
        return network()(torch.from_numpy(Preprocessing().apply(images))).numpy()


def refusal(kind: type[Exception], path: Path | Bundle, **options: object) -> str:
    with pytest.raises(kind) as caught:
        Predictor(path, **options)
    assert caught.value.remedy
    return caught.value.message


def test_images_are_labelled_as_the_network_does(bundle: Bundle, tmp_path: Path) -> None:
    np.save(tmp_path / "stack.npy", IMAGES)
    Image.fromarray(IMAGES[3]).save(tmp_path / "one.png")
    predictions = predict_images(bundle.path, tmp_path / "stack.npy", str(tmp_path / "one.png"))
    names = [f"{tmp_path / 'stack.npy'}[{index}]" for index in range(20)] + [str(tmp_path / "one.png")]
    assert [prediction.image for prediction in predictions] == names
    want = expected(np.concatenate([IMAGES, IMAGES[3:4]]))
    assert np.allclose([prediction.logits for prediction in predictions], want, rtol=0, atol=2e-5)
    assert [prediction.index for prediction in predictions] == want.argmax(1).tolist()
    assert [prediction.label for prediction in predictions] == [str(index) for index in want.argmax(1)]
    softmax = torch.from_numpy(want).double().softmax(1).amax(1).tolist()
    assert [prediction.probability for prediction in predictions] == pytest.approx(softmax, rel=1e-3)


def test_a_prediction_is_plain_json(bundle: Bundle, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", IMAGES[0])
    (prediction,) = predict_images(bundle, tmp_path / "a.npy")
    value = json.loads(json.dumps(prediction.to_json(), allow_nan=False))
    assert list(value) == ["image", "index", "label", "probability", "logits"]
    assert (value["label"], len(value["logits"]), tuple(value["logits"])) == (prediction.label, 10, prediction.logits)


@pytest.mark.parametrize("batch_size", [1, 7, 20, 256])
def test_the_batch_size_changes_nothing_but_speed(bundle: Bundle, batch_size: int, monkeypatch) -> None:
    with Predictor(bundle, batch_size=batch_size) as predictor:
        sizes, run = [], predictor._runner.run
        monkeypatch.setattr(predictor._runner, "run", lambda feeds: sizes.append(len(feeds["input"])) or run(feeds))
        logits = predictor.logits(IMAGES)
    assert np.allclose(logits, expected(IMAGES), rtol=0, atol=2e-5)
    assert max(sizes) <= batch_size
    assert len(sizes) == math.ceil(20 / batch_size)


def test_no_images_give_no_logits(bundle: Bundle) -> None:
    with Predictor(bundle) as predictor:
        assert predictor.logits(IMAGES[:0]).shape == (0, 10)
        assert predictor.files() == []


def test_softmax_of_large_logits_does_not_overflow(bundle: Bundle) -> None:
    with Predictor(bundle) as predictor:
        prediction = labelled("x", np.array([-3e38, 3e38, 0.0], np.float32), predictor.bundle.manifest.labels)
    assert (prediction.index, prediction.label, prediction.probability) == (1, "1", 1.0)


def test_labels_in_another_order_are_refused_by_predict_and_serve(bundle: Bundle, tmp_path: Path) -> None:
    other = reseal(copy_bundle(bundle, tmp_path / "1"), labels=tuple("0123456798"))
    words = "the same names in another order; first difference at class 8: '9' and '8'"
    assert words in refusal(UsageError, other)
    with pytest.raises(UsageError, match=words):
        open_served("lenet", "1", other.path, ServingSettings())


@pytest.mark.parametrize(("labels", "label"), [(None, "2"), (("a", "b", "ç"), "ç"), (("a", "b"), "2")])
def test_a_class_without_a_name_goes_by_its_index(bundle: Bundle, tmp_path: Path, labels, label: str) -> None:
    other = reseal(copy_bundle(bundle, tmp_path / "1"), labels=labels)
    with Predictor(other) as predictor:
        assert labelled("x", np.array([0.0, 1.0, 2.0], np.float32), predictor.bundle.manifest.labels).label == label


def test_the_bundle_s_own_preprocessing_is_used(bundle: Bundle, tmp_path: Path) -> None:
    preprocessing = Preprocessing(scale=1 / 100, mean=(0.5,), std=(2.0,))
    other = reseal(copy_bundle(bundle, tmp_path / "1"), preprocessing=preprocessing.to_json())
    with Predictor(other) as predictor, torch.no_grad():
        want = network()(torch.from_numpy(preprocessing.apply(IMAGES))).numpy()
        assert np.allclose(predictor.logits(IMAGES), want, rtol=0, atol=2e-5)
        assert not np.allclose(want, expected(IMAGES), rtol=0, atol=1e-3)


@pytest.mark.parametrize("runtime", ["torch-cpu", "torchscript-cpu"])
def test_another_runtime_agrees(bundle: Bundle, runtime: str) -> None:
    with Predictor(bundle, runtime=runtime) as predictor:
        assert np.allclose(predictor.logits(IMAGES), expected(IMAGES), rtol=0, atol=2e-5)


def test_it_needs_no_torch(bundle: Bundle, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", IMAGES[:2])
    code = (
        "import sys; from bnexport.serving.predictor import predict_images; "
        f"assert len(predict_images({str(bundle.path)!r}, {str(tmp_path / 'a.npy')!r})) == 2; "
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_changed_bundle_is_refused_before_an_engine_opens_it(bundle: Bundle, tmp_path: Path) -> None:
    folder = copy_bundle(bundle, tmp_path / "1")
    (folder / MODEL_ONNX).write_bytes(b"x" * (folder / MODEL_ONNX).stat().st_size)
    assert "model.onnx was changed" in refusal(BundleError, folder)


WIDE = Signature((SIGNATURE.inputs[0], TensorSpec("flag", "bool", ("batch",))), SIGNATURE.outputs)
IMAGE_OUT = Signature(SIGNATURE.inputs, (TensorSpec("mask", "float32", ("batch", 1, 28, 28)),))


@pytest.mark.parametrize("changes", [{"preprocessing": None}, {"signature": WIDE}, {"signature": IMAGE_OUT}])
def test_models_that_are_not_image_classifiers_are_refused(bundle: Bundle, tmp_path: Path, changes) -> None:
    reseal(copy_bundle(bundle, tmp_path / "1"), **changes)
    assert "is not an image classifier" in refusal(BundleError, tmp_path / "1")
    other = copy_bundle(bundle, tmp_path / "other")
    reseal(other, preprocessing=Preprocessing(height=32).to_json())
    assert "takes float32 of 1x28x28, but its preprocessing makes float32 of 1x32x28" in refusal(BundleError, other)


def test_the_remedy_names_options_that_exist(bundle: Bundle, tmp_path: Path) -> None:
    from bnexport.cli.fold_and_export import command

    reseal(copy_bundle(bundle, tmp_path / "1"), preprocessing=None)
    with pytest.raises(BundleError) as caught:
        Predictor(tmp_path / "1")
    named = {word.strip(",.") for word in caught.value.remedy.split() if word.startswith("--")}
    assert named
    assert named <= {option for parameter in command.params for option in parameter.opts}


def test_a_damaged_preprocessing_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    reseal(copy_bundle(bundle, tmp_path / "1"), preprocessing={"scale": "x"})
    assert "preprocessing" in refusal(DataError, tmp_path / "1")


def test_bad_arguments(bundle: Bundle, tmp_path: Path) -> None:
    assert "no-such" in refusal(UsageError, bundle, runtime="no-such")
    for size in (0, -1):
        assert refusal(UsageError, bundle, batch_size=size) == f"the batch size is {size}"
    assert "does not exist" in refusal(BundleError, tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("images", "message"),
    [(IMAGES.astype(np.float32), "float32, expected uint8"), (IMAGES[:, :27], "shape 27x28, expected 28x28x1")],
)
def test_images_that_do_not_fit_are_refused(bundle: Bundle, images: np.ndarray, message: str) -> None:
    with Predictor(bundle) as predictor, pytest.raises(DataError, match=message):
        predictor.logits(images)


def test_a_file_that_is_not_an_image_is_named(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("no image")
    for name, message in (("a.txt", "is not a PNG"), ("nowhere.png", "does not exist")):
        with pytest.raises(DataError, match=rf"{name} {message}"):
            predict_images(bundle, tmp_path / name)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_answer_that_is_not_finite_is_an_error(bundle: Bundle, monkeypatch, value: float) -> None:
    with Predictor(bundle) as predictor:
        monkeypatch.setattr(predictor._runner, "run", lambda _: {"logits": np.full((1, 10), value, np.float32)})
        with pytest.raises(DataError, match="contains NaN or infinity"):
            predictor.logits(IMAGES[:1])


def test_leaving_the_block_closes_the_runner(bundle: Bundle) -> None:
    with Predictor(bundle) as predictor:
        pass
    with pytest.raises(UsageError, match="closed"):
        predictor.logits(IMAGES[:1])


#: Options of serve with ``--workers auto`` -> sessions, threads, largest batch, and the line of the log.
TUNED: list[tuple[dict[str, object], dict[str, object], tuple[int, int, int], str | None]] = [
    ({}, {}, (3, 2, 32), "tuned: 3 sessions x 2 threads, batch 32"),
    ({}, {"max_batch": 8}, (3, 2, 8), "tuned: 3 sessions x 2 threads, batch 8"),
    ({}, {"workers": 2}, (2, 1, 64), None),
    ({"runtime": "torch-cpu"}, {}, (1, 1, 64), "not tuned: tuned.json has another runtime for the goal throughput: torch-cpu"),
    ({}, {"processes": 4096}, (1, 1, 64), "not tuned: tuned.json was measured with one process; this server has 4096"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "options", "expected", "line"), TUNED)
async def test_a_tuning_sets_sessions_threads_and_batch_of_a_server(
    bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, object],
    options: dict[str, object],
    expected: tuple[int, int, int],
    line: str | None,
) -> None:
    monkeypatch.setattr(served_model, "INLINE_SECONDS", 0.0)  # as for a model that is too slow for the event loop
    monkeypatch.setattr(served_model, "available_cores", lambda: 1)
    mine = tuned_copy(bundle, tmp_path / "tuned", monkeypatch, **changes)
    events: list[tuple[str, Any]] = []
    repository = Repository(mine.path, ServingSettings(**options), lambda what, **found: events.append((what, found)))
    repository.load()
    served = repository.resolve("bn_lenet")
    try:
        assert (served.batcher.workers, served.threads, served.batcher.limits.rows) == expected
        assert served.config()["parameters"] == {"intra_op_thread_count": {"string_value": str(expected[1])}}
        assert [fields["result"] for what, fields in events if what == "tuning"] == ([] if line is None else [line])
    finally:
        await served.close()


@pytest.mark.parametrize(("tuned", "line"), [(True, "tuned: 1 session x 2 threads, batch 32"), (False, None)])
async def test_a_model_on_the_event_loop_keeps_one_session(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tuned: bool, line: str | None
) -> None:
    """The cost is compared once at the start, and no further session is opened and measured."""
    mine = tuned_copy(bundle, tmp_path / "tuned", monkeypatch) if tuned else bundle
    monkeypatch.setattr(served_model, "add_workers", lambda *_, **__: pytest.fail("not needed"))
    for seconds, settings in ((1e9, ServingSettings()), (0.0, ServingSettings(workers=1))):
        monkeypatch.setattr(served_model, "INLINE_SECONDS", seconds)
        served = open_served("lenet", "1", mine.path, settings)
        assert (served.batcher.workers, served.tuning) == (1, line if settings.workers is None else None)
        await served.close()
    assert (served.threads, served.batcher.limits.rows) == (1, 64)
