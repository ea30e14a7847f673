"""Kill -9 at random moments, a disk that is full, two runs at once: real processes, real signals, real limits."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bnexport.cli.main import main
from bnexport.loading.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from bnexport.training.config import TrainingConfig
from bnexport.training.preparation import made_by, resume_note
from bnexport.training.processes import World
from bnexport.training.training_run import train

HERE = Path(__file__).parent
ROOT = Path(__file__).parents[3]
TRAIN = [sys.executable, "-m", "bnexport", "train", "--dataset", "digits", "--device", "cpu", "--batch-size", "1024"]

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")


def environment(**more):
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1", **more}


def bnexport_train(*options, limit=None, timeout=120):
    """Run the command in a process whose files may not grow beyond ``limit`` bytes."""
    limited = None if limit is None else lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return subprocess.run(
        [*TRAIN, *map(str, options)],
        env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False, preexec_fn=limited,
    )  # fmt: skip


@pytest.mark.slow
def test_twenty_kills_at_random_moments_resume_to_the_same_weights(tmp_path):
    """Momentum, AdamW, cosine with warm-up, dropout, draws of numpy and Python, bfloat16: bit by bit, optimiser included."""
    done = subprocess.run(
        [sys.executable, str(HERE / "killed_child.py"), str(tmp_path), "1"],
        env=environment(), capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    kills = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kills) == 20
    assert [kill for kill in kills if kill["difference"] or kill["left"]] == []
    assert len({(kill["recipe"], kill["at"], kill["count"]) for kill in kills}) >= 15
    assert {kill["epochs"] for kill in kills} >= {0, 1, 2}
    assert any(kill["parts"] for kill in kills), "none hit a file that was written next to its place"


@pytest.fixture(scope="module")
def one_epoch(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "a"
    train(TrainingConfig(dataset="digits", device="cpu", batch_size=1024, epochs=1), out=out)
    return out


def train_here(capsys, *options):
    """The command in this process: its exit code, and what it printed."""
    with pytest.raises(SystemExit) as left:
        main([*TRAIN[3:], *map(str, options)])
    return left.value.code, *capsys.readouterr()


def sentences(error):
    assert "Traceback" not in error
    lines = error.splitlines()
    assert len(lines) == 2, error
    return lines


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "config.json"}


@pytest.mark.slow
def test_a_file_that_may_not_grow_leaves_the_checkpoint(tmp_path, one_epoch):
    out = tmp_path / "a"
    shutil.copytree(one_epoch, out)
    before = contents(out)
    limit = (out / "checkpoint.safetensors").stat().st_size // 2
    done = bnexport_train("--out", out, "--resume", "--epochs", 2, limit=limit)
    assert done.returncode == 2
    assert "checkpoint.safetensors can't be written: [Errno 27] File too large" in sentences(done.stderr)[0]
    assert contents(out) == before
    assert bnexport_train("--out", out, "--resume", "--epochs", 2).returncode == 0


def namespaces():
    command = ["unshare", "-Urm", "sh", "-c", "mount -t tmpfs -o size=64k none /mnt"]
    try:
        return subprocess.run(command, capture_output=True, timeout=240, check=False).returncode == 0
    except OSError:
        return False


FULL = """
set -e
mount -t tmpfs -o size=800k none "$1"
cp -r "$2" "$1/a"
dd if=/dev/zero of="$1/filler" bs=1k 2>/dev/null || true
shift 2
"$@" && code=0 || code=$?
cp -r "$DISK/a" "$KEPT"
exit $code
"""


@pytest.mark.slow
@pytest.mark.skipif(not namespaces(), reason="this system lets no user mount a disk of his own")
def test_a_full_disk_leaves_the_checkpoint(tmp_path, one_epoch):
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    command = [*TRAIN, "--out", str(disk / "a"), "--resume", "--epochs", "2"]
    done = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", FULL, "sh", str(disk), str(one_epoch), *command],
        env={**environment(), "DISK": str(disk), "KEPT": str(kept)},
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "can't be written: [Errno 28] No space left on device" in sentences(done.stderr)[0]
    assert contents(kept) == contents(one_epoch)


def wait_until(condition, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
def test_two_runs_at_once_and_a_killed_one(tmp_path):
    out = tmp_path / "a"
    with subprocess.Popen(
        [*TRAIN, "--epochs", "500", "--out", str(out)],
        env=environment(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as first:  # fmt: skip
        try:
            wait_until(lambda: (out / "checkpoint.safetensors").exists())
            for option in ("--resume", "--force"):
                second = bnexport_train("--out", out, option)
                assert second.returncode == 2
                assert f"another run is writing into {out}" in sentences(second.stderr)[0]
            before = load_checkpoint(out / "checkpoint.safetensors").metadata["training"]["epoch"]
            wait_until(lambda: load_checkpoint(out / "checkpoint.safetensors").metadata["training"]["epoch"] > before)
            assert first.poll() is None
        finally:
            first.send_signal(signal.SIGKILL)
            first.communicate()
    assert (out / ".run.lock").exists()
    done = bnexport_train("--out", out, "--force", "--epochs", 1)
    assert done.returncode == 0, done.stderr


BREAKS = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.steps = torch.nn.Linear(784, 10), 0

    def forward(self, X):
        self.steps += self.training
        return self.linear(X.flatten(1)) * (1.0 if self.steps != 2 * 6 + 2 else float("inf"))

def build():
    return Net()
"""


# --- the note on a resumed run that may differ


def test_differences_are_named():
    now = {"device": "cpu", "processor": "a", "processes": 2, "threads": 1, "torch": "2.14"}
    assert made_by(World()).keys() == now.keys()
    assert resume_note(now, now) is None
    assert resume_note({}, now) is None, "older checkpoints do not contain it"
    for name, value in {"processor": "b", "processes": 3, "threads": 4, "torch": "2.13"}.items():
        note = resume_note({**now, name: value}, now)
        assert note is not None
        assert f"{name} was {value}, is {now[name]}" in note
    assert "on a GPU" in str(resume_note({}, {**now, "device": "H100", "processes": 1, "threads": 0}))


def test_a_resumed_run_with_other_threads_reports_it(tmp_path, one_epoch, capsys):
    out = tmp_path / "a"
    shutil.copytree(one_epoch, out)
    saved = load_checkpoint(out / "checkpoint.safetensors")
    saved.metadata["training"]["made_by"]["threads"] = 64
    save_checkpoint(out / "checkpoint.safetensors", Checkpoint(saved.state, saved.metadata, saved.optimizer))
    code, printed, error = train_here(capsys, "--out", out, "--resume", "--epochs", 2)
    assert code == 0, error
    assert "note: the resumed weights may differ by rounding" in printed
    assert f"threads was 64, is {torch.get_num_threads()}" in printed


def test_a_loss_that_is_not_finite_names_epoch_batch_and_checkpoint(tmp_path, capsys):
    """The network becomes infinite in the middle of its third epoch."""
    (tmp_path / "net.py").write_text(BREAKS)
    out = tmp_path / "a"
    model = f"{tmp_path / 'net.py'}:build"
    code, _, error = train_here(capsys, "--model", model, "--out", out, "--lr", 0.01, "--epochs", 4)
    assert code == 2
    message, remedy = sentences(error)
    assert "no longer finite in batch 2 of 6 of epoch 3" in message
    assert f"{out / 'checkpoint.safetensors'} has epoch 2, which was finite" in remedy
    assert load_checkpoint(out / "checkpoint.safetensors").metadata["training"]["epoch"] == 2
    assert not (out / "model.safetensors").exists()
