"""A process of test_synced_batch_norm: ``synced_child.py RANK SIZE FOLDER``. Saves what it computed, by case."""

import copy
import sys
from pathlib import Path

import torch
from support.models import randomise
from torch import Tensor, nn
from torch import distributed as dist

from bnexport.nn.batch_norm import BatchNorm
from bnexport.nn.synced_batch_norm import synchronised
from bnexport.training.processes import end_process


class Twice(nn.Module):
    """One layer under two names, called twice."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first = layer
        self.second = layer

    def forward(self, X: Tensor) -> Tensor:
        return self.second(self.first(X) * 1.5 + 0.25)


def tracked_plainly(layer: nn.Module) -> nn.Module:
    layer.momentum = None
    return layer


#: Case -> (network of 3 channels, shape of the whole batch, how many samples each process gets).
CASES = {
    "2-D": (lambda: nn.BatchNorm1d(3), (7, 3), (4, 3)),
    "3-D": (lambda: nn.BatchNorm1d(3), (5, 3, 6), (1, 4)),
    "4-D": (lambda: nn.BatchNorm2d(3), (7, 3, 4, 5), (3, 4)),
    "5-D": (lambda: nn.BatchNorm3d(3), (3, 3, 2, 3, 2), (2, 1)),
    "one has none": (lambda: nn.BatchNorm2d(3), (4, 3, 2, 2), (4, 0)),
    "no momentum": (lambda: tracked_plainly(nn.BatchNorm2d(3)), (6, 3, 2, 2), (2, 4)),
    "no gamma": (lambda: nn.BatchNorm2d(3, affine=False), (6, 3, 2, 2), (3, 3)),
    "called twice": (lambda: Twice(nn.BatchNorm2d(3)), (6, 3, 2, 2), (1, 5)),
    "scratch 2-D": (lambda: BatchNorm(3, 2), (7, 3), (4, 3)),
    "scratch 4-D": (lambda: BatchNorm(3, 4, unbiased=True), (5, 3, 2, 3), (3, 2)),
    "three processes": (lambda: nn.BatchNorm2d(3), (8, 3, 2, 2), (1, 5, 2)),
}


def network(case: str) -> nn.Module:
    return randomise(CASES[case][0](), seed=len(case)).double().train()


def batch(case: str) -> tuple[Tensor, Tensor]:
    """Inputs with a large mean and a tiny variance in one channel, and the gradient of the outputs."""
    generator = torch.Generator().manual_seed(5)
    shape = CASES[case][1]
    X = torch.randn(shape, generator=generator, dtype=torch.float64)
    X[:, 0] = X[:, 0] * 1e-3 + 1e4
    X[:, 1] *= 50
    return X, torch.randn(shape, generator=generator, dtype=torch.float64)


def computed(module: nn.Module, X: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Two steps' worth: outputs, gradients, statistics."""
    X = X.clone().requires_grad_()
    Y = module(X)
    Y.backward(grad)
    module(X.detach() * 0.5)
    gradients = {f"grad {name}": p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {"Y": Y.detach(), "grad X": X.grad, **gradients, **{name: b.clone() for name, b in module.named_buffers()}}


def main(rank: int, size: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=size)
    results = {}
    for case, (_, _, parts) in CASES.items():
        if len(parts) != size:
            continue
        X, grad = (part.split(parts)[rank] for part in batch(case))
        module = network(case)
        names = list(module.state_dict())
        module = synchronised(module)
        results[case] = computed(module, X, grad)
        assert list(module.state_dict()) == names
        # In eval mode no process is contacted: called by this process alone, the layer would wait for ever.
        if rank == 0:
            plain = network(case)
            plain.load_state_dict(module.state_dict())
            assert torch.equal(copy.deepcopy(module).eval()(X), plain.eval()(X))
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    end_process(0)
