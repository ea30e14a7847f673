"""The inputs of the comparison: real images where they exist, and inputs that no image set contains.

Random inputs alone are too weak: with two random samples no finite fault of the sabotage table shows a label flip.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bnexport.bundle import Manifest
from bnexport.data.classes import check_classes
from bnexport.data.dataset_table import folder_of, is_dataset
from bnexport.data.datasets import dataset_labels, load_test_images
from bnexport.data.images import prepared
from bnexport.data.preprocessing import preprocessing_of
from bnexport.data.samples import Samples
from bnexport.errors import BnexportError, DataError, UsageError
from bnexport.runtimes.replay import scale
from bnexport.tensors import Array, Signature, TensorSpec, other_sizes
from bnexport.verification.budget import Budget
from bnexport.verification.verdict import REAL

_OTHER_SIZED = 2


@dataclass(frozen=True)
class Batch:
    """Named inputs of n samples, name -> (n, ...): "images", "noise", "zeros", "ones", "one-hot".

    Where the files take pixels, noise has all values from 0 to 255, and the ones are 255.
    The ``smallest`` inputs have the smallest size that the network takes, which an engine may refuse.
    """

    name: str
    feeds: Mapping[str, Array]
    smallest: bool = False

    @property
    def n(self) -> int:
        """Return the number of samples."""
        return len(next(iter(self.feeds.values())))

    def head(self, n: int) -> Batch:
        """Return the first n samples."""
        return replace(self, feeds={name: array[:n] for name, array in self.feeds.items()})


@dataclass(frozen=True)
class Suite:
    """Every batch, real images or the caller's samples first, and the first batch's labels, int64 (n,).

    ``images`` describes the real inputs, or the reason why there are none; ``dataset`` names the labels' data set.
    """

    batches: tuple[Batch, ...]
    images: str
    labels: Array | None = None
    dataset: str | None = None


def build_suite(
    manifest: Manifest,
    golden: Mapping[str, Array],
    *,
    data_dir: str | Path | None,
    seed: int,
    budget: Budget,
    samples: Samples | None = None,
) -> Suite:
    """Build a bundle's inputs within the budget, from the caller's samples or the data set's test images.

    The golden inputs give the sizes of dimensions that vary, and valid values of integer inputs. Nothing is downloaded.
    DataError if ``data_dir`` was given and does not hold the data set, or if there are fewer samples than a fixed batch.
    UsageError if the data set's classes are not the bundle's, or if ``data_dir`` was given and there are no images.
    """
    specs = manifest.signature.inputs
    fixed = specs[0].shape[0] if isinstance(specs[0].shape[0], int) else None
    dataset = manifest.dataset
    if samples is not None:
        batches, labels, description = _given(samples, budget.real, fixed)
        dataset = samples.described
    else:
        images, labels, description = _images(manifest, data_dir, budget.real if fixed is None else fixed)
        if images is None and data_dir is not None:
            raise UsageError(
                f"the images in {data_dir} can't be used: {description}", remedy="Leave --data-dir and --dataset out"
            )
        batches = [] if images is None or len(images) < (fixed or 1) else [Batch("images", {specs[0].name: images})]
    for name, size, fill in (
        ("noise", budget.noise, _noise),
        ("zeros", budget.constant, lambda shape, _: np.zeros(shape)),
        ("ones", budget.constant, lambda shape, _: np.ones(shape)),
        ("one-hot", budget.one_hot, _one_hot),
    ):
        if name != "noise" and not manifest.takes_pixels and not any(spec.dtype.startswith("float") for spec in specs):
            continue
        rng = np.random.default_rng(seed)
        n = fixed or size
        filled = _pixels if manifest.takes_pixels else _filled
        batches.append(Batch(name, {spec.name: filled(fill, spec, golden[spec.name], n, rng) for spec in specs}))
    real = bool(batches) and batches[0].name in REAL
    return Suite(tuple(batches), description, labels if real else None, dataset)


def other_sized_batches(signature: Signature, golden: Mapping[str, Array], *, seed: int) -> Iterator[Batch]:
    """Yield two samples of noise in sizes other than the exported one, the most revealing first; none where no size varies."""
    exported = signature.named_sizes({name: array.shape[1:] for name, array in golden.items()})
    if not exported:
        return
    for steps in other_sizes(list(exported)):
        yield _sized(signature, golden, {dim: size + steps[dim] for dim, size in exported.items()}, seed=seed)


def smallest_batch(signature: Signature, golden: Mapping[str, Array], *, seed: int) -> Batch | None:
    """Return two samples of noise in the smallest sizes that the signature allows; None where it names none."""
    if not signature.smallest:
        return None
    exported = signature.named_sizes({name: array.shape[1:] for name, array in golden.items()})
    return replace(_sized(signature, golden, exported | signature.smallest, seed=seed), smallest=True)


def _sized(signature: Signature, golden: Mapping[str, Array], sizes: Mapping[str, int], *, seed: int) -> Batch:
    """Return noise in the given sizes, by the names of the dimensions that vary."""
    rng = np.random.default_rng(seed)
    feeds, shown = {}, ""
    for spec in signature.inputs:
        given = golden[spec.name]
        shape = [sizes[dim] if isinstance(dim, str) else dim for dim in spec.shape[1:]]
        like = np.resize(given, (1, *shape))  # its values are valid for integers; noise replaces floats
        feeds[spec.name] = _filled(_noise, spec, like, _OTHER_SIZED, rng)
        shown = shown or "x".join(str(sizes[dim]) for dim in spec.shape[1:] if isinstance(dim, str))
    return Batch(f"noise {shown}", feeds)


def _filled(fill: Any, spec: TensorSpec, golden: Array, n: int, rng: np.random.Generator) -> Array:
    """Return one input's array. Integers are indices or flags: only the golden inputs' values are known to be valid."""
    shape = (n, *golden.shape[1:])
    if not spec.dtype.startswith("float"):
        return rng.choice(golden.reshape(-1), size=shape).astype(spec.dtype)
    array: Array = fill(shape, rng).astype(spec.dtype)
    return array


def _pixels(fill: Any, _spec: TensorSpec, golden: Array, n: int, rng: np.random.Generator) -> Array:
    """Return uint8 pixels: random ones as noise, else 255 where the fill is 1."""
    shape = (n, *golden.shape[1:])
    return rng.integers(0, 256, shape, np.uint8) if fill is _noise else (255 * fill(shape, rng)).astype(np.uint8)


def _noise(shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    return rng.standard_normal(shape)


def _one_hot(shape: tuple[int, ...], _rng: np.random.Generator) -> Array:
    """Return an array with one element of each sample set to 1, spread evenly over all positions."""
    array = np.zeros((shape[0], int(np.prod(shape[1:]))))
    array[np.arange(shape[0]), np.linspace(0, array.shape[1] - 1, shape[0]).round().astype(int)] = 1
    return array.reshape(shape)


def _given(samples: Samples, limit: int, fixed: int | None) -> tuple[list[Batch], Array | None, str]:
    """Return the caller's samples as the first batch, their labels, and a description."""
    there = len(next(iter(samples.feeds.values())))
    if fixed is not None and there < fixed:
        raise DataError(
            f"a batch has {fixed} samples, but only {there} are given: {samples.described}",
            remedy=f"Give at least {fixed} samples",
        )
    n = fixed or min(there, limit)
    description = samples.described if n == there else f"the first {n} of {samples.described}"
    labels = None if samples.labels is None else samples.labels[:n]
    return [Batch("samples", samples.feeds).head(n)], labels, description


