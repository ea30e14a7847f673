from __future__ import annotations

import contextlib
import json
import os
import pickle
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from support.bundles import copy_bundle, reseal
from unit.deploying.conftest import foreign_bundle
from unit.serving.bulk.conftest import IMAGES, png, rows, write_parquet

from bnexport.bundle import MODEL_ONNX, MODEL_TORCHSCRIPT, Bundle
from bnexport.data.images import ENDINGS
from bnexport.errors import BnexportError, BundleError, DataError, OutputError, UsageError
from bnexport.serving.bulk.job import JOB, make_job
from bnexport.serving.bulk.measure import side_by_side
from bnexport.serving.bulk.on_ray import ShardActor, threads_ended
from bnexport.serving.bulk.predict import BulkResult, predict_in_bulk
from bnexport.serving.bulk.reading import READERS
from bnexport.serving.bulk.request import BulkProgress, BulkRequest
from bnexport.serving.bulk.sources import SOURCES
from bnexport.serving.bulk.worker import ShardWorker
from bnexport.serving.predictor import predict_images


def predict(bundle: Bundle, source: Path | list[Path], out: Path, **options: object) -> BulkResult:
    request = BulkRequest(**({"workers": 1, "shard_rows": 20, "batch_size": 8} | options))
    return predict_in_bulk(bundle, source if isinstance(source, list) else [source], out, request=request)


def test_every_kind_of_source_has_its_reader() -> None:
    assert set(SOURCES) == set(READERS)


@pytest.mark.parametrize(
    ("name", "options", "shards"),
    [
        ("a.npy", {}, 5),
        ("channel.npy", {"shard_rows": 90}, 1),
        ("a.npz", {}, 5),
        ("plain.npz", {"shard_rows": 7}, 13),
        ("pictures", {}, 5),
        ("a.parquet", {}, 4),
        ("several", {"id_column": "name"}, 4),
        ("structs.parquet", {"column": "picture", "id_column": "name"}, 3),
    ],
)
def test_sources(
    bundle: Bundle,
    sources: dict[str, Path],
    wanted: np.ndarray,
    tmp_path: Path,
    name: str,
    options: dict[str, object],
    shards: int,
) -> None:
    source = sources[name]
    done = predict(bundle, source, tmp_path / "out", logits=True, **options)
    assert (done.rows, done.shards, done.resumed_rows) == (90, shards, 0)
    found = rows(tmp_path / "out")
    assert np.allclose(found["logits"], wanted, rtol=0, atol=2e-5)
    assert found["label"] == [str(index) for index in wanted.argmax(1)]
    softmax = torch.from_numpy(wanted).double().softmax(1).numpy()
    assert np.allclose(found["probabilities"], softmax, rtol=1e-3, atol=1e-6)
    if "id_column" in options:
        assert found["id"] == [f"row {index}" for index in range(90)]
    elif name == "pictures":
        assert found["id"] == sorted(map(str, source.rglob("*.[pP][nN][gG]")))
    else:
        assert found["id"] == [f"{source}[{index}]" for index in range(90)]


