"""A bulk prediction in a separate process: killed between shards, interrupted, measured for memory, on Ray."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.processes import alive
from unit.serving.bulk.conftest import IMAGES

from bnexport.bundle import Bundle
from bnexport.serving.bulk.bulk_prediction import predict_in_bulk
from bnexport.serving.bulk.bulk_request import BulkRequest

ROOT = Path(__file__).parents[4]
#: A cluster on this machine is not joined: its actors would not be children of the test.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "RAY_ADDRESS": "local"}
SHARD_ROWS = 100
LIMIT = 120

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source with enough rows for a kill between shards. Each row has another image, so that a duplicate row is found."""
    images = np.concatenate([np.roll(IMAGES, step, 2) for step in range(100)])
    np.save(file := tmp_path_factory.mktemp("stack") / "stack.npy", images)
    return file


def command(bundle: Bundle, source: Path, out: Path, *options: str) -> list[str]:
    words = [sys.executable, "-m", "bnexport", "predict", str(bundle.path), str(source), "--out", str(out)]
    return [*words, "--shard-rows", str(SHARD_ROWS), *options]


@contextlib.contextmanager
def started(words: list[str]) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        words, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def until(what: str, ready: object, seconds: float = LIMIT) -> None:
    end = time.monotonic() + seconds
    while not ready():  # type: ignore[operator]
        assert time.monotonic() < end, f"{what} did not happen"
        time.sleep(0.01)


def parts(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in out.glob("part-*.parquet")}


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_a_kill_between_shards_loses_and_doubles_nothing(bundle: Bundle, stack: Path, tmp_path: Path) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    words = command(bundle, stack, out, "--workers", "2")
    with started(words) as process:
        until("a third shard", lambda: len(parts(out)) >= 3)
        workers = children(process.pid)
        assert len(workers) >= 2
        process.kill()
        process.wait(LIMIT)
        until("the end of its workers", lambda: not any(map(alive, workers)), 30)
    before = parts(out)
    assert 3 <= len(before) < 90, "killed between shards"
    done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, timeout=LIMIT, check=True)
    assert f"{len(before) * SHARD_ROWS} were there already" in done.stdout
    assert {name: time for name, time in parts(out).items() if name in before} == before, (
        "finished files are not written again"
    )
    assert len(parts(out)) == 90
    predict_in_bulk(bundle, [stack], whole, request=BulkRequest(workers=1, shard_rows=SHARD_ROWS))
    rows = pq.read_table(out)
    assert rows.num_rows == len(set(rows["id"].to_pylist())) == 9000
    assert rows.equals(pq.read_table(whole)), "the same rows as without the kill"


def test_ctrl_c_leaves_whole_shards(bundle: Bundle, stack: Path, tmp_path: Path) -> None:
    with started(command(bundle, stack, tmp_path / "out", "--workers", "2")) as process:
        until("a shard", lambda: parts(tmp_path / "out"))
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=LIMIT)
    assert process.returncode == 130
    assert "Interrupted." in errors
    assert "Traceback" not in errors
    assert {pq.read_metadata(path).num_rows for path in (tmp_path / "out").glob("part-*")} == {SHARD_ROWS}
    assert not list((tmp_path / "out").glob(".*"))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_workers_ignore_ctrl_c_while_they_start(bundle: Bundle, stack: Path, tmp_path: Path) -> None:
    """Before bnexport's code runs, Python would print a traceback."""
    deaf = {}
    with started(command(bundle, stack, tmp_path / "out", "--workers", "2")) as process:
        while not parts(tmp_path / "out"):
            assert process.poll() is None
            for child in children(process.pid):
                with contextlib.suppress(FileNotFoundError):
                    deaf.setdefault(child, hears_no_interrupt(child))
    assert len(deaf) >= 2
    assert all(deaf.values())


