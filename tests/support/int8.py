"""Networks and int8 bundles for the tests of quantisation; BatchNorm statistics are exact for random images."""

import functools
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import ModelProto
from torch import Tensor, nn

from bnexport.exporting.export_onnx import export_onnx
from bnexport.exporting.signature import ExportJob, signature_of
from bnexport.folding.fold import fold
from bnexport.onnx_files.models import read_model
from bnexport.tensors import Array

PIXELS = {"channels": 3, "height": 16, "width": 16, "scale": 1 / 255, "mean": [0.5, 0.4, 0.3], "std": [0.5, 0.25, 0.2]}


class Residual(nn.Module):
    """Convolution, depthwise and 1x1 convolution with BatchNorms, a sum, SiLU, a pooled head without BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.deep, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.wide, self.bn3 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.last, self.bn4 = nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        one = torch.relu(self.bn(self.stem(x)))
        two = nn.functional.relu6(self.bn2(self.deep(one)))
        both = one + self.bn3(self.wide(two))
        return self.head(nn.functional.silu(self.bn4(self.last(both))).mean((2, 3)))


def images(n: int, seed: int = 0) -> Array:
    """Return smooth random images as the preprocessing PIXELS gives them."""
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.random((n, 3, 5, 5)).astype(np.float32))
    pixels = nn.functional.interpolate(coarse, size=(16, 16), mode="bilinear").numpy()
    mean, std = (np.array(PIXELS[key], np.float32).reshape(-1, 1, 1) for key in ("mean", "std"))
    return np.asarray((pixels - mean) / std, np.float32)


@functools.cache
def residual() -> nn.Module:
    """Return a network whose gammas and betas are random, and whose moving statistics are those of 256 images."""
    torch.manual_seed(3)
    return exact_statistics(Residual())


def exact_statistics(network: nn.Module) -> nn.Module:
    """Give the BatchNorms random gammas and betas, and the moving statistics of 256 images."""
    with torch.no_grad():
        for norm in network.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.weight.uniform_(0.3, 1.5).mul_(torch.randn_like(norm.weight).sign())
                norm.bias.normal_(0.3, 0.8)
                norm.momentum = None
        network.train()(torch.from_numpy(images(256)))
    return network.eval()


def folded(network: nn.Module, folder: Path) -> ModelProto:
    """Return the folded network as an ONNX model."""
    inputs = (torch.from_numpy(images(2)),)
    model = fold(network, inputs).model
    signature = signature_of(model, inputs, input_names=("input",))
    export_onnx(ExportJob(model, inputs, signature), folder / "folded.onnx")
    return read_model(folder / "folded.onnx")


def snr(candidate: Mapping[str, Array] | Array, exact: Array) -> float:
    """Return the signal-to-noise ratio in dB."""
    values = candidate if isinstance(candidate, np.ndarray) else next(iter(candidate.values()))
    return float(10 * np.log10((exact**2).sum() / ((values - exact) ** 2).sum()))


def optimised(file: Path) -> Counter[str]:
    """Count the operators of the graph that ONNX Runtime computes."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(file.with_suffix(".optimised.onnx"))
    options.log_severity_level = 4  # a warning about the written graph
    onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)
