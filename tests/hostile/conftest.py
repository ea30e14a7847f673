from pathlib import Path

import numpy as np
import pytest
import torch
from cases import randomise
from PIL import Image
from support.hostile import Good
from support.shared import made_once
from torch import nn

from bnexport.bundle import Bundle

NETWORK = """
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
"""


def network() -> nn.Module:
    torch.manual_seed(1)
    return randomise(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), seed=1).eval()


def write_files(folder: Path) -> None:
    folder.mkdir()
    model, example = network(), (torch.rand(2, 1, 8, 8),)
    batch = torch.export.Dim("batch", min=2, max=4096)
    torch.export.save(torch.export.export(model, example, dynamic_shapes=({0: batch},)), folder / "model.pt2")
    torch.save(model.state_dict(), folder / "weights.pt")
    torch.save(model.state_dict(), folder / "old.pt", _use_new_zipfile_serialization=False)
    torch.onnx.export(model, example, str(folder / "model.onnx"), dynamo=True, external_data=False, verbose=False)
    (folder / "net.py").write_text(NETWORK)
    Image.fromarray(np.arange(784, dtype=np.uint8).reshape(28, 28)).save(folder / "picture.png")


@pytest.fixture(scope="session")
def good(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Good:
    folder = made_once(tmp_path_factory, "hostile_good", write_files)
    return Good(
        bundle.path,
        folder / "model.pt2",
        folder / "weights.pt",
        folder / "old.pt",
        folder / "model.onnx",
        f"{folder / 'net.py'}:build",
        folder / "picture.png",
    )
