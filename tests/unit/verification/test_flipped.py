from __future__ import annotations

import numpy as np

from bnexport.verification.metrics import count_flips, flipped_samples

SCORES = np.array([[0.0, 10.0, 1.0], [5.0, 4.9, 0.0], [1.0, 2.0, 9.0]])


def changed(index: int, scores: list[float]) -> np.ndarray:
    given = SCORES.copy()
    given[index] = scores
    return given


def test_nothing_changed() -> None:
    assert flipped_samples({"y": SCORES}, {"y": SCORES}, bound=0.1, labels=None) == ()


def test_a_small_margin_explains_a_flip_and_a_large_one_does_not() -> None:
    near = flipped_samples({"y": changed(1, [4.8, 5.0, 0.0])}, {"y": SCORES}, bound=0.02, labels=np.array([1, 0, 2]))
    assert len(near) == 1
    assert (near[0].index, near[0].label, near[0].reference, near[0].candidate) == (1, 0, 0, 1)
    assert near[0].explained
    assert near[0].margin == np.float64(5.0 - 4.9) / 10
    assert abs(near[0].error - 0.02) < 1e-12
    far = flipped_samples({"y": changed(2, [9.0, 2.0, 1.0])}, {"y": SCORES}, bound=0.02, labels=None)
    assert [(item.index, item.label, item.explained) for item in far] == [(2, None, False)]


def test_they_are_those_that_are_counted() -> None:
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((500, 4))
    given = scores + rng.standard_normal((500, 4)) * 0.05
    counted = count_flips(given, scores, bound=0.005)
    found = flipped_samples({"y": given}, {"y": scores}, bound=0.005, labels=None)
    assert sum(item.explained for item in found) == counted.explained
    assert sum(not item.explained for item in found) == counted.unexplained
    assert counted.explained > 0
    assert counted.unexplained > 0


def test_what_can_not_be_compared_shows_none() -> None:
    assert flipped_samples({}, {"y": SCORES}, bound=0.1, labels=None) == ()
    assert flipped_samples({"y": SCORES[:2]}, {"y": SCORES}, bound=0.1, labels=None) == ()
    assert flipped_samples({"y": SCORES * np.nan}, {"y": SCORES}, bound=0.1, labels=None) == ()
    assert flipped_samples({"y": SCORES[..., None]}, {"y": SCORES[..., None]}, bound=0.1, labels=None) == ()


def test_the_scale_of_several_batches_is_used() -> None:
    found = flipped_samples(
        {"y": changed(1, [4.8, 5.0, 0.0])}, {"y": SCORES}, bound=0.02, labels=None, scales={"y": 100.0}
    )
    assert abs(found[0].margin - 0.001) < 1e-12