def _images(manifest: Manifest, data_dir: str | Path | None, limit: int) -> tuple[Array | None, Array | None, str]:
    """Return test images as inputs (n, channels, height, width), their labels, and a description; None where there are none."""
    name = manifest.dataset
    if name is None:
        return None, None, "no real images: the bundle names no data set"
    if manifest.preprocessing is None or len(manifest.signature.inputs) != 1:
        return None, None, f"no real images: the bundle has no preprocessing for an image of {name}"
    if not is_dataset(name):
        return None, None, f"no real images: {name} is not a data set of bnexport"
    if data_dir is None and folder_of(name) is not None:
        return None, None, "no real images: a bundle may name any folder, so its images are read only with --data-dir"
    try:
        classes = dataset_labels(name, data_dir=data_dir)
        images, labels = read_images(manifest, name, data_dir, limit)
    except BnexportError:
        if data_dir is not None:
            raise
        # The error's message is left out: it names folders of this machine, and this text becomes part of the bundle.
        return None, None, f"no real images: {name} can't be read here; BNEXPORT_DATA or --data-dir names its folder"
    check_classes(manifest.classes, classes, dataset=name, scores=score_count(manifest.signature))
    spec = manifest.signature.inputs[0]
    if (problem := spec.problem(images)) is not None and isinstance(spec.shape[0], str):
        return None, None, f"no real images: of {name}, {problem}"
    return images, labels, f"{len(images)} test images of {name}"


