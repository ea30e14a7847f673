import contextlib
import json
import os
import pickle
import re
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from support.bundles import copy_bundle, reseal, tuned_copy
from support.pictures import png
from unit.deploying.conftest import foreign_bundle
from unit.serving.bulk.conftest import IMAGES, predict, rows

from bnexport import interrupts
from bnexport.bundle import MODEL_ONNX, MODEL_TORCHSCRIPT, Bundle
from bnexport.errors import BnexportError, BundleError, OutputError, UsageError
from bnexport.files import write_atomically
from bnexport.runtimes.onnxruntime import OnnxRuntimeRunner
from bnexport.serving.bulk import bulk_prediction
from bnexport.serving.bulk.bulk_prediction import JOB, ShardActor, make_job, predict_in_bulk, threads_ended
from bnexport.serving.bulk.bulk_request import BulkProgress, BulkRequest
from bnexport.serving.predictor import predict_images
from bnexport.tuned import Choice, tuning_line


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
    assert (about["model"], about["source"], about["rows"]) == ("bn_lenet", str(sources["a.npy"]), 20)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_ends_the_run(
    bundle: Bundle, sources: dict[str, Path], tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes) -> None:
        if path.name == "part-00002.parquet":
            raise OutputError(f"{path} can't be written: the disk is full", remedy="Free some space")
        write_atomically(path, content)

    monkeypatch.setattr(bulk_prediction, "write_atomically", full)
    with pytest.raises(OutputError, match=r"part-00002\.parquet can't be written: the disk is full"):
        predict(bundle, sources["a.npy"], tmp_path / "out", workers=workers)
    monkeypatch.undo()
    done = predict(bundle, sources["a.npy"], tmp_path / "out", workers=workers)
    assert done.resumed_rows >= 40
    assert rows(tmp_path / "out")["id"] == [f"{sources['a.npy']}[{index}]" for index in range(90)]


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_lost_interrupt_ends_the_run(bundle: Bundle, sources: dict[str, Path], tmp_path: Path, workers: int) -> None:
    done: list[int] = []

    class Loses(BulkProgress):
        def on_shard(self, rows: int) -> None:
            done.append(rows)
            with contextlib.suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)

    request = BulkRequest(workers=workers, shard_rows=20)
    with interrupts.noted(), pytest.raises(KeyboardInterrupt):
        predict_in_bulk(bundle, [sources["a.npy"]], tmp_path / "out", request=request, progress=Loses())
    assert done == [20]
    assert not list((tmp_path / "out").glob(".part-*"))


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


def test_missing_or_cut_off_files_are_written_again(bundle: Bundle, sources: dict[str, Path], tmp_path: Path) -> None:
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
    """A worker that outlived its killed parent may leave such a part, with the same number of rows."""
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
    for options, message in (({"logits": True}, "logits was False"), ({"shard_rows": 9}, "shards was 5, now 10")):
        with pytest.raises(OutputError, match=message):
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
        with pytest.raises(OutputError, match="not a folder of predictions"):
            predict(bundle, sources["a.npy"], tmp_path / out, force=True)
    (tmp_path / "out" / "precious").unlink()
    assert predict(bundle, sources["a.npy"], tmp_path / "out").rows == 90, "an empty folder is accepted"
    (tmp_path / "out" / JOB).write_text("[]")
    with pytest.raises(OutputError, match="not written by bnexport"):
        predict(bundle, sources["a.npy"], tmp_path / "out", force=True)


