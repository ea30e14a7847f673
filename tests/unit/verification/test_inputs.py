from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.bundles import manifest
from support.pictures import COLOURS, write_parts

from bnexport.bundle import Manifest
from bnexport.data.datasets import load_test_images
from bnexport.data.preprocessing import Preprocessing
from bnexport.errors import DataError, UsageError
from bnexport.tensors import Signature, TensorSpec
from bnexport.verification.budget import Work, budget_of
from bnexport.verification.inputs import build_suite

GOLDEN = {"input": np.zeros((3, 1, 28, 28), np.float32)}


def suite_of(described: Manifest, golden: dict[str, np.ndarray] = GOLDEN, *, limit: int = 10_000, **options: object):
    return build_suite(
        described, golden, **{"data_dir": None, "seed": 0, "budget": budget_of(Work(1), most=limit), **options}
    )


def test_real_images_go_through_the_bundles_own_preprocessing() -> None:
    described = replace(manifest(), preprocessing=Preprocessing(mean=(0.5,), std=(0.25,)).to_json())
    suite = suite_of(described)
    pixels, labels = load_test_images("digits")
    images = suite.batches[0]
    assert images.name == "images"
    assert images.n == len(pixels)
    np.testing.assert_allclose(images.feeds["input"][:9, 0], (pixels[:9] / 255 - 0.5) / 0.25, atol=1e-6)
    np.testing.assert_array_equal(suite.labels, labels)
    assert suite.images == f"{len(pixels)} test images of digits"


def test_synthetic_inputs() -> None:
    suite = suite_of(manifest())
    by_name = {batch.name: batch.feeds["input"] for batch in suite.batches}
    assert list(by_name) == ["images", "noise", "zeros", "ones", "one-hot"]
    assert all(array.dtype == np.float32 for array in by_name.values())
    assert set(np.unique(by_name["zeros"])) == {0}
    assert set(np.unique(by_name["ones"])) == {1}
    flat = by_name["one-hot"].reshape(784, 784)
    np.testing.assert_array_equal(flat, np.eye(784))  # every pixel of a 28x28 image once
    assert len(by_name["noise"]) > 64  # or the largest batch size would not be a part of it
    assert abs(float(by_name["noise"].std()) - 1) < 0.01


