"""The rows of a shard as batches of pixels that fit the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from bnexport.data.images import fit_stack, load_images, read_picture
from bnexport.data.preprocessing import Preprocessing
from bnexport.errors import DataError
from bnexport.serving.bulk.npz import NpzFiles
from bnexport.serving.bulk.parquet import encoded_images
from bnexport.serving.bulk.request import BulkRequest
from bnexport.serving.bulk.sources import Shard, map_npy
from bnexport.tensors import Array

#: Ids, and uint8 (n, height, width) or (n, height, width, channels).
Batch = tuple[list[str], Array]


def read_shard(shard: Shard, request: BulkRequest, preprocessing: Preprocessing, files: NpzFiles) -> Iterator[Batch]:
    """Batches of a shard, in order.

    Args:
        shard: Which rows.
        request: Batch size and columns.
        preprocessing: Of the model: size and channels.
        files: Of the worker, which closes them.

    Raises:
        DataError: An image is missing or damaged; the message names it.
    """
    return READERS[shard.kind](shard, request, preprocessing, files)


def _read_folder(shard: Shard, request: BulkRequest, preprocessing: Preprocessing, _: NpzFiles) -> Iterator[Batch]:
    for start in range(0, shard.rows, request.batch_size):
        found = []
        for part in shard.parts[start : start + request.batch_size]:
            images = load_images(Path(shard.path, str(part)), preprocessing)
            if len(images) != 1:  # a stack under a picture's name
                raise DataError(f"{images[0][0]} is one of several images in a picture", remedy="Name it .npy")
            found += images
        yield [name for name, _ in found], np.stack([image for _, image in found])


def _read_npy(shard: Shard, request: BulkRequest, preprocessing: Preprocessing, _: NpzFiles) -> Iterator[Batch]:
    return _stacks(shard, _npy_pieces(shard, request.batch_size), preprocessing)


def _npy_pieces(shard: Shard, batch: int) -> Iterator[Array]:
    """Read and not mapped: the pages of a mapped file count as this process's memory."""
    array = map_npy(Path(shard.path))
    size = math.prod(array.shape[1:])
    with Path(shard.path).open("rb") as file:
        file.seek(array.offset + shard.start * size * array.itemsize)
        for done in range(0, shard.rows, batch):
            piece = np.fromfile(file, array.dtype, min(batch, shard.rows - done) * size)
            yield piece.reshape(-1, *array.shape[1:])


def _read_npz(shard: Shard, request: BulkRequest, preprocessing: Preprocessing, files: NpzFiles) -> Iterator[Batch]:
    stream = files.stream(Path(shard.path), request.column, start=shard.start)
    pieces = stream.batches(shard.start, shard.rows, batch=request.batch_size)
    return _stacks(shard, pieces, preprocessing)


def _stacks(shard: Shard, pieces: Iterator[Array], preprocessing: Preprocessing) -> Iterator[Batch]:
    row = shard.start
    for piece in pieces:
        ids = [f"{shard.path}[{number}]" for number in range(row, row + len(piece))]
        row += len(piece)
        yield ids, _fitted(shard.path, piece, preprocessing)


def _fitted(path: str, stack: Array, preprocessing: Preprocessing) -> Array:
    """A stack that fits as it is, in one copy; another one image by image."""
    colours = () if preprocessing.channels == 1 else (preprocessing.channels,)
    plain = stack[..., 0] if stack.ndim == 4 and stack.shape[3] == 1 else stack
    if plain.dtype == np.uint8 and plain.shape[1:] == (preprocessing.height, preprocessing.width, *colours):
        return np.array(plain, order="C")
    return np.stack([image for _, image in fit_stack(Path(path), np.array(stack), preprocessing)])


def _read_parquet(shard: Shard, request: BulkRequest, preprocessing: Preprocessing, _: NpzFiles) -> Iterator[Batch]:
    groups = [int(part) for part in shard.parts]
    for ids, contents in encoded_images(Path(shard.path), request, row_groups=groups, start=shard.start):
        yield ids, np.stack(_decoded(shard.path, ids, contents, preprocessing))


def _decoded(
    path: str, ids: Sequence[str], contents: Sequence[bytes | None], preprocessing: Preprocessing
) -> list[Array]:
    images = []
    for name, content in zip(ids, contents, strict=True):
        named = name if name.startswith(path) else f"{path}, {name}"
        if not content:
            raise DataError(f"{named} has no image", remedy="Leave such rows out")
        images.append(read_picture(content, preprocessing, name=named))
    return images


#: Kind of shard -> its reader; ``sources.SOURCES`` has a row for each.
READERS: dict[str, Callable[[Shard, BulkRequest, Preprocessing, NpzFiles], Iterator[Batch]]] = {
    "folder": _read_folder,
    "npy": _read_npy,
    "npz": _read_npz,
    "parquet": _read_parquet,
}
