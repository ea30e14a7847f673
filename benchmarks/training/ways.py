"""Ways to train one epoch of BN-LeNet on Fashion-MNIST, each measured in a separate process.

``python -m benchmarks.training.ways NAME SECONDS`` prints one JSON line. The process is separate because the number of
threads, the memory that malloc keeps and the caches of a compiler can't be reset.
"""

from __future__ import annotations

import gzip
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bnexport.data.dataset_table import dataset_info
from bnexport.data.datasets import load_dataset
from bnexport.data.locate import locate
from bnexport.data.preprocessing import Preprocessing
from bnexport.nn.lenet import bn_lenet
from bnexport.training.data_parts import Resident, make_part
from bnexport.training.loop import Epochs, epoch_order, evaluate
from bnexport.training.step import Step, keep_freed_memory, pooling_by_products

BATCH = 256
LR = 1.0


@dataclass(frozen=True)
class TrainingWay:
    """A row of WAYS."""

    words: str
    #: Seconds to spend -> images per second of some epochs, and the number of threads.
    measure: Callable[[float], tuple[list[float], int]]
    kept: bool = False  # ``bnexport train`` does it


def _data() -> tuple[Resident, Resident]:
    dataset = load_dataset("fashion-mnist", download=False)
    parts = (dataset.train_images, dataset.train_labels), (dataset.test_images, dataset.test_labels)
    train, test = (make_part(*part, Preprocessing(), torch.device("cpu")) for part in parts)
    assert isinstance(train, Resident)
    assert isinstance(test, Resident)
    return train, test


def _chapter(workers: int) -> Callable[[], int]:
    """The chapter's own way: torchvision's data set, ToTensor per image, a DataLoader, sums read after every batch."""
    from torch.utils.data import DataLoader
    from torchvision.datasets import FashionMNIST
    from torchvision.transforms import ToTensor

    folder = tempfile.TemporaryDirectory(prefix="bnexport-benchmark-")  # deleted at the end of the process
    root = Path(folder.name)
    info = dataset_info("fashion-mnist")
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for path in locate(info, (*info.train, *info.test)).paths:  # torchvision reads them unpacked
        content = path.read_bytes()
        (raw / path.name.removesuffix(".gz")).write_bytes(gzip.decompress(content) if path.suffix == ".gz" else content)
    parts = [FashionMNIST(str(root), train=train, transform=ToTensor()) for train in (True, False)]
    network, loss_of = bn_lenet(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(network.parameters(), lr=LR)

    def epoch(_: object = folder) -> int:
        total = hits = tested = 0.0
        network.train()
        for X, y in DataLoader(parts[0], BATCH, shuffle=True, num_workers=workers):
            optimizer.zero_grad()
            logits = network(X)
            loss = loss_of(logits, y)
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                total += float(loss * len(X))
                hits += float((logits.argmax(1) == y).sum())
        network.eval()
        with torch.no_grad():
            for X, y in DataLoader(parts[1], BATCH, num_workers=workers):
                tested += float((network(X).argmax(1) == y).sum())
        return len(parts[0])

    return epoch


def _tensor_loop(
    *, fused: bool = False, products: bool = False, kept_memory: bool = False, threads: int | None = None
) -> Callable[[], int]:
    """The data set as one tensor, a gather per batch, and the given changes to the plain step."""
    if threads is not None:
        torch.set_num_threads(threads)
    if kept_memory:
        keep_freed_memory()
    train, test = _data()
    network = bn_lenet()
    optimizer = torch.optim.SGD(network.parameters(), lr=LR, fused=fused)
    epochs = Epochs(Step(network, optimizer), train, batch_size=BATCH)
    numbers = itertools.count(1)

    def epoch() -> int:
        with pooling_by_products(network) if products else nullcontext():
            epochs.take(epoch_order(train.count, seed=0, epoch=next(numbers)))
            evaluate(network, test)
        return train.count

    return epoch


def _two_processes(_seconds: float) -> tuple[list[float], int]:
    """Two processes with one thread each, by torchrun, gloo and statistics over both; training alone, without evaluation."""
    with tempfile.TemporaryDirectory(prefix="bnexport-benchmark-") as folder:
        run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "bnexport", "train"]
        options = ["--epochs", "4", "--no-recalibrate", "--sync-batch-norm", "--device", "cpu", "--out"]
        command = [*run, *options, f"{folder}/run"]
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        rows = Path(folder, "run", "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [float(json.loads(row)["examples_per_s"]) for row in rows[1:]], 2


def epochs_of(prepare: Callable[[], Callable[[], int]]) -> Callable[[float], tuple[list[float], int]]:
    """Return a measurement of whole epochs with evaluation: at least two, after one that is not counted.

    ``prepare`` is called once; its result trains one epoch with evaluation and returns the number of images.
    """

    def measure(seconds: float) -> tuple[list[float], int]:
        epoch = prepare()
        epoch()
        rates: list[float] = []
        started = time.perf_counter()
        while len(rates) < 2 or time.perf_counter() - started < seconds:
            begun = time.perf_counter()
            images = epoch()
            rates.append(images / (time.perf_counter() - begun))
        return rates, torch.get_num_threads()

    return measure


def _way(words: str, kept: bool = False, **loop: Any) -> TrainingWay:
    return TrainingWay(words, epochs_of(lambda: _tensor_loop(**loop)), kept)


_FAST: dict[str, Any] = {"fused": True, "kept_memory": True}
_OURS: dict[str, Any] = {**_FAST, "products": True}
#: Name -> way. The first ones are the chapter's, then come the steps to bnexport's, then variants of it.
WAYS: dict[str, TrainingWay] = {
    "chapter-4": TrainingWay("the chapter's code, 4 workers (its default)", epochs_of(lambda: _chapter(4))),
    "chapter-2": TrainingWay("the chapter's code, 2 workers", epochs_of(lambda: _chapter(2))),
    "chapter-0": TrainingWay("the chapter's code, no workers", epochs_of(lambda: _chapter(0))),
    "plain": _way("data set as one tensor, sums on the device", kept=True),
    "fused": _way("... and a fused optimiser", kept=True, fused=True),
    "memory": _way("... and freed memory kept", kept=True, **_FAST),
    "bnexport": _way("... and pooling as a product: bnexport train", kept=True, **_OURS),
    "one-thread": _way("bnexport with one thread", threads=1, **_OURS),
    "processes": TrainingWay("two processes of bnexport, synchronised BatchNorm (training alone)", _two_processes),
}


def gemm_rate(*, side: int = 1024, repeats: int = 30) -> float:
    """Return floating point operations per second of a float32 matrix product: the limit of this machine."""
    a = torch.rand(side, side)
    times: list[float] = []
    for _ in range(repeats):
        begun = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - begun)
    return 2 * side**3 / sorted(times)[len(times) // 2]


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # a DataLoader with more workers than cores warns at every epoch
    name, duration = sys.argv[1], float(sys.argv[2])
    rates, threads = ([gemm_rate()], torch.get_num_threads()) if name == "gemm" else WAYS[name].measure(duration)
    print(json.dumps({"rates": rates, "threads": threads}))
