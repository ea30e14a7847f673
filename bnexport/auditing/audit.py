"""Run every tool on one network, compare it with float64, and name the first BatchNorm that a tool folds wrongly."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bnexport import interrupts
from bnexport.auditing.audited_network import AuditedNetwork, Deviation, audited_network, batch_of, call, deviation
from bnexport.auditing.tool_table import TOOLS, AuditReport, AuditRow, Tool, ToolInput
from bnexport.environment import environment
from bnexport.errors import BnexportError, ModelError, Unavailable, UsageError
from bnexport.exporting.export_request import InputSpec
from bnexport.nn.calling import to_eval_mode
from bnexport.nn.soundness import check_sound
from bnexport.optional import one_line, quiet
from bnexport.verification.tolerances import TOLERANCES


class Hidden(nn.Module):
    """A wrapper that hides a BatchNorm from folds: its input and output are negated twice, which changes no bit."""

    def __init__(self, batch_norm: nn.Module) -> None:
        super().__init__()
        self.batch_norm = batch_norm

    def forward(self, x: Tensor) -> Any:
        """Return the output of the BatchNorm."""
        output = self.batch_norm(x.neg().neg())
        return output.neg().neg() if isinstance(output, Tensor) else output


def first_culprit(subject: AuditedNetwork, is_wrong: Callable[[nn.Module], bool]) -> str:
    """Return the path of the first BatchNorm, in the order of the calls, that a tool folds wrongly; "" if none is found.

    A bisection: the tool is wrong with the BatchNorms up to this one visible, and right with only those before it. It takes one
    run of the tool per step, and one to check that the tool is right with all BatchNorms hidden. The result is "" without a
    BatchNorm, if the tool is wrong for another reason, or if it fails on the changed network. ``is_wrong`` runs the tool on an
    equivalent module.
    """
    names = calls_in_order(subject)
    try:
        if not names or is_wrong(hide(subject.module, names)):
            return ""
        right, wrong = 0, len(names)
        while wrong - right > 1:
            middle = (right + wrong) // 2
            if is_wrong(hide(subject.module, names[middle:])):
                wrong = middle
            else:
                right = middle
    except Exception:  # the tool's own classes
        return ""
    return names[wrong - 1]


def hide(module: nn.Module, paths: list[str]) -> nn.Module:
    """Return a copy of a network with the BatchNorms at some paths (not the root) hidden, at all paths of a shared one."""
    copied = copy.deepcopy(module)
    wanted = {id(copied.get_submodule(path)): to_eval_mode(Hidden(copied.get_submodule(path))) for path in paths}
    for path, inner in list(copied.named_modules(remove_duplicate=False)):
        if id(inner) in wanted:
            parent, _, name = path.rpartition(".")
            setattr(copied.get_submodule(parent), name, wanted[id(inner)])
    return copied


def calls_in_order(subject: AuditedNetwork) -> list[str]:
    """Return the paths of the BatchNorms that forward calls, in the order of their first calls."""
    copied = copy.deepcopy(subject.module)
    called: dict[str, None] = {}
    for path, inner in copied.named_modules():
        if path and is_batch_norm(inner) and not any(map(is_batch_norm, list(inner.modules())[1:])):
            inner.register_forward_pre_hook(lambda _module, _inputs, path=path: called.setdefault(path))
    with torch.no_grad():
        call(copied, subject.example)
    return list(called)


def is_batch_norm(module: nn.Module) -> bool:
    """Return True if the name of a module's class or base class contains BatchNorm."""
    return any("BatchNorm" in kind.__name__ for kind in type(module).__mro__)


#: A fold reorders float32 arithmetic. Allowed error of a tool as a multiple of the network's own float32 error.
ALLOWANCE = 10.0
#: Largest float32 error of a network, of scale, at which tools can be judged.
_HOPELESS = 1e-2
#: Packages whose versions are recorded in addition to those of ``environment``.
_EXTRA_PACKAGES = ("onnxslim", "onnxsim")
_REASON = 200


@dataclass(frozen=True)
class _Finding:
    """The outputs of one tool, compared."""

    worst: Deviation  # The largest deviation
    batch_norms: int | None  # Number of remaining BatchNorms
    batches: tuple[int, ...]  # Accepted batch sizes
    refusal: str  # Reason for a refused batch size


