"""How many samples a verification compares, and that inputs of one size are evaluated in one call."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from bnexport.errors import BundleError
from bnexport.tensors import Array
from bnexport.verification.budget import budget_of
from bnexport.verification.inputs import Batch, each_once

LENET, RESNET50 = 280_000, 4_100_000_000


def test_a_small_network_is_compared_on_every_image() -> None:
    found = budget_of(LENET)
    assert found.real > 10_000
    assert (found.noise, found.one_hot, found.constant) == (256, 784, 2)
    assert found.batch_sizes == (1, 2, 7, 64)
    assert found.proof == found.proof_other == 512
    assert budget_of(LENET, thorough=True).proof > 2_000
    assert budget_of(LENET, thorough=True).synthetic == found.synthetic


def test_a_large_network_has_few_samples_of_each_kind_and_more_on_request() -> None:
    found, thorough = budget_of(RESNET50), budget_of(RESNET50, thorough=True)
    assert (found.real, found.noise, found.one_hot, found.constant) == (8, 4, 1, 1)
    assert (found.batch_sizes, found.repeat) == ((1, 2), 2)
    assert (found.proof, found.proof_other) == (2, 1)
    assert budget_of(RESNET50, given=True).real == 16
    assert min(thorough.real, thorough.noise, thorough.one_hot, thorough.repeat) == 16
    assert thorough.batch_sizes == (1, 2, 7, 64)
    assert (thorough.proof, thorough.proof_other) == (2, 2)


@pytest.mark.parametrize("cost", [0, 1, LENET, RESNET50])
def test_a_maximum_holds_for_every_kind(cost: int) -> None:
    found = budget_of(cost, most=1, thorough=True, given=True)
    counts = (found.real, found.noise, found.one_hot, found.constant, found.proof, found.proof_other)
    assert counts == (1, 1, 1, 1, 1, 1)


def test_more_work_never_gives_more_samples() -> None:
    budgets = [budget_of(10**power) for power in range(3, 12)]
    for less, more in itertools.pairwise(budgets):
        assert (less.real, less.synthetic, less.proof) >= (more.real, more.synthetic, more.proof)
        assert set(less.batch_sizes) >= set(more.batch_sizes)


class Doubling:
    """Doubles its input, and records the batches that it was called with."""

    def __init__(self, refused: float | None = None, *, first_only: bool = False) -> None:
        self.calls: list[int] = []
        self.refused, self.first_only = refused, first_only

    def __call__(self, feeds: dict[str, Array]) -> dict[str, Array]:
        x = feeds["x"]
        self.calls.append(len(x))
        if self.refused is not None and (x == self.refused).any():
            raise BundleError(f"no {self.refused}", remedy="none")
        return {"y": 2 * x[0] if self.first_only else 2 * x}


def batch(name: str, value: float, *shape: int, smallest: bool = False) -> Batch:
    return Batch(name, {"x": np.full(shape, value)}, smallest)


BATCHES = (batch("a", 1, 3, 2), batch("wide", 2, 1, 5), batch("b", 3, 2, 2), batch("least", 4, 2, 2, smallest=True))


def test_batches_of_one_sample_shape_are_evaluated_in_one_call() -> None:
    evaluate = Doubling()
    found = each_once(BATCHES, evaluate)
    assert evaluate.calls == [5, 1, 2]
    for item, outputs in zip(BATCHES, found, strict=True):
        assert not isinstance(outputs, Exception)
        np.testing.assert_array_equal(outputs["y"], 2 * item.feeds["x"])


def test_a_fixed_batch_is_evaluated_alone() -> None:
    evaluate = Doubling()
    each_once(BATCHES, evaluate, together=False)
    assert evaluate.calls == [3, 1, 2, 2]


def test_an_error_is_that_of_its_own_batch() -> None:
    found = each_once(BATCHES, Doubling(refused=3))
    assert [isinstance(item, BundleError) for item in found] == [False, False, True, False]
    assert found[0]["y"].shape == (3, 2)  # type: ignore[index]


def test_outputs_without_a_batch_are_evaluated_one_by_one() -> None:
    evaluate = Doubling(first_only=True)
    found = each_once(BATCHES[:1] + BATCHES[2:3], evaluate)
    assert evaluate.calls == [5, 3, 2]
    assert [item["y"].tolist() for item in found] == [[2, 2], [6, 6]]  # type: ignore[index]
