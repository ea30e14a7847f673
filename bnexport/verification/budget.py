"""The number of samples of each kind that a verification compares.

It depends on multiplications and bytes and not on time, so two machines compare the same samples.

A fault of a fold or a kernel changes the output of almost every sample, so a few samples decide most stages. Counts of labels
need many samples, which only small networks can afford in seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

#: Multiplications that a batch of real images may cost. A BN-LeNet needs 2.8e5 per image, so all 10,000 test images fit.
_REAL_WORK = 5e9
#: Multiplications of synthetic inputs, of each batch size, and of the repeated batch.
_SYNTHETIC_WORK = 2e9
#: Multiplications of evaluations in float64, and the largest number of samples: a fault of the file changes nearly every
#: sample, and labels are counted on the runtimes.
_PROOF_WORK, _MOST_PROOF = 6e8, 512
#: Bytes of the real samples and their outputs, which all stay in memory, and of the synthetic ones of one kind.
_REAL_BYTES, _SYNTHETIC_BYTES = 1e8, 5e7
#: Bytes of all values of the samples that a runtime computes in one call; smallest and largest number of these samples.
_CALL_BYTES, _LEAST_CALL, _MOST_CALL = 5e8, 4, 1024
#: Smallest number of samples of a larger network, by default and when thorough.
_LEAST_REAL, _THOROUGH = 8, 16
_LEAST_NOISE, _LEAST_ONE_HOT = 4, 1
_MOST_NOISE, _MOST_ONE_HOT, _MOST_CONSTANT = 256, 784, 2
#: The lead batch needs two samples: a single sample can't show that samples are mixed up.
_LEAST_PROOF = 2
#: Batch sizes whose answers are compared with those of the whole batch. The first two always are.
_BATCH_SIZES, _ALWAYS = (1, 2, 7, 64), 2


class Work(NamedTuple):
    """The work of one sample of a network; without bytes, only the multiplications bound the samples."""

    multiplications: int
    kept: int = 0  # Bytes of its inputs and outputs in float32
    values: int = 0  # Bytes of all values between the operators in float32: at least what an engine holds at once


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
    call: int = _MOST_CALL  # Samples that a runtime computes in one call

    @property
    def synthetic(self) -> int:
        """Return the number of synthetic samples that each runtime computes, with batch sizes and the repeat."""
        return self.noise + self.one_hot + 2 * self.constant + sum(self.batch_sizes) + self.repeat


def budget_of(work: Work, *, thorough: bool = False, most: int | None = None, given: bool = False) -> Budget:
    """Return the budget of a network, with the caller's maximum ``most`` for each kind of sample.

    ``thorough``: at least 16 samples of every kind for each runtime and two for each proof, whatever they cost. ``given``: the
    real samples are the caller's own, so at least 16 of them are used.
    """

    def fitting(multiplications: float, least: int, largest: float = math.inf, memory: float = _SYNTHETIC_BYTES) -> int:
        affordable = min(multiplications // max(work.multiplications, 1), memory // max(work.kept, 1))
        return int(min(max(least, affordable), largest, math.inf if most is None else most))

    least = _THOROUGH if thorough else 1
    synthetic = _REAL_WORK if thorough else _SYNTHETIC_WORK
    call = int(min(max(_CALL_BYTES // max(work.values, 1), _LEAST_CALL), _MOST_CALL))
    repeat = min(fitting(_SYNTHETIC_WORK, least if thorough else _ALWAYS), call)
    most_proof = math.inf if thorough else _MOST_PROOF
    return Budget(
        real=fitting(_REAL_WORK, _THOROUGH if thorough or given else _LEAST_REAL, memory=_REAL_BYTES),
        noise=fitting(synthetic, max(least, _LEAST_NOISE), _MOST_NOISE),
        one_hot=fitting(synthetic, max(least, _LEAST_ONE_HOT), _MOST_ONE_HOT),
        constant=fitting(_SYNTHETIC_WORK, least, _MOST_CONSTANT),
        proof=fitting(_PROOF_WORK, _LEAST_PROOF, most_proof),
        proof_other=fitting(_PROOF_WORK, _LEAST_PROOF if thorough else 1, most_proof),
        batch_sizes=tuple(size for size in _BATCH_SIZES if thorough or size <= max(repeat, _ALWAYS)),
        repeat=repeat,
        call=call,
    )
