"""Golden vectors: inputs with the outputs that the unfolded network gives for them in float64.

They travel in the bundle, so that a machine without torch, or without the network's code, can check what it runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bnexport.bundle import Manifest, write_golden
from bnexport.data.dataset_table import is_dataset
from bnexport.data.datasets import load_test_images
from bnexport.data.images import prepared
from bnexport.data.preprocessing import preprocessing_of
from bnexport.errors import BnexportError
from bnexport.tensors import Array, Signature, TensorSpec
from bnexport.verification.int8 import within_range
from bnexport.verification.reference import Reference

if TYPE_CHECKING:
    from torch import nn

_IMAGES = 8
_NOISE = 6
_MAX_BYTES = 2**19


def write_golden_vectors(
    folder: Path,
    manifest: Manifest,
    module: nn.Module,
    *,
    shapes: Mapping[str, tuple[int, ...]],
    data_dir: Path | None = None,
) -> None:
    """Write golden vectors of the unfolded module, evaluated in float64 (or ModelError), into a bundle's folder.

    ``shapes`` holds the shape of one sample of each input. Without ``data_dir`` the usual places are searched for the data set.
    """
    images = real_images(manifest, data_dir=data_dir)
    feeds = golden_inputs(manifest.signature, shapes=shapes, images=images, pixels=manifest.takes_pixels)
    feeds = within_range(manifest, feeds)
    reference = Reference(module, manifest.signature, description="the original module, in float64", manifest=manifest)
    write_golden(folder, manifest.signature, feeds, reference.evaluate(feeds))


def golden_inputs(
    signature: Signature,
    *,
    shapes: Mapping[str, tuple[int, ...]],
    images: Array | None = None,
    pixels: bool = False,
    seed: int = 0,
) -> dict[str, Array]:
    """Return input name -> (n, ...), the same n for all: some real images (n, ...) if given, seeded noise, zeros and ones.

    ``shapes`` holds the shape of one sample of each input. There are fewer samples where one is large. If the input is
    ``pixels``, the largest value replaces the ones: 255.
    """
    largest = max(
        int(np.prod(shape, dtype=np.int64)) * np.dtype(_spec.dtype).itemsize
        for _spec, shape in _each(signature, shapes)
    )
    budget = max(2, min(_IMAGES + _NOISE + 2, _MAX_BYTES // max(largest, 1)))
    rng = np.random.default_rng(seed)
    feeds = {}
    for spec, shape in _each(signature, shapes):
        real = [] if images is None or len(signature.inputs) != 1 else [images[: min(_IMAGES, budget - 1)]]
        ends = [np.full((1, *shape), value) for value in (0, 255 if pixels else 1)]
        rows = [*real, _noise(spec, (min(_NOISE, budget), *shape), rng), *ends]
        feeds[spec.name] = np.concatenate([row.astype(spec.dtype) for row in rows])[:budget]
    return feeds


def _each(signature: Signature, shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[TensorSpec, tuple[int, ...]]]:
    return [(spec, shapes[spec.name]) for spec in signature.inputs]


def _noise(spec: TensorSpec, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Return standard normal noise; for integers and flags 0 and 1, which are valid indices of every table."""
    if spec.dtype.startswith("float"):
        return rng.standard_normal(shape)
    return rng.integers(0, 256 if spec.dtype == "uint8" else 2, size=shape)


def real_images(manifest: Manifest, *, data_dir: Path | None = None) -> Array | None:
    """Return the first test images of the manifest's data set as inputs; None where there are none, or they do not fit."""
    if manifest.preprocessing is None or manifest.dataset is None or not is_dataset(manifest.dataset):
        return None
    try:
        preprocessing = preprocessing_of(manifest)
        assert preprocessing is not None
        pixels, _ = load_test_images(manifest.dataset, data_dir=data_dir, download=False, preprocessing=preprocessing)
        images = preprocessing.apply(prepared(pixels[:_IMAGES], preprocessing))
    except BnexportError:
        return None
    return images if manifest.signature.inputs[0].problem(images) is None else None
