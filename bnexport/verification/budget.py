"""The number of samples of each kind that a verification compares.

It depends on multiplications and not on time, so two machines compare the same samples.

A fault of a fold or a kernel changes the output of almost every sample, so a few samples decide most stages. Counts of labels
need many samples, which only small networks can afford in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

#: Multiplications that a batch of real images may cost. A BN-LeNet needs 2.8e5 per image, so all 10,000 test images fit.
_REAL_WORK = 5e9
#: Multiplications of synthetic inputs, of each batch size, and of the repeated batch.
_SYNTHETIC_WORK = 2e9
#: Multiplications of evaluations in float64, and the largest number of samples: a fault of the file changes nearly every
#: sample, and labels are counted on the runtimes.
_PROOF_WORK, _MOST_PROOF = 6e8, 512
#: Smallest number of samples of a larger network, by default and when thorough.
_LEAST_REAL, _THOROUGH = 8, 16
_LEAST_NOISE, _LEAST_ONE_HOT = 4, 1
_MOST_NOISE, _MOST_ONE_HOT, _MOST_CONSTANT = 256, 784, 2
#: The lead batch needs two samples: a single sample can't show that samples are mixed up.
_LEAST_PROOF = 2
#: Batch sizes whose answers are compared with those of the whole batch. The first two always are.
_BATCH_SIZES, _ALWAYS = (1, 2, 7, 64), 2


@dataclass(frozen=True)
class Budget:
    """Maximum number of samples of each kind."""

    real: int  # Test images of the data set, or the caller's samples
    noise: int  # Standard normal noise
    one_hot: int  # Samples with one element of 1
    constant: int  # Samples of zeros, and of ones
    proof: int  # Samples of the first batch that are evaluated in float64 and under an emulated precision
    proof_other: int  # Such samples of every other batch
    batch_sizes: tuple[int, ...]  # Batch sizes whose answers are compared with those of the whole batch
    repeat: int  # Samples that are run a second time

    @property
    def synthetic(self) -> int:
        """Return the number of synthetic samples that each runtime computes, with batch sizes and the repeat."""
        return self.noise + self.one_hot + 2 * self.constant + sum(self.batch_sizes) + self.repeat


def budget_of(cost: int, *, thorough: bool = False, most: int | None = None, given: bool = False) -> Budget:
    """Return the budget of a network.

    Args:
        cost: Multiplications per sample.
        thorough: At least 16 samples of every kind for each runtime and two for each proof, whatever they cost.
        most: The caller's maximum for each kind.
        given: The real samples are the caller's own, so at least 16 of them are used.
    """

    def fitting(work: float, least: int, largest: int | None = None) -> int:
        n = max(least, int(work // max(cost, 1)))
        n = n if largest is None else min(n, largest)
        return n if most is None else min(n, most)

    least = _THOROUGH if thorough else 1
    noise = fitting(_REAL_WORK if thorough else _SYNTHETIC_WORK, max(least, _LEAST_NOISE), _MOST_NOISE)
    affordable = fitting(_SYNTHETIC_WORK, least if thorough else _ALWAYS)
    return Budget(
        real=fitting(_REAL_WORK, _THOROUGH if thorough or given else _LEAST_REAL),
        noise=noise,
        one_hot=fitting(_REAL_WORK if thorough else _SYNTHETIC_WORK, max(least, _LEAST_ONE_HOT), _MOST_ONE_HOT),
        constant=fitting(_SYNTHETIC_WORK, least, _MOST_CONSTANT),
        proof=fitting(_PROOF_WORK, _LEAST_PROOF, None if thorough else _MOST_PROOF),
        proof_other=fitting(_PROOF_WORK, _LEAST_PROOF if thorough else 1, None if thorough else _MOST_PROOF),
        batch_sizes=tuple(size for size in _BATCH_SIZES if thorough or size <= max(affordable, _ALWAYS)),
        repeat=affordable,
    )
