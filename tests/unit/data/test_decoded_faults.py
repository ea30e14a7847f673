"""Pictures that can't be read, and several threads and processes that decode the same folder."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from support.decoding import left, load, one_by_one
from support.pictures import GREY, bomb, png, random_picture, write_parts, write_picture

from bnexport.data import decoded
from bnexport.errors import DataError, MissingDependency, OutputError
from bnexport.optional import no_warnings

# Pictures that can't be read


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


def test_files_that_torchvision_would_read_are_not_left_out_in_silence(tmp_path):
    root = write_parts(tmp_path / "set")
    write_picture(root / "train" / "cat" / "x.tiff")
    with pytest.raises(DataError, match=r"x\.tiff is not a PNG, JPEG, BMP, WebP or GIF file\. "):
        load(root)


def test_bad_pictures_can_be_left_out_and_are_reported(tmp_path, built):
    root = write_parts(tmp_path / "set")
    for part in ("train", "val"):
        (root / part / "cat" / "bad.png").write_text(f"hello {part}")
    for _ in range(2):
        dataset = load(root, on_bad="skip")
        assert dataset.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
        assert "2 unreadable images left out, such as train/cat/bad.png" in dataset.origin
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
    with pytest.raises(DataError, match="no image of"):
        load(root, on_bad="skip")


def test_a_full_disk_is_reported_before_the_work(tmp_path, monkeypatch):
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
        with no_warnings:
            inside.wait(240)
            leave[index].wait(240)

    before = list(warnings.filters)
    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    inside.wait(240)
    assert warnings.filters[0][0] == "ignore"
    for event, thread in zip(leave, threads, strict=True):  # the first to come may be the first to go
        event.set()
        thread.join(240)
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

root, count_file, pause = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
builds = 0

def progress(done, total):
    global builds
    builds += done == 1
    count_file.write_text(str(done))
    time.sleep(pause)

dataset = load_folder(root, preprocessing=GREY, cache_dir=root.parent / "cache", progress=progress)
print(builds, int(dataset.train_images.astype(int).sum()), int(dataset.test_images.astype(int).sum()))
"""


@contextlib.contextmanager
def child(root, count_file, pause):
    """A process that loads a folder, and waits after each picture."""
    here = Path(__file__).parents[3]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here / "tests")])}
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(root), str(count_file), str(pause)],
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


@pytest.mark.slow
def test_processes_that_want_the_same_folder_build_it_once(tmp_path):
    root = write_parts(tmp_path / "set", train=10, test=3)
    with contextlib.ExitStack() as stack:
        children = [stack.enter_context(child(root, tmp_path / f"count{n}", 0.02)) for n in range(3)]
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


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no kill -9 on this system")
def test_a_killed_build_is_cleared_away_and_done_again(tmp_path):
    root, count_file = write_parts(tmp_path / "set", train=10), tmp_path / "count"
    with child(root, count_file, 0.2) as process:
        wait_for(lambda: count_file.exists() and count_file.read_text() not in ("", "1"), process)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(240)
    assert [name for name in left(root) if name.endswith(".part")], "it was killed too late to show anything"
    assert np.array_equal(load(root).train_images, one_by_one(root, "train", GREY))
    assert not [name for name in left(root) if name.startswith(".")]


def test_a_mapped_entry_stays_readable_when_it_is_outdated(tmp_path):
    root = write_parts(tmp_path / "set")
    old = load(root).train_images
    want = one_by_one(root, "train", GREY)
    write_picture(root / "train" / "cat" / "1.png", 99, mode="RGBA")
    load(root)
    assert np.array_equal(old, want)
