"""Small data sets and checkpoints."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import randomise
from torch import nn

from bnexport.data import digits
from bnexport.data.preprocessing import Preprocessing
from bnexport.loading.checkpoint import Checkpoint, save_checkpoint
from bnexport.nn.lenet import bn_lenet

TRAIN, TEST = digits.draw(300, seed=1), digits.draw(80, seed=2)
Write = Callable[..., Path]


@pytest.fixture(autouse=True)
def _small_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bnexport.data.digits.training_set", lambda: TRAIN)
    monkeypatch.setattr("bnexport.data.digits.test_set", lambda: TEST)


def lenet(**options: int) -> nn.Module:
    """Random statistics in every channel; eps as a rebuilt network has it."""
    torch.manual_seed(0)
    network = randomise(bn_lenet(**options))  # type: ignore[arg-type]
    for module in network.modules():
        if hasattr(module, "eps"):
            module.eps = 1e-5
    return network.eval()


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a checkpoint of a network, by default of ``lenet()``."""

    def checkpoint(name: str = "model.safetensors", module: nn.Module | None = None, **changes: object) -> Path:
        model = module or lenet()
        metadata = {
            "network": {"source": "bn_lenet", "options": {"norm": "torch", "in_channels": 1, "num_classes": 10}},
            "dataset": "digits",
            "labels": list("0123456789"),
            "preprocessing": Preprocessing().to_json(),
            "training": {"epoch": 1},
            "recalibrated": False,
            **changes,
        }
        save_checkpoint(tmp_path / name, Checkpoint(model.state_dict(), metadata))
        return tmp_path / name

    return checkpoint


def inputs(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(Preprocessing().apply(images))
