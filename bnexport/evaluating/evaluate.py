"""Accuracy, loss and confusion of a checkpoint or a bundle on a data set's test images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bnexport.bundle import MANIFEST, Bundle
from bnexport.data.classes import SUSPECTS, at_chance, check_classes
from bnexport.data.dataset_table import folder_of
from bnexport.data.datasets import dataset_labels, load_test_images
from bnexport.data.folder import HOLDOUT, folder_layout
from bnexport.data.images import prepared
from bnexport.data.preprocessing import Preprocessing
from bnexport.environment import environment
from bnexport.errors import DataError, UsageError
from bnexport.evaluating.confusion import TOP_K, ClassScores, ConfusionCounts, wilson_interval
from bnexport.evaluating.network_options import EvaluationRequest, needed_dataset
from bnexport.optional import need_packages
from bnexport.runtimes.catalogue import DEFAULT_RUNTIME
from bnexport.serving.predictor import Predictor
from bnexport.tensors import Array

#: Called after each batch with the images done and the images in all.
OnBatch = Callable[[int, int], None]
#: Computes scores (n, classes) of uint8 images (n, height, width) or (n, channels, height, width).
Classifier = Callable[[Array], Array]
BATCH_SIZE = 1000


@dataclass(frozen=True)
class Evaluation:
    """The accuracy of a network on a data set's test images, as ``evaluate`` returns it."""

    subject: str  # The evaluated file or folder
    runtime: str  # The engine: "torch-cpu", "onnxruntime-cpu"
    dataset: str  # Name of the data set
    n: int  # Number of images
    correct: int  # Images whose best score is that of their class
    interval: tuple[float, float]  # 95 % Wilson interval of the accuracy
    loss: float  # Mean cross-entropy in nats
    top: float | None  # Share of images whose class is among the TOP_K best scores; None for at most TOP_K classes
    classes: tuple[ClassScores, ...]  # Scores of each class
    confusion: npt.NDArray[np.int64]  # (classes, classes); row: true class, column: predicted class
    environment: dict[str, Any]  # Hardware and versions
    note: str = ""  # Warning for the reader; "" without one
    preprocessing: Mapping[str, Any] = field(default_factory=dict)  # The preprocessing of the images, as in a manifest
    assumed: str = ""  # Sentence on a preprocessing that was assumed, because nothing states it; "" if it is known

    @property
    def accuracy(self) -> float:
        """Share of right labels, 0 to 1."""
        return self.correct / self.n

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
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
            "classes": [dict(vars(row)) for row in self.classes],
            "confusion": self.confusion.tolist(),
            "preprocessing": dict(self.preprocessing),
            "assumed": self.assumed,
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
    """Measure the accuracy of a trained network on the test images of a data set.

    Example:
        >>> found = bnexport.evaluate("models/bn_lenet/1", dataset="fashion-mnist")  # doctest: +SKIP
        >>> print(found.correct, "of", found.n)  # doctest: +SKIP
        8607 of 10000

    Args:
        path: A run directory, a checkpoint, a bundle, or with ``source`` any file of weights.
        request: All options; an argument below replaces the option of the same name.
        dataset: Name of a data set, or ``folder:PATH``; default: the one that the checkpoint or bundle names.
        data_dir: Folder of the data set.
        source: Code of the user's network, ``file.py:factory``. The file is executed.
        input: Shape of one image for plain weights, ``(3, 224, 224)`` or "3x224x224".
        mean: Mean per channel of pixels from 0 to 1, for plain weights; needs ``std``.
        std: Standard deviation per channel of pixels from 0 to 1, for plain weights.
        labels: Class names in the order of the scores, or a text file with one name per line.

    Returns:
        Accuracy with its 95 % interval, loss, scores of each class, and the confusion matrix.

    Raises:
        BadInput: The file, the options or the images can't be used, or the labels are not the data set's classes.
        Unavailable: A package, a device or the network connection is missing.
    """
    given = (request or EvaluationRequest()).with_options(
        dataset=dataset, data_dir=data_dir, source=source, input=input, mean=mean, std=std, labels=labels
    )
    return evaluate_path(Path(path), given)


def evaluate_path(path: Path, request: EvaluationRequest, *, on_batch: OnBatch | None = None) -> Evaluation:
    """Evaluate a run directory, a checkpoint or a bundle; errors are those of ``evaluate``."""
    if request.batch_size < 1:
        raise UsageError(f"the batch size is {request.batch_size}", remedy="Give at least 1")
    if (path / MANIFEST).exists():
        return _evaluate_bundle(path, request, on_batch)
    return _evaluate_checkpoint(path, request, on_batch)


