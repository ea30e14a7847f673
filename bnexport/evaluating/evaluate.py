"""Accuracy, loss and confusion of a checkpoint or a bundle on a data set's test images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from bnexport.bundle import MANIFEST, Bundle
from bnexport.data.classes import SUSPECTS, at_chance, check_classes
from bnexport.data.datasets import dataset_labels, load_test_images
from bnexport.data.prepare import prepared
from bnexport.data.preprocessing import Preprocessing
from bnexport.environment import environment
from bnexport.errors import DataError, UsageError
from bnexport.evaluating.confusion import TOP_K, ClassScores, ConfusionCounts, wilson_interval
from bnexport.evaluating.network_options import EvaluationRequest
from bnexport.optional import need_packages
from bnexport.serving.predictor import DEFAULT_RUNTIME, Predictor
from bnexport.tensors import Array

#: Told after each batch: images done, images in all.
OnBatch = Callable[[int, int], None]
BATCH_SIZE = 1000


class Classifier(Protocol):
    """Whatever gives scores (n, classes) for uint8 images (n, height, width)."""

    def logits(self, images: Array) -> Array:
        """Scores of a batch."""


@dataclass(frozen=True)
class Evaluation:
    """A network's accuracy on a data set.

    Attributes:
        subject: The file or folder.
        runtime: What ran it: "torch-cpu", "onnxruntime-cpu".
        dataset: Whose test images.
        n: Images.
        correct: Images whose best score is that of their class.
        interval: 95 % Wilson interval of the accuracy.
        loss: Mean cross-entropy in nats.
        top: Share of images whose class is among the TOP_K best scores; None for that few classes.
        classes: One row per class.
        confusion: int64 (classes, classes): row the true class, column the given one.
        environment: Hardware and versions.
        note: What the reader must know; "" for nothing.
    """

    subject: str
    runtime: str
    dataset: str
    n: int
    correct: int
    interval: tuple[float, float]
    loss: float
    top: float | None
    classes: tuple[ClassScores, ...]
    confusion: npt.NDArray[np.int64]
    environment: dict[str, Any]
    note: str = ""

    @property
    def accuracy(self) -> float:
        """0 to 1."""
        return self.correct / self.n

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "subject": self.subject,
            "runtime": self.runtime,
            "dataset": self.dataset,
            "n": self.n,
            "correct": self.correct,
            "accuracy": self.accuracy,
            "accuracy_95": list(self.interval),
            "loss": self.loss,
            f"top_{TOP_K}": self.top,
            "classes": [row.to_json() for row in self.classes],
            "confusion": self.confusion.tolist(),
            "note": self.note,
            "environment": self.environment,
        }


def evaluate(
    path: str | Path,
    *,
    request: EvaluationRequest | None = None,
    dataset: str | None = None,
    data_dir: str | Path | None = None,
    source: str | None = None,
    input: str | Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    labels: Sequence[str] | str | Path | None = None,
) -> Evaluation:
    """Count what a network gets right on a data set's test images.

    Args:
        path: A run directory, a checkpoint, a bundle, or with ``source`` any file of weights.
        request: All options; an argument below replaces the option of the same name.
        dataset: A name, or ``folder:PATH``; default: the one that the checkpoint or bundle names.
        data_dir: Folder of the data set.
        source: Code of a user's own network: ``file.py:factory``. That file is run.
        input: Shape of one image, ``(3, 224, 224)`` or "3x224x224"; for plain weights, as are the rest.
        mean: Per channel, of pixels from 0 to 1, with ``std``.
        std: Per channel, of pixels from 0 to 1.
        labels: Class names in the order of the scores, or a text file with one per line.

    Returns:
        Accuracy with its 95 % interval, loss, classes and the confusion matrix.

    Raises:
        BadInput: The file, the options or the images can't be used, or the labels are not the data set's classes.
        Unavailable: A package, device or network is missing here.
    """
    given = (request or EvaluationRequest()).with_options(
        dataset=dataset, data_dir=data_dir, source=source, input=input, mean=mean, std=std, labels=labels
    )
    return evaluate_path(Path(path), given)


def evaluate_path(path: Path, request: EvaluationRequest, *, on_batch: OnBatch | None = None) -> Evaluation:
    """Evaluate a run directory, a checkpoint or a bundle.

    Raises:
        UsageError: Options that do not go with what is evaluated, or no data set is named.
        BundleError: The bundle was changed, or is no classifier of images.
        ModelError: The checkpoint is missing or damaged, or the network fails.
        DataError: The images can't be read, or the network has another number of classes than the data set.
        Unavailable: A package, device or network that is not here.
    """
    if request.batch_size < 1:
        raise UsageError(f"the batch size is {request.batch_size}", remedy="Give at least 1")
    if (path / MANIFEST).exists():
        return _evaluate_bundle(path, request, on_batch)
    return _evaluate_checkpoint(path, request, on_batch)


def count_confusion(
    classifier: Classifier, images: Array, labels: Array, *, classes: int, batch_size: int, on_batch: OnBatch | None
) -> ConfusionCounts:
    """Run a classifier over labelled images.

    Raises:
        DataError: It gives another number of scores than there are classes, or no image is there.
    """
    if len(images) == 0:
        raise DataError("there are no images to evaluate on", remedy="Give a data set that has a test part")
    confusion = ConfusionCounts(classes)
    for start in range(0, len(images), batch_size):
        logits = classifier.logits(images[start : start + batch_size])
        if logits.shape[1] != classes:
            raise DataError(
                f"the network gives {logits.shape[1]} scores, the data set has {classes} classes",
                remedy="Choose the data set that the network was trained on with --dataset",
            )
        confusion.add(logits, labels[start : start + batch_size])
        if on_batch is not None:
            on_batch(confusion.n, len(images))
    return confusion


class _FittingPredictor(Predictor):
    """A predictor for images of any size, as data sets have them: (n, H, W) or (n, C, H, W)."""

    def logits(self, images: Array) -> Array:
        """See ``Predictor.logits``."""
        return super().logits(prepared(images, self.preprocessing))


def _evaluate_bundle(path: Path, request: EvaluationRequest, on_batch: OnBatch | None) -> Evaluation:
    if given := (*(("--device",) if request.device is not None else ()), *request.given):
        raise UsageError(
            f"{given[0]} goes with a checkpoint, {path} is a bundle",
            remedy="Name its engine and device with --runtime, such as onnxruntime-cuda",
        )
    bundle = Bundle.open(path)
    manifest = bundle.manifest
    dataset = _named(request.dataset or manifest.dataset, path)
    classes = dataset_labels(dataset, data_dir=request.data_dir)
    if manifest.classes is not None:
        check_classes(manifest.classes, classes, dataset=dataset, scores=None)
        classes = manifest.labels or classes
    runtime = request.runtime or DEFAULT_RUNTIME
    with _FittingPredictor(bundle, runtime=runtime, batch_size=request.batch_size) as predictor:
        subject = _Subject(path, runtime, dataset, classes, manifest.dataset, predictor.preprocessing)
        return _evaluation(predictor, subject, request, on_batch)


def _evaluate_checkpoint(path: Path, request: EvaluationRequest, on_batch: OnBatch | None) -> Evaluation:
    if request.runtime is not None:
        raise UsageError(
            f"--runtime goes with a bundle, {path} is none",
            remedy="Choose where torch runs with --device, or export it",
        )
    need_packages("evaluating a checkpoint", "torch", "safetensors")
    from bnexport.evaluating.network import NetworkClassifier, load_trained
    from bnexport.training.processes import choose_device

    device = choose_device(request.device or "auto")
    trained = load_trained(path, request)
    dataset = trained.dataset(request.dataset)
    classes = trained.classes(dataset, data_dir=request.data_dir)
    classifier = NetworkClassifier(trained.model.module, trained.preprocessing, device)
    runtime = f"torch-{device.type}"
    subject = _Subject(trained.file, runtime, dataset, classes, trained.model.dataset, trained.preprocessing)
    found = _evaluation(classifier, subject, request, on_batch)
    return replace(found, note="; ".join(filter(None, (found.note, *trained.model.notes))))


def _named(dataset: str | None, path: Path) -> str:
    if dataset is None:
        raise UsageError(f"{path} does not say on which data set it was trained", remedy="Pass --dataset NAME")
    return dataset


@dataclass(frozen=True)
class _Subject:
    path: Path
    runtime: str
    dataset: str
    classes: tuple[str, ...]
    trained_on: str | None
    preprocessing: Preprocessing


def _evaluation(
    classifier: Classifier, subject: _Subject, request: EvaluationRequest, on_batch: OnBatch | None
) -> Evaluation:
    labels = subject.classes
    images, truth = load_test_images(
        subject.dataset, data_dir=request.data_dir, download=True, preprocessing=subject.preprocessing
    )
    found = count_confusion(
        classifier, images, truth, classes=len(labels), batch_size=request.batch_size, on_batch=on_batch
    )
    return Evaluation(
        subject=str(subject.path),
        runtime=subject.runtime,
        dataset=subject.dataset,
        n=found.n,
        correct=found.correct,
        interval=wilson_interval(found.correct, found.n),
        loss=found.loss,
        top=found.top_accuracy(),
        classes=found.classes(labels),
        confusion=found.counts,
        environment=environment(),
        note="; ".join(_notes(subject, found)),
    )


def _notes(subject: _Subject, found: ConfusionCounts) -> Iterator[str]:
    """Yield the facts that a reader of the accuracy must know."""
    if subject.trained_on not in (None, subject.dataset):
        yield f"the network was trained on {subject.trained_on}"
    truth, given = (np.repeat(np.indices(found.counts.shape)[axis].ravel(), found.counts.ravel()) for axis in (0, 1))
    if at_chance(truth, given, len(subject.classes)) is not None:
        yield f"the accuracy is at or below chance: check {SUSPECTS}"
