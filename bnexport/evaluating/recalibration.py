"""A checkpoint with exact moving statistics, re-estimated over its training images, as a new checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bnexport.data.datasets import dataset_labels, load_test_images, load_train_images
from bnexport.data.preprocessing import Preprocessing
from bnexport.environment import environment
from bnexport.errors import BnexportError, ModelError, OutputError
from bnexport.evaluating.confusion import wilson_interval
from bnexport.evaluating.evaluate import BATCH_SIZE, OnBatch, count_confusion
from bnexport.evaluating.network import LoadedCheckpoint, NetworkClassifier, fails_on, input_batches, load_trained
from bnexport.evaluating.network_options import RecalibrationRequest
from bnexport.loading.checkpoint import Checkpoint, checkpoint_file, save_checkpoint
from bnexport.nn.moving_statistics import norm_layers, recalibrate, recalibrate_by_layer
from bnexport.nn.stale_statistics import StalenessReport, compare
from bnexport.tensors import Array
from bnexport.training.processes import choose_device

#: Added to the name of the checkpoint that is read.
SUFFIX = ".recalibrated.safetensors"


@dataclass(frozen=True)
class Accuracy:
    """On the data set's test images.

    Attributes:
        correct: Images whose best score is that of their class.
        n: Images.
    """

    correct: int
    n: int

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, with the 95 % Wilson interval."""
        interval = list(wilson_interval(self.correct, self.n))
        return {"correct": self.correct, "n": self.n, "accuracy": self.correct / self.n, "accuracy_95": interval}


@dataclass(frozen=True)
class Recalibration:
    """The result of a recalibration.

    Attributes:
        file: The checkpoint that was read; unchanged.
        out: The checkpoint that was written.
        facts: What ``out`` says of it: definition, data set, images, batch size, seed.
        before: With the old moving statistics.
        after: With the exact ones.
        distance: How far the old ones were from the exact ones, layer by layer.
        environment: Hardware and versions.
        notes: Sentences about choices in the weights file.
    """

    file: Path
    out: Path
    facts: dict[str, Any]
    before: Accuracy
    after: Accuracy
    distance: StalenessReport
    environment: dict[str, Any]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "file": str(self.file),
            "out": str(self.out),
            "recalibration": self.facts,
            "before": self.before.to_json(),
            "after": self.after.to_json(),
            "distance": self.distance.to_json(),
            "notes": list(self.notes),
            "environment": self.environment,
        }


def recalibrate_path(
    path: str | Path,
    out: str | Path | None = None,
    *,
    request: RecalibrationRequest | None = None,
    dataset: str | None = None,
    data_dir: str | Path | None = None,
    source: str | None = None,
    input: str | Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    labels: Sequence[str] | str | Path | None = None,
    force: bool | None = None,
) -> Recalibration:
    """Write a checkpoint with exact moving statistics, re-estimated over training images; the old one stays as it is.

    Args:
        path: A run directory, a checkpoint, or with ``source`` any file of weights.
        out: The file to write; default: beside ``path``, with SUFFIX.
        request: All options; an argument below replaces the option of the same name.
        dataset: A name, or ``folder:PATH``; default: the one that the checkpoint names.
        data_dir: Folder of the data set.
        source: Code of a user's own network: ``file.py:factory``. That file is run.
        input: Shape of one image, ``(3, 224, 224)`` or "3x224x224"; for plain weights, as are the rest.
        mean: Per channel, of pixels from 0 to 1, with ``std``.
        std: Per channel, of pixels from 0 to 1.
        labels: Class names in the order of the scores, or a text file with one per line.
        force: Replace ``out``.

    Raises:
        BadInput: The file, the options or the images can't be used; nothing was written.
        Unavailable: A package, device or network is missing here.
    """
    given = (request or RecalibrationRequest()).with_options(
        dataset=dataset, data_dir=data_dir, source=source, input=input, mean=mean, std=std, labels=labels, force=force
    )
    return recalibrate_checkpoint(Path(path), None if out is None else Path(out), given)