def audit(
    module: nn.Module,
    inputs: tuple[InputSpec, ...],
    *,
    tools: Sequence[str] = (),
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> AuditReport:
    """Compare the outputs of tools that fold a network with the network's outputs in float64.

    The network is not changed; it is evaluated in eval mode, on the CPU.

    Args:
        module: The network.
        inputs: One per argument of forward.
        tools: Names in TOOLS; empty: all. The control always runs, because the bound depends on it.
        seed: Random seed of the inputs.
        progress: Called with the name of each tool before it runs.

    Raises:
        UsageError: A tool is unknown.
        RefusedModel: Weights are not finite, or a BatchNorm is in training mode.
        ModelError: The network can't be copied, run, or evaluated in float64.
    """
    chosen = _chosen(tools)
    check_sound(module, allow_untrained=True)
    subject = audited_network(module, inputs, seed=seed)
    rows: list[AuditRow] = []
    bound, rule = 0.0, ""
    for tool in chosen:
        if progress is not None:
            progress(tool.name)
        if tool.control:
            bound, rule = _bound_of(row := _control_row(tool, subject))
        else:
            row = _row(tool, subject, bound)
        interrupts.check()
        rows.append(row)
    return AuditReport(tuple(rows), bound, rule, seed, subject.batches, _notes(subject), _environment())


def _chosen(names: Sequence[str]) -> tuple[Tool, ...]:
    known = [tool.name for tool in TOOLS]
    if unknown := [name for name in names if name not in known]:
        raise UsageError(f"the tool {unknown[0]!r} is unknown", remedy=f"Choose one of {', '.join(known)}")
    return tuple(tool for tool in TOOLS if tool.control or not names or tool.name in names)


def _control_row(tool: Tool, subject: AuditedNetwork) -> AuditRow:
    """Return the row of the network itself in float32; ModelError if its error is too large to judge tools by."""
    found = _examine(tool, subject, subject.module)
    if found.worst.problem or found.worst.error > _HOPELESS:
        why = found.worst.problem or f"its error is {found.worst.error:.1e} of scale"
        raise ModelError(
            f"the network in its own precision does not match float64, so it can't be used to judge tools: {why}",
            remedy="Audit it in float32, and check its weights",
        )
    return AuditRow(tool.name, "right", True, found.batch_norms, found.worst.error, batches=found.batches)


def _bound_of(control: AuditRow) -> tuple[float, str]:
    """Return the largest error of a right tool, and the rule of this bound."""
    noise, strict = ALLOWANCE * (control.error or 0.0), TOLERANCES["strict"].bound
    rule = f"the larger of {strict:g} and {ALLOWANCE:g} x the error of {control.tool}"
    return max(strict, noise), rule


def _row(tool: Tool, subject: AuditedNetwork, bound: float) -> AuditRow:
    """Return the row of one tool. Only wrong outputs are wrong: an error is a failure that the user sees."""
    try:
        found = _examine(tool, subject, subject.module)
    except Unavailable as error:
        return AuditRow(tool.name, "not run", reason=error.message)
    except BnexportError as error:
        return AuditRow(tool.name, "failed", reason=error.message)
    except Exception as error:  # the tool's own classes
        return AuditRow(tool.name, "failed", reason=f"{type(error).__name__}: {one_line(error, _REASON)}")
    refused = sorted({*subject.batches} - {*found.batches})
    reason = f"not with a batch of {' or '.join(map(str, refused))}: {found.refusal}" if refused else ""
    worst = found.worst
    row = AuditRow(tool.name, "right", False, found.batch_norms, worst.error, reason=reason, batches=found.batches)
    if worst.error <= bound:
        return row
    return replace(
        row,
        verdict="wrong",
        output=worst.output,
        channel=worst.channel,
        batch_norm=first_culprit(subject, lambda module: not _examine(tool, subject, module).worst.error <= bound),
        reason=worst.problem or reason,
    )


def _examine(tool: Tool, subject: AuditedNetwork, module: nn.Module) -> _Finding:
    """Run a tool on a copy of a module that computes the same as the network, and compare its outputs.

    A refused batch size other than the traced one is not wrong; the finding contains it.
    """
    deviations, batches, refusal = [], [], ""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="bnexport-audit-"))
        stack.enter_context(quiet())
        stack.enter_context(torch.no_grad())
        job = ToolInput(copy.deepcopy(module), subject.example, Path(folder))
        product = stack.enter_context(tool.open(job))
        for probe, expected in zip(subject.probes, subject.expected, strict=True):
            try:
                answer = product.run(probe)
            except Exception as error:  # the tool's own classes
                if batch_of(probe) == batch_of(subject.example):
                    raise
                refusal = one_line(error, _REASON)
                continue
            deviations.append(deviation(answer, expected, subject.scales))
            batches.append(batch_of(probe))
    return _Finding(max(deviations, key=lambda item: item.error), product.batch_norms, tuple(batches), refusal)


def _notes(subject: AuditedNetwork) -> tuple[str, ...]:
    if not subject.untrained:
        return ()
    layers = "1 BatchNorm layer was" if subject.untrained == 1 else f"{subject.untrained} BatchNorm layers were"
    return (f"{layers} never trained and got random numbers for the audit, because a fresh one hides wrong folds",)


def _environment() -> dict[str, Any]:
    record = environment()
    for name in _EXTRA_PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            record["packages"][name] = metadata.version(name)
    return record
