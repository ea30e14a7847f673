"""The fold of one network: the BatchNorms that remain, an independent check, and the cost next to torch.export."""

from __future__ import annotations

import copy
import re
import time
from collections import Counter
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from benchmarks.clock import Spread
from benchmarks.zoo.network import EXAMPLE, ZooNetwork, make_zoo_network, outputs_of
from bnexport.folding.fold import FoldResult, fold_traced
from bnexport.folding.fold_report import FoldReport, FoldRow
from bnexport.folding.torch_backend.nodes import module_path
from bnexport.folding.torch_backend.trace import trace

aten = torch.ops.aten

#: Bound on a fold's float32 error: a multiple of the network's own error plus a share of the scale.
WRONG_FACTOR, WRONG_SHARE = 10.0, 1e-6
#: Samples of the independent check, and the offset of its seed.
_CHECKED, _OTHER_SEED = 3, 1000
#: Place of a BatchNorm call -> its meaning.
PLACES: dict[str, str] = {
    "adjacent": "directly after a linear layer whose output it alone reads: any exporter can fold it",
    "apart": "anywhere else",
    "arithmetic": "no batch_norm operator: a scale or shift by constants that is read like one",
}
#: Linear operators whose output has its channels on axis 1.
_LINEAR = (
    aten.conv1d.default, aten.conv1d.padding, aten.conv2d.default, aten.conv2d.padding, aten.conv3d.default,
    aten.conv3d.padding, aten.convolution.default, aten.conv_transpose1d.default, aten.conv_transpose2d.input,
    aten.conv_transpose3d.input, aten.linear.default, aten.addmm.default,
)  # fmt: skip
_NOTHING_BETWEEN = (
    aten.dropout.default, aten.feature_dropout.default, aten.alias.default, aten.clone.default, aten.contiguous.default,
    aten.detach.default,
)  # fmt: skip


def measure_fold(source: str, *, seed: int = 0) -> dict[str, Any]:
    """Fold ``torchvision:NAME`` or ``timm:NAME`` and return plain JSON values; the seed sets weights, statistics and inputs."""
    subject = make_zoo_network(source, seed=seed)
    found: dict[str, Any] = {"shape": list(subject.shape), "norms": subject.norms}
    if not subject.norms:
        return found
    example = subject.batch(EXAMPLE, seed + 1)
    started = time.perf_counter()
    original = trace(subject.module, (example,))
    traced = time.perf_counter() - started
    result, plain = (fold_traced(original, (example,), name=source, prove=prove) for prove in (True, False))
    clamped, places = fold_traced(original, (example,), name=source, clamps=True), places_of(original)
    ours, more = (
        account(each.report, places) | independent_check(subject, each.model, seed=seed + _OTHER_SEED)
        for each in (result, clamped)
    )
    return found | ours | {"cost": cost_of(traced, plain, result), "clamped": more}


def cost_of(traced: float, plain: FoldResult, proved: FoldResult) -> dict[str, dict[str, float]]:
    """Return the seconds of the trace and of a fold of its graph, without and with proofs, and their ratios to the trace."""
    fold, proof = (sum(result.seconds.values()) for result in (plain, proved))
    values = {"trace": traced, "fold": fold, "proved": proof, "ratio": fold / traced, "ratio_proved": proof / traced}
    return {name: asdict(Spread.of([value])) for name, value in values.items()}


def account(report: FoldReport, places: dict[str, list[str]]) -> dict[str, Any]:
    """Return the fold report in numbers; ``places``: ``places_of`` the unfolded graph."""
    waiting = {module: list(flags) for module, flags in places.items()}
    outcomes: dict[str, Counter[str]] = {place: Counter() for place in PLACES}
    reasons: Counter[str] = Counter()
    for row in report.rows:
        place = waiting[row.module].pop(0) if waiting.get(row.module) else "arithmetic"
        outcomes[place][row.outcome] += 1
        if not row.gone and place != "arithmetic":
            reasons[general(row)] += 1
    return {
        "calls": len(report.rows),
        "outcomes": {key: dict(value) for key, value in outcomes.items()},
        "reasons": dict(reasons.most_common()),
        "remaining": report.remaining,
        "error": report.error,
        "warnings": list(report.warnings),
    }


def places_of(graph_module: GraphModule) -> dict[str, list[str]]:
    """Return module path -> the places, as in PLACES, of its BatchNorm calls."""
    found: dict[str, list[str]] = {}
    for node in graph_module.graph.nodes:
        if node.target is aten.batch_norm.default:
            found.setdefault(module_path(node), []).append("adjacent" if _is_adjacent(node) else "apart")
    return found


def independent_check(subject: ZooNetwork, folded: GraphModule, *, seed: int) -> dict[str, Any]:
    """Compare the folded graph in float32 with the original in float64, on other inputs and another batch size.

    The error of the original in float32 is the share of rounding that the network has without a fold.
    """
    batch = subject.batch(_CHECKED, seed)
    given = outputs_of(folded, batch)
    plain = outputs_of(subject.module, batch)
    exact = outputs_of(copy.deepcopy(subject.module).double(), batch.double())
    error, noise = _difference(given, exact), _difference(plain, exact)
    finite = [value if value < float("inf") else None for value in (error, noise)]
    # Deviation between samples as a share of the largest output: near 0, the check could not see a fault.
    varies = max(float(item.std(0).max() / item.abs().max()) for item in exact)
    wrong = not error <= WRONG_FACTOR * noise + WRONG_SHARE
    return {"check_error": finite[0], "check_noise": finite[1], "wrong": wrong, "varies": varies}


def general(row: FoldRow) -> str:
    """Return a row's reason without the names and numbers of this network, so that equal reasons can be counted."""
    text = re.sub(r" \((?!docs/)[\w.]+\)", "", row.reason)  # "add (stages.0.norm)"
    text = re.sub(r"(?<![\w/])[A-Za-z_]\w*(?:\.\w+)+", "a layer", text)
    text = re.sub(r"\b([a-z][a-z0-9_]*?)_\d+\b", r"\1", text)
    return re.sub(r"\b\d+ of its", "some of its", text)


def _is_adjacent(node: Node) -> bool:
    parent = node.args[0]
    while isinstance(parent, Node) and parent.target in _NOTHING_BETWEEN and len(parent.users) == 1:
        parent = parent.args[0]
    if not isinstance(parent, Node) or parent.target not in _LINEAR or len(parent.users) != 1:
        return False
    # Axis 1 of a (N, L, C) output of a linear layer has positions, not its channels.
    return parent.target is not aten.linear.default or parent.meta["val"].ndim == 2


def _difference(given: list[Tensor], exact: list[Tensor]) -> float:
    """Largest |difference| as a share of the largest |value|, worst output; infinity if it is not a number."""
    if len(given) != len(exact) or any(have.shape != want.shape for have, want in zip(given, exact, strict=True)):
        return float("inf")
    pairs = zip(given, exact, strict=True)
    errors = [float((have.double() - want).abs().max() / want.abs().max()) for have, want in pairs]
    return max(error if error == error else float("inf") for error in errors)
