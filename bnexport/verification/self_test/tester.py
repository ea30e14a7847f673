"""Test of the verifier: faults are put into copies of a bundle, and each copy must fail the verification.

A verification that passes proves little unless one that should fail does. So each fault of ``faults.FAULTS`` is put into a copy
of the bundle, and the copy is verified as the bundle was.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from bnexport import interrupts
from bnexport.bundle import MODEL_ONNX, Bundle
from bnexport.errors import BundleError, UsageError
from bnexport.files import output_errors
from bnexport.onnx_files.models import multiplications, read_model
from bnexport.runtimes.catalogue import RunnerSpec
from bnexport.verification.forecast import FACTOR
from bnexport.verification.scope import Scope
from bnexport.verification.self_test.copies import Copy, FaultTarget, NotTried, effect_of
from bnexport.verification.self_test.faults import Fault, faults_of
from bnexport.verification.verdict import FaultResult, VerificationReport
from bnexport.verification.verify import verify

if TYPE_CHECKING:
    from torch import nn


#: Number of samples of each kind. With fewer samples, faults are harder to detect; a verification uses up to 10,000.
_SAMPLES = 64
#: Largest number of multiplications of a batch, which may reduce the number of samples, and the least number of samples.
_WORK, _MIN_SAMPLES = 5e8, 8
#: Number of samples for faults that show only in the number of right labels.
_MANY_SAMPLES = 256
#: Error of scale up to which a fault is harmless: rounding the folded weights to float32 is 1e-7. The number equals the proof's
#: bound, but is not read from it: a bound that is too wide must not excuse the faults that it lets pass.
_HARMLESS = 1e-6
#: One runtime that reads model.onnx: the proofs look at every file, whatever runs.
_RUNTIME = "onnxruntime-cpu"


def self_test(
    bundle: Bundle | str | Path,
    *,
    runtimes: Sequence[str | RunnerSpec] | None = None,
    dataset: str | None = None,
    data_dir: str | Path | None = None,
    samples: str | Path | None = None,
    module: nn.Module | None = None,
    seed: int = 0,
    allow_low_accuracy: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> tuple[FaultResult, ...]:
    """Put every fault into a copy of a bundle and verify the copy, in strict float32, on few samples.

    At most 64 samples of each kind are used, of a large network fewer; 256 where a fault shows in accuracy alone. The copies
    lie in a temporary folder, one at a time, and are always removed. The bundle itself is verified first: if that fails, a
    failing copy shows nothing, and no fault is tried.

    Arguments and errors are those of ``verify`` and ``Scope``, except that ``runtimes`` is onnxruntime-cpu alone by default.
    BatchNorm faults are put into copies of ``module``. ``progress`` is called before each fault with its number from 1, the
    number of faults, and what it is.

    Returns:
        One result per fault, in the order of ``faults.faults_of``.

    Raises:
        OutputError: A copy can't be written.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)

    def check(spoiled: Bundle, most: int, runner: RunnerSpec | None, *, images: bool = True) -> VerificationReport:
        """Verify with few samples and in strict float32 only."""
        return verify(
            spoiled,
            runtimes=(runtimes or (_RUNTIME,)) if runner is None else (runner,),
            dataset=dataset if images else None,
            data_dir=data_dir if images else None,
            samples=samples,
            module=module,
            seed=seed,
            scope=Scope(
                ("float32",), max_samples=most, drift=False, all_files=True, allow_low_accuracy=allow_low_accuracy
            ),
        )

    control = check(opened, _MANY_SAMPLES, None)
    faults = faults_of(opened)
    if not control.passed:
        reason = f"the bundle fails without it: {control.summary()}"
        return tuple(_not_tried(fault, reason) for fault in faults)
    subject = FaultTarget(opened, module, _harmless(control), control.accuracy)
    few, results = _few(opened), []
    for number, fault in enumerate(faults, 1):
        interrupts.check()
        if progress is not None:
            progress(number, len(faults), f"{fault.name} in {fault.where}")
        results.append(_result(check, subject, fault, _MANY_SAMPLES if fault.many else few))
    return tuple(results)


def _result(check: Callable[..., VerificationReport], subject: FaultTarget, fault: Fault, most: int) -> FaultResult:
    """Copy, spoil, verify on at most ``most`` samples of each kind, and remove the copy."""
    with tempfile.TemporaryDirectory(prefix="bnexport-self-test-") as folder:
        copy = Copy(subject, Path(folder) / "copy")
        try:
            with output_errors(copy.folder):
                shutil.copytree(subject.bundle.path, copy.folder)
                where = fault.put(copy) or fault.where
        except NotTried as why:
            return _not_tried(fault, str(why))
        try:
            spoiled = Bundle.open(copy.folder)
        except BundleError as error:  # the manifest's own digest, which ``verify`` checks first of all
            reason = error.message.replace(f"{copy.folder}/", "")
            return FaultResult(fault.name, where, fault.expected, ("integrity",), "caught", None, reason)
        effect = effect_of(spoiled, fault.evaluate)
        try:
            report = check(spoiled, most, fault.runner)
        except UsageError:  # the copy's labels are no longer the data set's: verified without images
            plain = Bundle(spoiled.path, replace(spoiled.manifest, dataset=None))
            report = check(plain, most, fault.runner, images=False)
        return _judged(subject, fault, where, effect, report)


def _judged(
    subject: FaultTarget, fault: Fault, where: str, effect: float | None, report: VerificationReport
) -> FaultResult:
    """Return a fault as caught by its stage, harmless, caught by another stage, or missed."""
    caught = tuple(dict.fromkeys((*(row.stage for row in report.failures), *report.missing_stages)))
    found = FaultResult(fault.name, where, fault.expected, caught, "caught" if caught else "missed", effect)
    if fault.expected not in caught and effect is not None and effect <= subject.harmless:
        reason = f"it changes no golden output by more than {subject.harmless:.0e} of scale"
        return replace(found, outcome="harmless", reason=reason)
    rows = sorted(report.failures, key=lambda row: row.stage != fault.expected)
    return replace(found, reason=rows[0].reason if rows else "")


def _not_tried(fault: Fault, reason: str) -> FaultResult:
    return FaultResult(fault.name, fault.where, fault.expected, (), "not tried", None, reason)


def _few(bundle: Bundle) -> int:
    """Return the number of samples of each kind that a copy is verified on."""
    inputs, _ = bundle.golden()
    cost = multiplications(read_model(bundle.file(MODEL_ONNX)), {name: x.shape[1:] for name, x in inputs.items()})
    return max(_MIN_SAMPLES, min(_SAMPLES, int(_WORK // cost)))


def _harmless(control: VerificationReport) -> float:
    """Return the harmless effect of rounding this bundle's weights: more in half precision, where it is measured."""
    rows = [row for row in control.rows if (row.stage, row.subject) == ("file-proof", MODEL_ONNX)]
    return max([_HARMLESS, *(FACTOR * row.predicted for row in rows if row.predicted is not None)])
