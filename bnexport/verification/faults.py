"""The faults that a verification has to see: where each is put, and which stage exists to catch it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from bnexport.bundle import GOLDEN, MANIFEST, MODEL_EXPORTED, MODEL_ONNX, MODEL_TORCHSCRIPT, WEIGHTS, Bundle
from bnexport.runtimes.catalogue import RunnerSpec
from bnexport.runtimes.reference import EmulatedRunner
from bnexport.verification.fault_copy import (
    Copy,
    Evaluate,
    NotTried,
    evaluate_onnx,
    evaluate_tf32,
    evaluate_torch,
    evaluate_weights,
)
from bnexport.verification.fault_files import (
    claim_opset,
    flip_anywhere,
    flip_golden,
    flip_unfolded_weight,
    flip_weight,
    normalise_pixels,
    permute_labels,
    put_nan,
    rename_output,
    retype_output,
    scale_pixels,
)
from bnexport.verification.fault_norms import NORM_FAULTS, spoil_norm

if TYPE_CHECKING:
    from torch import nn

    from bnexport.runtimes.base import Runner
    from bnexport.runtimes.settings import RunSettings


@dataclass(frozen=True)
class Fault:
    """One row of FAULTS.

    Attributes:
        name: What is done: "eps dropped".
        where: The file or runtime that it is done to.
        expected: The stage that exists to catch it.
        put: Does it to a copy, and says where exactly. All but the flipped bits of the stage "integrity" seal the copy
            again, so that no hash gives them away.
        evaluate: What was changed, for the size of the effect; None where that is no number.
        runner: A runtime with a fault in it, in place of a good one.
        many: Whether it is seen only in how many labels are right, which takes more samples.
    """

    name: str
    where: str
    expected: str
    put: Callable[[Copy], str]
    evaluate: Evaluate | None = None
    runner: RunnerSpec | None = None
    many: bool = False


def faults_of(bundle: Bundle) -> tuple[Fault, ...]:
    """FAULTS, and one flipped bit in each file of a bundle."""
    names = (*bundle.manifest.files, MANIFEST)
    return (*FAULTS, *(Fault("one flipped bit", name, "integrity", flip_anywhere(name)) for name in names))


def _only_float32(copy: Copy) -> str:
    """Nothing is done to the files: the fault is in the engine."""
    if (stored := copy.subject.bundle.manifest.onnx.get("precision", "float32")) != "float32":
        raise NotTried(f"the bundle is {stored}, for which no engine computes in float32")
    return ""


def _open_tf32(bundle: Bundle, _device: str, _module: nn.Module | None, _settings: RunSettings) -> Runner:
    """TF32 whatever was asked for."""
    return EmulatedRunner(bundle, "tf32")


_TF32 = RunnerSpec("emulated", "cpu", MODEL_ONNX, _open_tf32, lambda _device: None, default=False)
#: Model file -> what evaluates it in float64.
_MODELS: dict[str, Evaluate] = {
    MODEL_ONNX: evaluate_onnx,
    MODEL_TORCHSCRIPT: evaluate_torch(MODEL_TORCHSCRIPT),
    MODEL_EXPORTED: evaluate_torch(MODEL_EXPORTED),
}

FAULTS: tuple[Fault, ...] = (
    *(Fault(row.name, MODEL_ONNX, "file-proof", partial(spoil_norm, fault=row), evaluate_onnx) for row in NORM_FAULTS),
    Fault("NaN in a weight", MODEL_ONNX, "file-proof", put_nan, evaluate_onnx),
    *(
        Fault("high bit of a weight, sealed again", name, "file-proof", flip_weight(name, high=True), evaluate)
        for name, evaluate in _MODELS.items()
    ),
    *(
        Fault("lowest bit of a weight, sealed again", name, "weights", flip_weight(name, high=False), evaluate)
        for name, evaluate in _MODELS.items()
    ),
    Fault("high bit, sealed again", WEIGHTS, "golden-reference", flip_unfolded_weight, evaluate_weights),
    *(
        Fault("high bit, sealed again", f"{GOLDEN}/{kind}_0.pb", "golden", flip_golden(kind), evaluate_onnx)
        for kind in ("input", "output")
    ),
    Fault("TF32 left on in strict mode", "emulated runtime", "precision", _only_float32, evaluate_tf32, _TF32),
    Fault("pixels 0 to 255 for 0 to 1", MANIFEST, "accuracy", scale_pixels, many=True),
    Fault("other mean and deviation", MANIFEST, "accuracy", normalise_pixels, many=True),
    Fault("another output name", MODEL_ONNX, "declaration", rename_output),
    Fault("another output type", MODEL_ONNX, "declaration", retype_output),
    Fault("another opset claimed", MANIFEST, "declaration", claim_opset),
    Fault("labels permuted", MANIFEST, "declaration", permute_labels),
)