def hears_no_interrupt(pid: int) -> bool:
    lines = dict(line.split(":\t") for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "Sig" in line)
    return bool((int(lines["SigBlk"], 16) | int(lines["SigIgn"], 16)) & 1 << (signal.SIGINT - 1))


def test_a_dead_worker_is_a_sentence(bundle: Bundle, stack: Path, tmp_path: Path) -> None:
    with started(command(bundle, stack, tmp_path / "out", "--workers", "2")) as process:
        until("a shard", lambda: parts(tmp_path / "out"))
        os.kill(children(process.pid)[-1], signal.SIGKILL)
        _, errors = process.communicate(timeout=LIMIT)
    assert process.returncode == 3
    assert "a worker's process died" in errors
    assert "Traceback" not in errors


PEAK = """
import sys
from pathlib import Path
from bnexport.serving.bulk.bulk_prediction import predict_in_bulk
from bnexport.serving.bulk.bulk_request import BulkRequest

predict_in_bulk(sys.argv[1], [sys.argv[2]], sys.argv[3], request=BulkRequest(workers=1, shard_rows=2000))
print(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("ending", ["npy", "npz"])
def test_memory_does_not_grow_with_the_source(bundle: Bundle, tmp_path: Path, ending: str) -> None:
    peaks = []
    for rows in (4_000, 50_000):
        source = tmp_path / f"{rows}.{ending}"
        images = np.random.default_rng(0).integers(0, 16, (rows, 28, 28), np.uint8)  # zeros would pack like a bomb
        np.save(source, images) if ending == "npy" else np.savez_compressed(source, image=images)
        words = [sys.executable, "-c", PEAK, str(bundle.path), str(source), str(tmp_path / f"out-{rows}")]
        done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, timeout=LIMIT, check=True)
        peaks.append(int(done.stdout) / 1024)
    assert peaks[1] - peaks[0] < 15, f"{peaks} MB for 3 and 39 MB of images"


@pytest.mark.needs("ray")
def test_ray_with_an_actor_killed_in_between(bundle: Bundle, stack: Path, tmp_path: Path) -> None:
    """On a local Ray of two workers, which writes the same files as the local engine."""
    program = Path(__file__).with_name("ray_child.py")
    out, whole = tmp_path / "out", tmp_path / "whole"
    words = [sys.executable, str(program), str(bundle.path), str(stack), str(out), str(SHARD_ROWS)]
    with started(words) as process:
        printed, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors[-2000:]
    assert printed.splitlines()[-1] == "killed 1 rows 9000", "Ray reports the death before"
    predict_in_bulk(bundle, [stack], whole, request=BulkRequest(workers=1, shard_rows=SHARD_ROWS))
    assert pq.read_table(out).equals(pq.read_table(whole))
    assert len(parts(out)) == 90


@pytest.mark.needs("ray")
def test_errors_of_ours_come_back_from_ray(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "bad.png").write_bytes(b"garbage")
    with started(command(bundle, tmp_path / "in", tmp_path / "out", "--engine", "ray", "--workers", "1")) as process:
        _, errors = process.communicate(timeout=240)
    assert process.returncode == 2, errors[-2000:]
    assert "bad.png is not a PNG" in errors


def test_two_runs_do_not_write_into_one_folder(bundle: Bundle, stack: Path, tmp_path: Path) -> None:
    """Otherwise, --force of another job would mix its rows with those of the first job."""
    out = tmp_path / "out"
    with started(command(bundle, stack, out, "--workers", "1")) as process:
        until("a shard", lambda: parts(out))
        os.kill(process.pid, signal.SIGSTOP)
        for options in ((), ("--force", "--logits")):
            words = command(bundle, stack, out, "--workers", "1", *options)
            second = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, timeout=LIMIT, check=False)
            assert second.returncode == 2
            assert "another run is writing into" in second.stderr
        os.kill(process.pid, signal.SIGCONT)
        printed, errors = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, errors
    assert "9000 rows" in printed
