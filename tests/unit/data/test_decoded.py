"""Pictures are decoded once, by whoever comes first, whole or not at all, and to what prediction makes of them."""

import contextlib
import os
import signal
import struct
import subprocess
import sys
import threading
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from support.pictures import COLOURS, GREY, png, random_picture, write_parts, write_picture, write_pictures

from bnexport.data import decoded, images
from bnexport.data.folder import load_folder, load_folder_part
from bnexport.data.images import load_images
from bnexport.data.preprocessing import Preprocessing
from bnexport.errors import DataError, MissingDependency, OutputError

#: Ending -> what it may keep.
KINDS = {
    ".png": ("L", "RGB", "RGBA", "P", "1", "16 bits"),
    ".jpg": ("L", "RGB"),
    ".jpeg": ("L", "RGB", "CMYK"),
    ".bmp": ("L", "RGB", "P"),
    ".webp": ("RGB", "RGBA"),
    ".gif": ("L", "P"),
}


def load(root, preprocessing=GREY, **options):
    return load_folder(root, preprocessing=preprocessing, cache_dir=root.parent / "cache", **options)


def one_by_one(root, part, preprocessing):
    """The pictures of a part as prediction reads them: (n, channels, height, width)."""
    files = sorted((root / part).rglob("*.*"), key=lambda file: (file.parts[len(root.parts) + 1], file.as_posix()))
    rows = [load_images(file, preprocessing)[0][1] for file in files]
    return np.stack([row[None] if row.ndim == 2 else row.transpose(2, 0, 1) for row in rows])


def left(root):
    """Entries of the cache, by the part that they are of."""
    return sorted(path.name for path in (root.parent / "cache").glob("folders/*/*"))


@pytest.fixture
def built(monkeypatch):
    """Counts builds."""
    calls = []
    really = decoded._build
    monkeypatch.setattr(decoded, "_build", lambda *given: [calls.append(given[0].name), really(*given)][1])
    return calls


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
    asked = Preprocessing(channels, height, width, mean=(0.0,) * channels, std=(1.0,) * channels)
    for dataset in (load(root, asked), load(root, asked)):  # built, then from the cache
        assert isinstance(dataset.train_images, np.memmap)
        assert dataset.train_images.dtype == np.uint8
        assert not dataset.train_images.flags.writeable
        assert np.array_equal(dataset.train_images, one_by_one(root, "train", asked))
        test = one_by_one(root, "val", asked)  # they are mixed
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


def test_progress_is_told_while_pictures_are_decoded_and_only_then(tmp_path):
    told = []
    root = write_parts(tmp_path / "set")
    load(root, progress=lambda *now: told.append(now))
    assert told == [(1, 6), (2, 6), (3, 6), (4, 6), (5, 6), (6, 6), (1, 4), (2, 4), (3, 4), (4, 4)]
    load(root, progress=lambda *now: told.append(now))
    assert len(told) == 10


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


def test_two_sizes_stay_beside_each_other(tmp_path, built):
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


# Pictures that can't be read


