"""Images and labels of a training: resident on the device, or read from a file batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from bnexport.data.preprocessing import Preprocessing
from bnexport.tensors import Array

#: A part that is larger than this as float32 stays in its file, as uint8, and is read batch by batch.
RESIDENT_BYTES = 2 << 30


class Resident:
    """A part as one float32 tensor on the device: a batch is one gather, without work per image."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels
        self.count, self.device = len(labels), images.device

    def batches(self, indices: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches; all indices are copied to the device at once."""
        together = to_device(torch.cat([torch.empty(0, dtype=torch.int64), *indices]), self.device)
        for batch in torch.split(together, [len(part) for part in indices]):
            yield self.images.index_select(0, batch), self.labels.index_select(0, batch)


class Streamed:
    """A part that is too large for memory: a thread reads and converts the next batch during the current step."""

    def __init__(self, images: Array, labels: Array, preprocessing: Preprocessing, device: torch.device) -> None:
        self.images, self.labels, self.preprocessing = images, labels, preprocessing
        self.count, self.device = len(labels), device

    def batches(self, indices: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches."""
        with ThreadPoolExecutor(1) as reader:
            ahead: Future[tuple[Tensor, Tensor]] | None = None
            for batch in indices:
                now, ahead = ahead, reader.submit(self._read, batch.numpy())
                if now is not None:
                    yield self._arrived(*now.result())
            if ahead is not None:
                yield self._arrived(*ahead.result())

    def _arrived(self, X: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return to_device(X, self.device), to_device(y, self.device)

    def _read(self, batch: Array) -> tuple[Tensor, Tensor]:
        # The file is read in ascending order, and the batch is ordered in memory.
        forwards = np.argsort(batch)
        pixels = np.empty((len(batch), *self.images.shape[1:]), np.uint8)
        pixels[forwards] = self.images[batch[forwards]]
        X = torch.from_numpy(self.preprocessing.apply(pixels))
        return X, torch.from_numpy(np.ascontiguousarray(self.labels[batch]))


#: One part of a data set, training or test: the number of images ``count``, the ``device`` of the batches, and ``batches``,
#: which yields inputs float32 (n, channels, height, width) and labels int64 (n,) for each group of int64 CPU indices.
DataPart = Resident | Streamed


def to_device(value: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to a device; with pinned memory the host does not wait for the copy."""
    return value if device.type == "cpu" else value.pin_memory().to(device, non_blocking=True)


def make_part(images: Array, labels: Array, preprocessing: Preprocessing, device: torch.device) -> DataPart:
    """Return one part of a data set for a device; ``images`` are the result of ``data.images.prepared``."""
    if images.size * 4 > RESIDENT_BYTES:
        return Streamed(images, labels, preprocessing, device)
    inputs = torch.from_numpy(preprocessing.apply(images))
    return Resident(inputs.to(device), torch.from_numpy(np.ascontiguousarray(labels)).to(device))
