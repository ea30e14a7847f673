"""Images of one size and kind, fitted to a model."""

from __future__ import annotations

import numpy as np

from bnexport.data.dataset_table import Images
from bnexport.data.images import fit_array
from bnexport.data.preprocessing import Preprocessing
from bnexport.errors import DataError


def prepared(images: Images, preprocessing: Preprocessing) -> Images:
    """Fit images to a model: what ``data.images`` gives, to the last bit, for the same pictures stored as PNG files.

    Grey becomes RGB by repeating, RGB grey by Pillow's weights (ITU-R 601-2: 0.299, 0.587, 0.114), another size is
    reached by bilinear filtering. The result is in memory: take a large set in batches.

    Args:
        images: uint8 (n, H, W), or (n, C, H, W) with 1 or 3 channels.
        preprocessing: The model's preprocessing: size and channels.

    Returns:
        uint8 (n, channels, height, width). Where nothing is to do it is a view of the images.

    Raises:
        DataError: It is not such images, or the model takes neither 1 nor 3 channels.
        MissingDependency: Pillow is needed, and not installed.
    """
    planes = images[:, np.newaxis] if images.ndim == 3 else images
    if images.dtype != np.uint8 or planes.ndim != 4 or planes.shape[1] not in (1, 3) or 0 in planes.shape[1:]:
        raise DataError(
            f"an array of {images.dtype.name} and shape {images.shape} is not images",
            remedy="Give uint8 of shape (n, H, W) or (n, C, H, W) with 1 or 3 channels",
        )
    wanted = (preprocessing.channels, preprocessing.height, preprocessing.width)
    if planes.shape[1:] == wanted:
        return planes
    if planes.shape[1] == 1 and wanted == (3, *planes.shape[2:]):
        return np.repeat(planes, 3, axis=1)
    fitted = np.empty((len(planes), *wanted), np.uint8)
    for index, image in enumerate(planes):
        fitted[index] = channels_first(
            fit_array(image[0] if len(image) == 1 else image.transpose(1, 2, 0), preprocessing)
        )
    return fitted


def channels_first(image: Images) -> Images:
    """Return a view of (H, W) or (H, W, C) as (C, H, W)."""
    return image[np.newaxis] if image.ndim == 2 else image.transpose(2, 0, 1)
