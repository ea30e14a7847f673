import gzip
import hashlib
import http.server
import os
import stat
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
from support.pictures import idx

from bnexport.data import dataset_table, locate
from bnexport.data.datasets import dataset_labels, load_dataset, load_test_images, load_train_images
from bnexport.errors import DataError, NetworkError, OutputError, UsageError

NAMES = [file.name for file in (*dataset_table.DATASETS["mnist"].train, *dataset_table.DATASETS["mnist"].test)]


def contents(seed=0, labels=10):
    """The four packed files of a tiny set, in the order of NAMES."""
    generator = np.random.default_rng(seed)
    files = []
    for count in (6, 4):
        files.append(idx(generator.integers(0, 256, (count, 28, 28)).astype(np.uint8)))
        files.append(idx((np.arange(count) % labels).astype(np.uint8)))
    return [gzip.compress(content, mtime=0) for content in files]


def md5(content):
    return hashlib.md5(content).hexdigest()


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """mnist with tiny files, no mirror, an empty cache and no BNEXPORT_DATA."""
    files = [dataset_table.DataFile(name, md5(content)) for name, content in zip(NAMES, contents(), strict=True)]
    info = replace(dataset_table.DATASETS["mnist"], train=tuple(files[:2]), test=tuple(files[2:]), mirrors=())
    monkeypatch.setitem(dataset_table.DATASETS, "mnist", info)
    monkeypatch.setattr(locate, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.delenv("BNEXPORT_DATA", raising=False)
    return info


def place(root, files=None, packed=True):
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in zip(NAMES, files or contents(), strict=True):
        if content is None:
            continue
        if packed:
            (folder / name).write_bytes(content)
        else:
            (folder / name.removesuffix(".gz")).write_bytes(gzip.decompress(content))
    return root


def check(dataset):
    assert dataset.train_images.shape == (6, 28, 28)
    assert dataset.test_images.shape == (4, 28, 28)
    assert dataset.train_images.dtype == np.uint8
    assert dataset.test_labels.dtype == np.int64
    assert dataset.test_labels.tolist() == [0, 1, 2, 3]
    generator = np.random.default_rng(0)
    assert np.array_equal(dataset.train_images, generator.integers(0, 256, (6, 28, 28)))


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        name = self.path.rpartition("/")[2]
        self.server.requested.append(name)
        if name not in self.server.files:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(self.server.claimed or len(self.server.files[name])))
        self.end_headers()
        self.wfile.write(self.server.files[name])

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    """Serves ``files`` by name; ``claimed`` replaces the announced length."""

    def __init__(self, files, claimed=None):
        self.files, self.claimed, self.requested = files, claimed, []
        super().__init__(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/data/"

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()
        self.thread.join()


def mirrors(monkeypatch, info, *urls):
    monkeypatch.setitem(dataset_table.DATASETS, "mnist", replace(info, mirrors=urls))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def good():
    return dict(zip(NAMES, contents(), strict=True))


# --- where files are looked for


@pytest.mark.parametrize("packed", [True, False])
def test_data_dir(tiny, tmp_path, packed):
    root = place(tmp_path / "here", packed=packed)
    dataset = load_dataset("mnist", data_dir=root, download=False)
    check(dataset)
    assert dataset.origin == str(root / "MNIST" / "raw")
    assert dataset.labels == tuple("0123456789")


def test_the_order_of_the_places(tiny, tmp_path, monkeypatch):
    place(tmp_path / "cache")
    assert "cache" in load_dataset("mnist").origin
    monkeypatch.setenv("BNEXPORT_DATA", str(place(tmp_path / "variable")))
    assert "variable" in load_dataset("mnist").origin
    assert "given" in load_dataset("mnist", data_dir=place(tmp_path / "given")).origin
    # An incomplete place is passed over, except a place that the caller named.
    (tmp_path / "variable" / "MNIST" / "raw" / NAMES[0]).unlink()
    assert "cache" in load_dataset("mnist").origin
    (tmp_path / "given" / "MNIST" / "raw" / NAMES[0]).unlink()
    with pytest.raises(DataError, match="MNIST is missing"):
        load_dataset("mnist", data_dir=tmp_path / "given", download=False)


def test_the_test_part_alone(tiny, tmp_path):
    root = place(tmp_path / "here", [None, None, *contents()[2:]])
    images, labels = load_test_images("mnist", data_dir=root)
    assert images.shape == (4, 28, 28)
    assert labels.tolist() == [0, 1, 2, 3]
    with pytest.raises(DataError, match="MNIST is missing"):
        load_dataset("mnist", data_dir=root, download=False)


def test_reading_never_writes(tiny, tmp_path, monkeypatch):
    root = place(tmp_path / "variable")
    monkeypatch.setenv("BNEXPORT_DATA", str(root))
    folders = [root, root / "MNIST", root / "MNIST" / "raw"]
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    for folder in folders:
        folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        check(load_dataset("mnist"))
    finally:
        for folder in folders:
            folder.chmod(0o755)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before
    assert not (tmp_path / "cache").exists()


def test_the_variables_folder_is_not_filled_by_a_download(tiny, tmp_path, monkeypatch):
    variable = tmp_path / "variable"
    variable.mkdir()
    monkeypatch.setenv("BNEXPORT_DATA", str(variable))
    with Server(good()) as server:
        mirrors(monkeypatch, tiny, server.url)
        dataset = load_dataset("mnist")
    check(dataset)
    assert list(variable.iterdir()) == []
    assert dataset.origin == f"downloaded to {tmp_path / 'cache' / 'MNIST' / 'raw'}"


def test_nothing_found(tiny, tmp_path):
    with pytest.raises(DataError, match="MNIST is missing") as caught:
        load_test_images("mnist", data_dir=tmp_path / "nowhere")
    assert "nowhere" in caught.value.message
    assert "BNEXPORT_DATA" in caught.value.remedy


def test_an_unknown_name():
    for load in (load_dataset, load_test_images):
        with pytest.raises(UsageError, match="'cifar'") as caught:
            load("cifar")
        assert "fashion-mnist" in caught.value.remedy


def test_the_embedded_set_needs_nothing(tiny):
    dataset = load_dataset("digits", download=False)
    images, labels = load_test_images("digits")
    assert np.array_equal(images, dataset.test_images)
    assert np.array_equal(labels, dataset.test_labels)
    assert "embedded" in dataset.origin


@pytest.mark.needs("data")
def test_real_fashion_mnist():
    images, labels = load_test_images("fashion-mnist")
    assert images.shape == (10_000, 28, 28)
    assert labels[:4].tolist() == [9, 2, 1, 1]
    assert np.bincount(labels).tolist() == [1000] * 10


def test_the_table():
    for name, info in dataset_table.DATASETS.items():
        assert name == info.name
        assert len(info.labels) == 10
        files = (*info.train, *info.test)
        assert len(files) == (0 if info.embedded else 4)
        assert bool(info.mirrors) != info.embedded
        assert all(len(bytes.fromhex(file.md5)) == 16 for file in files)
        assert all(url.endswith("/") for url in info.mirrors)


# --- wrong files


@pytest.mark.parametrize("where", ["data_dir", "variable"])
def test_a_wrong_md5_names_the_file(tiny, tmp_path, monkeypatch, where):
    root = place(tmp_path / "here", [*contents()[:3], contents(seed=1)[3][:-1]])
    monkeypatch.setenv("BNEXPORT_DATA", str(root) if where == "variable" else "")
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte\.gz has a wrong MD5"):
        load_dataset("mnist", data_dir=root if where == "data_dir" else None)


def test_a_wrong_file_in_the_cache_is_downloaded_again(tiny, tmp_path, monkeypatch):
    cache = place(tmp_path / "cache", [b"broken", *contents()[1:]])
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz has a wrong MD5"):
        load_dataset("mnist", download=False)
    with Server(good()) as server:
        mirrors(monkeypatch, tiny, server.url)
        check(load_dataset("mnist"))
    assert server.requested == [NAMES[0]]
    assert (cache / "MNIST" / "raw" / NAMES[0]).read_bytes() == contents()[0]


def test_a_users_wrong_file_is_never_overwritten(tiny, tmp_path, monkeypatch):
    root = place(tmp_path / "here", [b"mine", None, None, None])
    with Server(good()) as server:
        mirrors(monkeypatch, tiny, server.url)
        with pytest.raises(DataError, match="wrong MD5"):
            load_dataset("mnist", data_dir=root)
    assert (root / "MNIST" / "raw" / NAMES[0]).read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("index", "array", "message"),
    [
        (0, np.zeros((6, 28, 27), np.uint8), "28, 27"),
        (0, np.zeros((0, 28, 28), np.uint8), "0, 28, 28"),
        (1, np.zeros(5, np.uint8), r"\(5,\), expected uint8 \(6,\)"),
        (1, np.full(6, 10, np.uint8), "label 10"),
        (3, np.zeros((4, 1), np.uint8), r"\(4, 1\)"),
    ],
)
def test_unpacked_files_are_checked_by_their_structure(tiny, tmp_path, index, array, message):
    files = contents()
    files[index] = gzip.compress(idx(array))
    with pytest.raises(DataError, match=message):
        load_dataset("mnist", data_dir=place(tmp_path / "here", files, packed=False))