def bomb(side):
    """A PNG whose header promises side x side pixels."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">2I5B", side, side, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


BAD = {
    "nothing": b"",
    "a text": b"hello",
    "half a picture": png(random_picture(0))[:150],
    "a bomb": bomb(60_000),
    "too many pixels": bomb(9000),
    "another format": b"II*\0\x08\0\0\0" + bytes(20),
    "an array": b"\x93NUMPY\x01\0" + bytes(100),
}


@pytest.mark.parametrize("content", BAD.values(), ids=BAD)
def test_a_bad_picture_stops_with_its_name_and_leaves_nothing(tmp_path, content):
    root = write_parts(tmp_path / "set")
    (root / "train" / "cat" / "bad.png").write_bytes(content)
    for _ in range(2):
        with pytest.raises(DataError, match=r"bad\.png") as caught:
            load(root)
        assert str(root / "train" / "cat" / "bad.png") in caught.value.message
        assert 'on_bad="skip"' in caught.value.remedy
        assert "delete train/cat/bad.png" in caught.value.remedy
        assert left(root) == []


def test_what_torchvision_would_read_is_not_left_out_in_silence(tmp_path):
    root = write_parts(tmp_path / "set")
    write_picture(root / "train" / "cat" / "x.tiff")
    with pytest.raises(DataError, match=r"x\.tiff is not a PNG, JPEG, BMP, WebP or GIF file\. "):
        load(root)


def test_bad_pictures_can_be_left_out_which_is_told(tmp_path, built):
    root = write_parts(tmp_path / "set")
    for part in ("train", "val"):
        (root / part / "cat" / "bad.png").write_text(f"hello {part}")
    for _ in range(2):
        dataset = load(root, on_bad="skip")
        assert dataset.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
        assert "2 left out that can't be read, such as train/cat/bad.png" in dataset.origin
    assert len(built) == 2
    with pytest.raises(DataError, match=r"bad\.png is not a PNG"):  # although it is in the cache
        load(root)
    (root / "train" / "cat" / "bad.png").unlink()
    (root / "val" / "cat" / "bad.png").unlink()
    assert np.array_equal(load(root).train_images, dataset.train_images)


@pytest.mark.parametrize("labels", ["cat", "cat dog"])
def test_leaving_out_may_leave_no_class_empty(tmp_path, labels):
    root = write_parts(tmp_path / "set")
    for label in labels.split():
        for file in (root / "train" / label).iterdir():
            file.write_bytes(b"hello")
    with pytest.raises(DataError, match="no picture of"):
        load(root, on_bad="skip")


def test_a_full_disk_is_told_before_the_work(tmp_path, monkeypatch):
    root = write_parts(tmp_path / "set")
    usage = decoded.shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(decoded.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OutputError, match="need") as caught:
        load(root)
    assert "cache_dir" in caught.value.remedy


def test_a_cache_that_can_not_be_written(tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(OutputError, match="cache"):
        load(write_parts(tmp_path / "set"))


@pytest.mark.parametrize("name", ["filelock", "PIL"])
def test_without_a_package_it_is_named(tmp_path, monkeypatch, name):
    root = write_parts(tmp_path / "set")
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependency, match="needs filelock" if name == "filelock" else "needs pillow"):
        load(root)


# Several threads and processes


def test_threads_leave_the_filters_of_warnings_as_they_were():
    inside, leave = threading.Barrier(3), [threading.Event(), threading.Event()]

    def work(index):
        with images._silence:
            inside.wait(10)
            leave[index].wait(10)

    before = list(warnings.filters)
    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    inside.wait(10)
    assert warnings.filters[0][0] == "ignore"
    for event, thread in zip(leave, threads, strict=True):  # the first to come may be the first to go
        event.set()
        thread.join(10)
    assert list(warnings.filters) == before


def test_an_interrupt_leaves_nothing(tmp_path):
    root = write_parts(tmp_path / "set")

    def stop(done, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load(root, progress=stop)
    assert left(root) == []
    assert len(load(root).train_images) == 6


CHILD = """
import sys, time
from pathlib import Path
from bnexport.data.folder import load_folder
from support.pictures import GREY

root, told, pause = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
builds = 0

def progress(done, total):
    global builds
    builds += done == 1
    told.write_text(str(done))
    time.sleep(pause)

dataset = load_folder(root, preprocessing=GREY, cache_dir=root.parent / "cache", progress=progress)
print(builds, int(dataset.train_images.astype(int).sum()), int(dataset.test_images.astype(int).sum()))
"""


@contextlib.contextmanager
def child(root, told, pause):
    """A process that loads a folder, and waits after each picture."""
    here = Path(__file__).parents[3]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here / "tests")])}
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(root), str(told), str(pause)],
        env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    with process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(condition, process):
    end = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end, "the child does not come to it"
        time.sleep(0.01)


def test_processes_that_want_the_same_folder_build_it_once(tmp_path):
    root = write_parts(tmp_path / "set", train=10, test=3)
    with contextlib.ExitStack() as stack:
        children = [stack.enter_context(child(root, tmp_path / f"told{n}", 0.02)) for n in range(3)]
        printed = []
        for process in children:
            out, err = process.communicate(timeout=240)
            assert process.returncode == 0, err
            printed.append(out.split())
    assert sum(int(words[0]) for words in printed) == 2  # the two parts, by one process or by two
    dataset = load(root)
    sums = [str(int(part.astype(int).sum())) for part in (dataset.train_images, dataset.test_images)]
    assert [words[1:] for words in printed] == [sums] * 3
    assert np.array_equal(dataset.train_images, one_by_one(root, "train", GREY))


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no kill -9 on this system")
def test_a_killed_build_is_cleared_away_and_done_again(tmp_path):
    root, told = write_parts(tmp_path / "set", train=10), tmp_path / "told"
    with child(root, told, 0.2) as process:
        wait_for(lambda: told.exists() and told.read_text() not in ("", "1"), process)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(60)
    assert [name for name in left(root) if name.endswith(".part")], "it was killed too late to show anything"
    assert np.array_equal(load(root).train_images, one_by_one(root, "train", GREY))
    assert not [name for name in left(root) if name.startswith(".")]


def test_who_has_mapped_an_entry_keeps_it_when_it_is_outdated(tmp_path):
    root = write_parts(tmp_path / "set")
    old = load(root).train_images
    want = one_by_one(root, "train", GREY)
    changed(root)
    load(root)
    assert np.array_equal(old, want)
