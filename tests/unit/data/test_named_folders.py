"""Folders of images by their names, as every data set goes."""

import numpy as np
import pytest
from support.pictures import COLOURS, write_parts

from bnexport.data import dataset_table
from bnexport.data.datasets import dataset_labels, load_dataset, load_test_images, load_train_images
from bnexport.errors import DataError, UsageError


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """The name of a folder of images, with an empty cache."""
    monkeypatch.setattr("bnexport.data.decoded.cache_folder", lambda: tmp_path / "cache")
    return f"folder:{write_parts(tmp_path / 'set')}"


def test_a_folder_goes_by_its_name(pictures, tmp_path):
    reported = []
    dataset = load_dataset(pictures, preprocessing=COLOURS, on_picture=lambda *now: reported.append(now))
    assert dataset.name == pictures
    assert dataset.train_images.shape == (6, 3, 6, 5)
    assert reported[-1] == (4, 4)
    images, labels = load_test_images(pictures, preprocessing=COLOURS)
    assert np.array_equal(images, dataset.test_images)
    assert np.array_equal(labels, dataset.test_labels)
    images, labels = load_train_images(pictures, preprocessing=COLOURS)
    assert np.array_equal(images, dataset.train_images)
    assert np.array_equal(labels, dataset.train_labels)
    assert dataset_labels(pictures) == dataset.labels == ("cat", "dog")
    assert dataset_labels("digits") == tuple("0123456789")


def test_a_folder_that_moved_is_found_by_data_dir(pictures, tmp_path):
    (tmp_path / "set").rename(tmp_path / "new")
    for load in (load_dataset, load_test_images):
        with pytest.raises(DataError, match="does not exist") as caught:
            load(pictures, preprocessing=COLOURS)
        assert "--data-dir" in caught.value.remedy
    assert load_dataset(pictures, data_dir=tmp_path / "new", preprocessing=COLOURS).name == pictures
    assert len(load_test_images(pictures, data_dir=tmp_path / "new", preprocessing=COLOURS)[1]) == 4
    assert len(load_train_images(pictures, data_dir=tmp_path / "new", preprocessing=COLOURS)[1]) == 6
    assert dataset_labels(pictures, data_dir=tmp_path / "new") == ("cat", "dog")


@pytest.mark.parametrize("load", [load_dataset, load_test_images, load_train_images])
def test_a_folder_needs_a_size_and_a_path(pictures, load):
    with pytest.raises(UsageError, match="the image size"):
        load(pictures)
    with pytest.raises(UsageError, match="does not name a folder") as caught:
        load("folder:", preprocessing=COLOURS)
    assert "folder:PATH" in caught.value.remedy
    with pytest.raises(UsageError, match="unknown") as caught:
        load("foldr:x", preprocessing=COLOURS)
    assert "folder:PATH" in caught.value.remedy


@pytest.mark.parametrize(
    ("name", "known"), [("mnist", True), ("folder:x", True), ("folder:", False), ("cifar", False), ("", False)]
)
def test_names_of_data_sets(name, known):
    assert dataset_table.is_dataset(name) is known