def test_the_seed_decides_the_noise() -> None:
    first, again, other = (suite_of(manifest(), seed=seed).batches[1].feeds["input"] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_the_limit_holds_for_every_batch() -> None:
    assert all(batch.n <= 20 for batch in suite_of(manifest(), limit=20).batches)
    assert suite_of(manifest(), limit=20).batches[0].n == 20


def test_unknown_and_absent_data_sets_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BNEXPORT_DATA", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    assert "names no data set" in suite_of(replace(manifest(), dataset=None)).images
    assert "cifar" in suite_of(replace(manifest(), dataset="cifar")).images
    absent = suite_of(replace(manifest(), dataset="fashion-mnist"))
    assert absent.images.startswith("no real images: ")
    assert absent.labels is None
    assert [batch.name for batch in absent.batches] == ["noise", "zeros", "ones", "one-hot"]
    with pytest.raises(DataError):
        suite_of(replace(manifest(), dataset="fashion-mnist"), data_dir=tmp_path / "nothing")


def test_images_of_another_size_are_reported() -> None:
    described = replace(manifest(), signature=Signature((TensorSpec("input", "float32", ("batch", 1, 32, 32)),), ()))
    suite = suite_of(described, {"input": np.zeros((2, 1, 32, 32), np.float32)})
    assert "no real images: of digits" in suite.images
    assert suite.batches[0].feeds["input"].shape[1:] == (1, 32, 32)


def test_integer_inputs_take_values_that_are_known_to_be_valid() -> None:
    signature = Signature(
        (TensorSpec("tokens", "int64", ("batch", "length")), TensorSpec("weight", "float32", ("batch", 2))), ()
    )
    golden = {"tokens": np.array([[3, 5, 9]]), "weight": np.zeros((1, 2), np.float32)}
    suite = suite_of(replace(manifest(), signature=signature), golden)
    assert [batch.name for batch in suite.batches] == ["noise", "zeros", "ones", "one-hot"]
    for batch in suite.batches:
        assert batch.feeds["tokens"].dtype == np.int64
        assert batch.feeds["tokens"].shape == (batch.n, 3)
        assert set(np.unique(batch.feeds["tokens"])) <= {3, 5, 9}
    assert set(np.unique(suite.batches[1].feeds["weight"])) == {0}
    only = Signature((signature.inputs[0],), ())
    assert [batch.name for batch in suite_of(replace(manifest(), signature=only), golden).batches] == ["noise"]


def test_a_fixed_batch_dimension_is_kept() -> None:
    described = replace(manifest(), signature=Signature((TensorSpec("input", "float32", (4, 1, 28, 28)),), ()))
    suite = suite_of(described, {"input": np.zeros((4, 1, 28, 28), np.float32)})
    assert [batch.n for batch in suite.batches] == [4, 4, 4, 4, 4]


def pictures(folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: object) -> Manifest:
    """A bundle of a network that was trained on a folder of images."""
    monkeypatch.setattr("bnexport.data.decoded.cache_folder", lambda: folder / "cache")
    described = replace(
        manifest(),
        dataset=f"folder:{write_parts(folder / 'set')}",
        preprocessing=COLOURS.to_json(),
        labels=("cat", "dog"),
        signature=Signature((TensorSpec("input", "float32", ("batch", 3, 6, 5)),), ()),
    )
    return replace(described, **changes)


def test_a_folder_of_images_is_decoded_to_the_bundles_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    described = pictures(tmp_path, monkeypatch)
    suite = suite_of(described, {"input": np.zeros((2, 3, 6, 5), np.float32)}, data_dir=tmp_path / "set")
    pixels, labels = load_test_images(described.dataset, preprocessing=COLOURS)
    np.testing.assert_array_equal(suite.batches[0].feeds["input"], pixels * np.float32(1 / 255))
    np.testing.assert_array_equal(suite.labels, labels)
    assert suite.images == f"4 test images of {described.dataset}"


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (("cat", "dog", "emu"), "differ in number, 3 and 2; first difference at class 2: 'emu' and nothing"),
        (("dog", "cat"), "are the same names in another order; first difference at class 0: 'dog' and 'cat'"),
        (("cat", "emu"), "differ; first difference at class 1: 'emu' and 'dog'"),
    ],
)
def test_a_folder_whose_classes_are_not_the_labels_is_refused(
    labels: tuple[str, ...], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    described = pictures(tmp_path, monkeypatch, labels=labels)
    with pytest.raises(UsageError) as caught:
        suite_of(described, {"input": np.zeros((2, 3, 6, 5), np.float32)}, data_dir=tmp_path / "set")
    assert caught.value.message.endswith(expected)


def test_a_folder_is_read_only_at_data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bundle comes from anywhere, and may name any folder of this machine."""
    described = pictures(tmp_path, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr("bnexport.data.datasets.load_folder_part", lambda *_, **__: pytest.fail("it was read"))
        patch.setattr("bnexport.data.datasets.folder_layout", lambda *_, **__: pytest.fail("it was looked at"))
        suite = suite_of(described, {"input": np.zeros((2, 3, 6, 5), np.float32)})
    assert suite.images == "no real images: a bundle may name any folder, so its images are read only with --data-dir"
    assert suite.labels is None
    (tmp_path / "set").rename(tmp_path / "new")
    moved = suite_of(described, {"input": np.zeros((2, 3, 6, 5), np.float32)}, data_dir=tmp_path / "new")
    assert moved.images.startswith("4 test images")


def test_images_are_fitted_to_the_model() -> None:
    described = replace(
        manifest(),
        preprocessing=Preprocessing(3, 32, 32, mean=(0.0,) * 3, std=(1.0,) * 3).to_json(),
        signature=Signature((TensorSpec("input", "float32", ("batch", 3, 32, 32)),), ()),
    )
    suite = suite_of(described, {"input": np.zeros((2, 3, 32, 32), np.float32)}, limit=30)
    images = suite.batches[0]
    assert (images.name, images.n) == ("images", 30)
    np.testing.assert_array_equal(images.feeds["input"][:, 0], images.feeds["input"][:, 2])
    assert suite.images == "30 test images of digits"
