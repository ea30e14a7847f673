"""Conversion of image arrays to a model's size and channels."""

from __future__ import annotations

import numpy as np

from bnexport.data.dataset_table import Images
from bnexport.data.images import fit_array
from bnexport.data.preprocessing import Preprocessing
from bnexport.errors import DataError


def prepared(images: Images, preprocessing: Preprocessing) -> Images:
    """Fit images to a model, bit for bit as ``data.images`` does for the same images in PNG files.

    Grey is repeated to RGB, RGB is converted to grey by Pillow's weights (ITU-R 601-2: 0.299, 0.587, 0.114), and images are
    resized by bilinear filtering. The result is in memory, so a large set should be fitted in batches.

    Args:
        images: uint8 (n, H, W), or (n, C, H, W) with 1 or 3 channels.
        preprocessing: The model's preprocessing: size and channels.

    Returns:
        uint8 (n, channels, height, width); a view of the images if they fit.

    Raises:
        DataError: The array has another type or shape, or the model has neither 1 nor 3 channels.
        MissingDependency: Pillow is needed and not installed.
    """
    planes = images[:, np.newaxis] if images.ndim == 3 else images
    if images.dtype != np.uint8 or planes.ndim != 4 or planes.shape[1] not in (1, 3) or 0 in planes.shape[1:]:
        raise DataError(
            f"the images are an array of {images.dtype.name} and shape {images.shape}",
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
