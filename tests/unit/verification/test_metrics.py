from __future__ import annotations

import numpy as np
import pytest

from bnexport.runtimes.replay import incomparable, scale
from bnexport.verification.metrics import count_flips, measure, rule_of_three
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
def test_what_is_not_finite_is_a_problem_on_either_side(bad: float) -> None:
    spoiled = REFERENCE.copy()
    spoiled[0, 1] = bad
    assert "candidate has 1 values that are not finite" in measure({"y": spoiled}, {"y": REFERENCE}, bound=1).problem
    assert "reference has 1 values that are not finite" in measure({"y": REFERENCE}, {"y": spoiled}, bound=1).problem
    assert measure({"y": spoiled}, {"y": spoiled}, bound=1).problem


def test_nothing_to_compare_is_a_problem() -> None:
    assert measure({}, {}, bound=1).problem == "there are no outputs to compare"
    assert measure({}, {"y": REFERENCE}, bound=1).problem == "output 'y' is missing"
    assert "nothing was compared" in measure({"y": REFERENCE[:0]}, {"y": REFERENCE[:0]}, bound=1).problem
    assert "shape (2, 2), the reference (2, 3)" in (incomparable("y", REFERENCE[:, :2], REFERENCE) or "")


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
