"""Train BN-LeNet on Fashion-MNIST in several ways; print how stale its statistics are and the accuracy that this costs.

``python -m benchmarks.training.stale_statistics`` takes about 20 epochs on a CPU; docs/statistics.md has its table.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch

from benchmarks.command import finish, options
from benchmarks.pages import table_page
from bnexport.data.datasets import load_dataset
from bnexport.data.preprocessing import Preprocessing
from bnexport.evaluating.network import BATCH_SIZE, input_batches, sampled_staleness
from bnexport.loading.sources import LoadedModel
from bnexport.nn.lenet import bn_lenet
from bnexport.nn.moving_statistics import recalibrate

APPLY = Preprocessing()
#: (learning rate, momentum of BatchNorm, seed, epochs to print)
RUNS = ((0.01, 0.1, 0, (1,)), (0.1, 0.1, 0, (1, 2)), (1.0, 0.1, 0, (1, 2, 5, 10)), (1.0, 0.1, 1, (1, 2)),
        (2.0, 0.1, 0, (1, 2)), (1.0, 0.01, 0, (1,)), (1.0, 0.001, 0, (1,)), (0.1, 0.001, 0, (1,)))  # fmt: skip


def rows(name: str, runs: Sequence[tuple[float, float, int, tuple[int, ...]]] = RUNS) -> Iterator[list[str]]:
    """Train each run on a data set, and yield the cells of its printed epochs."""
    data = load_dataset(name)
    images, labels = torch.from_numpy(APPLY.apply(data.train_images)), torch.from_numpy(data.train_labels)

    def accuracy(network: torch.nn.Module) -> float:
        network.eval()
        found = network(torch.from_numpy(APPLY.apply(data.test_images)))
        return float((found.argmax(1).numpy() == data.test_labels).mean())

    for lr, momentum, seed, epochs in runs:
        torch.manual_seed(seed)
        optimizer = torch.optim.SGD((network := bn_lenet()).parameters(), lr=lr)
        for layer in network:
            layer.momentum = momentum  # type: ignore[assignment]
        for epoch in range(1, max(epochs) + 1):
            for batch in torch.split(torch.randperm(len(labels)), 256):
                optimizer.zero_grad()
                network.train()
                torch.nn.functional.cross_entropy(network(images[batch]), labels[batch]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            if epoch in epochs:
                trained = LoadedModel(network, name, {}, dataset=name, preprocessing=APPLY.to_json())
                worst = sampled_staleness(trained).worst
                exact = copy.deepcopy(network)
                assert worst is not None
                order = torch.randperm(len(labels)).numpy()
                recalibrate(exact, input_batches(data.train_images, order, BATCH_SIZE, APPLY))
                cells = [f"{lr:g}", f"{momentum:g}", str(seed), str(epoch), f"{worst.error:.3f} ({worst.name})"]
                yield [*cells, f"{accuracy(network):.4f}", f"{accuracy(exact):.4f}"]


def main() -> None:
    """Train, and print the table."""
    options("training.stale_statistics", __doc__).parse_args()
    heads = ["lr", "momentum", "seed", "epoch", "error of the worst layer", "accuracy", "accuracy, exact statistics"]
    print(table_page(heads, list(rows("fashion-mnist")), "SGD, batches of 256"))


if __name__ == "__main__":
    finish("stale_statistics", main)
