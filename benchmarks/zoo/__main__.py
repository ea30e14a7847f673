"""Fold every network of torchvision and many of timm, next to other tools; write JSON lines and docs/results/zoo.md.

Networks that are in the file already are not measured again, so an interrupted run resumes. All of them take some hours.
"""

from __future__ import annotations

import os
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.command import finish, options, progress
from benchmarks.pages import render, write_page
from benchmarks.zoo.fold import PLACES, WRONG_FACTOR, WRONG_SHARE
from benchmarks.zoo.network import CALIBRATION, EXAMPLE
from benchmarks.zoo.run import PARTS, ZooRun, run_zoo
from bnexport.environment import describe
from bnexport.folding.fold_report import GONE, OUTCOMES
from bnexport.folding.torch_backend.torch_proof import MAX_ERROR

#: Key of a tool in the lines -> its heading.
TOOLS: dict[str, str] = {
    "torch.onnx.export": "torch.onnx.export",
    "torch.jit.freeze": "torch.jit.freeze",
    "onnxruntime": "ONNX Runtime",
    "onnxslim": "onnxslim",
}
_NOTHING = "-"


Fold = Mapping[str, Any]  # the result of ``measure_fold``


def write_document(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the page of the lines that ``read_lines`` returns."""
    entries = entries_of(lines)
    folds = {name: entry["fold"] for name, entry in entries.items() if "calls" in entry["fold"]}
    clamps = {name: fold["clamped"] for name, fold in folds.items() if "clamped" in fold}
    errors = {name: fold["error"] for name, fold in folds.items() if fold["error"] is not None}
    inexact = [
        f"{name} ({error:.1e}, its own float32 error {_size(folds[name]['check_noise'])})"
        for name, error in errors.items()
        if error > MAX_ERROR
    ]

    def total(place: str, outcomes: Sequence[str] = tuple(OUTCOMES)) -> int:
        return sum(_count(fold, place, outcomes) for fold in folds.values())

    text = render(
        "zoo/page.md.jinja", entries=entries, folds=folds, clamps=clamps, gone=GONE, total=total, places=PLACES,
        plain=[name for name, entry in entries.items() if not _norms(entry) and not entry["problems"]],
        conditions=[(line, describe(dict(line))) for line in lines if line["part"] == "conditions"],
        example=EXAMPLE, calibration=CALIBRATION, wrong_factor=WRONG_FACTOR, wrong_share=WRONG_SHARE, max_error=MAX_ERROR,
        outcomes=[[name, *(total(place, [name]) for place in ("adjacent", "apart")), meaning]
                  for name, meaning in OUTCOMES.items()],
        tools=[_tool(entries, folds, key, heading) for key, heading in TOOLS.items()],
        errors=errors, inexact=inexact, exact=[error for error in errors.values() if error <= MAX_ERROR],
        wrong=_verdict(folds, lambda fold: fold["wrong"]), warned=_verdict(folds, _warned),
        adjacent=_verdict(folds, lambda fold: _count(fold, "adjacent") > _count(fold, "adjacent", GONE)),
        more=_verdict(folds, lambda fold: fold["remaining"] > _standing(fold)),
        clamped_gone=sum(_count(fold, "apart", GONE) for fold in clamps.values()),
        unclamped=sum(folds[name]["remaining"] for name in clamps),
        clamped_wrong=_verdict(clamps, lambda fold: fold["wrong"] or _warned(fold)),
        reasons=_reasons(folds), costs=_costs(folds), failures=_failures(entries),
        heads=["network", "pixels", "BatchNorms", "adjacent", "apart", "apart, gone", "left: bnexport", "with clamps",
               *TOOLS.values(), "error", "check", "trace, s", "fold", "with proofs"],
        rows=[_cells(name, entry) for name, entry in entries.items() if _norms(entry)],
    )  # fmt: skip
    write_page([text], path)


def entries_of(lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return network -> the results "fold" and "tools", {} without one, and "problems": part -> reason of its failure.

    torchvision's networks are first, in the order of their names.
    """
    measured = [line for line in lines if line["part"] != "conditions"]
    names = sorted({line["name"] for line in measured}, key=lambda name: (not name.startswith("torchvision"), name))
    entries: dict[str, dict[str, Any]] = {name: {"fold": {}, "tools": {}, "problems": {}} for name in names}
    for line in measured:
        place = entries[line["name"]]["problems"] if "problem" in line else entries[line["name"]]
        place[line["part"]] = line["problem"] if "problem" in line else line["result"]
    return entries


def _norms(entry: Mapping[str, Any]) -> int:
    """Return the number of BatchNorm modules; 0 if unknown."""
    return int((entry["fold"] or entry["tools"]).get("norms", 0))


def _count(fold: Fold, place: str, outcomes: Sequence[str] = tuple(OUTCOMES)) -> int:
    """Return the number of BatchNorm calls at a place with one of the outcomes."""
    return sum(fold["outcomes"][place].get(outcome, 0) for outcome in outcomes)


def _standing(fold: Fold) -> int:
    """Return the number of BatchNorm calls that are not gone by their rows."""
    return sum(_count(fold, place) - _count(fold, place, GONE) for place in ("adjacent", "apart"))


def _warned(fold: Fold) -> bool:
    return any("failed its proof" in text for text in fold["warnings"])


def _verdict(folds: Mapping[str, Fold], missed: Callable[[Fold], bool]) -> str:
    names = [name for name, fold in folds.items() if missed(fold)]
    return f"missed by {len(names)} ({', '.join(names)})" if names else "met"


def _tool(entries: Mapping[str, Any], folds: Mapping[str, Fold], key: str, heading: str) -> list[object]:
    both = {name: left for name in folds if key in (left := entries[name]["tools"].get("left", {}))}
    before = sum(left.get("before", _norms(entries[name])) for name, left in both.items())
    return [heading, len(both), before, sum(left[key] for left in both.values()),
            sum(folds[name]["remaining"] for name in both)]  # fmt: skip


def _reasons(folds: Mapping[str, Fold]) -> list[list[object]]:
    reasons: Counter[str] = Counter()
    networks: Counter[str] = Counter()
    for fold in folds.values():
        reasons.update(fold["reasons"])
        networks.update(fold["reasons"].keys())
    return [[count, networks[reason], reason] for reason, count in reasons.most_common()]


def _costs(folds: Mapping[str, Fold]) -> list[list[str]]:
    costs = {name: {key: cost["middle"] for key, cost in fold["cost"].items()} for name, fold in folds.items()}
    found = []
    for key, ratio, what in (("fold", "ratio", "without the proofs"), ("proved", "ratio_proved", "with the proofs")):
        if costs:
            worst = max(costs, key=lambda name: costs[name][ratio])
            middle = statistics.median(cost[ratio] for cost in costs.values())
            total, traced = (sum(cost[name] for cost in costs.values()) for name in (key, "trace"))
            together = f"{total / traced:.2f} ({total:.0f} s of {traced:.0f} s)"
            found.append([what, f"{middle:.2f}", f"{costs[worst][ratio]:.2f} ({worst})", together])
    return found


def _cells(name: str, entry: Mapping[str, Any]) -> list[object]:
    fold, left, failed = entry["fold"], entry["tools"].get("left", {}), entry["tools"].get("failed", {})
    tools = [left.get(key, "failed" if key in failed else _NOTHING) for key in TOOLS]
    head = [name, (fold or entry["tools"])["shape"][-1]]
    if "calls" not in fold:
        return [*head, _norms(entry), *[_NOTHING] * 5, *tools, *[_NOTHING] * 5]
    cost, counts = fold["cost"], [_count(fold, "adjacent"), _count(fold, "apart"), _count(fold, "apart", GONE)]
    clamps = fold["clamped"]["remaining"] if "clamped" in fold else _NOTHING
    check = f"{_size(fold['check_error'])} ({_size(fold['check_noise'])}){' WRONG' if fold['wrong'] else ''}"
    trace = f"{cost['trace']['low']:.2f} (n = {cost['trace']['n']})"
    ratios = [f"{cost[key]['low']:.2f} to {cost[key]['high']:.2f}" for key in ("ratio", "ratio_proved")]
    ours = [sum(counts[:2]), *counts, fold["remaining"], clamps]
    return [*head, *ours, *tools, _size(fold["error"]), check, trace, *ratios]


def _failures(entries: Mapping[str, Any]) -> list[list[str]]:
    found = [[name, part, why] for name, entry in entries.items() for part, why in entry["problems"].items()]
    failed = [(name, item) for name, entry in entries.items() for item in entry["tools"].get("failed", {}).items()]
    return found + [[name, TOOLS.get(tool, "export for the tools"), why] for name, (tool, why) in failed]


def _size(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:.1e}"


def main() -> None:
    """Measure, and write the page if --page names it."""
    parser = options("zoo", __doc__)
    parser.add_argument("names", nargs="*", metavar="NETWORK", help="torchvision:NAME or timm:NAME; default: all")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines; their networks are kept")
    parser.add_argument("--only", choices=[*PARTS], help="measure this part alone")
    parser.add_argument("--limit", type=int, default=0, help="measure at most this many networks")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--seconds", type=float, default=300.0, help="time limit of one network")
    parser.add_argument("--memory-gb", type=float, default=10.0, help="memory limit of one process")
    parser.add_argument("--again", action="store_true", help="measure networks of the file again")
    parser.add_argument("--page", type=Path, help="write the page of all measurements to this file")
    given = vars(parser.parse_args())
    page, only = given.pop("page"), given.pop("only")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread a process: as many processes as --jobs
    given |= {"names": tuple(given["names"]), "parts": (only,) if only else tuple(PARTS)}
    lines = run_zoo(ZooRun(**given), on_line=progress)
    if page:
        write_document(lines, page)


if __name__ == "__main__":
    finish("zoo", main)
