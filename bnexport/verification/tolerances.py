"""The error that each stage allows, with the reason for each bound.

All bounds are shares of the reference's scale: max |candidate - reference| / max |reference|, per output. Measured on
a BN-LeNet over 10,000 Fashion-MNIST images: float32 kernels 3.8e-7, TF32 7.6e-4, the fault "eps dropped" 6.8e-5. A
fault can be ten times smaller than correct TF32, so a single bound is not enough; each stage isolates one cause.
"""

from __future__ import annotations

from dataclasses import dataclass

from bnexport.runtimes.replay import GOLDEN_BOUND


@dataclass(frozen=True)
class Tolerance:
    """One row of TOLERANCES."""

    bound: float  # Largest error of scale that passes
    reason: str  # Reason for the bound


TOLERANCES: dict[str, Tolerance] = {
    "file-proof": Tolerance(
        1e-6,
        "all arithmetic is float64, so only the one rounding of each folded weight to float32 is left: 5e-8 measured, "
        "and the smallest fault, eps dropped, is 6.8e-5",
    ),
    "golden": Tolerance(
        GOLDEN_BOUND, "golden outputs are float64 rounded once; the rest is the runtime's float32 noise"
    ),
    "golden-reference": Tolerance(1e-6, "float64 against float64 rounded once to float32 (6e-8)"),
    "strict": Tolerance(1e-5, "IEEE float32 kernels with another order of summation: 3.8e-7 measured on a CPU"),
    "shipping": Tolerance(
        1e-5,
        "3 x the noise predicted by emulating the precision on this very model; where that is smaller, what strict float32 "
        "may be off by",
    ),
    "batch-size": Tolerance(1e-5, "another batch size may choose another kernel, never another answer"),
    "repeat": Tolerance(1e-5, "two runs of one input: 0 on a CPU, about 1e-6 where a GPU sums in another order"),
}
