"""Golden vectors: inputs with the outputs that the unfolded network gives for them in float64.

They travel in the bundle, so that a machine without torch, or without the network's code, can check what it runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bnexport.bundle import Manifest, write_golden
from bnexport.data.dataset_table import is_dataset
from bnexport.errors import BnexportError
from bnexport.tensors import Array, Signature
from bnexport.verification.inputs import read_images
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

    ``shapes`` are as in ``golden_inputs``. Without ``data_dir`` the usual places are searched for the data set.
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
    largest = max(math.prod(shapes[spec.name]) * np.dtype(spec.dtype).itemsize for spec in signature.inputs)
    budget = max(2, min(_IMAGES + _NOISE + 2, _MAX_BYTES // max(largest, 1)))
    rng = np.random.default_rng(seed)
    feeds = {}
    for spec in signature.inputs:
        shape = shapes[spec.name]
        real = [] if images is None or len(signature.inputs) != 1 else [images[: min(_IMAGES, budget - 1)]]
        ends = [np.full((1, *shape), value) for value in (0, 255 if pixels else 1)]
        size = (min(_NOISE, budget), *shape)
        most = 256 if spec.dtype == "uint8" else 2  # of integers and flags, 0 and 1 are valid indices of every table
        noise: Array = rng.standard_normal(size) if spec.dtype.startswith("float") else rng.integers(0, most, size=size)
        rows = [*real, noise, *ends]
        feeds[spec.name] = np.concatenate([row.astype(spec.dtype) for row in rows])[:budget]
    return feeds


def real_images(manifest: Manifest, *, data_dir: Path | None = None) -> Array | None:
    """Return the first test images of the manifest's data set as inputs; None where there are none, or they do not fit."""
    if manifest.preprocessing is None or manifest.dataset is None or not is_dataset(manifest.dataset):
        return None
    try:
        images, _ = read_images(manifest, manifest.dataset, data_dir, _IMAGES)
    except BnexportError:
        return None
    return images if manifest.signature.inputs[0].problem(images) is None else None