def test_a_truncated_unpacked_file(tiny, tmp_path):
    root = place(tmp_path / "here", packed=False)
    file = root / "MNIST" / "raw" / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError, match="truncated"):
        load_dataset("mnist", data_dir=root)


# --- downloads


def test_download_into_the_given_folder(tiny, tmp_path, monkeypatch):
    reported = []
    with Server(good()) as server:
        mirrors(monkeypatch, tiny, server.url)
        check(load_dataset("mnist", data_dir=tmp_path / "new", progress=lambda *now: reported.append(now)))
        check(load_dataset("mnist", data_dir=tmp_path / "new"))
    assert server.requested == NAMES
    assert sorted(path.name for path in (tmp_path / "new" / "MNIST" / "raw").iterdir()) == sorted(NAMES)
    size = len(contents()[0])
    assert reported[0] == (NAMES[0], size, size)
    assert not (tmp_path / "cache").exists()


def test_the_next_mirror_helps(tiny, tmp_path, monkeypatch):
    with Server({}) as empty, Server(dict.fromkeys(NAMES, b"other")) as wrong, Server(good()) as server:
        mirrors(monkeypatch, tiny, empty.url, wrong.url, server.url)
        check(load_dataset("mnist"))
    assert empty.requested == wrong.requested == server.requested == NAMES


