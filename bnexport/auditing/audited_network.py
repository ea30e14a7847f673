"""The network under audit: its inputs, its outputs in float64, and the deviation of a tool's outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bnexport.errors import BnexportError, ModelError
from bnexport.exporting.export_request import InputSpec, example_inputs
from bnexport.nn.soundness import is_untrained
from bnexport.nn.statistics import NormView
from bnexport.optional import one_line, quiet
from bnexport.runtimes.replay import incomparable
from bnexport.runtimes.torch_outputs import flatten, private_copy
from bnexport.tensors import Array
from bnexport.verification.metrics import common_scales
from bnexport.verification.widening import wide_casts

#: Batch sizes of the inputs. Tools trace the first one; the others show a fold that is right for one size only.
BATCHES = (2, 2, 3, 5)
#: Two float64 runs of one input differ by less than this, unless the network draws random numbers.
_REPEAT = 1e-9


@dataclass(frozen=True)
class Deviation:
    """The deviation of a tool's outputs from the reference."""

    # max |output - reference| / max |reference| of the worst output; infinite if they can't be compared
    error: float = 0.0
    output: str = ""  # Name of that output
    channel: int | None = None  # Index on axis 1 of its worst element; None without such an axis
    problem: str = ""  # Reason why they can't be compared, or ""


@dataclass(frozen=True)
class AuditedNetwork:
    """One network, its inputs, and its outputs in float64."""

    module: nn.Module  # A private copy in eval mode, in its own precision; tools get copies of it
    probes: tuple[tuple[Tensor, ...], ...]  # Input batches, batch first; the first is the example that tools trace
    expected: tuple[dict[str, Array], ...]  # Per probe: output name -> float64 array
    scales: dict[str, float]  # Output name -> largest |value| over all probes
    untrained: int = 0  # Untrained BatchNorm layers, which got random statistics

    @property
    def example(self) -> tuple[Tensor, ...]:
        """The batch that tools trace."""
        return self.probes[0]

    @property
    def batches(self) -> tuple[int, ...]:
        """Batch size of each probe."""
        return tuple(batch_of(probe) for probe in self.probes)


def audited_network(module: nn.Module, inputs: tuple[InputSpec, ...], *, seed: int = 0) -> AuditedNetwork:
    """Copy a network and compute its outputs in float64; the network itself is not changed.

    ``inputs`` has one item per argument of forward. Batch sizes that the network refuses are left out, except the first one.
    Untrained BatchNorms get random numbers in the copy.

    Raises:
        ModelError: It can't be copied or run, or its outputs in float64 are not finite, not float64, or not reproducible.
        UsageError: An input is too large.
    """
    copied = private_copy(module, "cpu")
    untrained = _randomise_untrained(copied, torch.Generator().manual_seed(seed))
    drawn = [example_inputs(inputs, batch=size, seed=seed + index) for index, size in enumerate(BATCHES)]
    probes = tuple(probe for probe in drawn if _runs(copied, probe, required=batch_of(probe) == BATCHES[0]))
    wide = private_copy(copied, "cpu", torch.float64)
    expected = tuple(_answer(wide, probe) for probe in probes)
    again = _answer(wide, probes[0])
    if deviation(list(again.values()), expected[0], common_scales((again, expected[0]))).error > _REPEAT:
        raise ModelError(
            "the network's outputs change from call to call, so they can't be compared",
            remedy="Remove random numbers and state between calls from its forward",
        )
    return AuditedNetwork(copied, probes, expected, common_scales(expected), untrained)


def call(module: Any, probe: tuple[Tensor, ...]) -> list[Array]:
    """Return the outputs of a torch callable as arrays; the inputs are copied, because forward may change them."""
    outputs = [tensor.detach().cpu() for tensor in flatten(module(*(tensor.clone() for tensor in probe)))]
    return [(tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy() for tensor in outputs]


def deviation(answer: Sequence[Array], expected: dict[str, Array], scales: dict[str, float]) -> Deviation:
    """Return the largest deviation of outputs from the reference."""
    if len(answer) != len(expected):
        problem = f"it has {len(answer)} outputs, the network {len(expected)}"
        return Deviation(float("inf"), "", None, problem)
    found = [
        _output_deviation(name, array, want, scales[name])
        for array, (name, want) in zip(answer, expected.items(), strict=True)
    ]
    return max(found, key=lambda item: item.error)


def batch_of(probe: tuple[Tensor, ...]) -> int:
    """Return the batch size of an input."""
    return int(probe[0].shape[0])


def _output_deviation(name: str, array: Array, want: Array, scale: float) -> Deviation:
    if (problem := incomparable(name, array, want)) is not None:
        return Deviation(float("inf"), name, None, problem)
    difference = np.abs(array.astype(np.float64) - want.astype(np.float64))
    place = np.unravel_index(int(difference.argmax()), difference.shape)
    return Deviation(float(difference.max()) / scale, name, int(place[1]) if difference.ndim > 1 else None)


def _randomise_untrained(module: nn.Module, generator: torch.Generator) -> int:
    """Randomise untrained BatchNorms, and return their number: a fresh one makes a wrong fold look right."""
    found = [NormView.of(layer) for layer in module.modules() if is_untrained(layer)]
    layers = [layer for layer in found if layer is not None]
    for layer in layers:
        tensors = ((layer.gamma, 0.5, 1.5), (layer.beta, -0.5, 0.5), (layer.mean, -0.5, 0.5), (layer.var, 0.5, 1.5))
        with torch.no_grad():
            for tensor, low, high in tensors:
                if tensor is not None:
                    tensor.uniform_(low, high, generator=generator)
            if layer.gamma is not None:
                layer.gamma.mul_(_signs(layer.gamma, generator))
    return len(layers)


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """Return -1 for about a quarter of the elements, and 1 for the others."""
    return (torch.rand(like.shape, generator=generator) - 0.25).sign().to(like.dtype)


def _runs(module: nn.Module, probe: tuple[Tensor, ...], *, required: bool) -> bool:
    """Return True if the network accepts an input; ModelError if it refuses a required one."""
    try:
        with torch.no_grad(), quiet():
            call(module, probe)
    except Exception as error:  # the module is the user's code
        if not required:
            return False
        raise ModelError(
            f"the network can't run on a batch of {batch_of(probe)}: {one_line(error, 200)}",
            remedy="Check the shapes given with --input, one per argument of forward",
        ) from error
    return True


def _answer(wide: nn.Module, probe: tuple[Tensor, ...]) -> dict[str, Array]:
    """Return the outputs in float64 by name: "output", or "output 0", "output 1", ... for several."""
    try:
        with torch.no_grad(), wide_casts(), quiet():
            arrays = call(wide, tuple(tensor.double() if tensor.is_floating_point() else tensor for tensor in probe))
    except Exception as error:  # the module is the user's code
        raise _no_reference(one_line(error, 200)) from error
    if not arrays:
        raise _no_reference("it returns no tensor")
    answer = {"output" if len(arrays) == 1 else f"output {index}": array for index, array in enumerate(arrays)}
    for name, array in answer.items():
        if array.dtype.kind == "f" and array.dtype != np.float64:
            raise _no_reference(f"{name} is {array.dtype}")
        if array.size == 0 or not np.isfinite(array).all():
            raise _no_reference(f"{name} is {'empty' if array.size == 0 else 'not finite'}")
    return answer


def _no_reference(why: str) -> BnexportError:
    return ModelError(
        f"the network can't be evaluated in float64: {why}",
        remedy="Remove fixed float32 casts and tensors from its forward, and check its weights",
    )
