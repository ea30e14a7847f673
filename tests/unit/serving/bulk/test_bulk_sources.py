import contextlib
import os
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.pictures import png
from unit.serving.bulk.conftest import IMAGES, predict, rows, write_parquet

from bnexport.bundle import Bundle
from bnexport.data.images import ENDINGS
from bnexport.errors import DataError, UsageError
from bnexport.serving.bulk.bulk_prediction import ShardWorker, make_job
from bnexport.serving.bulk.bulk_request import BulkRequest

#: Source -> part of the error.
BAD_SOURCES = {
    "float.npy": "expected a stack of uint8",
    "flat.npy": "expected a stack of uint8",
    "fortran.npy": "in C order",
    "empty.npy": "contains no image",
    "one_picture.npy": "save one colour image as image[None]",
    "one_picture.npz": "save one colour image as image[None]",
    "channels_first.npy": "(n, height, width, channels)",
    "no_pixels.npy": "has images of 28x0 pixels",
    "no_pixels.npz": "has images of 28x0 pixels",
    "huge.npy": "has images of 8000x8000 pixels",
    "two.npz": "no array 'image', only 'a', 'b'",
    "float.npz": "expected a stack of uint8",
    "cut.npz": "",
    "cut.npy": "declares an array of",
    "text.parquet": "not a Parquet file",
    "a.txt": "neither a folder nor a .npy, .npz or Parquet file",
    "none": "contains no image",
    "both": "Parquet files and pictures",
    "named.parquet": "no column 'image', only 'picture'",
    "texts.parquet": "is string, expected bytes",
    "twice.parquet": "several columns 'image'",
    "null.parquet": "null.parquet[1] has no image",
    "garbage.parquet": "garbage.parquet[1] is not a PNG",
    "damaged": "bad.png can't be read",
    "nowhere": "does not exist",
}


def write_bad_sources(folder: Path) -> None:
    np.save(folder / "float.npy", IMAGES.astype(np.float32))
    np.save(folder / "flat.npy", IMAGES.reshape(90, -1))
    np.save(folder / "fortran.npy", np.asfortranarray(IMAGES))
    np.save(folder / "empty.npy", IMAGES[:0])
    colours = np.repeat(IMAGES[:40, 0, :, None], 3, 2)
    np.save(folder / "one_picture.npy", colours)
    np.savez(folder / "one_picture.npz", image=colours)
    np.save(folder / "channels_first.npy", IMAGES[:, None])
    np.save(folder / "no_pixels.npy", IMAGES[:, :0])
    np.savez(folder / "no_pixels.npz", image=IMAGES[:, :0])
    with (folder / "huge.npy").open("wb") as file:  # sparse
        header = {"descr": "|u1", "fortran_order": False, "shape": (1, 8_000, 8_000)}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + 8_000**2)
    np.savez(folder / "two.npz", a=IMAGES, b=IMAGES)
    np.savez(folder / "float.npz", image=IMAGES / 255)
    (folder / "cut.npz").write_bytes((folder / "two.npz").read_bytes()[:5000])
    (folder / "cut.npy").write_bytes((folder / "flat.npy").read_bytes()[:500])
    (folder / "text.parquet").write_text("x")
    (folder / "a.txt").write_text("x")
    (folder / "none").mkdir()
    (folder / "both").mkdir()
    (folder / "both" / "a.png").write_bytes(png(IMAGES[0]))
    write_parquet(folder / "both" / "a.parquet", {"image": [png(IMAGES[0])]}, 1)
    write_parquet(folder / "named.parquet", {"picture": [png(IMAGES[0])]}, 1)
    write_parquet(folder / "texts.parquet", {"image": ["a"]}, 1)
    pq.write_table(pa.Table.from_arrays([[png(IMAGES[0])]] * 2, names=["image"] * 2), folder / "twice.parquet")
    write_parquet(folder / "null.parquet", {"image": [png(IMAGES[0]), None]}, 2)
    write_parquet(folder / "garbage.parquet", {"image": [png(IMAGES[0]), b"garbage"]}, 2)
    (folder / "damaged").mkdir()
    (folder / "damaged" / "good.png").write_bytes(png(IMAGES[0]))
    (folder / "damaged" / "bad.png").write_bytes(png(IMAGES[0])[:60])


@pytest.mark.parametrize("name", BAD_SOURCES)
def test_bad_sources(bundle: Bundle, tmp_path: Path, name: str) -> None:
    (tmp_path / "in").mkdir()
    write_bad_sources(tmp_path / "in")
    with pytest.raises(DataError) as caught:
        predict(bundle, tmp_path / "in" / name, tmp_path / "out")
    assert BAD_SOURCES[name] in caught.value.message
    assert name in caught.value.message
    assert caught.value.remedy
    assert not list((tmp_path / "out").glob("part-*"))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
