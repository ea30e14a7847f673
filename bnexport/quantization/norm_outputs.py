"""Which tensors of a folded file are outputs and inputs of the original network's BatchNorms.

Folding removes BatchNorms and keeps their values: the output of a convolution with a folded BatchNorm is that BatchNorm's
output. Original and file are evaluated in float64 on the same few samples, and a tensor with the same numbers is the same
tensor. So no name has to be traced through exporters, and it does not matter by which rule a BatchNorm was folded.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bnexport.errors import ModelError
from bnexport.nn.statistics import NormView
from bnexport.onnx_files.float64 import Float64Evaluator
from bnexport.quantization.moments import Known
from bnexport.tensors import Array

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch import nn

#: Largest difference, of scale, of one tensor in both evaluations: float32 weights against float64 ones, over many layers.
_SAME = 1e-4


@dataclass(frozen=True)
class Seen:
    """Values of a BatchNorm's input or output (n, channels, ...) with the trained moments."""

    values: Array
    moments: Known


def seen_in_module(module: nn.Module, feeds: Mapping[str, Array]) -> list[Seen]:
    """Return the outputs and inputs of a module's BatchNorm calls, in float64; outputs first. The module is not changed."""
    import torch

    from bnexport.nn.calling import to_eval_mode

    copied = to_eval_mode(copy.deepcopy(module)).to("cpu", torch.float64)
    outputs: list[Seen] = []
    inputs: list[Seen] = []

    def look(layer: Any, given: tuple[Any, ...], result: Any) -> None:
        view = NormView.of(layer)
        assert view is not None
        mean, std = view.mean.reshape(-1).numpy(), torch.sqrt(view.var.reshape(-1)).numpy()
        ones = np.ones_like(mean)
        gamma = ones if view.gamma is None else view.gamma.detach().reshape(-1).numpy()
        beta = 0 * ones if view.beta is None else view.beta.detach().reshape(-1).numpy()
        outputs.append(Seen(result.detach().numpy().copy(), Known(beta, np.abs(gamma))))
        inputs.append(Seen(given[0].detach().numpy().copy(), Known(mean, std)))

    for layer in copied.modules():
        if NormView.of(layer) is not None:
            layer.register_forward_hook(look)
    with torch.no_grad():
        copied(
            *(
                torch.from_numpy(array.astype(np.float64) if array.dtype.kind == "f" else array)
                for array in feeds.values()
            )
        )
    return outputs + inputs


def seen_in_file(original: ModelProto, feeds: Mapping[str, Array]) -> list[Seen]:
    """Return the outputs and inputs of an unfolded file's BatchNormalization nodes, in float64; outputs first."""
    from onnx import numpy_helper

    values = {**feeds, **Float64Evaluator(original).intermediate(feeds)}
    values |= {tensor.name: numpy_helper.to_array(tensor) for tensor in original.graph.initializer}
    outputs, inputs = [], []
    for node in original.graph.node:
        if node.op_type != "BatchNormalization":
            continue
        gamma, beta, mean, var = (values[name].astype(np.float64).reshape(-1) for name in node.input[1:5])
        outputs.append(Seen(values[node.output[0]], Known(beta, np.abs(gamma))))
        inputs.append(Seen(values[node.input[0]], Known(mean, np.sqrt(var))))
    return outputs + inputs


def known_moments(seen: Sequence[Seen], values: Mapping[str, Array]) -> dict[str, Known]:
    """Return tensor of the folded file -> trained moments, for each tensor with the numbers of a BatchNorm's output or input.

    Args:
        seen: Of the original network; an earlier entry wins.
        values: Tensor -> its values in the folded file, on the same samples.
    """
    known: dict[str, Known] = {}
    for entry in seen:
        moments = entry.moments
        if not (np.isfinite(moments.mean).all() and np.isfinite(moments.std).all()):
            raise ModelError(
                "a BatchNorm has a beta, gamma or moving statistic that is not finite",
                remedy="Load other weights, or run bnexport recalibrate",
            )
        for name, array in values.items():
            if name not in known and _same(array, entry.values):
                known[name] = moments
    return known


def _same(one: Array, other: Array) -> bool:
    if one.shape != other.shape or one.dtype.kind != "f":
        return False
    return bool(np.abs(one - other).max(initial=0.0) <= _SAME * max(float(np.abs(other).max(initial=0.0)), 1e-30))
