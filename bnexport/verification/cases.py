"""A batch with the right answer, and what a run may be off by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bnexport.tensors import Array
from bnexport.verification.inputs import Batch

Outputs = Mapping[str, Array]


@dataclass(frozen=True)
class Case:
    """A batch with the right answer.

    Attributes:
        batch: Inputs.
        expected: Output name -> (n, ...); float64 of the original, or the golden vectors.
        scales: Output name -> what errors are a share of; None: the largest |expected| of this batch.
    """

    batch: Batch
    expected: Outputs
    scales: Mapping[str, float] | None = None

    def head(self, n: int) -> Case:
        """The first n samples."""
        return Case(self.batch.head(n), heads(self.expected, n), self.scales)


@dataclass(frozen=True)
class Plan:
    """What every runtime is put through.

    Attributes:
        golden: The bundle's golden vectors; None when they can't be read.
        cases: The batches of stages 2 and 3, real images first.
        sizes: The batch whose first samples are run in other batch sizes; None when the batch dimension is fixed.
        empty: Whether zero samples have to work.
        labels: True classes of the first batch; None without.
    """

    golden: Case | None
    cases: tuple[Case, ...]
    sizes: Batch | None
    empty: bool
    labels: Array | None = None


def heads(outputs: Outputs, n: int) -> dict[str, Array]:
    """The first n samples of every output."""
    return {name: array[:n] for name, array in outputs.items()}