def count_confusion(
    classifier: Classifier,
    dataset: str,
    classes: int,
    preprocessing: Preprocessing,
    *,
    data_dir: Path | None,
    batch_size: int = BATCH_SIZE,
    on_batch: OnBatch | None = None,
) -> ConfusionCounts:
    """Run a classifier over a data set's test images; DataError for no image or for another number of scores."""
    images, labels = load_test_images(dataset, data_dir=data_dir, download=True, preprocessing=preprocessing)
    if len(images) == 0:
        raise DataError(f"the data set {dataset} has no test images", remedy="Choose a data set with a test part")
    confusion = ConfusionCounts(classes)
    for start in range(0, len(images), batch_size):
        logits = classifier(images[start : start + batch_size])
        if logits.shape[1] != classes:
            raise DataError(
                f"the network returns {logits.shape[1]} scores, but the data set has {classes} classes",
                remedy="Choose the data set that the network was trained on with --dataset",
            )
        confusion.add(logits, labels[start : start + batch_size])
        if on_batch is not None:
            on_batch(confusion.n, len(images))
    return confusion


def _evaluate_bundle(path: Path, request: EvaluationRequest, on_batch: OnBatch | None) -> Evaluation:
    if given := (*(("--device",) if request.device is not None else ()), *request.given):
        raise UsageError(
            f"{given[0]} is for a checkpoint, but {path} is a bundle",
            remedy="Name its engine and device with --runtime, such as onnxruntime-cuda",
        )
    bundle = Bundle.open(path)
    manifest = bundle.manifest
    dataset = needed_dataset(request.dataset or manifest.dataset, path)
    classes = dataset_labels(dataset, data_dir=request.data_dir)
    if manifest.classes is not None:
        check_classes(manifest.classes, classes, dataset=dataset, scores=None)
        classes = manifest.labels or classes
    runtime = request.runtime or DEFAULT_RUNTIME
    with Predictor(bundle, runtime=runtime, batch_size=request.batch_size) as predictor:
        fitting = predictor.preprocessing
        subject = _Evaluated(path, runtime, dataset, classes, manifest.dataset, fitting)
        return _evaluation(lambda images: predictor.logits(prepared(images, fitting)), subject, request, on_batch)


def _evaluate_checkpoint(path: Path, request: EvaluationRequest, on_batch: OnBatch | None) -> Evaluation:
    if request.runtime is not None:
        raise UsageError(
            f"--runtime is for a bundle, but {path} is not a bundle",
            remedy="Choose the device of torch with --device, or export the network first",
        )
    need_packages("evaluating a checkpoint", "torch", "safetensors")
    from bnexport.evaluating.network import classifier_of, load_trained
    from bnexport.training.processes import choose_device

    device = choose_device(request.device or "auto")
    trained = load_trained(path, request)
    dataset = trained.dataset(request.dataset)
    classes = trained.classes(dataset, data_dir=request.data_dir)
    classifier = classifier_of(trained.model.module, trained.preprocessing, device)
    runtime = f"torch-{device.type}"
    subject = _Evaluated(trained.file, runtime, dataset, classes, trained.model.dataset, trained.preprocessing)
    found = _evaluation(classifier, subject, request, on_batch)
    return replace(
        found, note="; ".join(filter(None, (found.note, *trained.model.notes))), assumed=trained.model.assumed
    )


@dataclass(frozen=True)
class _Evaluated:
    path: Path
    runtime: str
    dataset: str
    classes: tuple[str, ...]
    trained_on: str | None
    preprocessing: Preprocessing


def _evaluation(
    classifier: Classifier, subject: _Evaluated, request: EvaluationRequest, on_batch: OnBatch | None
) -> Evaluation:
    found = count_confusion(
        classifier,
        subject.dataset,
        len(subject.classes),
        subject.preprocessing,
        data_dir=request.data_dir,
        batch_size=request.batch_size,
        on_batch=on_batch,
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
        classes=found.classes(subject.classes),
        confusion=found.counts,
        environment=environment(),
        preprocessing=subject.preprocessing.to_json(),
        note="; ".join(_notes(subject, found, request.data_dir)),
    )


def _notes(subject: _Evaluated, found: ConfusionCounts, data_dir: Path | None) -> Iterator[str]:
    """Yield warnings for the reader of the accuracy."""
    if subject.trained_on not in (None, subject.dataset):
        yield f"the network was trained on {subject.trained_on}"
    folder = folder_of(subject.dataset)
    if subject.trained_on is None and folder is not None and folder_layout(data_dir or folder).test is None:
        yield (
            f"{subject.dataset} has no test part: bnexport held out {HOLDOUT:.0%} of each class, and your own training may"
            " have used these images"
        )
    truth, given = (np.repeat(np.indices(found.counts.shape)[axis].ravel(), found.counts.ravel()) for axis in (0, 1))
    if at_chance(truth, given, len(subject.classes)) is not None:
        yield f"the accuracy is at or below chance: check {SUSPECTS}"
