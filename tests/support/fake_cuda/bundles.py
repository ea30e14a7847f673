"""Bundles of networks with what users' networks contain: folded and exported by bnexport, not verified."""

from pathlib import Path
from typing import Any

import torch
from support.models import randomise
from torch import Tensor, nn
from torch.nn import functional

from bnexport.bundle import MODEL_ONNX, Bundle, Manifest, seal
from bnexport.exporting.export_onnx import export_onnx
from bnexport.exporting.export_request import OnnxTarget
from bnexport.exporting.half import in_precision
from bnexport.exporting.signature import ExportJob, signature_of
from bnexport.folding.fold import fold
from bnexport.folding.torch_backend.trace import size_shapes


class Users(nn.Module):
    """A flatten by ``view``, and tensors that are made in forward on the device of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.linear = nn.Linear(6 * 8 * 8, 5)

    def forward(self, x: Tensor) -> Tensor:
        maps = functional.relu(self.bn(self.conv(x)))
        ramp = torch.arange(maps.size(3), device=x.device, dtype=x.dtype)
        ones = torch.ones(maps.size(0), 1, device=x.device, dtype=x.dtype)
        flat = (maps + ramp).view(maps.size(0), -1)
        return self.linear(flat + ones)


class AnySize(nn.Module):
    """Sizes that are computed from the input's: a resize to them, and a mean over them."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.bn = nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6)
        self.skip, self.head = nn.Conv2d(3, 6, 1), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        small = functional.relu(self.bn(self.down(x)))
        maps = functional.interpolate(small, size=x.shape[-2:], mode="nearest") + self.skip(x)
        return maps, self.head(maps.mean(dim=(2, 3)).reshape(x.shape[0], -1))


class NoKernel(nn.Module):
    """An activation that onnxruntime has for the CPU alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.det(self.bn(self.conv(x)))


def onnx_bundle(
    folder: Path, module: nn.Module, *shapes: tuple[int, ...], sizes: bool = False, precision: str = "float32"
) -> Bundle:
    """Create a folder with a bundle of only the ONNX file of a folded network, whose statistics become random.

    The shapes of the inputs have a batch of at least 2; ``sizes``: height and width vary as well.
    """
    model = randomise(module).eval()
    generator = torch.Generator().manual_seed(0)
    inputs = tuple(torch.rand(shape, generator=generator) for shape in shapes)
    options: dict[str, Any] = {"dynamic_shapes": size_shapes(model, inputs)} if sizes else {}
    folded = fold(model, inputs, **options).model
    names = tuple(f"input{number or ''}" for number in range(len(inputs)))
    signature = signature_of(folded, inputs, input_names=names, dynamic_size=sizes)
    folder.mkdir(parents=True)
    shipped = in_precision(folded, inputs, precision)
    export_onnx(ExportJob(shipped, inputs, signature, OnnxTarget()), folder / MODEL_ONNX)
    return seal(folder, Manifest("net", 1, signature, {"source": "tests"}))
