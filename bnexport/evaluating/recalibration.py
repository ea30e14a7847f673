"""Re-estimation of a checkpoint's moving statistics over its training images, written as a new checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnexport.data.datasets import load_train_images
from bnexport.environment import environment
from bnexport.errors import BnexportError, ModelError
from bnexport.evaluating.confusion import wilson_interval
from bnexport.evaluating.evaluate import OnBatch, count_confusion
from bnexport.evaluating.network import LoadedCheckpoint, classifier_of, fails_on, input_batches, load_trained
from bnexport.evaluating.network_options import RecalibrationRequest
from bnexport.files import refuse_existing_file
from bnexport.loading.checkpoint import Checkpoint, checkpoint_file, save_checkpoint
from bnexport.nn.moving_statistics import norm_layers, recalibrate, recalibrate_by_layer
from bnexport.nn.stale_statistics import StalenessReport, compare
from bnexport.tensors import Array
from bnexport.training.processes import choose_device

#: Default ending of the written file, after the name of the checkpoint.
SUFFIX = ".recalibrated.safetensors"


@dataclass(frozen=True)
class Accuracy:
    """Accuracy on the data set's test images."""

    correct: int  # Images whose best score is that of their class
    n: int  # Number of images

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values, with the 95 % Wilson interval."""
        interval = list(wilson_interval(self.correct, self.n))
        return {"correct": self.correct, "n": self.n, "accuracy": self.correct / self.n, "accuracy_95": interval}


@dataclass(frozen=True)
class Recalibration:
    """The result of a recalibration, as ``recalibrate`` returns it."""

    file: Path  # The checkpoint that was read; unchanged
    out: Path  # The checkpoint that was written
    facts: dict[str, Any]  # Its metadata "recalibration": definition, data set, images, batch size, seed
    before: Accuracy  # With the old moving statistics
    after: Accuracy  # With the exact statistics
    distance: StalenessReport  # Distance of the old statistics from the exact ones, layer by layer
    environment: dict[str, Any]  # Hardware and versions
    notes: tuple[str, ...] = ()  # Sentences about choices in the weights file
    assumed: str = ""  # Sentence on a preprocessing that was assumed, because nothing states it; "" if it is known

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "file": str(self.file),
            "out": str(self.out),
            "recalibration": self.facts,
            "before": self.before.to_json(),
            "after": self.after.to_json(),
            "distance": self.distance.to_json(),
            "notes": list(self.notes),
            "assumed": self.assumed,
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
    """Write a copy of a checkpoint with exact moving statistics, re-estimated over training images.

    Example:
        >>> done = bnexport.recalibrate("runs/train", dataset="fashion-mnist")  # doctest: +SKIP
        >>> print(done.before.correct, done.after.correct, done.out)  # doctest: +SKIP

    Args:
        path: A run directory, a checkpoint, or with ``source`` any file of weights. It is not changed.
        out: The file to write; default: next to ``path``, ending in ".recalibrated.safetensors".
        request: All options; an argument below replaces the option of the same name.
        dataset: Name of a data set, or ``folder:PATH``; default: the one that the checkpoint names.
        data_dir: Folder of the data set.
        source: Code of the user's network, ``file.py:factory``. The file is executed.
        input: Shape of one image for plain weights, ``(3, 224, 224)`` or "3x224x224".
        mean: Mean per channel of pixels from 0 to 1, for plain weights; needs ``std``.
        std: Standard deviation per channel of pixels from 0 to 1, for plain weights.
        labels: Class names in the order of the scores, or a text file with one name per line.
        force: Replace ``out``.

    Returns:
        The written file, the accuracy before and after, and the distance of the old statistics from the exact ones.

    Raises:
        BadInput: The file, the options or the images can't be used; nothing was written.
        Unavailable: A package, a device or the network connection is missing.
    """
    given = (request or RecalibrationRequest()).with_options(
        dataset=dataset, data_dir=data_dir, source=source, input=input, mean=mean, std=std, labels=labels, force=force
    )
    return recalibrate_checkpoint(Path(path), None if out is None else Path(out), given)


def recalibrate_checkpoint(
    path: Path, out: Path | None, request: RecalibrationRequest, *, on_batch: OnBatch | None = None
) -> Recalibration:
    """Write a checkpoint with exact moving statistics; ``on_batch`` is called after each batch of training images.

    Errors are those of ``recalibrate_path``: OutputError if ``out`` is the file that is read, exists already, or can't be
    written; FeedError if a batch is too small for a BatchNorm.
    """
    file = checkpoint_file(path)
    target = file.with_name(file.stem + SUFFIX) if out is None else out
    refuse_existing_file(target, force=request.force, read=[file], role="checkpoint that is read")
    device = choose_device(request.device)
    trained = load_trained(path, request)
    module = trained.model.module
    layers = norm_layers(module)
    if not layers:
        raise ModelError(
            f"{file} has no BatchNorm with moving statistics, so there is nothing to re-estimate",
            remedy="Give a network with BatchNorm layers",
        )
    name = trained.dataset(request.dataset)
    classes, fitting = len(trained.classes(name, data_dir=request.data_dir)), trained.preprocessing
    train, _ = load_train_images(name, data_dir=request.data_dir, download=True, preprocessing=fitting)
    # In mixed order: a set sorted by class would give batches unlike those of training.
    order = np.random.default_rng(request.seed).permutation(len(train))[: request.samples]
    classifier = classifier_of(module, fitting, device)

    def accuracy() -> Accuracy:
        found = count_confusion(classifier, name, classes, fitting, data_dir=request.data_dir)
        return Accuracy(found.correct, found.n)

    before = accuracy()
    old = {path: (layer.mean.clone(), layer.var.clone()) for path, layer in layers.items()}
    _recalibrate(trained, train, order, request, device, on_batch)
    rows = tuple(
        compare(path, layer, moving=old[path], exact=(layer.mean, layer.var)) for path, layer in layers.items()
    )
    after = accuracy()
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
    notes = trained.model.notes
    return Recalibration(file, target, facts, before, after, distance, environment(), notes, trained.model.assumed)


def _recalibrate(
    trained: LoadedCheckpoint,
    images: Array,
    order: Array,
    request: RecalibrationRequest,
    device: torch.device,
    on_batch: OnBatch | None,
) -> None:
    """Replace the moving statistics by those of images[order], in one pass or in one per layer."""
    module, by_layer = trained.model.module, request.definition == "population"
    passes = len(norm_layers(module)) if by_layer else 1  # at most
    last, done = torch.zeros(0), 0

    def batches() -> Iterator[Tensor]:
        nonlocal last, done
        for last in input_batches(images, order, request.batch_size, trained.preprocessing):
            yield last
            done += len(last)
            if on_batch is not None:
                on_batch(done, passes * len(order))

    try:
        if by_layer:
            recalibrate_by_layer(module, batches, device=device)
        else:
            recalibrate(module, batches(), device=device)
    except BnexportError:
        raise
    except Exception as error:  # the module is the user's code
        raise fails_on(last, error, module) from error
