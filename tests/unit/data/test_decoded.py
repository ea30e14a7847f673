"""Pictures are decoded once, by the first process, whole or not at all, to the same pixels as for prediction."""

import os

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from support.decoding import left, load, one_by_one
from support.pictures import COLOURS, GREY, random_picture, write_parts, write_picture, write_pictures

from bnexport.data import decoded
from bnexport.data.folder import load_folder_part
from bnexport.data.preprocessing import Preprocessing

#: Ending -> what it may keep.
KINDS = {
    ".png": ("L", "RGB", "RGBA", "P", "1", "16 bits"),
    ".jpg": ("L", "RGB"),
    ".jpeg": ("L", "RGB", "CMYK"),
    ".bmp": ("L", "RGB", "P"),
    ".webp": ("RGB", "RGBA"),
    ".gif": ("L", "P"),
}


# Pixels


def test_each_picture_keeps_its_label(tmp_path):
    root = write_parts(tmp_path / "set", train=6, test=20)
    dataset = load(root)
    found = dict(zip((image.tobytes() for image in dataset.test_images), dataset.test_labels.tolist(), strict=True))
    test = [image.tobytes() for image in one_by_one(root, "val", GREY)]
    assert [found[content] for content in test] == [0] * 20 + [1] * 20


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kinds=st.lists(
        st.sampled_from([(ending, mode) for ending, modes in KINDS.items() for mode in modes]), min_size=2, max_size=5
    ),
    size=st.tuples(st.integers(1, 14), st.integers(1, 14)),
    turned=st.integers(0, 8),
    wanted=st.tuples(st.sampled_from([1, 3]), st.integers(1, 9), st.integers(1, 9)),
)
def test_the_map_is_what_one_by_one_decoding_gives(tmp_path_factory, kinds, size, turned, wanted):
    root = tmp_path_factory.mktemp("set") / "set"
    for index, (ending, mode) in enumerate(kinds):
        exif = Image.Exif()
        exif[0x0112] = turned
        for part in ("train", "val"):
            file = root / part / "ab"[index % 2] / f"{index}{ending}"
            file.parent.mkdir(parents=True, exist_ok=True)
            options = {"exif": exif} if ending in (".jpg", ".jpeg", ".webp", ".png") else {}
            random_picture(index + (part == "val") * 50, mode=mode, size=size).save(file, **options)
    # Pictures of a few pixels may be the same in both parts, which is refused.
    contents = [file.read_bytes() for file in root.rglob("*.*") if file.is_file()]
    assume(len(set(contents)) == len(contents))
    channels, height, width = wanted
    preprocessing = Preprocessing(channels, height, width, mean=(0.0,) * channels, std=(1.0,) * channels)
    for dataset in (load(root, preprocessing), load(root, preprocessing)):  # built, then from the cache
        assert isinstance(dataset.train_images, np.memmap)
        assert dataset.train_images.dtype == np.uint8
        assert not dataset.train_images.flags.writeable
        assert np.array_equal(dataset.train_images, one_by_one(root, "train", preprocessing))
        test = one_by_one(root, "val", preprocessing)  # they are mixed
        assert sorted(image.tobytes() for image in dataset.test_images) == sorted(image.tobytes() for image in test)


def test_names_in_any_encoding(tmp_path):
    root = write_parts(tmp_path / "set")
    odd = os.path.join(os.fsencode(root), b"train", b"cat", b"\xff\xe9.png")
    try:
        os.rename(root / "train" / "cat" / "1.png", odd)
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    for _ in range(2):
        assert len(load(root).train_images) == 6


