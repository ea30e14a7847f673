"""Several processes on this machine, started by torchrun."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from processes_child import COUNT, RUNS, small_dataset
from test_reliability import HERE, ROOT, environment, wait_until

from bnexport.cli.main import main
from bnexport.errors import DataError, UsageError
from bnexport.loading.checkpoint import load_checkpoint
from bnexport.training.loop import epoch_order
from bnexport.training.processes import World, open_world
from bnexport.training.training_run import train


def torchrun(size, *words, timeout=280):
    starter = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    with subprocess.Popen(
        [*starter, *map(str, words)], env=environment(), cwd=ROOT, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            out, error = process.communicate(timeout=timeout)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out, error


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_the_shares_of_a_batch_are_the_batch(size):
    for count in (0, 1, size - 1, size, size + 1, 2 * size, 20, 97):
        batch = torch.randperm(count, generator=torch.Generator().manual_seed(count))
        worlds = [World(rank, size) for rank in range(size)]
        shares = [world.share(batch) for world in worlds]
        assert torch.equal(torch.cat(shares), batch)
        lengths = {len(share) for share in shares}
        assert max(lengths) - min(lengths) <= 1
        assert worlds[0].smallest_share(count) == min(lengths)


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def together(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"of{request.param}")
    code, out, error = torchrun(request.param, HERE / "processes_child.py", folder)
    assert code == 0, error
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(request.param)]
    return folder, found, out, error


def test_every_image_is_seen_once_in_every_epoch(together):
    _, found, _, _ = together
    for name, config in RUNS.items():
        whole = [
            batch.tolist()
            for epoch in range(1, config.epochs + 1)
            for batch in torch.split(epoch_order(COUNT, seed=config.seed, epoch=epoch), config.batch_size)
        ]
        parts = [one[name]["seen"] for one in found]
        together_seen = [[index for share in shares for index in share] for shares in zip(*parts, strict=True)]
        assert together_seen[: len(whole)] == whole  # what follows is the look at the statistics after the last epoch
        assert len({one[name]["accuracy"] for one in found}) == 1, "one test accuracy for all"


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bnexport.training.preparation.load_dataset", small_dataset)
        for name, config in RUNS.items():
            train(replace(config, recalibrate=False), out=folder / name)
    return folder


def distance(one, other):
    first, second = (load_checkpoint(folder / "checkpoint.safetensors") for folder in (one, other))
    losses = [[row["train_loss"] for row in file.metadata["training"]["history"]] for file in (first, second)]
    assert first.state.keys() == second.state.keys()
    weights = [  # as a share of the largest in its tensor, where that is above 1: moving variances are
        ((value.double() - second.state[name]).abs().max() / max(value.abs().max(), 1)).item()
        for name, value in first.state.items()
    ]
    return max(*weights, *(abs(a - b) for a, b in zip(*losses, strict=True)))


def test_synchronised_processes_train_what_one_does(together, alone):
    folder = together[0]
    for name in ("synced torch", "synced scratch", "none"):
        assert distance(folder / name, alone / name) < 1e-5, name
    assert distance(folder / "not synced", alone / "not synced") > 1e-3


def test_the_accuracy_is_that_of_the_saved_statistics(together):
    """Without synchronised BatchNorm each process has separate moving statistics; the first one's are saved."""
    from test_run import Preprocessing, bn_lenet

    folder, found, _, _ = together
    checkpoint = load_checkpoint(folder / "not synced" / "checkpoint.safetensors")
    network = bn_lenet(**checkpoint.metadata["network"]["options"]).eval()
    network.load_state_dict(checkpoint.state)
    dataset = small_dataset()
    with torch.no_grad():
        logits = network(torch.from_numpy(Preprocessing().apply(dataset.test_images)))
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(dataset.test_labels)).item()
    assert checkpoint.metadata["training"]["history"][-1]["test_loss"] == pytest.approx(loss, rel=1e-5)
    assert (logits.argmax(1).numpy() == dataset.test_labels).mean() == pytest.approx(found[0]["not synced"]["accuracy"])


