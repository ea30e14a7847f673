"""A user's network, checkpoint and folder of images: a small residual network that labels six kinds of pictures."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from bnexport.data.preprocessing import Preprocessing
from bnexport.loading.sources import call_factory

CLASSES = ("circle", "cross", "ring", "square", "star", "triangle")
#: The options that describe an image of the network, as the command line takes them.
IMAGE = ("--input", "3x32x32", "--mean", "0.5,0.5,0.5", "--std", "0.25,0.25,0.25")
PREPROCESSING = Preprocessing(3, 32, 32, mean=(0.5,) * 3, std=(0.25,) * 3)
#: Test pictures of each class: enough that chance differs from twice chance.
TESTED = 20
_LEARNED = 10

NETWORK = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x):
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class Residual(nn.Module):
    def __init__(self, width, classes):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.block, self.fc = Block(width), nn.Linear(width, classes)

    def features(self, x):
        x = self.block(torch.relu(self.norm(self.stem(x))))
        return x.mean((2, 3))

    def forward(self, x):
        return self.fc(self.features(x))


def build(width=12, classes=6):
    return Residual(width, classes)
"""


@dataclass(frozen=True)
class Home:
    """A user's folder: the network's code, its checkpoint, the pictures, and a file of their labels.

    Attributes:
        source: The factory, as the command line takes it.
        weights: A checkpoint dict with the state dict inside.
        photos: ``train`` and ``val`` with one folder per class.
        labels: One label per line, in the order of the network's scores.
    """

    root: Path
    source: str
    weights: Path
    photos: Path
    labels: Path

    @property
    def dataset(self) -> str:
        return f"folder:{self.photos}"

    def out(self, name: str) -> Path:
        return self.root / "models" / name / "1"

    def named(self, *names: str) -> Path:
        """Another file of labels."""
        file = self.root / f"labels_{len(list(self.root.glob('labels_*')))}.txt"
        file.write_text("\n".join(names))
        return file

    def network(self) -> nn.Module:
        """The trained network."""
        module = call_factory(self.source, {})
        module.load_state_dict(torch.load(self.weights, weights_only=True)["state_dict"])
        return module.eval()


def make_home(root: Path) -> Home:
    """Write the pictures and the code, and train the network: its last layer is solved for, so that this takes a second."""
    code, photos = root / "my_network.py", root / "photos"
    code.write_text(NETWORK)
    for label in range(len(CLASSES)):
        for part, count in (("train", _LEARNED), ("val", TESTED)):
            for index in range(count):
                write_photo(photos / part / CLASSES[label] / f"{index}.png", label, seed=index + 100 * (part == "val"))
    labels = root / "labels.txt"
    labels.write_text("\n".join(CLASSES))
    home = Home(root, f"{code}:build", root / "checkpoint.pth", photos, labels)
    network, images = call_factory(home.source, {}), _images(photos / "train")
    state = _trained(network, torch.from_numpy(PREPROCESSING.apply(images)))
    torch.save({"epoch": 7, "state_dict": state, "loss": 0.01}, home.weights)
    return home


def write_photo(file: Path, label: int, *, seed: int) -> None:
    """Write a noisy picture whose colours depend on its class."""
    rng = np.random.default_rng((label, seed))
    colour = np.array([[220, 60, 60], [60, 200, 60], [60, 60, 220], [210, 210, 60], [60, 200, 210], [200, 60, 200]])[
        label
    ]
    pixels = np.full((32, 32, 3), 110) + rng.normal(0, 12, (32, 32, 3))
    top, left = rng.integers(2, 10, 2)
    pixels[top : top + 20, left : left + 20] = colour + rng.normal(0, 12, (20, 20, 3))
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file)


def _images(part: Path) -> Any:
    return np.stack([np.asarray(Image.open(file)) for name in CLASSES for file in sorted((part / name).iterdir())])


def _trained(network: Any, X: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the network's state: random weights, statistics of the images, and a last layer fitted by least squares."""
    torch.manual_seed(0)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.weight, 1.0, 0.3)
            nn.init.normal_(layer.bias, 0.0, 0.3)
            layer.momentum = None  # the mean over all batches
    with torch.no_grad():
        for layer in (network.norm, network.block.bn1, network.block.bn2):
            network.eval()
            layer.train()
            network.features(X)
        features = network.eval().features(X).double()
        wide = torch.cat([features, torch.ones(len(features), 1)], dim=1)
        truth = torch.eye(len(CLASSES)).double().repeat_interleave(_LEARNED, dim=0) * 8
        solved = torch.linalg.lstsq(wide, truth).solution
        network.fc.weight.copy_(solved[:-1].T)
        network.fc.bias.copy_(solved[-1])
    state: dict[str, torch.Tensor] = network.state_dict()
    return state
