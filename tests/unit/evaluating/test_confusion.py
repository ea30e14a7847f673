import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bnexport.evaluating.confusion import TOP_K, ConfusionCounts, wilson_interval


def confusion(logits: np.ndarray, labels: np.ndarray, *cuts: int) -> ConfusionCounts:
    found = ConfusionCounts(logits.shape[1])
    for part, truth in zip(np.split(logits, cuts), np.split(labels, cuts), strict=True):
        found.add(part, truth)
    return found


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(2, 60),
    classes=st.integers(2, 9),
    seed=st.integers(0, 2**31),
    ties=st.booleans(),
    shift=st.sampled_from([0.0, -2e3, 1e4]),
)
def test_counts_and_loss_are_those_of_the_textbook(n: int, classes: int, seed: int, ties: bool, shift: float) -> None:
    generator = np.random.default_rng(seed)
    logits = generator.standard_normal((n, classes)).astype(np.float32) * 3
    logits = (np.round(logits) if ties else logits) + np.float32(shift)
    labels = generator.integers(0, classes, n)
    found = confusion(logits, labels, n // 2)
    given_class = logits.argmax(1)
    for true in range(classes):
        for guess in range(classes):
            assert found.counts[true, guess] == ((labels == true) & (given_class == guess)).sum()
    assert found.correct == (given_class == labels).sum()
    loss = torch.nn.functional.cross_entropy(torch.from_numpy(logits).double(), torch.from_numpy(labels))
    assert found.loss == pytest.approx(float(loss), rel=1e-9, abs=1e-12)
    best = np.argsort(-logits, axis=1, kind="stable")[:, :TOP_K]
    hits = float((best == labels[:, None]).any(1).mean())
    assert found.top_accuracy() == (pytest.approx(hits) if classes > TOP_K else None)


def test_precision_recall_and_f1() -> None:
    counts = np.array([[5, 1, 0], [2, 2, 0], [0, 4, 0]])
    found = ConfusionCounts(3)
    found.counts[:] = counts
    rows = found.classes(("a", "b", "c"))
    assert [row.support for row in rows] == [6, 4, 4]
    assert rows[0].precision == pytest.approx(5 / 7)
    assert rows[0].recall == pytest.approx(5 / 6)
    assert rows[0].f1 == pytest.approx(2 * (5 / 7) * (5 / 6) / (5 / 7 + 5 / 6))
    assert (rows[2].precision, rows[2].recall, rows[2].f1) == (None, 0.0, 0.0)
    assert (rows[1].precision, rows[1].recall) == (pytest.approx(2 / 7), 0.5)


def test_a_class_without_samples() -> None:
    found = confusion(np.eye(3)[[0, 0]], np.array([0, 0]))
    assert [row.recall for row in found.classes(("a", "b", "c"))] == [1.0, None, None]
    assert [row.f1 for row in found.classes(("a", "b", "c"))] == [1.0, None, None]


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [  # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 1 - 0.1611, 1.0),
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson_interval(hits: int, n: int, low: float, high: float) -> None:
    found = wilson_interval(hits, n)
    assert found == pytest.approx((low, high), abs=5e-5)
    assert 0.0 <= found[0] <= found[1] <= 1.0
