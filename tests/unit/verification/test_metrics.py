from fractions import Fraction
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnexport.runtimes.replay import incomparable, scale
from bnexport.verification.metrics import (
    accuracy_change,
    count_flips,
    flipped_samples,
    mcnemar,
    measure,
    per_sample,
    rule_of_three,
)
from bnexport.verification.verdict import Flips

REFERENCE = np.array([[8.0, 1.0, 0.0], [0.0, 4.0, 2.0]])


def test_the_error_is_a_share_of_the_references_scale() -> None:
    candidate = REFERENCE.copy()
    candidate[1, 2] += 0.04  # its own relative error is 2 %, of scale it is 0.5 %
    found = measure({"y": candidate}, {"y": REFERENCE}, bound=0.01)
    assert found.error == pytest.approx(0.005)
    assert found.max_abs == pytest.approx(0.04)
    assert found.rms == pytest.approx(0.04 / np.sqrt(6))
    assert (found.n, found.problem) == (2, "")


def test_the_worst_output_decides() -> None:
    large = np.full((2, 3), 1000.0)
    found = measure({"a": large + 1, "b": REFERENCE + 0.08}, {"a": large, "b": REFERENCE}, bound=1e-5)
    assert found.error == pytest.approx(0.01)
    assert found.max_abs == pytest.approx(1)


def test_a_reference_of_zeros_is_compared_absolutely() -> None:
    zeros = np.zeros((2, 3))
    assert scale(zeros) == 1
    assert measure({"y": zeros}, {"y": zeros}, bound=1e-5).error == 0
    assert measure({"y": zeros + 1e-3}, {"y": zeros}, bound=1e-5).error == pytest.approx(1e-3)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nonfinite_numbers_are_a_problem_on_either_side(bad: float) -> None:
    spoiled = REFERENCE.copy()
    spoiled[0, 1] = bad
    assert "candidate has 1 values that are not finite" in measure({"y": spoiled}, {"y": REFERENCE}, bound=1).problem
    assert "reference has 1 values that are not finite" in measure({"y": REFERENCE}, {"y": spoiled}, bound=1).problem
    assert measure({"y": spoiled}, {"y": spoiled}, bound=1).problem


def test_nothing_to_compare_is_a_problem() -> None:
    assert measure({}, {}, bound=1).problem == "there are no outputs to compare"
    assert measure({}, {"y": REFERENCE}, bound=1).problem == "output 'y' is missing"
    assert "nothing was compared" in measure({"y": REFERENCE[:0]}, {"y": REFERENCE[:0]}, bound=1).problem
    assert "shape (2, 2), but the reference has (2, 3)" in (incomparable("y", REFERENCE[:, :2], REFERENCE) or "")


def test_float32_is_not_measured_in_float32() -> None:
    candidate = np.array([[16777216.0, 0.0]], np.float32)
    assert measure({"y": candidate}, {"y": np.array([[16777217.0, 0.0]])}, bound=1).max_abs == 1


def test_the_margin_certificate_sorts_every_sample() -> None:
    # The scale is 100 and the bound 1 %, so 1 per score is allowed and a lead of more than 2 certifies.
    reference = np.array([[100.0, 0.0], [10.0, 7.5], [10.0, 8.5], [10.0, 9.0], [10.0, 7.0]])
    candidate = np.array([[100.0, 0.0], [10.0, 7.5], [10.0, 8.5], [9.0, 9.5], [7.0, 8.0]])
    assert count_flips(candidate, reference, bound=0.01) == Flips(
        certified=2, uncertain=1, explained=1, unexplained=1, rate_bound=None
    )
    assert count_flips(reference, reference, bound=0.01) == Flips(3, 2, 0, 0, rate_bound=3 / 5)


def test_a_flip_cannot_hide_within_the_allowed_error() -> None:
    rng = np.random.default_rng(0)
    reference = rng.standard_normal((2000, 10))
    candidate = reference + rng.uniform(-1, 1, reference.shape) * 0.01 * scale(reference)
    flips = count_flips(candidate, reference, bound=0.01)
    assert flips.unexplained == 0
    assert flips.explained > 0


