"""Train BN-LeNet on Fashion-MNIST in several ways; print how stale its statistics are and what that costs (Markdown).

Use: python scripts/stale_statistics.py     About 20 epochs on a CPU; docs/statistics.md holds its table.
"""

from __future__ import annotations

import copy

import torch

from bnexport.data.datasets import load_dataset
from bnexport.data.preprocessing import Preprocessing
from bnexport.environment import describe, environment
from bnexport.evaluating.network import input_batches
from bnexport.evaluating.staleness import BATCH_SIZE, Subject, sampled_staleness
from bnexport.nn.lenet import bn_lenet
from bnexport.nn.moving_statistics import recalibrate

NAME, APPLY = "fashion-mnist", Preprocessing()
#: Learning rate, momentum of BatchNorm, seed, epochs to print.
RUNS = ((0.01, 0.1, 0, (1,)), (0.1, 0.1, 0, (1, 2)), (1.0, 0.1, 0, (1, 2, 5, 10)), (1.0, 0.1, 1, (1, 2)),
        (2.0, 0.1, 0, (1, 2)), (1.0, 0.01, 0, (1,)), (1.0, 0.001, 0, (1,)), (0.1, 0.001, 0, (1,)))  # fmt: skip
HEAD = "| lr | momentum | seed | epoch | error of the worst layer | accuracy | accuracy, exact statistics |\n"
data = load_dataset(NAME)
images, labels = torch.from_numpy(APPLY.apply(data.train_images)), torch.from_numpy(data.train_labels)


def accuracy(network: torch.nn.Module) -> float:
    found = network.eval()(torch.from_numpy(APPLY.apply(data.test_images)))
    return float((found.argmax(1).numpy() == data.test_labels).mean())


print(HEAD + "|---" * 7 + "|")
for lr, momentum, seed, epochs in RUNS:
    torch.manual_seed(seed)
    optimizer = torch.optim.SGD((network := bn_lenet()).parameters(), lr=lr)
    for layer in network:
        layer.momentum = momentum
    for epoch in range(1, max(epochs) + 1):
        for batch in torch.split(torch.randperm(len(labels)), 256):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(network.train()(images[batch]), labels[batch]).backward()
            optimizer.step()
        if epoch in epochs:
            worst, exact = sampled_staleness(Subject(network, NAME, APPLY.to_json())).worst, copy.deepcopy(network)
            recalibrate(exact, input_batches(data.train_images, torch.randperm(len(labels)).numpy(), BATCH_SIZE, APPLY))
            row = f"{worst.error:.3f} ({worst.name}) | {accuracy(network):.4f} | {accuracy(exact):.4f} |"
            print(f"| {lr:g} | {momentum:g} | {seed} | {epoch} | {row}", flush=True)
print(f"\n{describe(environment())}.")
