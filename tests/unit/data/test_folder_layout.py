"""Layouts of folders of images: those that are found, and those that are refused with one sentence."""

import os
import shutil
from pathlib import Path

import pytest
from support.pictures import COLOURS, GREY, write_parts, write_picture, write_pictures

from bnexport.data.decoded import PictureFile
from bnexport.data.folder import folder_layout, hold_out, list_part, load_folder
from bnexport.errors import DataError, UsageError


def load(root, **options):
    return load_folder(root, preprocessing=GREY, cache_dir=root.parent / "cache", **options)


def names(root):
    layout = folder_layout(root)
    return [file.name for file in list_part(layout, layout.train)]


# Layouts that are read


def test_classes_are_sorted_as_torchvision_sorts_them(tmp_path):
    datasets = pytest.importorskip("torchvision.datasets")
    labels = ("b", "B", "10", "9", "ä", "a b", "_")
    for part in ("train", "val"):
        write_pictures(tmp_path, *(f"{part}/{label}/{name}.png" for label in labels for name in ("2", "10", "deep/1")))
    theirs = datasets.ImageFolder(tmp_path / "train")
    assert list(folder_layout(tmp_path).labels) == theirs.classes
    layout = folder_layout(tmp_path)
    ours = {(file.name, file.label) for file in list_part(layout, layout.train)}
    assert ours == {(Path(path).relative_to(tmp_path).as_posix(), label) for path, label in theirs.samples}


@pytest.mark.parametrize("name", ["val", "test"])
def test_two_parts(tmp_path, name):
    dataset = load(write_parts(tmp_path / "set", name=name))
    assert dataset.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert sorted(dataset.test_labels) == [0, 0, 1, 1]
    assert dataset.labels == ("cat", "dog")
    assert dataset.origin == f"{tmp_path / 'set'}, train and {name}"
    assert dataset.name == f"folder:{tmp_path / 'set'}"


def test_with_test_and_val_val_is_not_used_and_this_is_reported(tmp_path):
    write_parts(tmp_path / "set", name="val", test=1)
    write_parts(tmp_path / "set", name="test", test=2)
    dataset = load(tmp_path / "set")
    assert len(dataset.test_labels) == 4
    assert "val is not used" in dataset.origin


def test_without_parts_a_share_of_each_class_is_held_out_and_this_is_reported(tmp_path):
    root = write_pictures(tmp_path / "set", *(f"cat/{n}.png" for n in range(20)), *(f"dog/{n}.png" for n in range(3)))
    dataset = load(root)
    assert sorted(dataset.test_labels) == [0, 0, 1]
    assert dataset.train_labels.tolist() == [0] * 18 + [1] * 2
    assert "3 of 23 images held out" in dataset.origin
    assert "seed 0" in dataset.origin
    assert len(load(root, holdout=0.5).test_labels) == 10 + 2


def test_train_alone_is_split_too(tmp_path):
    write_pictures(tmp_path / "set", *(f"train/{c}/{n}.png" for c in "ab" for n in range(4)))
    dataset = load(tmp_path / "set")
    assert (len(dataset.train_labels), len(dataset.test_labels)) == (6, 2)


def test_a_class_may_be_called_train(tmp_path):
    write_pictures(tmp_path, "car/1.png", "train/1.png")
    assert folder_layout(tmp_path).labels == ("car", "train")


def test_hidden_entries_and_other_files_do_not_count(tmp_path):
    write_pictures(tmp_path, "a/1.png", "b/1.PNG", "b/.hidden.png", ".git/1.png")
    for name in ("README.md", "a/notes.txt", "a/.DS_Store"):
        (tmp_path / name).write_text("x")
    assert folder_layout(tmp_path).labels == ("a", "b")
    assert names(tmp_path) == ["a/1.png", "b/1.PNG"]


def test_a_linked_picture_counts(tmp_path):
    write_pictures(tmp_path / "set", "a/1.png", "b/1.png")
    (tmp_path / "set" / "a" / "2.png").symlink_to(write_picture(tmp_path / "store" / "x" / "2.png"))
    assert names(tmp_path / "set") == ["a/1.png", "a/2.png", "b/1.png"]


def test_the_first_test_images_are_a_fair_sample(tmp_path):
    write_pictures(tmp_path / "set", *(f"{p}/{c}/{n}.png" for p in ("train", "val") for c in "ab" for n in range(30)))
    labels = load(tmp_path / "set").test_labels
    assert 10 <= int(labels[:30].sum()) <= 20
    assert int(labels.sum()) == 30


# The split


def files(*counts):
    return [PictureFile(f"{label}/{n}.png", label, 1, 1) for label, count in enumerate(counts) for n in range(count)]


def test_the_split_is_stratified_and_follows_the_seed():
    train, test = hold_out(files(100, 50), share=0.2)
    assert sorted(file.label for file in test) == [0] * 20 + [1] * 10
    assert not {file.name for file in train} & {file.name for file in test}
    assert len(train) + len(test) == 150
    assert hold_out(files(100, 50), share=0.2) == (train, test)
    assert hold_out(files(100, 50), share=0.2, seed=1)[1] != test


def test_a_folder_that_grows_keeps_nearly_all_of_its_split():
    before = {file.name for file in hold_out(files(100, 100))[0]}
    after = {file.name for file in hold_out(files(110, 110))[1]}
    assert len(before & after) <= 4  # trained with before, tested with after; a fresh draw would give about 20


