import hashlib

import numpy as np
import pytest

from bnexport.data import digits


def test_the_drawings_are_pinned():
    """Every machine draws the same bytes; a changed stroke changes the data set and this number."""
    images, labels = digits.draw(100, seed=1)
    assert labels.tolist() == list(range(10)) * 10
    assert images.dtype == np.uint8
    assert (
        hashlib.sha256(images.tobytes()).hexdigest()
        == "d209a2bc8706aa80c3730eb6f1be9f45d2db37b3ba4063fcd35d764a25abb948"
    )


def test_the_parts_differ():
    train, _ = digits.draw(50, seed=1)
    test, _ = digits.draw(50, seed=2)
    assert not np.array_equal(train, test)


def test_the_whole_sets():
    for draw, count in ((digits.training_set, digits.TRAIN_COUNT), (digits.test_set, digits.TEST_COUNT)):
        images, labels = draw()
        assert images.shape == (count, 28, 28)
        assert np.bincount(labels).tolist() == [count // 10] * 10
        assert len(np.unique(images.reshape(count, -1), axis=0)) == count


@pytest.mark.parametrize("draw", [digits.training_set, digits.test_set])
def test_the_whole_sets_are_drawn_once_and_given_as_copies(draw, monkeypatch):
    images, labels = draw()
    monkeypatch.setattr(digits, "draw", None)
    first = images.copy()
    images[:] = 0
    labels[:] = 0
    again, numbers = draw()
    assert np.array_equal(again, first)
    assert numbers.any()


@pytest.mark.parametrize("digit", range(10))
def test_every_image_shows_a_digit_inside_its_frame(digit):
    images, labels = digits.draw(300, seed=3)
    chosen = images[labels == digit]
    bright = chosen > 100
    ink = bright.mean((1, 2))
    assert ink.min() > 0.02
    assert ink.max() < 0.45
    edge = np.concatenate([bright[:, 0], bright[:, -1], bright[:, :, 0], bright[:, :, -1]], axis=1)
    assert edge.mean() < 0.02


def test_a_class_is_closer_to_its_own_mean():
    """The labels belong to the images: a nearest-mean rule gets most of them right."""
    images, labels = digits.draw(600, seed=4)
    means = np.stack([images[:500][labels[:500] == digit].mean(0) for digit in range(10)])
    distances = ((images[500:, None] - means[None]) ** 2).sum((2, 3))
    assert (distances.argmin(1) == labels[500:]).mean() > 0.6
