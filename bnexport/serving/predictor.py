"""Labels images with a bundle: preprocessing, one runner, probabilities. It needs neither torch nor HTTP."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from bnexport.bundle import Bundle
from bnexport.data.classes import check_classes, known_classes, reordered
from bnexport.data.images import load_images
from bnexport.data.preprocessing import Preprocessing, preprocessing_of
from bnexport.errors import BundleError, DataError, UsageError
from bnexport.runtimes.base import Runner
from bnexport.runtimes.catalogue import DEFAULT_RUNTIME, runner_spec
from bnexport.tensors import Array, TensorSpec


@dataclass(frozen=True)
class Prediction:
    """The prediction for one image."""

    image: str  # The image's file, with [index] in a file of several images
    index: int  # Class with the largest logit
    label: str  # Name of the class; its index as text if the bundle has no labels
    probability: float  # Softmax of the logits at that class
    logits: tuple[float, ...]  # The model's logits, one per class

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self) | {"logits": list(self.logits)}


def check_labels(bundle: Bundle) -> None:
    """Refuse labels that are the known classes of the manifest's data set in another order.

    Other names are accepted: labels may be translated.
    """
    manifest = bundle.manifest
    known = known_classes(manifest.dataset)
    names = manifest.classes
    if known is not None and manifest.dataset is not None and names is not None and reordered(names, known):
        check_classes(names, known, dataset=manifest.dataset, scores=None)


class Predictor:
    """An open bundle that labels images. Use it in a ``with`` block.

    Args:
        bundle: A bundle or its directory. Its hashes are checked before any engine opens a file.
        runtime: A name from ``runtimes.catalogue.RUNNERS``.
        batch_size: Images per call of the engine.

    Raises:
        BundleError: The bundle was changed, or is not an image classifier with one input and one output.
        RuntimeUnavailable: The engine or device is missing.
        UsageError: An unknown runtime, or a batch size below 1.
    """

    def __init__(self, bundle: Bundle | str | Path, *, runtime: str = DEFAULT_RUNTIME, batch_size: int = 256) -> None:
        if batch_size < 1:
            raise UsageError(f"the batch size is {batch_size}", remedy="Give at least 1")
        self.bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        self.bundle.check()
        self.preprocessing = image_preprocessing(self.bundle)
        check_labels(self.bundle)
        self._batch_size = batch_size
        self._runner = runner_spec(runtime).open(self.bundle)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._runner.close()

    def files(self, *paths: str | Path) -> list[Prediction]:
        """Label every image of PNG, JPEG, BMP, WebP, GIF, .npy or IDX files, in order; DataError for an unreadable file."""
        predictions = []
        for path in paths:
            named = load_images(path, self.preprocessing)
            if not named:
                raise DataError(f"{path} contains no image", remedy="Give a file with at least one image")
            logits = self.logits(np.stack([image for _, image in named]))
            labels = self.bundle.manifest.labels
            predictions += [labelled(name, row, labels) for (name, _), row in zip(named, logits, strict=True)]
        return predictions

    def logits(self, images: Array) -> Array:
        """Return the logits (n, classes), in the model's element type, of images: uint8 (n, height, width[, channels]).

        Raises DataError for images of another size than the preprocessing's, or if a logit is not finite.
        """
        starts = range(0, max(len(images), 1), self._batch_size)
        parts = [
            run_images(self._runner, self.preprocessing.apply(images[start : start + self._batch_size]))
            for start in starts
        ]
        logits: Array = np.concatenate(parts)
        if not np.isfinite(logits).all():
            raise DataError("the model's answer contains NaN or infinity", remedy="Run bnexport verify on the bundle")
        return logits


def batches(inputs: Array, spec: TensorSpec) -> Iterator[tuple[Array, int]]:
    """Yield inputs (n, ...) in batches of the model's size, each with the number of its valid rows.

    A fixed batch is filled by repeating its inputs.
    """
    size = spec.shape[0]
    if isinstance(size, str):
        yield inputs, len(inputs)
        return
    for start in range(0, max(len(inputs), 1), size):
        part = inputs[start : start + size]
        yield np.resize(part, (size, *part.shape[1:])), len(part)


def run_images(runner: Runner, inputs: Array) -> Array:
    """Return logits (n, classes) of inputs (n, ...) for a model with one input and one output."""
    spec, output = runner.signature.inputs[0], runner.signature.outputs[0].name
    return np.concatenate([runner.run({spec.name: batch})[output][:rows] for batch, rows in batches(inputs, spec)])


def softmax(logits: Array, axis: int = -1) -> Array:
    """Return probabilities in float64 of logits, whose classes are along ``axis``."""
    weights = logits.astype(np.float64)
    weights -= weights.max(axis, keepdims=True)
    np.exp(weights, out=weights)
    weights /= weights.sum(axis, keepdims=True)
    return weights


def labelled(image: str, logits: Array, labels: Sequence[str] | None) -> Prediction:
    """Return the prediction of one row of logits."""
    index = int(logits.argmax())
    label = labels[index] if labels is not None and index < len(labels) else str(index)
    return Prediction(image, index, label, float(softmax(logits)[index]), tuple(map(float, logits)))


def predict_images(
    bundle: Bundle | str | Path, *images: str | Path, runtime: str = DEFAULT_RUNTIME
) -> list[Prediction]:
    """Label image files (PNG, JPEG, BMP, WebP, GIF, .npy, IDX) with a bundle; see ``Predictor``."""
    with Predictor(bundle, runtime=runtime) as predictor:
        return predictor.files(*images)


def image_preprocessing(bundle: Bundle) -> Preprocessing:
    """Return the preprocessing of an image classifier; BundleError for other models."""
    manifest = bundle.manifest
    one_each = len(manifest.signature.inputs) == len(manifest.signature.outputs) == 1
    if manifest.preprocessing is None or not one_each or len(manifest.signature.outputs[0].shape) != 2:
        raise BundleError(
            f"{bundle.path} has no preprocessing for images, or is not an image classifier",
            remedy="Export it again by bnexport fold-and-export with --mean and --std, or feed model.onnx yourself",
        )
    preprocessing, spec = preprocessing_of(manifest), manifest.signature.inputs[0]
    assert preprocessing is not None
    dtype = "uint8" if manifest.takes_pixels else "float32"
    made = (preprocessing.channels, preprocessing.height, preprocessing.width)
    if (
        spec.dtype != dtype
        or len(spec.sample_shape) != len(made)
        or any(isinstance(dim, int) and dim != size for dim, size in zip(spec.sample_shape, made, strict=True))
    ):
        raise BundleError(
            f"{bundle.path} takes {spec.dtype} of {'x'.join(map(str, spec.sample_shape))}, but its preprocessing makes {dtype} "
            f"of {'x'.join(map(str, made))}",
            remedy="Export it by bnexport fold-and-export with --mean and --std of this input, or feed model.onnx yourself",
        )
    return preprocessing