def test_one_picture_is_left_and_one_is_held_out():
    for share in (0.01, 0.99):
        assert [len(part) for part in hold_out(files(2, 2), share=share)] == [2, 2]


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0, float("nan")])
def test_a_share_that_is_none(share):
    with pytest.raises(UsageError, match="share"):
        hold_out(files(2, 2), share=share)


def test_a_class_of_one_picture_can_not_be_split():
    with pytest.raises(DataError, match=r"1/0\.png is the only image of its class"):
        hold_out(files(2, 1))


# Layouts that are refused


def empty_class(root):
    write_parts(root)
    shutil.rmtree(root / "train" / "dog")
    (root / "train" / "dog").mkdir()


def class_is_a_file(root):
    write_parts(root)
    shutil.rmtree(root / "train" / "dog")
    (root / "train" / "dog").write_text("x")


def class_only_in(part):
    return lambda root: write_pictures(write_parts(root), f"{part}/emu/1.png")


def same_picture(root):
    write_parts(root)
    shutil.copy(root / "train" / "cat" / "1.png", root / "val" / "cat" / "1.png")


def loop(root):
    write_parts(root)
    (root / "train" / "cat" / "more").symlink_to(root / "train")


def link_to_itself(root):
    write_parts(root)
    (root / "train" / "cat" / "self").symlink_to("self")


def val_is_train(root):
    write_parts(root)
    shutil.rmtree(root / "val")
    (root / "val").symlink_to("train")


def dead_link(root):
    (write_parts(root) / "train" / "cat" / "x.png").symlink_to("nowhere")


def pipe(root):
    os.mkfifo(write_parts(root) / "train" / "cat" / "x.png")


def too_deep(root):
    write_picture(write_parts(root) / "train" / "cat" / "/".join("abcdefghijklmnopq") / "x.png")


def a_file(root):
    root.write_text("x")


def renamed_val(root):
    write_parts(root, name="valid")


REFUSED = {
    "no folder": (lambda root: None, "does not exist", "--data-dir"),
    "a file": (a_file, "is a file, not a folder", "--data-dir"),
    "nothing": (lambda root: root.mkdir(), "has no class folders", "PATH/train/CLASS"),
    "pictures without classes": (
        lambda root: write_pictures(root, "1.png"), "has the image 1.png outside of the class folders", "class folder",
    ),
    "a picture beside classes": (
        lambda root: write_pictures(write_parts(root), "train/x.jpg"), "x.jpg outside of the class folders", "class folder",
    ),
    "parts without classes": (
        lambda root: write_pictures(root, "train/1.png", "val/1.png"), "no classes in train", "PATH/train/CLASS"
    ),
    "an unknown part": (renamed_val, "'valid', but no val or test", "val"),
    "one class": (lambda root: write_pictures(root, "cat/1.png"), "only the class 'cat'", "two classes"),
    "no pictures at all": (lambda root: [(root / name).mkdir(parents=True) for name in "ab"], "has no image", "delete"),
    "an empty class": (empty_class, "dog has no image", "delete"),
    "a class that is a file": (class_is_a_file, "dog is a file, not a class folder", "folder with images"),
    "a class only in train": (class_only_in("train"), "emu is missing", "'emu'"),
    "a class only in val": (class_only_in("val"), "emu is missing", "'emu'"),
    "a picture in both parts": (same_picture, "is the same image as", "Delete one"),
    "a loop of links": (loop, "leads to", "Remove the link"),
    "a link to itself": (link_to_itself, "can't be read", "links"),
    "val is train": (val_is_train, "leads to", "Remove the link"),
    "a link to nowhere": (dead_link, "x.png can't be read", "broken link"),
    "a pipe": (pipe, "is not a plain file", "Remove it"),
    "too deep": (too_deep, "folders deep", "Move it to a higher folder"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "message", "remedy"), REFUSED.values(), ids=REFUSED)
def test_folders_that_are_not_data_sets_are_refused_with_a_sentence(tmp_path, make, message, remedy):
    root = tmp_path / "x" / "set"
    root.parent.mkdir()
    make(root)
    with pytest.raises(DataError) as caught:
        load(root)
    assert message in caught.value.message
    assert str(root) in caught.value.message
    assert remedy in caught.value.remedy
    assert "\n" not in str(caught.value)


def test_two_pictures_of_one_name_are_two_pictures(tmp_path):
    write_parts(tmp_path / "set")
    for part, colour in (("train", 7), ("val", 8)):  # as large as each other
        write_picture(tmp_path / "set" / part / "cat" / "9.bmp", colour)
    assert len(load(tmp_path / "set").test_labels) == 5


def test_a_folder_that_may_not_be_read(tmp_path, monkeypatch):
    write_parts(tmp_path / "set")
    really = os.scandir

    def refuse(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return really(path)

    monkeypatch.setattr(os, "scandir", refuse)  # root may read everything
    with pytest.raises(DataError, match=r"dog can't be read: .*Permission denied") as caught:
        load(tmp_path / "set")
    assert "permissions" in caught.value.remedy


def test_a_model_of_two_channels(tmp_path):
    two = type(COLOURS)(2, 6, 5, mean=(0.0, 0.0), std=(1.0, 1.0))
    with pytest.raises(DataError, match="2 channels") as caught:
        load_folder(write_parts(tmp_path / "set"), preprocessing=two, cache_dir=tmp_path / "cache")
    assert "3x64x64" in caught.value.remedy
