"""The conversion of images to inputs: one definition for training, verification and serving."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bnexport.bundle import Manifest
from bnexport.errors import DataError
from bnexport.optional import one_line
from bnexport.tensors import Array


def _check_bytes(images: Array) -> None:
    if images.dtype != np.uint8:
        raise DataError(
            f"the images are {images.dtype.name}, expected uint8", remedy="Give pixels from 0 to 255 as uint8"
        )


@dataclass(frozen=True)
class Preprocessing:
    """Converts pixels from 0 to 255 to ``(pixel * scale - mean) / std`` in float32, channels first.

    Example:
        >>> import numpy as np
        >>> preprocessing = bnexport.Preprocessing(3, 4, 4, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
        >>> preprocessing.apply(np.full((2, 4, 4, 3), 255, np.uint8)).shape
        (2, 3, 4, 4)

    Raises:
        DataError: A number is out of range, or the means or deviations are not one per channel.
    """

    channels: int = 1  # 1 for grey, 3 for RGB
    height: int = 28  # Height in pixels
    width: int = 28  # Width in pixels
    scale: float = 1 / 255  # Factor on the pixels
    mean: tuple[float, ...] = (0.0,)  # Subtracted after scaling, one value per channel
    std: tuple[float, ...] = (1.0,)  # Divisor after the mean, one value per channel

    def __post_init__(self) -> None:
        if (problem := self._problem()) is not None:
            raise DataError(
                f"the preprocessing {problem}", remedy="Correct the preprocessing of the model or the manifest"
            )

    def _problem(self) -> str | None:
        if min(self.channels, self.height, self.width) < 1:
            return f"has an empty image of {self.channels}x{self.height}x{self.width}"
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            return f"has {len(self.mean)} means and {len(self.std)} standard deviations for {self.channels} channel(s)"
        if not all(map(math.isfinite, (self.scale, *self.mean, *self.std))) or min(self.std) <= 0 or self.scale <= 0:
            return "has numbers that are not finite, or a scale or standard deviation that is not positive"
        return None

    def apply(self, images: Array) -> Array:
        """Convert images to inputs.

        Args:
            images: uint8 (n, height, width), (n, height, width, channels) or (n, channels, height, width).

        Returns:
            float32 (n, channels, height, width), a new array.

        Raises:
            DataError: The element type or shape is another one (``data.images`` fits images to the shape), or ambiguous: 3x3
                pixels with 3 channels.
        """
        _check_bytes(images)
        inputs = np.ascontiguousarray(self._channels_first(images), dtype=np.float32)
        if np.shares_memory(inputs, images):
            inputs = inputs.copy()
        inputs *= np.float32(self.scale)
        if any(self.mean):
            inputs -= np.asarray(self.mean, np.float32).reshape(-1, 1, 1)
        if any(value != 1.0 for value in self.std):
            inputs /= np.asarray(self.std, np.float32).reshape(-1, 1, 1)
        return inputs

    def exact(self, pixels: Array) -> Array:
        """Return the inputs of the original network for pixels of the input's shape, in float64."""
        mean, std = (np.array(values).reshape(-1, 1, 1) for values in (self.mean, self.std))
        return np.asarray((pixels.astype(np.float64) * self.scale - mean) / std)

    def _channels_first(self, images: Array) -> Array:
        """Return the same images as (n, channels, height, width)."""
        first, last = (self.channels, self.height, self.width), (self.height, self.width, self.channels)
        if first == last and self.channels > 1 and images.ndim == 4:
            raise DataError(
                f"images of {'x'.join(map(str, first))} can have their channels first or last, so their layout is ambiguous",
                remedy="Use a model with another image size",
            )
        stacked = images[..., np.newaxis] if images.ndim == 3 else images
        if stacked.shape[1:] == last:
            return stacked.transpose(0, 3, 1, 2)
        if images.ndim == 4 and images.shape[1:] == first:
            return images
        raise DataError(
            f"the images have shape {'x'.join(map(str, images.shape[1:]))}, expected "
            f"{'x'.join(map(str, last))} (height, width, channels)",
            remedy="Resize the images, or convert them between grey and RGB, first",
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Preprocessing:
        """Read the result of ``to_json``; DataError for missing keys or values of the wrong type."""
        try:
            return cls(
                channels=int(value["channels"]),
                height=int(value["height"]),
                width=int(value["width"]),
                scale=float(value["scale"]),
                mean=tuple(map(float, value["mean"])),
                std=tuple(map(float, value["std"])),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"the preprocessing can't be read: {one_line(error)}", remedy="Write the bundle or the checkpoint again"
            ) from error


class PixelPreprocessing(Preprocessing):
    """The preprocessing of a bundle whose files take pixels: they scale and subtract, so ``apply`` only orders the axes."""

    def apply(self, images: Array) -> Array:
        """Return the same uint8 images as (n, channels, height, width); the rest as in ``Preprocessing.apply``."""
        _check_bytes(images)
        return np.ascontiguousarray(self._channels_first(images))


def preprocessing_of(manifest: Manifest) -> Preprocessing | None:
    """Return the preprocessing that makes the inputs of a bundle's files; None where the manifest has none."""
    if manifest.preprocessing is None:
        return None
    kind = PixelPreprocessing if manifest.takes_pixels else Preprocessing
    return kind.from_json(manifest.preprocessing)


def original_feeds(manifest: Manifest, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Return the inputs of the original network for inputs of a bundle's files: pixels are converted in float64."""
    if not manifest.takes_pixels or manifest.preprocessing is None:
        return dict(feeds)
    image = Preprocessing.from_json(manifest.preprocessing)
    return {name: image.exact(array) for name, array in feeds.items()}