def recalibrate_checkpoint(
    path: Path, out: Path | None, request: RecalibrationRequest, *, on_batch: OnBatch | None = None
) -> Recalibration:
    """Write a checkpoint with exact moving statistics; the one that is read stays as it is.

    Args:
        path: A run directory or checkpoint; with ``request.source`` also the weights of a user's own network.
        out: The file to write; default: beside ``path``, with SUFFIX.
        request: How.
        on_batch: Told after each batch of training images.

    Raises:
        OutputError: ``out`` is the file that is read, exists already, or can't be written.
        UsageError: No data set is named, or the numbers are out of range.
        ModelError: The checkpoint is missing or damaged, has no BatchNorm, or fails on the images.
        FeedError: A batch is too small for a BatchNorm.
        DataError: The images can't be read, or the network has another number of classes than the data set.
        Unavailable: A package, device or network that is not here.
    """
    file = checkpoint_file(path)
    target = file.with_name(file.stem + SUFFIX) if out is None else out
    _refuse_target(file, target, force=request.force)
    device = choose_device(request.device)
    trained = load_trained(path, request)
    module = trained.model.module
    layers = norm_layers(module)
    if not layers:
        raise ModelError(
            f"{file} has no BatchNorm with moving statistics, so there is nothing to re-estimate",
            remedy="Give a network that was trained with batch normalization",
        )
    name = trained.dataset(request.dataset)
    trained.classes(name, data_dir=request.data_dir)
    fitting = trained.preprocessing
    train, _ = load_train_images(name, data_dir=request.data_dir, download=True, preprocessing=fitting)
    order = _chosen(len(train), request)
    classifier = NetworkClassifier(module, trained.preprocessing, device)
    before = _accuracy(classifier, name, request, fitting)
    old = {path: (layer.mean.clone(), layer.var.clone()) for path, layer in layers.items()}
    _recalibrate(trained, _Feed(train, order, request, trained, on_batch), device)
    rows = tuple(
        compare(path, layer, moving=old[path], exact=(layer.mean, layer.var)) for path, layer in layers.items()
    )
    after = _accuracy(classifier, name, request, fitting)
    facts = {
        "definition": request.definition,
        "dataset": name,
        "images": len(order),
        "batch_size": request.batch_size,
        "seed": request.seed,
    }
    metadata = {**trained.metadata, "recalibrated": True, "recalibration": facts}
    save_checkpoint(target, Checkpoint(module.state_dict(), metadata))
    distance = StalenessReport(rows, len(order))
    return Recalibration(file, target, facts, before, after, distance, environment(), trained.model.notes)


def _recalibrate(trained: LoadedCheckpoint, feed: _Feed, device: torch.device) -> None:
    module = trained.model.module
    try:
        if feed.request.definition == "population":
            recalibrate_by_layer(module, feed.begin, device=device)
        else:
            recalibrate(module, feed.begin(), device=device)
    except BnexportError:
        raise
    except Exception as error:  # the module is the user's code
        raise fails_on(feed.last, error, module) from error


class _Feed:
    """The training images in batches, as often as they are needed."""

    def __init__(
        self,
        images: Array,
        order: Array,
        request: RecalibrationRequest,
        trained: LoadedCheckpoint,
        on_batch: OnBatch | None,
    ) -> None:
        self.request = request
        self.last = torch.zeros(0)
        self._images, self._order = images, order
        self._preprocessing = trained.preprocessing
        self._on_batch = on_batch
        self._passes = _passes(trained.model.module, request.definition)
        self._done = 0

    def begin(self) -> Iterator[Tensor]:
        """All batches, once."""
        for X in input_batches(self._images, self._order, self.request.batch_size, self._preprocessing):
            self.last = X
            yield X
            self._done += len(X)
            if self._on_batch is not None:
                self._on_batch(self._done, self._passes * len(self._order))


def _passes(module: nn.Module, definition: str) -> int:
    """Passes over the images, at most."""
    return len(norm_layers(module)) if definition == "population" else 1


def _chosen(n: int, request: RecalibrationRequest) -> Array:
    """The images that are used, in mixed order: a set sorted by class would give batches like none in training."""
    return np.random.default_rng(request.seed).permutation(n)[: request.samples]


def _accuracy(
    classifier: NetworkClassifier, name: str, request: RecalibrationRequest, fitting: Preprocessing
) -> Accuracy:
    images, labels = load_test_images(name, data_dir=request.data_dir, download=True, preprocessing=fitting)
    classes = len(dataset_labels(name, data_dir=request.data_dir))
    found = count_confusion(classifier, images, labels, classes=classes, batch_size=BATCH_SIZE, on_batch=None)
    return Accuracy(found.correct, found.n)


def _refuse_target(file: Path, target: Path, *, force: bool) -> None:
    """Refuse to write over something, before long work."""
    if target.exists() and file.exists() and target.samefile(file):
        raise OutputError(f"{target} is the checkpoint that is read", remedy="Choose another --out")
    if target.is_dir():
        raise OutputError(f"{target} is a folder", remedy="Give --out a file name")
    if target.exists() and not force:
        raise OutputError(f"{target} exists already", remedy="Choose another --out, or pass --force to replace it")
