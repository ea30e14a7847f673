"""The embedded data set: digits drawn by this module, so that everything runs without a network connection or a file.

Each digit is a hand-designed set of strokes. Each image has its own rotation, shear, size, place, wobble of the stroke
points, pen width, softness, brightness and noise. The set is for trials and tests, not for benchmarks.

Only additions, products, quotients, square roots and comparisons are used (rotations come from the rational
parametrisation of the circle), which IEEE 754 defines to the last bit: the images are the same on every machine.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from bnexport.data.dataset_table import Images, Labels

TRAIN_COUNT = 6000
TEST_COUNT = 1000
SIZE = 28

Floats = npt.NDArray[np.float64]

#: Digit -> its strokes, as polylines "x,y x,y ..." in a box 100 wide and 140 high, y downwards.
STROKES: dict[int, tuple[str, ...]] = {
    0: ("50,0 20,12 4,42 2,80 14,118 42,140 72,132 93,102 98,62 86,20 50,0",),
    1: ("22,32 56,0 54,70 52,140",),
    2: ("6,34 20,8 50,0 82,10 92,40 78,72 42,106 4,138 50,136 98,138",),
    3: ("8,14 42,0 80,10 88,36 70,60 36,68 76,76 96,102 82,130 46,140 6,126",),
    4: ("62,0 32,50 2,94 50,95 100,93", "72,42 71,90 70,140"),
    5: ("92,2 50,2 16,3 12,36 10,64 48,54 84,68 96,98 78,128 42,140 4,126",),
    6: ("82,6 46,18 18,52 6,96 22,130 54,140 86,126 92,98 74,74 40,74 10,100",),
    7: ("4,4 50,3 96,2 72,48 52,92 38,140",),
    8: ("50,66 18,50 12,22 48,0 86,20 80,48 50,66 12,90 8,120 50,140 92,120 88,90 50,66",),
    9: ("90,42 64,68 28,66 8,40 20,10 54,0 84,14 90,42 88,90 78,140",),
}

_CHUNK = 64  # images drawn at once: their pixel arrays stay in the processor's cache


def training_set() -> tuple[Images, Labels]:
    """Return TRAIN_COUNT images (n, 28, 28) and their labels (n,), the same at every call."""
    return _copy(*_drawn(TRAIN_COUNT, seed=1))


def test_set() -> tuple[Images, Labels]:
    """Return TEST_COUNT images (n, 28, 28) and their labels (n,), drawn with another seed."""
    return _copy(*_drawn(TEST_COUNT, seed=2))


def _copy(images: Images, labels: Labels) -> tuple[Images, Labels]:
    """Return copies, so that a caller may change its images."""
    return images.copy(), labels.copy()


def draw(count: int, *, seed: int) -> tuple[Images, Labels]:
    """Draw digits with the labels 0 to 9 in turn: uint8 (count, 28, 28), white on black, and int64 (count,)."""
    generator = np.random.Generator(np.random.PCG64(seed))
    labels = np.arange(count, dtype=np.int64) % len(STROKES)
    images = np.empty((count, SIZE, SIZE), np.uint8)
    for digit in STROKES:
        places = np.flatnonzero(labels == digit)
        for start in range(0, len(places), _CHUNK):
            chunk = places[start : start + _CHUNK]
            images[chunk] = _draw_digit(digit, len(chunk), generator)
    return images, labels


#: Draws a set once per process: it takes about a second, and a verification uses it several times.
_drawn = functools.cache(draw)


def _draw_digit(digit: int, count: int, generator: np.random.Generator) -> Images:
    """Return ``count`` drawings of one digit."""

    def between(low: float, high: float, *shape: int) -> Floats:
        # random() only: its stream is the part of numpy's generators that is the same in all versions.
        return low + (high - low) * generator.random((count, *shape))

    place = _placement(between)
    distance = np.full((count, SIZE * SIZE), np.inf)
    for stroke in map(_points, STROKES[digit]):
        x, y = place(stroke + between(-0.06, 0.06, len(stroke), 2))  # (count, points) each
        for index in range(len(stroke) - 1):
            _nearest(distance, x[:, index : index + 2], y[:, index : index + 2])
    pen, softness = between(0.8, 1.7, 1), between(0.6, 1.4, 1)  # half the width and the blur of the edge, in pixels
    ink = np.clip((pen + softness / 2 - np.sqrt(distance)) / softness, 0.0, 1.0)
    grey = ink * between(170, 255, 1) + between(-1, 1, SIZE * SIZE) * between(0, 28, 1)
    pixels: Images = np.clip(np.floor(grey + 0.5), 0, 255).astype(np.uint8)
    return pixels.reshape(count, SIZE, SIZE)


def _points(stroke: str) -> Floats:
    """Return points (points, 2) in a box 1 wide and 1.4 high."""
    return np.array([point.split(",") for point in stroke.split()], np.float64) / 100


def _placement(between: Callable[..., Floats]) -> Callable[[Floats], tuple[Floats, Floats]]:
    """Return a function from stroke points (count, points, 2) in the box to x and y in pixels."""
    half_turn = between(-0.16, 0.16, 1)  # tangent of half the angle: up to 18 degrees either way
    cos, sin = (1 - half_turn**2) / (1 + half_turn**2), 2 * half_turn / (1 + half_turn**2)
    shear, wide, high = between(-0.25, 0.25, 1), between(9.0, 14.0, 1), between(12.5, 15.5, 1)
    right, down = between(-2.2, 2.2, 1), between(-2.2, 2.2, 1)
    middle = (SIZE - 1) / 2

    def place(points: Floats) -> tuple[Floats, Floats]:
        y = (points[..., 1] - 0.7) * high
        x = (points[..., 0] - 0.5) * wide - shear * y
        return x * cos - y * sin + middle + right, x * sin + y * cos + middle + down

    return place


def _nearest(distance: Floats, x: Floats, y: Floats) -> None:
    """Lower each pixel's squared distance to that of one segment per image."""
    dx, dy = x[:, 1:] - x[:, :1], y[:, 1:] - y[:, :1]  # (count, 1)
    length = dx * dx + dy * dy + 1e-12
    from_x, from_y = _COLUMNS - x[:, :1], _ROWS - y[:, :1]  # (count, pixels)
    along = np.clip((from_x * dx + from_y * dy) / length, 0.0, 1.0)
    from_x -= along * dx
    from_y -= along * dy
    np.minimum(distance, from_x * from_x + from_y * from_y, out=distance)


_ROWS = np.repeat(np.arange(SIZE, dtype=np.float64), SIZE)
_COLUMNS = np.tile(np.arange(SIZE, dtype=np.float64), SIZE)
