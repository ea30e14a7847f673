"""The original network in float64, with which every runtime is compared."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from bnexport.bundle import WEIGHTS, Bundle, Manifest
from bnexport.data.preprocessing import original_feeds
from bnexport.errors import BnexportError, ModelError
from bnexport.optional import installed, one_line
from bnexport.tensors import Array, Signature

if TYPE_CHECKING:
    from torch import nn


#: Most samples at once, and most elements of their inputs: larger blocks of memory cost more time than they save.
_CHUNK, _ELEMENTS = 512, 1 << 19


class Reference:
    """Evaluates an unfolded module in float64, in eval mode; the module given is never changed.

    ``description`` is the module's origin, for the report. ``doubt`` returns how the module differs from the network of the
    bundle; it is called when the module fails. Where the files of the bundle with this ``manifest`` take pixels, the module
    gets preprocessed ones, in float64.
    """

    def __init__(
        self,
        module: nn.Module,
        signature: Signature,
        *,
        description: str,
        doubt: Callable[[], str] = str,
        manifest: Manifest | None = None,
    ) -> None:
        import torch

        from bnexport.runtimes.torch_outputs import private_copy

        self.description = description
        self._manifest = manifest
        self._doubt = doubt
        self._signature = signature
        self._module = private_copy(module, "cpu", torch.float64)

    def evaluate(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Evaluate in float64, input name -> (n, ...) to output name -> (n, ...); ModelError if the module can't."""
        size = len(feeds[self._signature.inputs[0].name])
        # A batch dimension that is fixed can't be cut; an empty batch still has to go through once.
        elements = sum(array.size for array in feeds.values()) // max(size, 1)
        step = min(max(_ELEMENTS // max(elements, 1), 1), _CHUNK)
        if not isinstance(self._signature.inputs[0].shape[0], str):
            step = max(size, 1)
        parts = [self._part(feeds, at, at + step) for at in range(0, max(size, 1), step)]
        return {spec.name: np.concatenate([p[i] for p in parts]) for i, spec in enumerate(self._signature.outputs)}

    def _part(self, feeds: Mapping[str, Array], start: int, stop: int) -> list[Array]:
        import torch

        from bnexport.runtimes.torch_float64 import wide_convolutions
        from bnexport.runtimes.torch_outputs import flatten
        from bnexport.verification.widening import wide_casts

        part = {name: array[start:stop] for name, array in feeds.items()}
        part = part if self._manifest is None else original_feeds(self._manifest, part)
        arrays = [np.array(part[spec.name]) for spec in self._signature.inputs]
        tensors = [torch.from_numpy(array.astype(np.float64) if array.dtype.kind == "f" else array) for array in arrays]
        try:
            with torch.inference_mode(), wide_casts(), wide_convolutions():
                results = [tensor.numpy() for tensor in flatten(self._module(*tensors))]
        except Exception as error:  # the module is the user's code
            if difference := self._doubt():
                raise ModelError(
                    f"{type(self._module).__name__} is not the network of the bundle: {difference}",
                    remedy="Give the network that was exported",
                ) from error
            raise _unusable(one_line(error, 200)) from error
        if len(results) < len(self._signature.outputs):
            raise _unusable(f"it returns {len(results)} outputs, but the signature has {len(self._signature.outputs)}")
        if narrow := [array.dtype.name for array in results if array.dtype.kind == "f" and array.dtype != np.float64]:
            raise _unusable(f"it returns {narrow[0]}")
        return results


def live_reference(bundle: Bundle, module: nn.Module) -> Reference:
    """Return the caller's module as the reference; ModelError if it can't be copied."""
    manifest, doubt = bundle.manifest, functools.partial(_difference, bundle, module)
    return Reference(
        module, manifest.signature, description="the original module, in float64", doubt=doubt, manifest=manifest
    )


def rebuilt_reference(bundle: Bundle) -> Reference:
    """Return the network that is rebuilt from the bundle's unfolded weights, where ``not_rebuilt`` returns None.

    BundleError if the weights are missing; ModelError if they are damaged or another network's.
    """
    from bnexport.runtimes.torch_runners import original_network

    manifest = bundle.manifest
    description = f"{manifest.network['source']} rebuilt from {WEIGHTS}, in float64"
    return Reference(original_network(bundle), manifest.signature, description=description, manifest=manifest)


def _difference(bundle: Bundle, module: nn.Module) -> str:
    """Return how a module's tensors differ in shape from the bundle's weights, whatever their names are; "" if they do not."""
    if WEIGHTS not in bundle.manifest.files or bundle.problem(WEIGHTS) is not None:
        return ""
    from bnexport.loading.checkpoint import read_safetensors

    stored = {name: tuple(tensor.shape) for name, tensor in read_safetensors(bundle.file(WEIGHTS))[0].items()}
    given = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    shapes = [sorted(shape for shape in state.values() if shape) for state in (stored, given)]
    if shapes[0] == shapes[1]:
        return ""
    odd = next((name for name, shape in stored.items() if shape and given.get(name) != shape), next(iter(stored)))
    found = "x".join(map(str, given[odd])) if odd in given else "missing"
    return f"{odd} is {found}, in the bundle {'x'.join(map(str, stored[odd]))}"


def not_rebuilt(bundle: Bundle) -> str | None:
    """Return why the original network can't be rebuilt here without its author's code, as the end of a sentence; else None."""
    if not installed("torch"):
        return "which needs torch, which is not installed here"
    from bnexport.loading.sources import unknown_reason

    return unknown_reason(bundle.manifest.network)


def takes_empty_batch(reference: Reference, feeds: Mapping[str, Array]) -> bool:
    """Return whether the original itself accepts zero samples; only then the exported files have to."""
    try:
        reference.evaluate({name: array[:0] for name, array in feeds.items()})
    except BnexportError:
        return False
    return True


def _unusable(why: str) -> ModelError:
    return ModelError(
        f"the original module can't be evaluated in float64: {why}",
        remedy="Remove fixed float32 casts and tensors from its forward, or verify against the golden vectors alone",
    )