def test_only_one_process_prints(together):
    folder, found, out, error = together
    assert {json.dumps(one["codes"]) for one in found} == {
        json.dumps({"reported once": 0, "resumed": 0, "small batch": 2, "diverged": 2, "one is broken": 2})
    }
    assert out.count("epoch 1/2  loss") == out.count("epoch 2/2  loss") == out.count("epoch 3/3  loss") == 1
    assert out.count("written: ") == 6
    ours = [line for line in error.splitlines() if line.startswith("Error: ")]
    assert len(ours) == 3
    assert f"images for {len(found)} processes, and BatchNorm needs at least 2 in each" in ours[0]
    assert "diverged: the loss or the weights are no longer finite in batch 2 of 4 of epoch 1" in ours[1]
    assert ours[2] == "Error: process 1: this one can't read it."
    assert "Traceback" not in error
    assert {path.name for path in (folder / "reported").iterdir()} >= {"model.safetensors", "learning_curves.png"}


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_others_and_the_run_resumes(tmp_path):
    out, size = tmp_path / "a", 3
    words = [
        "-m",
        "bnexport",
        "train",
        "--dataset",
        "digits",
        "--device",
        "cpu",
        "--batch-size",
        "512",
        "--out",
        str(out),
    ]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(size)}
    processes = [
        subprocess.Popen(
            [sys.executable, *words, "--epochs", "500"],
            env=environment(**meeting, RANK=str(rank), LOCAL_RANK=str(rank)), cwd=ROOT,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(size)
    ]  # fmt: skip
    try:
        wait_until(lambda: (out / "metrics.jsonl").exists(), 120)
        processes[1].send_signal(signal.SIGKILL)
        for rank in (0, 2):
            _, error = processes[rank].communicate(timeout=240)
            assert processes[rank].returncode == 3, error
            assert "Error: another process of this training ended" in error
            assert "start again with --resume, with any number of processes" in error
            assert "Traceback" not in error
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    epoch = load_checkpoint(out / "checkpoint.safetensors").metadata["training"]["epoch"]
    code, text, error = torchrun(2, HERE / "resume_child.py", out)
    assert code == 0, error
    assert f"resuming after epoch {epoch}" in text
    assert "processes was 3, is 2" in text


# --- the end of a process

ENDING = """
import atexit, sys
from bnexport.training.processes import end_process

class Finalised:
    def __del__(self):
        print("finalised", flush=True)

kept = Finalised()
atexit.register(print, "exit function")
print("printed", end=" ")
if sys.argv[1] == "plainly":
    raise SystemExit(3)
end_process(3)
"""


@pytest.mark.sampled(2, 1)
@pytest.mark.parametrize(
    ("way", "shown"), [("plainly", "printed exit function\nfinalised\n"), ("", "printed exit function\n")]
)
def test_a_process_of_several_ends_without_finalising_python_and_loses_nothing(way, shown):
    """Finalisation is what aborts a process whose gloo threads still let go of tensors (a race that no test can force)."""
    found = subprocess.run(
        [sys.executable, "-c", ENDING, way], env=environment(), cwd=ROOT, capture_output=True, text=True
    )
    assert (found.returncode, found.stdout) == (3, shown), found.stderr


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="no /dev/full here")
@pytest.mark.sampled(2)
@pytest.mark.parametrize(("code", "ended"), [(0, 120), (3, 3)])
def test_lost_output_is_a_failure(code, ended):
    """As where Python itself ends: 120."""
    text = f"from bnexport.training.processes import end_process; print('printed'); end_process({code})"
    with Path("/dev/full").open("w") as full:
        found = subprocess.run(
            [sys.executable, "-c", text], env=environment(PYTHONUNBUFFERED=""), cwd=ROOT, stdout=full
        )
    assert found.returncode == ended


@pytest.mark.parametrize(("size", "rank", "ended"), [("1", "0", []), ("2", "0", [2]), ("2", "1", [2])])
def test_the_command_line_ends_each_of_several_processes(monkeypatch, capsys, size, rank, ended):
    """The other processes end with the same code and print nothing."""
    monkeypatch.setenv("WORLD_SIZE", size)
    monkeypatch.setenv("RANK", rank)
    codes = []
    monkeypatch.setattr("bnexport.training.processes.end_process", codes.append)
    with pytest.raises(SystemExit) as left:
        main(["train", "--lr", "-1", "--device", "cpu"])
    assert (codes, left.value.code) == (ended, 2)
    assert ("Error: " in capsys.readouterr().err) == (rank == "0")


# --- what is refused


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "1"}, "RANK is 1, but WORLD_SIZE is 1"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2, but WORLD_SIZE is 2"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK is 'x', not a number"),
        ({"RANK": "0", "WORLD_SIZE": "-2"}, "WORLD_SIZE is '-2'"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR is not set"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, "MASTER_PORT is not set"),
    ],
)
def test_variables_that_contradict_each_other(monkeypatch, variables, message):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=message) as caught, open_world("cpu"):
        pass
    assert "torchrun" in caught.value.remedy


def test_a_single_process_runs_the_function_itself():
    world = World()
    assert world.from_leader(lambda: 3) == world.all_do(lambda: 3) == world.leader_first(lambda: 3) == 3

    def broken():
        raise DataError("mine", remedy="none")

    with pytest.raises(DataError, match="mine"):
        world.all_do(broken)
