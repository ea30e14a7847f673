"""Small folders of images."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bnexport.data.preprocessing import Preprocessing
from bnexport.tensors import Array

GREY = Preprocessing(1, 6, 5)
COLOURS = Preprocessing(3, 6, 5, mean=(0.0,) * 3, std=(1.0,) * 3)


def random_picture(seed: int, *, mode: str = "RGB", size: tuple[int, int] = (9, 7)) -> Image.Image:
    """A picture of noise; ``size`` is (width, height), ``mode`` one of Pillow's, or "16 bits"."""
    rng = np.random.default_rng(seed)
    width, height = size
    if mode == "16 bits":
        return Image.fromarray(rng.integers(0, 65536, (height, width)).astype(np.uint16))
    colours = Image.fromarray(rng.integers(0, 256, (height, width, 4)).astype(np.uint8))
    if mode == "RGBA":
        return colours
    flat = colours.convert("RGB")
    return flat.quantize(16) if mode == "P" else flat.convert(mode)


def write_picture(file: Path, seed: int | None = None, *, mode: str = "RGB", **options: Any) -> Path:
    """Write a picture of noise in the format of the file's suffix; without a seed, the seed follows from the name."""
    file.parent.mkdir(parents=True, exist_ok=True)
    seed = zlib.crc32(str(file.relative_to(file.parents[2])).encode()) if seed is None else seed
    random_picture(seed, mode=mode).save(file, **options)
    return file


def write_pictures(root: Path, *names: str) -> Path:
    """A folder with such files by their relative names."""
    for name in names:
        write_picture(root / name)
    return root


def write_parts(root: Path, *, train: int = 3, test: int = 2, name: str = "val") -> Path:
    """A folder with the classes cat and dog in ``train`` and in another part."""
    for part, count in (("train", train), (name, test)):
        write_pictures(root, *(f"{part}/{label}/{index}.png" for label in ("cat", "dog") for index in range(count)))
    return root


def grey_png(width: int, height: int, data: bytes) -> bytes:
    """Return a grey PNG of this size with any compressed data."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">2I5B", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def bomb(side: int = 60_000) -> bytes:
    """Return a PNG whose header promises side x side pixels."""
    return grey_png(side, side, zlib.compress(bytes(10_000)))


def idx(array: Array, code: int = 8) -> bytes:
    """Return an array as an IDX file of the element type ``code``."""
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, code, array.ndim, *array.shape) + array.tobytes()


def png(image: Image.Image | np.ndarray, kind: str = "PNG") -> bytes:
    """Return the bytes of a picture's file."""
    stream = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(stream, kind)
    return stream.getvalue()