def test_a_model_that_takes_more_than_an_image_is_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    foreign = foreign_bundle(tmp_path / "foreign" / "4")
    with pytest.raises(BundleError, match="has no preprocessing for images"):
        predict(foreign, sources["a.npy"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_changed_bundle_is_refused(bundle: Bundle, sources: dict[str, Path], tmp_path: Path) -> None:
    spoiled = copy_bundle(bundle, tmp_path / "1")
    (spoiled / MODEL_ONNX).write_bytes(b"x")
    with pytest.raises(BundleError, match=r"model\.onnx"):
        predict(Bundle.open(spoiled), sources["a.npy"], tmp_path / "out")


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"shard_rows": 0}, {"workers": 0}, {"runtime": "none"}])
def test_bad_requests(options: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        BulkRequest(**options)


def test_predictions_are_not_written_into_the_bundle(bundle: Bundle, sources: dict[str, Path]) -> None:
    with pytest.raises(OutputError, match="is inside"):
        predict(bundle, sources["a.npy"], bundle.path / "out")
    bundle.check()


def test_a_worker_that_can_not_open_its_file_reports_it(
    bundle: Bundle, sources: dict[str, Path], tmp_path: Path
) -> None:
    """The worker is a separate process."""
    folder = copy_bundle(bundle, tmp_path / "1")
    (folder / MODEL_TORCHSCRIPT).unlink()
    with pytest.raises(BundleError, match=r"has no model\.pt"):
        predict(reseal(folder), sources["a.npy"], tmp_path / "out", workers=2, runtime="torchscript-cpu")


def test_an_unknown_engine(bundle: Bundle, sources: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'slurm' is unknown"):
        predict_in_bulk(bundle, [sources["a.npy"]], tmp_path / "out", engine="slurm")


@pytest.mark.parametrize("gone", [True, False])
def test_a_damaged_image_ends_the_run_and_the_repaired_one_resumes(bundle: Bundle, tmp_path: Path, gone: bool) -> None:
    """With processes, the error arrives complete. Written files stay, also after the picture is repaired or removed."""
    folder = tmp_path / "in"
    folder.mkdir()
    for index in range(12):
        (folder / f"{index:02d}.png").write_bytes(png(IMAGES[index]))
    (folder / "11.png").write_bytes(b"garbage")
    with pytest.raises(BnexportError, match=r"11\.png"):
        predict(bundle, folder, tmp_path / "out", workers=2, shard_rows=4)
    assert len(list((tmp_path / "out").glob("part-*"))) == 2
    (folder / "11.png").unlink() if gone else (folder / "11.png").write_bytes(png(IMAGES[11]))
    with pytest.raises(OutputError, match="a source has changed"):
        predict(bundle, folder, tmp_path / "out", workers=2, shard_rows=4)
    done = predict(bundle, folder, tmp_path / "out", workers=2, shard_rows=4, force=True)
    assert (done.resumed_rows, done.rows) == (8, 11 if gone else 12)
    assert rows(tmp_path / "out")["id"] == sorted(map(str, folder.iterdir()))


def test_a_folder_is_read_as_training_reads_it(bundle: Bundle, tmp_path: Path) -> None:
    """Hidden entries do not count, links count as their targets, and no picture counts twice."""
    folder, store = tmp_path / "in", tmp_path / "store"
    for place, names in ((folder, ("a.png", ".b.png", ".git/c.png")), (store, ("d.PNG", "deeper/e.png"))):
        for index, name in enumerate(names):
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(png(IMAGES[index]))
    (folder / "linked").symlink_to(store)
    predict(bundle, folder, tmp_path / "out")
    found = rows(tmp_path / "out")["id"]
    assert found == [str(folder / name) for name in ("a.png", "linked/d.PNG", "linked/deeper/e.png")]
    (folder / "again").symlink_to(store)
    with pytest.raises(BnexportError, match=r"leads to .* again"):
        predict(bundle, folder, tmp_path / "other")


def test_force_keeps_what_belongs_to_the_new_job_alone(bundle: Bundle, tmp_path: Path) -> None:
    """Without one picture, all later ones move by one. A second source that grows does not change the first one."""
    first, second, out = tmp_path / "a", tmp_path / "b.npy", tmp_path / "out"
    first.mkdir()
    for index in range(8):
        (first / f"{index}.png").write_bytes(png(IMAGES[index]))
    np.save(second, IMAGES[:8])
    predict(bundle, [first, second], out, shard_rows=4)
    np.save(second, IMAGES[:9])
    assert predict(bundle, [first, second], out, shard_rows=4, force=True).resumed_rows == 8
    (first / "5.png").unlink()
    done = predict(bundle, [first, second], out, shard_rows=3, force=True)
    assert (done.rows, done.resumed_rows) == (16, 0), "other shards"
    (first / "6.png").unlink()
    done = predict(bundle, [first, second], out, shard_rows=3, force=True)
    assert (done.rows, done.resumed_rows) == (15, 3), "the second source's files have other numbers now"
    assert pq.read_table(out).num_rows == 15
    predict(bundle, [first, second], tmp_path / "fresh", shard_rows=3)
    assert pq.read_table(out).equals(pq.read_table(tmp_path / "fresh"))


def test_an_actor_of_ray_starts_from_the_users_folder(
    bundle: Bundle, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's processes start in another folder. An error while the worker opens is returned as a value, too."""
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


class _Lines(BulkProgress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def on_tuning(self, line: str) -> None:
        self.lines.append(line)

    def on_start(self, rows: int, done: int, workers: int) -> None:
        self.lines.append(f"{workers} workers")


@pytest.mark.parametrize(
    ("changes", "options", "lines"),
    [
        ({"sessions": 1}, {}, ["tuned: 1 session x 2 threads, batch 32", "1 workers"]),
        ({}, {"workers": 1}, ["tuned: 1 session x 1 thread, batch 32", "1 workers"]),
        ({"sessions": 1}, {"batch_size": 7}, ["tuned: 1 session x 2 threads, batch 7", "1 workers"]),
        (
            {"runtime": "openvino-cpu"},
            {"workers": 1},
            ["not tuned: tuned.json has another runtime for the goal throughput: openvino-cpu", "1 workers"],
        ),
    ],
)
def test_a_tuning_sets_what_no_option_sets(
    bundle: Bundle,
    sources: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    wanted: np.ndarray,
    changes: dict[str, object],
    options: dict[str, int],
    lines: list[str],
) -> None:
    mine = tuned_copy(bundle, tmp_path / "tuned", monkeypatch, **changes)
    calls: list[int] = []
    threads: list[int | None] = []
    run, opened = OnnxRuntimeRunner.run, OnnxRuntimeRunner.__init__

    def counted(self: Any, feeds: Any) -> Any:
        calls.append(len(feeds["input"]))
        return run(self, feeds)

    def noted(self: Any, *words: Any, **settings: Any) -> None:
        threads.append(settings["settings"].threads)
        opened(self, *words, **settings)

    monkeypatch.setattr(OnnxRuntimeRunner, "run", counted)
    monkeypatch.setattr(OnnxRuntimeRunner, "__init__", noted)
    listener = _Lines()
    request = BulkRequest(logits=True, **options)
    predict_in_bulk(mine, [sources["a.npy"]], tmp_path / "out", request=request, progress=listener)
    assert listener.lines == lines
    found = re.fullmatch(r"tuned: .* x (\d) .*batch (\d+)", lines[0])
    assert threads == [int(found[1]) if found else 1]
    assert max(calls[1:]) == (int(found[2]) if found else 90), "after the probe of two samples"
    assert np.allclose(rows(tmp_path / "out")["logits"], wanted, rtol=0, atol=2e-5)


def test_without_a_tuning_nothing_is_printed(bundle: Bundle, sources: dict[str, Path], tmp_path: Path) -> None:
    listener = _Lines()
    predict_in_bulk(bundle, [sources["a.npy"]], tmp_path / "out", request=BulkRequest(workers=1), progress=listener)
    assert listener.lines == ["1 workers"]


def test_small_tuned_batches_are_read_together() -> None:
    choice = Choice("onnxruntime-cpu", 24, 1, 1, 1.0, 1.0, 1.0)
    tuned = BulkRequest(tuning=choice)
    assert (tuned.rows_read(), tuned.resolved_batch()) == (240, 24)
    assert replace(tuned, batch_size=7).rows_read() == 7
    assert BulkRequest(tuning=replace(choice, batch=1000)).rows_read() == 1000
    assert tuning_line(choice) == "tuned: 1 session x 1 thread, batch 24"
