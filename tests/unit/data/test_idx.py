import gzip
import struct

import numpy as np
import pytest
from support.pictures import idx

from bnexport.data.images import IDX_TYPES, read_idx
from bnexport.errors import DataError

IMAGES = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)


def write(tmp_path, content):
    file = tmp_path / "x-ubyte"
    file.write_bytes(content)
    return file


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_images(tmp_path, pack):
    got = read_idx(write(tmp_path, pack(idx(IMAGES))))
    assert got.dtype == np.uint8
    assert np.array_equal(got, IMAGES)
    assert got.flags.writeable


@pytest.mark.parametrize("code", list(IDX_TYPES))
def test_every_element_type(tmp_path, code):
    array = np.array([1, 2, 120], IDX_TYPES[code])
    got = read_idx(write(tmp_path, idx(array, code)))
    assert got.tolist() == [1, 2, 120]
    assert got.dtype.isnative


def test_no_elements(tmp_path):
    assert read_idx(write(tmp_path, idx(IMAGES[:0]))).shape == (0, 3, 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"", "is empty"),
        (b"\0\0", "is truncated"),
        (idx(IMAGES)[:10], "truncated inside its header"),
        (idx(IMAGES)[:-1], "truncated: it has 23 of 24"),
        (idx(IMAGES) + b"x", "longer than its header"),
        (b"PNG and more", "not an IDX file"),
        (b"\0\0\x08\x00" + bytes(8), "not an IDX file"),
        (b"\0\0\x07\x01" + bytes(8), "not an IDX file"),
        (gzip.compress(idx(IMAGES), mtime=0)[:-12], "truncated"),
        (gzip.compress(idx(IMAGES), mtime=0)[:-4] + b"\1\2\3\4", "can't be read"),
        (b"\x1f\x8b" + bytes(30), "can't be read"),
        (struct.pack(">BBBB3I", 0, 0, 8, 3, *[2**32 - 1] * 3), "above the limit"),
        (gzip.compress(idx(IMAGES) + bytes(2**24)), "longer than its header"),
    ],
)
def test_damage_is_named(tmp_path, content, message):
    file = tmp_path / "x-ubyte" if content is None else write(tmp_path, content)
    with pytest.raises(DataError, match=message) as caught:
        read_idx(file)
    assert str(file) in str(caught.value)


def test_the_limit_counts_unpacked_bytes(tmp_path):
    array = np.zeros((1000, 1000), np.uint8)
    file = write(tmp_path, gzip.compress(idx(array)))
    assert file.stat().st_size < 5000
    with pytest.raises(DataError, match="above the limit of 10000"):
        read_idx(file, max_bytes=10_000)
