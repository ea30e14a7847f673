"""The same names in the same order, and the binomial rule of an accuracy at chance."""

import math

import numpy as np
import pytest

from bnexport.data.classes import _at_most, at_chance, check_classes, check_dataset
from bnexport.errors import DataError, UsageError


def shares(n: int, classes: int) -> np.ndarray:
    return np.arange(n) % classes


@pytest.mark.parametrize(
    ("n", "classes", "found"), [(5, 6, None), (17, 6, None), (18, 6, 1 / 6), (480, 6, 1 / 6), (4, 2, None), (5, 2, 0.5)]
)
def test_no_right_label_is_at_chance_where_there_are_enough_samples(n: int, classes: int, found: float | None) -> None:
    truth = shares(n, classes)
    assert at_chance(truth, (truth + 1) % classes, classes) == pytest.approx(found)


def test_with_a_thousand_classes_66_samples_are_enough() -> None:
    for n, refused in ((65, False), (66, True), (500, True)):
        assert (at_chance(shares(n, 1000), shares(n, 1000) + 500, 1000) is not None) is refused


def test_one_answer_for_every_sample_is_at_chance() -> None:
    """80 of 480 right, as where pixels from 0 to 1 go through the mean and deviation of pixels from 0 to 255."""
    assert at_chance(shares(480, 6), np.full(480, 2), 6) == pytest.approx(1 / 6)
    mostly = np.repeat([0, 1], [900, 100])
    assert at_chance(mostly, np.zeros(1000, np.int64), 2) == pytest.approx(0.9)
    few = np.repeat([0, 1], [90, 10])
    assert at_chance(few, np.zeros(100, np.int64), 2) is None, "too few of the second class for a decision"


def test_samples_of_one_class_that_are_right_are_not_at_chance() -> None:
    one = np.full(200, 3)
    assert at_chance(one, one, 6) is None
    assert at_chance(one, one + 1, 6) == pytest.approx(1 / 6)
    assert at_chance(one[:0], one[:0], 6) is None


@pytest.mark.parametrize(
    ("accuracy", "classes", "n"), [(0.35, 6, 480), (0.2, 10, 10_000), (0.05, 1000, 500), (0.7, 2, 300)]
)
def test_a_weak_network_is_not_at_chance(accuracy: float, classes: int, n: int) -> None:
    truth = shares(n, classes)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        given = np.where(rng.random(n) < accuracy, truth, rng.integers(0, classes, n))
        assert at_chance(truth, given, classes) is None


def test_a_useful_network_fails_in_fewer_than_one_case_of_a_thousand() -> None:
    """The stated bound, exactly: over all counts of right labels, at twice chance."""
    for n in (5, 18, 40, 100, 400):
        truth, refused = shares(n, 6), 0.0
        for right in range(n + 1):
            given = np.where(np.arange(n) < right, truth, (truth + 1) % 6)
            if at_chance(truth, given, 6) is not None:
                refused += math.comb(n, right) * (1 / 3) ** right * (2 / 3) ** (n - right)
        assert refused < 0.001


def test_the_binomial_tail() -> None:
    for n, p in ((1, 0.3), (20, 0.5), (37, 0.01)):
        for k in range(-1, n + 1):
            exact = sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1))
            assert _at_most(k, n, p) == pytest.approx(exact, abs=1e-12)


def test_names_are_compared_without_case_and_separators() -> None:
    check_classes(("T-Shirt", " ankle_boot"), ("t shirt", "Ankle Boot"), dataset="x", scores=2)
    check_classes(None, ("a", "b"), dataset="x", scores=2)
    check_classes(None, ("a", "b"), dataset="x", scores=None)
    with pytest.raises(UsageError, match="the network returns 3 scores, but x has 2 classes"):
        check_classes(None, ("a", "b"), dataset="x", scores=3)


def test_a_data_set_that_can_not_be_used_is_refused() -> None:
    with pytest.raises(UsageError, match="'photos' is unknown"):
        check_dataset("photos", preprocessing=None)
    with pytest.raises(UsageError, match="For your own images pass dataset=folder:"):
        check_dataset("/", preprocessing=None)
    image = {"channels": 1, "height": 4, "width": 4, "scale": 1.0, "mean": [0.0], "std": [1.0]}
    with pytest.raises(DataError, match="nowhere does not exist"):
        check_dataset("folder:nowhere", preprocessing=image)
    check_dataset("digits", preprocessing=image, labels=tuple("0123456789"), scores=10)
