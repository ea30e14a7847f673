"""A checkpoint as a network that runs: with its own or a user's code, on a device, by its own preprocessing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bnexport.data.prepare import prepared
from bnexport.data.preprocessing import Preprocessing
from bnexport.errors import DataError, ModelError, RuntimeUnavailable, UsageError
from bnexport.loading.checkpoint import METADATA_KEY, checkpoint_file, load_checkpoint, read_safetensors
from bnexport.loading.sources import LoadedModel, checkpoint_of, load_source
from bnexport.loading.weights import is_safetensors
from bnexport.nn.calling import place_of
from bnexport.optional import one_line
from bnexport.reproducibility import strict_float32
from bnexport.tensors import Array

#: What a data set without any word on preprocessing goes through: pixels from 0 to 1.
DEFAULT_PREPROCESSING = Preprocessing()


@dataclass(frozen=True)
class Trained:
    """A checkpoint, loaded.

    Attributes:
        file: The file that was read.
        model: The network in eval mode on the CPU, and what is known about it.
        metadata: All that the checkpoint says about itself; of plain weights, what can be said of them.
    """

    file: Path
    model: LoadedModel
    metadata: Mapping[str, Any]

    @property
    def preprocessing(self) -> Preprocessing:
        """Its own, or pixels from 0 to 1.

        Raises:
            DataError: What the checkpoint says can't be understood.
        """
        found = self.model.preprocessing
        return DEFAULT_PREPROCESSING if found is None else Preprocessing.from_json(found)

    def dataset(self, given: str | None) -> str:
        """The data set to use: the one that is given, else the one that it was trained on.

        Raises:
            UsageError: There is neither.
        """
        if (name := given or self.model.dataset) is None:
            raise UsageError(f"{self.file} does not say on which data set it was trained", remedy="Pass --dataset NAME")
        return name


def load_trained(path: Path, *, source: str | None = None) -> Trained:
    """Load a run directory, a checkpoint, or the weights of a user's own network.

    Args:
        path: A run directory or checkpoint of bnexport; with ``source`` also plain safetensors or a torch state dict.
        source: Code of a network that bnexport can't rebuild by itself: ``file.py:factory``. That file is run.

    Raises:
        ModelError: Something is missing, damaged, or does not fit together.
        MissingDependency: The package that defines the network is not installed.
    """
    file = checkpoint_file(path)
    metadata: dict[str, Any] = {}
    if is_safetensors(file) and METADATA_KEY in read_safetensors(file)[1]:
        metadata = load_checkpoint(file).metadata
    elif source is None and is_safetensors(file):
        raise ModelError(
            f"{file} holds weights but no bnexport metadata, so its network is unknown",
            remedy="Name its code with --source file.py:factory, which evaluate and recalibrate take",
        )
    if source is None:
        return Trained(file, load_source(str(file)), metadata)
    options = (metadata.get("network") or {}).get("options")
    model = load_source(source, weights=file, options=options)
    labels = metadata.get("labels")
    model = replace(
        model,
        dataset=metadata.get("dataset"),
        labels=model.labels if labels is None else tuple(labels),
        preprocessing=metadata.get("preprocessing") or model.preprocessing,
    )
    return Trained(file, model, metadata or checkpoint_of(model).metadata)


class NetworkClassifier:
    """A network in eval mode and strict float32 that gives scores for images.

    Args:
        module: Moved to the device.
        preprocessing: Of its images.
        device: Where it runs.
    """

    def __init__(self, module: nn.Module, preprocessing: Preprocessing, device: torch.device) -> None:
        self._module = module.to(device)
        self._preprocessing = preprocessing
        self._device = device

    def logits(self, images: Array) -> Array:
        """Scores (n, classes) of uint8 images (n, height, width) or (n, channels, height, width) of any size.

        Raises:
            DataError: The images do not fit the preprocessing, or the scores are not finite.
            ModelError: The network fails on them, or gives something else than one score per class.
            RuntimeUnavailable: The GPU's memory is full.
        """
        X = inputs_of(images, self._preprocessing).to(self._device)
        with strict_float32(), torch.inference_mode():
            try:
                Y: Any = self._module(X)
            except torch.OutOfMemoryError as error:
                raise RuntimeUnavailable(
                    f"the memory of {self._device} is full", remedy="Choose a smaller --batch-size, or --device cpu"
                ) from error
            except Exception as error:  # the module is the user's code
                raise fails_on(X, error, self._module) from error
        if not isinstance(Y, Tensor) or Y.dim() != 2 or len(Y) != len(X):
            raise ModelError("the network does not give one row of scores per image", remedy="Evaluate a classifier")
        logits: Array = Y.float().cpu().numpy()
        if not np.isfinite(logits).all():
            raise DataError("the network's answer holds NaN or infinity", remedy="Check its weights; train again")
        return logits


def fails_on(X: Tensor, error: Exception, module: nn.Module) -> ModelError:
    """What to raise when a user's network fails on a batch."""
    shape = "x".join(map(str, X.shape))
    return ModelError(
        f"the network fails on images of shape {shape}{place_of(error, module)}: {one_line(error, 200)}",
        remedy="Choose a data set whose images fit the network",
    )


def inputs_of(images: Array, preprocessing: Preprocessing) -> Tensor:
    """uint8 images (n, H, W) or (n, C, H, W) as an input (n, channels, height, width), resized where they do not fit."""
    return torch.from_numpy(preprocessing.apply(prepared(images, preprocessing)))


def input_batches(images: Array, order: Array, batch_size: int, preprocessing: Preprocessing) -> Iterator[Tensor]:
    """Inputs in batches of nearly equal size, at most ``batch_size``, so that no single image is left for the last.

    Args:
        images: uint8 (n, height, width) or (n, channels, height, width).
        order: Indices of the images that are used.
        batch_size: At least 1.
        preprocessing: Of the network.
    """
    for indices in np.array_split(order, max(1, -(-len(order) // batch_size))):
        yield inputs_of(images[indices], preprocessing)