@pytest.mark.parametrize(("n", "bound"), [(0, 1.0), (2, 1.0), (300, 0.01), (10_000, 3e-4)])
def test_the_rule_of_three(n: int, bound: float) -> None:
    assert rule_of_three(n) == pytest.approx(bound)


def test_only_scores_per_class_have_labels() -> None:
    assert measure({"y": np.ones((4, 1))}, {"y": np.ones((4, 1))}, bound=1).flips is None
    assert measure({"y": np.ones((4, 3, 2))}, {"y": np.ones((4, 3, 2))}, bound=1).flips is None
    integers = np.ones((4, 3), np.int64)
    assert measure({"y": integers}, {"y": integers}, bound=1).flips is None


# Changed labels, sample by sample.

SCORES = np.array([[0.0, 10.0, 1.0], [5.0, 4.9, 0.0], [1.0, 2.0, 9.0]])


def changed(index: int, scores: list[float]) -> np.ndarray:
    candidate = SCORES.copy()
    candidate[index] = scores
    return candidate


def test_equal_scores_have_no_changed_label() -> None:
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


def test_changed_labels_are_those_that_are_counted() -> None:
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((500, 4))
    candidate = scores + rng.standard_normal((500, 4)) * 0.05
    counted = count_flips(candidate, scores, bound=0.005)
    found = flipped_samples({"y": candidate}, {"y": scores}, bound=0.005, labels=None)
    assert sum(item.explained for item in found) == counted.explained
    assert sum(not item.explained for item in found) == counted.unexplained
    assert counted.explained > 0
    assert counted.unexplained > 0


def test_outputs_that_can_not_be_compared_have_no_changed_label() -> None:
    assert per_sample({}, {"y": SCORES}) is None
    assert flipped_samples({}, {"y": SCORES}, bound=0.1, labels=None) == ()
    assert flipped_samples({"y": SCORES[:2]}, {"y": SCORES}, bound=0.1, labels=None) == ()
    assert flipped_samples({"y": SCORES * np.nan}, {"y": SCORES}, bound=0.1, labels=None) == ()
    assert flipped_samples({"y": SCORES[..., None]}, {"y": SCORES[..., None]}, bound=0.1, labels=None) == ()


def test_margins_are_shares_of_the_scale_of_several_batches() -> None:
    found = flipped_samples(
        {"y": changed(1, [4.8, 5.0, 0.0])}, {"y": SCORES}, bound=0.02, labels=None, scales={"y": 100.0}
    )
    assert abs(found[0].margin - 0.001) < 1e-12


# Changes of accuracy.


def test_zero_changes_are_not_evidence() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(7, 7) == 1.0


@pytest.mark.parametrize(("lost", "won", "p"), [(1, 0, 1.0), (5, 0, 0.0625), (10, 1, 24 / 2048), (8, 2, 112 / 1024)])
def test_the_exact_values_of_mcnemar(lost: int, won: int, p: float) -> None:
    assert mcnemar(lost, won) == pytest.approx(p)
    assert mcnemar(won, lost) == mcnemar(lost, won)


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_two_sided_binomial_test(lost: int, won: int) -> None:
    n = lost + won
    tail = sum(Fraction(comb(n, k), 2**n) for k in range(min(lost, won) + 1))
    assert mcnemar(lost, won) == pytest.approx(float(min(Fraction(1), 2 * tail)))


def test_thousands_of_changes_do_not_overflow() -> None:
    """From 1,030 changes on, the number of their orders is beyond a float."""
    assert 0 <= mcnemar(3_000, 400) < 1e-300
    assert 0.9 < mcnemar(2_000, 2_001) <= 1.0


def test_accuracy_is_counted_by_the_true_class() -> None:
    reference = np.eye(4)[[0, 1, 2, 3, 0, 1]]
    candidate = np.eye(4)[[0, 1, 2, 0, 1, 2]]
    labels = np.array([0, 1, 2, 3, 1, 3])  # the fourth is lost, the fifth won, the sixth wrong on both sides
    found = accuracy_change(reference, candidate, labels)
    assert (found.n, found.reference, found.candidate, found.lost, found.won) == (6, 4, 4, 1, 1)
    assert found.p == 1.0
    assert "4 of 6 labels right before, 4 after (1 lost, 1 won" in found.sentence()
