"""A process of test_processes, started by torchrun with a folder. Several checks, because a start takes seconds."""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from bnexport.cli.main import run
from bnexport.data import digits
from bnexport.data.dataset_table import Dataset
from bnexport.errors import DataError
from bnexport.training import preparation
from bnexport.training.config import TrainingConfig
from bnexport.training.data_parts import Resident
from bnexport.training.processes import end_process
from bnexport.training.training_run import train

#: 53 images in batches of 15 and one of 8: neither 2 nor 3 processes divide them.
COUNT = 53
CONFIG = TrainingConfig(dataset="digits", epochs=3, batch_size=15, lr=0.05, device="cpu", seed=5, momentum=0.5)
SYNCED = replace(CONFIG, sync_batch_norm=True)
RUNS = {
    "synced torch": SYNCED,
    "synced scratch": replace(SYNCED, norm="scratch"),
    "not synced": CONFIG,
    "none": replace(CONFIG, norm="none", batch_size=49),
}
#: A head that no step uses, which torch's own data parallelism refuses by itself.
NETWORK = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.unused = nn.Sequential(nn.Flatten(), nn.Linear(784, 10), nn.BatchNorm1d(10)), nn.Linear(3, 3)

    def forward(self, X):
        return self.body(X)
"""


def small_dataset(*_: object, **__: object) -> Dataset:
    return Dataset("digits", *digits.draw(COUNT, seed=1), *digits.draw(25, seed=2), tuple("0123456789"), "a test")


def broken_for_one(*_: object, **__: object) -> Dataset:
    if os.environ["RANK"] == "1":
        raise DataError("this one can't read it", remedy="Mend it")
    return small_dataset()


def recorded(seen: list[list[int]]) -> Any:
    """Resident's method that notes the indices of each batch."""
    plain = Resident.batches

    def batches(self: Resident, indices: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        if self.count == COUNT:
            seen.extend(part.tolist() for part in indices)
        return plain(self, indices)

    return batches


def code_of(words: list[str]) -> object:
    """The exit code; processes that follow leave silently."""
    try:
        return run(words)
    except SystemExit as left:
        return left.code


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = os.environ["RANK"]
    found: dict[str, Any] = {}
    preparation.load_dataset = small_dataset  # type: ignore[assignment]
    plain = Resident.batches
    for name, config in RUNS.items():
        seen: list[list[int]] = []
        Resident.batches = recorded(seen)  # type: ignore[method-assign]
        result = train(replace(config, recalibrate=False), out=folder / name)
        found[name] = {"seen": seen, "accuracy": result.test_accuracy}
        Resident.batches = plain  # type: ignore[method-assign]

    (folder / "net.py").write_text(NETWORK) if rank == "0" else None
    words = ["train", "--dataset", "digits", "--device", "cpu", "--epochs", "2", "--batch-size", "15"]
    own = ["--model", f"{folder / 'net.py'}:Net", "--momentum", "0.5", "--lr", "0.01"]
    found["codes"] = {
        "reported once": code_of([*words, "--out", str(folder / "reported"), *own]),
        "resumed": code_of(["train", "--out", str(folder / "reported"), "--resume", "--epochs", "3"]),
        "small batch": code_of([*words[:-1], "2", "--out", str(folder / "small")]),
        "diverged": code_of([*words, "--norm", "none", "--lr", "1e38", "--out", str(folder / "diverged")]),
    }
    preparation.load_dataset = broken_for_one  # type: ignore[assignment]
    found["codes"]["one is broken"] = code_of([*words, "--out", str(folder / "broken")])
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    end_process(0)
