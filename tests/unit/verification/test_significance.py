from __future__ import annotations

from fractions import Fraction
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnexport.verification.metrics import accuracy_change, mcnemar


def test_zero_changes_are_not_evidence() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(7, 7) == 1.0


@pytest.mark.parametrize(("lost", "won", "p"), [(1, 0, 1.0), (5, 0, 0.0625), (10, 1, 24 / 2048), (8, 2, 112 / 1024)])
def test_the_exact_values(lost: int, won: int, p: float) -> None:
    assert mcnemar(lost, won) == pytest.approx(p)
    assert mcnemar(won, lost) == mcnemar(lost, won)


@given(st.integers(0, 60), st.integers(0, 60))
def test_it_is_the_two_sided_binomial_test(lost: int, won: int) -> None:
    n = lost + won
    tail = sum(Fraction(comb(n, k), 2**n) for k in range(min(lost, won) + 1))
    assert mcnemar(lost, won) == pytest.approx(float(min(Fraction(1), 2 * tail)))


def test_thousands_of_changes_do_not_overflow() -> None:
    """From 1,030 changes on, the number of their orders is beyond a float."""
    assert 0 <= mcnemar(3_000, 400) < 1e-300
    assert 0.9 < mcnemar(2_000, 2_001) <= 1.0


def test_it_counts_by_the_true_class() -> None:
    reference = np.eye(4)[[0, 1, 2, 3, 0, 1]]
    candidate = np.eye(4)[[0, 1, 2, 0, 1, 2]]
    labels = np.array([0, 1, 2, 3, 1, 3])  # the fourth is lost, the fifth won, the sixth wrong on both sides
    found = accuracy_change(reference, candidate, labels)
    assert (found.n, found.reference, found.candidate, found.lost, found.won) == (6, 4, 4, 1, 1)
    assert found.p == 1.0
    assert "4 of 6 labels right before, 4 after (1 lost, 1 won" in found.sentence()