@pytest.mark.parametrize(
    ("files", "claimed", "message"),
    [
        ({}, None, "404"),
        (dict.fromkeys(NAMES, b"not it"), None, "wrong MD5"),
        (good(), 10_000_000, "more expected"),
        ({name: content[:50] for name, content in good().items()}, None, "wrong MD5"),
    ],
)
def test_a_download_that_fails_leaves_nothing(tiny, tmp_path, monkeypatch, files, claimed, message):
    with Server(files, claimed) as server:
        mirrors(monkeypatch, tiny, server.url)
        with pytest.raises(NetworkError, match=message) as caught:
            load_dataset("mnist")
    assert server.url in caught.value.message
    assert "--dataset digits" in caught.value.remedy
    assert "MNIST/raw" in caught.value.remedy
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_no_server(tiny, monkeypatch):
    with Server({}) as server:
        url = server.url
    mirrors(monkeypatch, tiny, url, "nonsense")
    with pytest.raises(NetworkError, match="could not be downloaded"):
        load_dataset("mnist")


def test_a_server_that_never_ends_is_cut_off(tiny, monkeypatch):
    monkeypatch.setattr(locate, "MAX_BYTES", 100)
    with Server(good()) as server:
        mirrors(monkeypatch, tiny, server.url)
        with pytest.raises(NetworkError, match="more than 100 bytes"):
            load_dataset("mnist")


def test_a_full_disk_is_not_taken_for_the_network(tiny, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with Server(good()) as server:
        mirrors(monkeypatch, tiny, server.url)
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match="No space left"):
            load_dataset("mnist")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_the_default_cache_is_the_systems():
    assert "bnexport" in locate.cache_folder().parts


def test_the_cache_without_platformdirs_is_where_linux_keeps_caches(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert locate.cache_folder() == tmp_path / "bnexport"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate.cache_folder() == tmp_path / ".cache" / "bnexport"


def test_the_training_part_alone(tiny, tmp_path):
    root = place(tmp_path / "given", [*contents()[:2], None, None])
    images, labels = load_train_images("mnist", data_dir=root)
    assert images.shape == (6, 28, 28)
    assert labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert np.array_equal(load_train_images("digits")[0], load_dataset("digits").train_images)


@pytest.mark.parametrize("read", [load_dataset, load_test_images, load_train_images, dataset_labels])
def test_a_folder_for_embedded_images_is_refused(read, tmp_path):
    read("digits")
    with pytest.raises(UsageError, match="the images of digits are part of bnexport"):
        read("digits", data_dir=tmp_path)
