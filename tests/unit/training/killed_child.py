"""A child of test_reliability: runs that are killed at random moments, each a fork of this process, which has torch loaded.

Nothing is computed here before a fork, because torch's threads do not survive one. Prints one JSON line per kill.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bnexport.data import digits
from bnexport.data.dataset_table import Dataset
from bnexport.loading.checkpoint import load_checkpoint
from bnexport.optional import require
from bnexport.training import preparation
from bnexport.training.config import TrainingConfig
from bnexport.training.listeners import TrainingListener
from bnexport.training.training_run import train

EPOCHS, BATCHES, KILLS = 3, 4, 20
#: Several kinds of random layers: dropout by torch, noise by numpy and by Python.
NETWORK = """
import random
import numpy as np
import torch
from torch import nn

class Noise(nn.Module):
    def forward(self, X):
        return X * float(np.random.uniform(0.9, 1.1)) * random.uniform(0.9, 1.1) if self.training else X

def build():
    norm = nn.BatchNorm2d(4, eps=1e-3)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([-1.5, 0.0, 0.3, 2.0]))
    return nn.Sequential(
        nn.Conv2d(1, 4, 5, stride=3), norm, nn.ReLU(), Noise(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(256, 10)
    )
"""


def recipes(folder: Path) -> dict[str, TrainingConfig]:
    (folder / "net.py").write_text(NETWORK)
    common = {"dataset": "digits", "epochs": EPOCHS, "batch_size": 16, "device": "cpu", "seed": 7}
    cosine = {"schedule": "cosine", "warmup_epochs": 0.75}
    own = {"model": f"{folder / 'net.py'}:build", "optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1}
    return {
        "momentum": TrainingConfig(**common, lr=0.2, momentum=0.9, weight_decay=0.01, **cosine),
        "dropout": TrainingConfig(**common, **own, label_smoothing=0.1, **cosine),
        "bfloat16": TrainingConfig(**common, lr=0.2, momentum=0.9, amp="bfloat16"),
        "scratch": TrainingConfig(**common, lr=0.01, norm="scratch", optimizer="adamw"),
    }


def small_dataset(*_: object, **__: object) -> Dataset:
    """54 images: three batches of 16 and one of 6."""
    return Dataset("digits", *digits.draw(54, seed=1), *digits.draw(20, seed=2), tuple("0123456789"), "a test")


class Teller(TrainingListener):
    """Writes a letter for each step into a pipe."""

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe

    def on_batch(self, done: int, total: int) -> None:
        assert total == BATCHES
        os.write(self.pipe, b"b")


def tell_of_renames(pipe: int) -> None:
    """Print a letter when a file is whole next to its place, and one after its renaming; slowly, so that both can be hit."""
    replace = Path.replace

    def slow(self: Path, target: Path) -> Path:
        os.write(pipe, b"r")
        time.sleep(0.02)
        result = replace(self, target)
        os.write(pipe, b"R")
        time.sleep(0.02)
        return result

    Path.replace = slow  # type: ignore[method-assign,assignment]


def forked(act: Callable[[], object]) -> int:
    child = os.fork()
    if child:
        return child
    try:
        act()
        os._exit(0)
    except BaseException as error:
        print(f"child: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def finished(act: Callable[[], object]) -> None:
    _, status = os.waitpid(forked(act), 0)
    assert status == 0, f"a run ended with {status}"


def killed(config: TrainingConfig, out: Path, letter: bytes, count: int, delay: float) -> None:
    """Start a run, wait for the letter to come ``count`` times and a moment more, and kill it."""
    reader, writer = os.pipe()

    def run() -> None:
        tell_of_renames(writer)
        train(config, out=out, progress=Teller(writer))
        os.write(writer, b"e" * 99)
        signal.pause()  # to be killed late is to be killed, too

    child = forked(run)
    os.close(writer)
    seen = b""
    while seen.count(letter) < count and b"e" not in seen:
        got = os.read(reader, 1)
        assert got, "the run ended by itself"
        seen += got
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(reader)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL


def whole_epochs(out: Path) -> int:
    """Epochs in the checkpoint of a killed run; every file that is there is whole."""
    if (out / "config.json").exists():
        TrainingConfig.from_json(json.loads((out / "config.json").read_text()))
    if (out / "metrics.jsonl").exists():
        assert all(json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines())
    files = [out / name for name in ("checkpoint.safetensors", "model.safetensors")]
    epochs = [load_checkpoint(file).metadata["training"]["epoch"] for file in files if file.exists()]
    return int(epochs[0]) if epochs else 0


def difference(one: Path, other: Path) -> str:
    """The first thing in which two runs' results differ, but for the speed; "" when nothing does."""
    for name in ("checkpoint.safetensors", "model.safetensors"):
        first, second = load_checkpoint(one / name), load_checkpoint(other / name)
        for part in ("state", "optimizer"):
            a, b = getattr(first, part), getattr(second, part)
            if set(a) != set(b):
                return f"{name}: {part} holds other tensors"
            for key in a:
                if not torch.equal(a[key], b[key]):
                    return f"{name}: {key}"
        rows = [
            [{**row, "examples_per_s": 0} for row in checkpoint.metadata["training"]["history"]]
            for checkpoint in (first, second)
        ]
        if rows[0] != rows[1]:
            return f"{name}: history"
    return ""


def warm_up(config: TrainingConfig) -> None:
    """Import what a run imports as it goes, before the forks: torch's optimisers take a second of it."""
    preparation.build_network(config, 10, config.preprocessing())
    preparation.make_optimizer(torch.nn.Linear(1, 1), config, torch.device("cpu")).state_dict()
    require("filelock", purpose="a test")


def moments(choose: random.Random) -> list[tuple[bytes, int, float]]:
    """At the start, after random steps, and around random renames: (letter, how often it came, seconds more)."""
    writes = 1 + 2 * EPOCHS + 1
    start = [(b"b", 0, choose.uniform(0, 0.02)) for _ in range(2)]
    steps = [(b"b", choose.randint(1, EPOCHS * BATCHES), choose.uniform(0, 0.004)) for _ in range(10)]
    renames = [(choose.choice([b"r", b"R"]), choose.randint(1, writes), choose.uniform(0, 0.015)) for _ in range(8)]
    return start + steps + renames


def main(folder: Path, seed: int) -> None:
    torch.set_num_threads(1)
    dataset = small_dataset()
    preparation.load_dataset = lambda *_, **__: dataset
    every = recipes(folder)
    warm_up(every["scratch"])
    for name, config in every.items():
        finished(lambda config=config, name=name: train(config, out=folder / name))
    for number, (letter, count, delay) in enumerate(moments(random.Random(seed))):
        name = list(every)[number % len(every)]
        out = folder / f"killed_{number}"
        killed(every[name], out, letter, count, delay)
        epochs = whole_epochs(out)
        parts = len(list(out.glob(".*.part"))) if out.is_dir() else 0
        finished(lambda name=name, out=out: train(every[name], out=out, resume=True))
        left = [path.name for path in out.iterdir() if path.name.endswith(".part")]
        found = {"recipe": name, "at": letter.decode(), "count": count, "epochs": epochs, "parts": parts, "left": left}
        print(json.dumps({**found, "difference": difference(out, folder / name)}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