def test_of_an_animation_the_first_frame_counts(tmp_path):
    frames = [random_picture(seed, mode="L", size=(5, 6)) for seed in (1, 2)]
    for name in ("a/1.gif", "a/2.gif", "b/1.gif", "b/2.gif"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        frames[0].save(tmp_path / "set" / name, save_all=True, append_images=frames[1:])
    assert np.array_equal(load(tmp_path / "set").train_images[0, 0], np.asarray(frames[0]))


def test_progress_is_reported_only_while_pictures_are_decoded(tmp_path):
    reported = []
    root = write_parts(tmp_path / "set")
    load(root, progress=lambda *now: reported.append(now))
    assert reported == [(1, 6), (2, 6), (3, 6), (4, 6), (5, 6), (6, 6), (1, 4), (2, 4), (3, 4), (4, 4)]
    load(root, progress=lambda *now: reported.append(now))
    assert len(reported) == 10


def test_one_part_alone_decodes_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(decoded, "cache_folder", lambda: tmp_path / "cache")
    root = write_parts(tmp_path / "set")
    pixels, labels = load_folder_part(root, "test", preprocessing=COLOURS)
    assert [name.partition("-")[0] for name in left(root)] == ["test"]
    dataset = load(root, COLOURS)
    assert np.array_equal(pixels, dataset.test_images)
    assert np.array_equal(labels, dataset.test_labels)
    assert np.array_equal(load_folder_part(root, "train", preprocessing=COLOURS)[0], dataset.train_images)


def test_one_part_of_a_split_folder_is_that_of_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(decoded, "cache_folder", lambda: tmp_path / "cache")
    root = write_pictures(tmp_path / "set", *(f"{label}/{n}.png" for label in "ab" for n in range(12)))
    dataset = load(root)
    assert np.array_equal(load_folder_part(root, "test", preprocessing=GREY)[0], dataset.test_images)
    assert np.array_equal(load_folder_part(root, "train", preprocessing=GREY)[1], dataset.train_labels)


# When it is decoded again


def test_nothing_new_nothing_decoded(tmp_path, built):
    root = write_parts(tmp_path / "set")
    first, second = load(root), load(root)
    assert len(built) == 2  # the two parts, once
    assert np.array_equal(first.train_images, second.train_images)


def changed(root):
    write_picture(root / "train" / "cat" / "1.png", 99, mode="RGBA")


def touched(root):
    os.utime(root / "train" / "cat" / "1.png", ns=(1, 1))


def one_more(root):
    write_picture(root / "train" / "cat" / "9.png")


def one_less(root):
    (root / "train" / "cat" / "1.png").unlink()


def renamed(root):
    (root / "train" / "cat" / "1.png").rename(root / "train" / "cat" / "7.png")


def moved(root):
    (root / "train" / "cat" / "1.png").rename(root / "train" / "dog" / "7.png")


@pytest.mark.parametrize("change", [changed, touched, one_more, one_less, renamed, moved])
def test_a_changed_folder_is_decoded_again_and_the_old_entry_goes(tmp_path, built, change):
    root = write_parts(tmp_path / "set")
    load(root)
    load(root, COLOURS)
    before = left(root)
    change(root)
    dataset = load(root)
    assert [name.partition("-")[0] for name in built] == ["train", "test"] * 2 + ["train"]
    assert np.array_equal(dataset.train_images, one_by_one(root, "train", GREY))
    after = left(root)
    assert len([name for name in after if name.startswith("train")]) == 1  # outdated ones of every size are gone
    assert [name for name in after if name.startswith("test")] == [name for name in before if name.startswith("test")]


def test_two_sizes_are_kept_next_to_each_other(tmp_path, built):
    root = write_parts(tmp_path / "set")
    for _ in range(2):
        load(root)
        load(root, COLOURS)
    assert len(built) == 4


def test_two_folders_do_not_share_a_cache(tmp_path, built):
    for name in ("x", "y"):
        load(write_parts(tmp_path / name))
    assert len(built) == 4
    assert len(left(tmp_path / "x")) == 4


def test_another_pillow_decodes_again(tmp_path, built, monkeypatch):
    root = write_parts(tmp_path / "set")
    load(root)
    monkeypatch.setattr("PIL.__version__", "0.1")
    load(root)
    assert len(built) == 4


def truncated(entry):
    content = (entry / "pixels.bin").read_bytes()
    (entry / "pixels.bin").write_bytes(content[:-1])


def grown(entry):
    (entry / "pixels.bin").write_bytes((entry / "pixels.bin").read_bytes() + b"\0")


def without(name):
    return lambda entry: (entry / name).unlink()


def index_of(text):
    return lambda entry: (entry / "index.json").write_text(text)


@pytest.mark.parametrize(
    "damage",
    [
        truncated, grown, without("pixels.bin"), without("index.json"), index_of(""), index_of("[]"), index_of("{}"),
        index_of('{"skipped": [1]}'), index_of('{"skipped": [["train/cat/1.png", "x"]]}'),
    ],
)  # fmt: skip
def test_a_damaged_entry_is_built_again(tmp_path, built, damage):
    root = write_parts(tmp_path / "set")
    load(root)
    (entry,) = (tmp_path / "cache").glob("folders/*/train-*")
    damage(entry)
    assert np.array_equal(load(root).train_images, one_by_one(root, "train", GREY))
    assert len(built) == 3
