"""The copies of a bundle that the self-test puts faults into, and the facts about the bundle itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bnexport.bundle import MODEL_ONNX, WEIGHTS, Bundle, Manifest, seal
from bnexport.data.preprocessing import Preprocessing, original_feeds
from bnexport.errors import BnexportError
from bnexport.files import write_atomically
from bnexport.onnx_files.emulation import Emulator
from bnexport.onnx_files.float64 import Float64Evaluator
from bnexport.onnx_files.models import read_model
from bnexport.tensors import Array
from bnexport.verification.metrics import measure
from bnexport.verification.reference import Reference, not_rebuilt, rebuilt_reference
from bnexport.verification.stages import proved_file

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch import Tensor, nn


#: Evaluates what a fault changed, on golden inputs; for the size of its effect.
Evaluate = Callable[[Bundle, Mapping[str, Array]], Mapping[str, Array]]


class NotTried(Exception):
    """A fault that can't be put into this bundle. Its text is the reason; it never leaves the self-test."""


@dataclass(frozen=True)
class FaultTarget:
    """The bundle whose verification is tested, which never changes, and the original network, if the caller gave it."""

    bundle: Bundle
    module: nn.Module | None
    harmless: float  # Error of scale up to which a fault need not be caught
    #: The original's accuracy on the self-test's samples: ``{"dataset", "n", "correct"}``; empty without labels
    accuracy: Mapping[str, Any]

    @cached_property
    def golden(self) -> tuple[dict[str, Array], dict[str, Array]]:
        """Return golden inputs and outputs by name."""
        return self.bundle.golden()

    @cached_property
    def network(self) -> nn.Module | None:
        """Return the original network; None where only its author has its code, or its weights are not in the bundle."""
        if self.module is not None or not self.rebuilt:
            return self.module
        from bnexport.runtimes.torch_runners import original_network

        return original_network(self.bundle)

    @property
    def rebuilt(self) -> bool:
        """Return whether a verification builds the original network from the bundle's own weights."""
        return self.module is None and not_rebuilt(self.bundle) is None and WEIGHTS in self.bundle.manifest.files

    @property
    def example(self) -> tuple[Tensor, ...]:
        """Return inputs to trace the network with: two golden samples, or all where the batch size is fixed."""
        import torch

        manifest = self.bundle.manifest
        specs, feeds = manifest.signature.inputs, original_feeds(manifest, self.golden[0])
        n = 2 if isinstance(specs[0].shape[0], str) else None
        arrays = [np.array(feeds[spec.name][:n]) for spec in specs]
        return tuple(torch.from_numpy(array.astype(np.float32) if manifest.takes_pixels else array) for array in arrays)

    @cached_property
    def folded(self) -> dict[str, Tensor]:
        """Return the weights of the folded network, as ``fold`` makes them."""
        assert self.network is not None, "the network must be known"
        return folded_weights(self.network, self.example, self.bundle.manifest)

    def effect(self, module: nn.Module) -> float:
        """Return max |module - original| / scale on the golden inputs, in float64; infinite where it is not finite."""
        manifest = self.bundle.manifest
        reference = Reference(module, manifest.signature, description="with a fault", manifest=manifest)
        outputs = reference.evaluate(self.golden[0])
        found = measure(outputs, self.golden[1], bound=self.harmless)
        return float("inf") if found.problem else found.error


@dataclass(frozen=True)
class Copy:
    """A copy of the bundle (``subject``) to spoil."""

    subject: FaultTarget
    folder: Path

    def file(self, name: str) -> Path:
        """Return a file of the copy; NotTried where the bundle was written without it."""
        if name not in self.subject.bundle.manifest.files:
            raise NotTried(f"the bundle was written without {name}")
        return self.folder / name

    @property
    def folded_file(self) -> str:
        """Return the file with the folded float weights: model.onnx, or the original of an int8 one."""
        return proved_file(self.subject.bundle)

    def model(self, name: str = MODEL_ONNX) -> ModelProto:
        """Return an ONNX file of the copy as read, to be changed."""
        return read_model(self.file(name))

    def write_model(self, model: ModelProto, name: str = MODEL_ONNX) -> None:
        """Write an ONNX file and seal the copy again."""
        write_atomically(self.folder / name, model.SerializeToString(deterministic=True))
        self.seal()

    def seal(self, **changes: Any) -> None:
        """Write a manifest whose hashes hold again, with ``changes`` of its fields, so that only the numbers show the fault."""
        seal(self.folder, replace(self.subject.bundle.manifest, **changes))


def folded_weights(network: nn.Module, example: tuple[Tensor, ...], manifest: Manifest) -> dict[str, Tensor]:
    """Return the weights of a bundle's files, made of a network again; not proved, as the network may be wrong on purpose."""
    from bnexport.folding.fold import fold

    folded = fold(network, example, prove=False).model
    if manifest.takes_pixels and manifest.preprocessing is not None:
        from bnexport.exporting.half import PRECISIONS
        from bnexport.folding.pixel_input import pixel_module

        stored = PRECISIONS[manifest.precision]
        folded = pixel_module(folded, Preprocessing.from_json(manifest.preprocessing), stored)
    return dict(folded.state_dict())


def evaluate_onnx(bundle: Bundle, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
    """Evaluate model.onnx in float64."""
    return Float64Evaluator(read_model(bundle.file(proved_file(bundle)))).evaluate(feeds)


def evaluate_tf32(bundle: Bundle, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
    """Evaluate model.onnx as an engine of TF32 does."""
    return Emulator(read_model(bundle.file(MODEL_ONNX)), "tf32").evaluate(feeds)


def evaluate_weights(bundle: Bundle, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
    """Evaluate the unfolded network, rebuilt from the bundle's weights, in float64."""
    return rebuilt_reference(bundle).evaluate(feeds)


def evaluate_torch(bundle: Bundle, feeds: Mapping[str, Array], *, name: str) -> Mapping[str, Array]:
    """Evaluate model.pt or model.pt2 in float64."""
    from bnexport.runtimes.torch_float64 import TorchFloat64Evaluator

    return TorchFloat64Evaluator(bundle.file(name), bundle.manifest.signature).evaluate(feeds)


def effect_of(bundle: Bundle, evaluate: Evaluate | None) -> float | None:
    """Return max |faulty - golden| / scale on the golden inputs of a spoiled bundle; None if it can't be measured."""
    if evaluate is None:
        return None
    try:
        inputs, expected = bundle.golden()
        found = measure(evaluate(bundle, inputs), expected, bound=0.0)
    except BnexportError:
        return None
    return None if found.problem else found.error