def read_images(manifest: Manifest, dataset: str, data_dir: str | Path | None, limit: int) -> tuple[Array, Array]:
    """Return test images of a data set as inputs (n, channels, height, width), at most ``limit``, and their labels (n,).

    The manifest must have a preprocessing. Errors are those of ``load_test_images``.
    """
    preprocessing = preprocessing_of(manifest)
    assert preprocessing is not None
    pixels, labels = load_test_images(dataset, data_dir=data_dir, download=False, preprocessing=preprocessing)
    return preprocessing.apply(prepared(pixels[:limit], preprocessing)), labels[:limit]


def score_count(signature: Signature) -> int | None:
    """Return the number of scores of a classifier; None where there are several outputs, or not one row of scores."""
    shapes = [spec.sample_shape for spec in signature.outputs]
    size = shapes[0][0] if len(shapes) == 1 and len(shapes[0]) == 1 else None
    return size if isinstance(size, int) else None


Outputs = Mapping[str, Array]


@dataclass(frozen=True)
class Case:
    """A batch with the right answer: output name -> (n, ...), float64 of the original, or the golden vectors.

    ``scales`` has output name -> scale of errors; None: the largest |expected| of this batch.
    """

    batch: Batch
    expected: Outputs
    scales: Mapping[str, float] | None = None

    def head(self, n: int) -> Case:
        """Return the first n samples."""
        return Case(self.batch.head(n), heads(self.expected, n), self.scales)

    def worst(self, candidate: Outputs, n: int) -> Case:
        """Return the n samples of which an output is furthest from the right answer; the scales are those of all samples."""
        scales = {name: (self.scales or {}).get(name) or scale(array) for name, array in self.expected.items()}
        errors = np.zeros(self.batch.n)
        for name, array in self.expected.items():
            off = np.abs(candidate[name].astype(np.float64) - array).reshape(len(array), -1)
            errors = np.maximum(errors, off.max(axis=1, initial=0.0) / scales[name])
        at = np.sort(np.argsort(-errors, kind="stable")[:n])
        feeds = {name: array[at] for name, array in self.batch.feeds.items()}
        return Case(
            replace(self.batch, feeds=feeds), {name: array[at] for name, array in self.expected.items()}, scales
        )


def heads(outputs: Outputs, n: int) -> dict[str, Array]:
    """Return the first n samples of every output."""
    return {name: array[:n] for name, array in outputs.items()}


def each_once(
    batches: Sequence[Batch], evaluate: Callable[[Mapping[str, Array]], Mapping[str, Array]], *, together: bool = True
) -> list[Outputs | BnexportError]:
    """Evaluate batches, those of one sample shape in one call, and return the outputs of each, or the error that it raised.

    ``evaluate`` maps input name -> (n, ...) to output name -> (n, ...). ``together`` is False where the batch dimension is
    fixed, so that each batch needs a call.
    """
    found: dict[int, Outputs | BnexportError] = {}
    groups: dict[Any, list[int]] = {}
    for index, batch in enumerate(batches):
        shapes = tuple((name, array.dtype.str, array.shape[1:]) for name, array in batch.feeds.items())
        groups.setdefault((shapes, batch.smallest) if together else index, []).append(index)
    for members in groups.values():
        found |= zip(members, _in_one_call([batches[index] for index in members], evaluate), strict=True)
    return [found[index] for index in range(len(batches))]


def _in_one_call(
    batches: Sequence[Batch], evaluate: Callable[[Mapping[str, Array]], Mapping[str, Array]]
) -> list[Outputs | BnexportError]:
    """Evaluate batches of one sample shape together, or one by one to find the batch that raises an error."""
    if len(batches) == 1:
        try:
            return [evaluate(batches[0].feeds)]
        except BnexportError as error:
            return [error]
    ends = list(itertools.accumulate(batch.n for batch in batches))
    try:
        whole = evaluate({name: np.concatenate([batch.feeds[name] for batch in batches]) for name in batches[0].feeds})
        together = all(array.ndim > 0 and len(array) == ends[-1] for array in whole.values())
    except BnexportError:
        together = False
    if not together:
        return [found for batch in batches for found in _in_one_call([batch], evaluate)]
    return [
        {name: array[end - batch.n : end] for name, array in whole.items()}
        for batch, end in zip(batches, ends, strict=True)
    ]