@pytest.mark.parametrize("name", [b"in/\xff.png", b"in\xff/a.png", b"in/\xff.parquet"])
def test_a_name_that_is_not_text(bundle: Bundle, tmp_path: Path, name: bytes) -> None:
    file = tmp_path / os.fsdecode(name)
    file.parent.mkdir()
    file.write_bytes(png(IMAGES[0]))
    with pytest.raises(DataError, match="not UTF-8"):
        predict(bundle, file.parent, tmp_path / "out")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_predictions_go_into_a_folder_of_any_name(bundle: Bundle, sources: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / os.fsdecode(b"\xff")
    assert predict(bundle, sources["a.npy"], out).resumed_rows == 0
    assert predict(bundle, sources["a.npy"], out).resumed_rows == 90


def test_an_image_is_given_once(bundle: Bundle, sources: dict[str, Path], tmp_path: Path) -> None:
    folder = sources["pictures"]
    for chosen in ([folder, folder], [folder, folder / "x"], [folder / "x" / ".." / "x", folder / "x"]):
        with pytest.raises(UsageError, match="given twice"):
            predict(bundle, chosen, tmp_path / "out")


@pytest.mark.parametrize("name", ["pictures", "a.npy", "a.npz"])
def test_ids_of_a_column_where_there_is_none(
    bundle: Bundle, sources: dict[str, Path], tmp_path: Path, name: str
) -> None:
    with pytest.raises(UsageError, match="has no column 'sku'"):
        predict(bundle, sources[name], tmp_path / "out", id_column="sku")


def test_a_row_without_an_id_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", {"image": [png(IMAGES[0])] * 3, "sku": ["a", None, "c"]}, 2)
    with pytest.raises(DataError, match=r"a\.parquet\[1\] has no id"):
        predict(bundle, tmp_path / "a.parquet", tmp_path / "out", id_column="sku")


@pytest.mark.parametrize("kind", [pa.dictionary(pa.int32(), pa.binary()), pa.binary_view(), pa.large_binary()], ids=str)
def test_kinds_of_bytes(bundle: Bundle, wanted: np.ndarray, tmp_path: Path, kind: pa.DataType) -> None:
    contents = pa.array([png(image) for image in IMAGES[:5]] * 2, pa.binary()).cast(kind)
    pq.write_table(pa.table({"image": contents}), tmp_path / "a.parquet")
    predict(bundle, tmp_path / "a.parquet", tmp_path / "out")
    assert rows(tmp_path / "out")["label"] == [str(index) for index in wanted[:5].argmax(1)] * 2


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (pa.array([b"a"], pa.binary()), "is binary, expected text or numbers"),
        (pa.array([b"a"], pa.binary(1)), "expected text or numbers"),
        (pa.array([["a"]]), "expected text or numbers"),
        (pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")), "not UTF-8"),
    ],
    ids=["binary", "fixed", "list", "utf8"],
)
def test_ids_that_have_no_text(bundle: Bundle, tmp_path: Path, ids: pa.Array, message: str) -> None:
    pq.write_table(pa.table({"image": [png(IMAGES[0])], "sku": ids}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=message):
        predict(bundle, tmp_path / "a.parquet", tmp_path / "out", id_column="sku")


def test_predictions_are_not_written_into_their_source(bundle: Bundle, sources: dict[str, Path]) -> None:
    for out in (sources["pictures"] / "out", sources["pictures"]):
        with pytest.raises(UsageError, match="is inside the source"):
            predict(bundle, sources["pictures"], out)


def test_every_kind_of_picture_is_found(bundle: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for image, ending in zip(IMAGES, ENDINGS, strict=False):
        Image.fromarray(image.squeeze()).save(folder / f"a{ending}")
    (folder / "notes.txt").write_text("no picture")
    predict(bundle, folder, tmp_path / "out", workers=1)
    assert sorted(Path(str(name)).suffix for name in rows(tmp_path / "out")["id"]) == sorted(ENDINGS)


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.parquet"])
def test_a_source_that_changes_while_it_is_read(
    bundle: Bundle, sources: dict[str, Path], tmp_path: Path, name: str
) -> None:
    """With the same number of rows, the result would silently mix both versions."""
    (tmp_path / name).write_bytes(sources[name].read_bytes())
    job = make_job(bundle, (tmp_path / name,), tmp_path / "out", BulkRequest(workers=1, shard_rows=20))
    with contextlib.closing(ShardWorker(job)) as worker:
        worker.run(job.shards[0])
        (tmp_path / "new").write_bytes(sources[name].read_bytes())
        (tmp_path / "new").replace(tmp_path / name)
        with pytest.raises(DataError, match="has changed while it was read"):
            worker.run(job.shards[1])
    assert len(list((tmp_path / "out").glob("part-*"))) == 1


def test_shards_do_not_depend_on_the_caller(bundle: Bundle, sources: dict[str, Path], tmp_path: Path) -> None:
    """Workers, batches and the order in which a folder lists its files change no shard."""
    chosen = (sources["pictures"], sources["several"])
    jobs = [
        make_job(bundle, chosen, tmp_path, BulkRequest(workers=workers, batch_size=size))
        for workers, size in ((1, 1), (7, 64))
    ]
    assert jobs[0].shards == jobs[1].shards
    assert jobs[0].description == jobs[1].description
    assert [shard.number for shard in jobs[0].shards] == list(range(len(jobs[0].shards)))