def test_the_written_files(bundle: Bundle, sources: dict[str, Path], tmp_path: Path) -> None:
    predict(bundle, sources["a.npy"], tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [JOB, *(f"part-{number:05d}.parquet" for number in range(5))]
    schema = pq.read_schema(tmp_path / "out" / "part-00000.parquet")
    assert schema.names == ["id", "label", "probabilities"]
    assert schema.field("id").type == schema.field("label").type == pa.string()
    assert schema.field("probabilities").type.value_type == pa.float32()
    about = json.loads(schema.metadata[b"bnexport"])
    assert (about["model"], about["rows"]) == ("bn_lenet", 90)


def test_bulk_and_single_predictions_agree(bundle: Bundle, sources: dict[str, Path], tmp_path: Path) -> None:
    predict(bundle, sources["pictures"], tmp_path / "out")
    found = rows(tmp_path / "out")
    single = predict_images(bundle, *found["id"])
    assert [prediction.label for prediction in single] == found["label"]
    assert [prediction.image for prediction in single] == found["id"]


def test_processes_and_several_sources(bundle: Bundle, sources: dict[str, Path], tmp_path: Path) -> None:
    seen: list[tuple[int, ...]] = []

    class Listener(BulkProgress):
        def on_start(self, rows: int, done: int, workers: int) -> None:
            seen.append((rows, done, workers))

        def on_shard(self, rows: int) -> None:
            seen.append((rows,))

    request = BulkRequest(workers=2, shard_rows=30)
    chosen = [sources["a.npz"], sources["pictures"]]
    predict_in_bulk(bundle, chosen, tmp_path / "two", request=request, progress=Listener())
    assert seen == [(180, 0, 2), *[(30,)] * 6]
    predict(bundle, chosen, tmp_path / "one", shard_rows=30, batch_size=256)
    assert pq.read_table(tmp_path / "two").equals(pq.read_table(tmp_path / "one"))


def test_images_of_another_size_are_fitted(bundle: Bundle, tmp_path: Path) -> None:
    np.save(tmp_path / "large.npy", np.repeat(np.repeat(IMAGES[:9], 2, 1), 2, 2))
    predict(bundle, tmp_path / "large.npy", tmp_path / "out")
    assert rows(tmp_path / "out")["label"] == [p.label for p in predict_images(bundle, tmp_path / "large.npy")]


def test_a_finished_job_is_left_alone(bundle: Bundle, sources: dict[str, Path], tmp_path: Path) -> None:
    predict(bundle, sources["a.npy"], tmp_path / "out")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert predict(bundle, sources["a.npy"], tmp_path / "out").resumed_rows == 90
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == times


def test_what_is_missing_or_cut_off_is_written_again(bundle: Bundle, sources: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    predict(bundle, sources["a.npy"], out)
    before = pq.read_table(out)
    (out / "part-00001.parquet").unlink()
    cut = out / "part-00003.parquet"
    cut.write_bytes(cut.read_bytes()[:-9])
    (out / ".part-00002.parquet.x.part").write_bytes(b"begun")
    assert predict(bundle, sources["a.npy"], out).resumed_rows == 50
    assert pq.read_table(out).equals(before)
    assert not list(out.glob(".*"))


def test_a_part_of_another_job_is_written_again(bundle: Bundle, sources: dict[str, Path], tmp_path: Path) -> None:
    """As a worker that outlived its killed parent may leave one: it has as many rows."""
    other = reseal(copy_bundle(bundle, tmp_path / "bn_lenet" / "1"), labels=tuple("abcdefghij"))
    predict(other, sources["a.npy"], tmp_path / "other")
    predict(bundle, sources["a.npy"], tmp_path / "out")
    before, name = pq.read_table(tmp_path / "out"), "part-00002.parquet"
    (tmp_path / "other" / name).replace(tmp_path / "out" / name)
    assert predict(bundle, sources["a.npy"], tmp_path / "out").resumed_rows == 70
    assert pq.read_table(tmp_path / "out").equals(before)


def test_another_job_is_refused_without_force(bundle: Bundle, sources: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    np.save(tmp_path / "mine.npy", IMAGES)
    predict(bundle, tmp_path / "mine.npy", out)
    for options, told in (({"logits": True}, "logits was False"), ({"shard_rows": 9}, "shards was 5, now 10")):
        with pytest.raises(OutputError, match=told):
            predict(bundle, tmp_path / "mine.npy", out, **options)
    with pytest.raises(OutputError, match="sources was"):
        predict(bundle, sources["a.npy"], out)
    np.save(tmp_path / "mine.npy", IMAGES[::-1])
    with pytest.raises(OutputError, match="a source has changed"):
        predict(bundle, tmp_path / "mine.npy", out)
    other = reseal(copy_bundle(bundle, tmp_path / "bn_lenet" / "1"), labels=tuple("abcdefghij"))
    with pytest.raises(OutputError, match="manifest was"):
        predict(other, tmp_path / "mine.npy", out)
    predict(other, tmp_path / "mine.npy", out, shard_rows=50, force=True)
    assert len(list(out.glob("part-*"))) == 2
    assert set(rows(out)["label"]) <= set("abcdefghij")


def test_a_folder_of_something_else_is_never_replaced(bundle: Bundle, sources: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    (tmp_path / "file").write_text("x")
    for out in ("out", "file"):
        with pytest.raises(OutputError, match="no folder of predictions"):
            predict(bundle, sources["a.npy"], tmp_path / out, force=True)
    (tmp_path / "out" / "precious").unlink()
    assert predict(bundle, sources["a.npy"], tmp_path / "out").rows == 90, "an empty folder is as good as none"
    (tmp_path / "out" / JOB).write_text("[]")
    with pytest.raises(OutputError, match="not bnexport's"):
        predict(bundle, sources["a.npy"], tmp_path / "out", force=True)


def test_a_model_that_takes_more_than_an_image_is_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    foreign = foreign_bundle(tmp_path / "foreign" / "4")
    with pytest.raises(BundleError, match="does not say how an image becomes an input"):
        predict(foreign, sources["a.npy"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_changed_bundle_is_refused(bundle: Bundle, sources: dict[str, Path], tmp_path: Path) -> None:
    spoiled = copy_bundle(bundle, tmp_path / "1")
    (spoiled / MODEL_ONNX).write_bytes(b"x")
    with pytest.raises(BundleError, match=r"model\.onnx"):
        predict(Bundle.open(spoiled), sources["a.npy"], tmp_path / "out")


#: Source -> what is said of it.
BAD_SOURCES = {
    "float.npy": "expected a stack of uint8",
    "flat.npy": "expected a stack of uint8",
    "fortran.npy": "in C order",
    "empty.npy": "holds no image",
    "one_picture.npy": "one picture in colour is saved as image[None]",
    "one_picture.npz": "one picture in colour is saved as image[None]",
    "channels_first.npy": "(n, height, width, channels)",
    "no_pixels.npy": "holds images of 28x0 pixels",
    "no_pixels.npz": "holds images of 28x0 pixels",
    "huge.npy": "holds images of 8000x8000 pixels",
    "two.npz": "no array 'image' but 'a', 'b'",
    "float.npz": "expected a stack of uint8",
    "cut.npz": "",
    "cut.npy": "not a whole .npy file",
    "text.parquet": "not a Parquet file",
    "a.txt": "no folder and no .npy, .npz or Parquet file",
    "none": "holds no image",
    "both": "Parquet files and pictures",
    "named.parquet": "no column 'image', it has 'picture'",
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


@pytest.mark.skipif(sys.platform != "linux", reason="other systems know no such names")
@pytest.mark.parametrize("name", [b"in/\xff.png", b"in\xff/a.png", b"in/\xff.parquet"])
def test_a_name_that_is_no_text(bundle: Bundle, tmp_path: Path, name: bytes) -> None:
    file = tmp_path / os.fsdecode(name)
    file.parent.mkdir()
    file.write_bytes(png(IMAGES[0]))
    with pytest.raises(DataError, match="not UTF-8"):
        predict(bundle, file.parent, tmp_path / "out")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems know no such names")
def test_predictions_go_into_a_folder_of_any_name(bundle: Bundle, sources: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / os.fsdecode(b"\xff")
    assert predict(bundle, sources["a.npy"], out).resumed_rows == 0
    assert predict(bundle, sources["a.npy"], out).resumed_rows == 90


def test_an_image_is_given_once(bundle: Bundle, sources: dict[str, Path], tmp_path: Path) -> None:
    folder = sources["pictures"]
    for chosen in ([folder, folder], [folder, folder / "x"], [folder / "x" / ".." / "x", folder / "x"]):
        with pytest.raises(UsageError, match="given twice"):
            predict(bundle, chosen, tmp_path / "out")


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"shard_rows": 0}, {"workers": 0}, {"runtime": "none"}])
def test_bad_requests(options: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        BulkRequest(**options)


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
    ("ids", "told"),
    [
        (pa.array([b"a"], pa.binary()), "is binary, expected text or numbers"),
        (pa.array([b"a"], pa.binary(1)), "expected text or numbers"),
        (pa.array([["a"]]), "expected text or numbers"),
        (pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")), "not UTF-8"),
    ],
    ids=["binary", "fixed", "list", "utf8"],
)
def test_ids_that_have_no_text(bundle: Bundle, tmp_path: Path, ids: pa.Array, told: str) -> None:
    pq.write_table(pa.table({"image": [png(IMAGES[0])], "sku": ids}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=told):
        predict(bundle, tmp_path / "a.parquet", tmp_path / "out", id_column="sku")


def test_predictions_are_not_written_into_the_bundle(bundle: Bundle, sources: dict[str, Path]) -> None:
    with pytest.raises(OutputError, match="lies in"):
        predict(bundle, sources["a.npy"], bundle.path / "out")
    bundle.check()


def test_predictions_are_not_written_into_their_source(bundle: Bundle, sources: dict[str, Path]) -> None:
    for out in (sources["pictures"] / "out", sources["pictures"]):
        with pytest.raises(UsageError, match="lies in the source"):
            predict(bundle, sources["pictures"], out)


def test_a_worker_that_can_not_open_its_file_says_so(bundle: Bundle, sources: dict[str, Path], tmp_path: Path) -> None:
    """In a process of its own, too."""
    folder = copy_bundle(bundle, tmp_path / "1")
    (folder / MODEL_TORCHSCRIPT).unlink()
    with pytest.raises(BundleError, match=r"has no model\.pt"):
        predict(reseal(folder), sources["a.npy"], tmp_path / "out", workers=2, runtime="torchscript-cpu")


def test_every_kind_of_picture_is_found(bundle: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for image, ending in zip(IMAGES, ENDINGS, strict=False):
        Image.fromarray(image.squeeze()).save(folder / f"a{ending}")
    (folder / "notes.txt").write_text("no picture")
    predict(bundle, folder, tmp_path / "out", workers=1)
    assert sorted(Path(str(name)).suffix for name in rows(tmp_path / "out")["id"]) == sorted(ENDINGS)


def test_an_unknown_engine(bundle: Bundle, sources: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'slurm' is not known"):
        predict_in_bulk(bundle, [sources["a.npy"]], tmp_path / "out", engine="slurm")


def test_a_damaged_image_ends_the_run_and_the_mended_one_goes_on(bundle: Bundle, tmp_path: Path) -> None:
    """In processes: the error comes back whole, what was written stays."""
    folder = tmp_path / "in"
    folder.mkdir()
    for index in range(12):
        (folder / f"{index:02d}.png").write_bytes(png(IMAGES[index]))
    (folder / "11.png").write_bytes(b"garbage")
    with pytest.raises(BnexportError, match=r"11\.png"):
        predict(bundle, folder, tmp_path / "out", workers=2, shard_rows=4)
    assert len(list((tmp_path / "out").glob("part-*"))) == 2
    (folder / "11.png").unlink()
    with pytest.raises(OutputError, match="a source has changed"):
        predict(bundle, folder, tmp_path / "out", workers=2, shard_rows=4)


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.parquet"])
def test_a_source_that_changes_while_it_is_read(
    bundle: Bundle, sources: dict[str, Path], tmp_path: Path, name: str
) -> None:
    """With as many rows as before it would be half the one and half the other, and nobody told."""
    (tmp_path / name).write_bytes(sources[name].read_bytes())
    job = make_job(bundle, (tmp_path / name,), tmp_path / "out", BulkRequest(workers=1, shard_rows=20))
    with contextlib.closing(ShardWorker.of(job)) as worker:
        worker.run(job.shards[0])
        (tmp_path / "new").write_bytes(sources[name].read_bytes())
        (tmp_path / "new").replace(tmp_path / name)
        with pytest.raises(DataError, match="has changed while it was read"):
            worker.run(job.shards[1])
    assert len(list((tmp_path / "out").glob("part-*"))) == 1


def test_shards_do_not_depend_on_who_asks(bundle: Bundle, sources: dict[str, Path], tmp_path: Path) -> None:
    """Workers, batches and the order in which a folder lists its files change no shard."""
    chosen = (sources["pictures"], sources["several"])
    jobs = [
        make_job(bundle, chosen, tmp_path, BulkRequest(workers=workers, batch_size=size))
        for workers, size in ((1, 1), (7, 64))
    ]
    assert jobs[0].shards == jobs[1].shards
    assert jobs[0].description == jobs[1].description
    assert [shard.number for shard in jobs[0].shards] == list(range(len(jobs[0].shards)))


def test_the_measured_table(bundle: Bundle, sources: dict[str, Path]) -> None:
    head, _, bare, ours, share, *rest = side_by_side(bundle, sources["a.npy"], workers=2, repeats=1).splitlines()
    rate, cpu = ([float(row.split("|")[column].split()[0]) for row in (bare, ours, share)] for column in (2, 3))
    assert head.count("|") == share.count("|") == 4
    assert rate[2] == pytest.approx(rate[1] / rate[0], abs=0.3)
    assert cpu[2] == pytest.approx(cpu[0] / cpu[1], rel=0.02)
    assert cpu[0] > 1000, "the processes are counted: 90 images bear their start"
    assert "n = 1 pairs of 90 images, 2 workers" in " ".join(rest)


def test_an_actor_of_ray_starts_from_the_users_folder(
    bundle: Bundle, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's processes are where Ray was started; an error while the worker opens travels as a value, too."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.npy").write_bytes(sources["a.npy"].read_bytes())
    copy_bundle(bundle, tmp_path / "b")
    job = make_job(Bundle.open("b"), (Path("in.npy"),), Path("out"), BulkRequest(workers=1))
    rows = [{"shard": pickle.dumps(shard)} for shard in job.shards]
    monkeypatch.chdir("/")
    actor = ShardActor(pickle.dumps(job.without_shards()), str(tmp_path))
    assert [actor(row) for row in rows] == [{"rows": 90, "error": b""}]
    assert pq.read_metadata(tmp_path / "out" / "part-00000.parquet").num_rows == 90
    monkeypatch.chdir("/")
    lost = ShardActor(pickle.dumps(job.without_shards()), str(tmp_path / "nowhere"))
    error = pickle.loads(lost(rows[0])["error"])
    assert isinstance(error, BundleError)
    assert "b does not exist" in error.message


def test_threads_of_ray_are_waited_for() -> None:
    slept = []

    def sleep() -> None:
        time.sleep(0.2)
        slept.append(True)

    with pytest.raises(KeyError), threads_ended():
        threading.Thread(target=sleep).start()
        raise KeyError
    assert slept
