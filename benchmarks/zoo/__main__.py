"""Fold every network of torchvision and many of timm, next to other tools; write JSON lines and docs/results/zoo.md.

Networks that are in the file already are not measured again, so an interrupted run resumes. All of them take some hours.
"""

from __future__ import annotations

import os
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.command import finish, options, progress
from benchmarks.pages import render, write_page
from benchmarks.zoo.fold import PLACES, WRONG_FACTOR, WRONG_SHARE
from benchmarks.zoo.network import CALIBRATION, EXAMPLE
from benchmarks.zoo.run import PARTS, ZooRun, run_zoo
from bnexport.environment import describe
from bnexport.folding.report import GONE, OUTCOMES
from bnexport.folding.torch_backend.torch_proof import MAX_ERROR

#: Key of a tool in the lines -> its heading.
TOOLS: dict[str, str] = {
    "torch.onnx.export": "torch.onnx.export",
    "torch.jit.freeze": "torch.jit.freeze",
    "onnxruntime": "ONNX Runtime",
    "onnxslim": "onnxslim",
}
_NOTHING = "-"


@dataclass(frozen=True, eq=False)
class Entry:
    """One network with the results of both parts; empty if a part was not measured or failed."""

    name: str
    fold: Mapping[str, Any]
    tools: Mapping[str, Any]
    problems: Mapping[str, str]  # part -> reason of its failure

    @property
    def norms(self) -> int:
        """Return the number of BatchNorm modules; 0 if unknown."""
        return int((self.fold or self.tools).get("norms", 0))

    @property
    def warned(self) -> bool:
        """Return True if a fold failed its own proof."""
        return any("failed its proof" in text for text in self.fold["warnings"])

    @property
    def clamped(self) -> Entry:
        """Return the same network folded with ``clamps``."""
        return Entry(self.name, self.fold["clamped"], self.tools, self.problems)

    def count(self, place: str, outcomes: Sequence[str] = tuple(OUTCOMES)) -> int:
        """Return the number of BatchNorm calls at a place with one of the outcomes."""
        found = self.fold.get("outcomes", {}).get(place, {})
        return sum(int(found.get(outcome, 0)) for outcome in outcomes)


def write_document(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the page of the lines that ``read_lines`` returns."""
    entries = entries_of(lines)
    folded = [entry for entry in entries if "calls" in entry.fold]
    clamped = [entry for entry in folded if "clamped" in entry.fold]
    plain = [entry for entry in entries if not entry.norms and not entry.problems]
    conditions = [(line, describe(dict(line))) for line in lines if line["part"] == "conditions"]
    errors = [(entry, entry.fold["error"]) for entry in folded if entry.fold["error"] is not None]
    inexact = [
        f"{entry.name} ({error:.1e}, its own float32 error {_size(entry.fold['check_noise'])})"
        for entry, error in errors
        if error > MAX_ERROR
    ]
    text = render(
        "zoo/page.md.jinja", entries=entries, folded=folded, clamped=clamped, plain=plain, conditions=conditions, gone=GONE,
        example=EXAMPLE, calibration=CALIBRATION, places=PLACES, total=lambda place, *rest: _total(folded, place, *rest),
        outcomes=[[name, *(_total(folded, place, [name]) for place in ("adjacent", "apart")), meaning]
                  for name, meaning in OUTCOMES.items()],
        tools=[_tool(folded, key, heading) for key, heading in TOOLS.items()],
        wrong_factor=WRONG_FACTOR, wrong_share=WRONG_SHARE, max_error=MAX_ERROR, errors=errors, inexact=inexact,
        exact=[error for _, error in errors if error <= MAX_ERROR],
        wrong=_verdict(folded, lambda entry: entry.fold["wrong"]), warned=_verdict(folded, lambda entry: entry.warned),
        adjacent=_verdict(folded, lambda entry: entry.count("adjacent") > entry.count("adjacent", GONE)),
        more=_verdict(folded, lambda entry: entry.fold["remaining"] > _standing(entry)),
        clamped_gone=sum(entry.clamped.count("apart", GONE) for entry in clamped),
        clamped_wrong=_verdict(clamped, lambda entry: entry.clamped.fold["wrong"] or entry.clamped.warned),
        reasons=_reasons(folded), costs=_costs(folded), failures=_failures(entries),
        heads=["network", "pixels", "BatchNorms", "adjacent", "apart", "apart, gone", "left: bnexport", "with clamps",
               *TOOLS.values(), "error", "check", "trace, s", "fold", "with proofs"],
        rows=[_cells(entry) for entry in entries if entry.norms and (entry.fold or entry.tools)],
    )  # fmt: skip
    write_page([text], path)


def entries_of(lines: Sequence[Mapping[str, Any]]) -> list[Entry]:
    """Return the lines by network: torchvision's first, in the order of their names."""
    gathered: dict[str, dict[str, Mapping[str, Any]]] = {}
    for line in lines:
        if line["part"] != "conditions":
            gathered.setdefault(line["name"], {})[line["part"]] = line
    return [
        Entry(
            name,
            found.get("fold", {}).get("result", {}),
            found.get("tools", {}).get("result", {}),
            {part: line["problem"] for part, line in found.items() if "problem" in line},
        )
        for name, found in sorted(gathered.items(), key=lambda item: (not item[0].startswith("torchvision"), item[0]))
    ]


def _total(entries: Sequence[Entry], place: str, outcomes: Sequence[str] = tuple(OUTCOMES)) -> int:
    return sum(entry.count(place, outcomes) for entry in entries)


def _standing(entry: Entry) -> int:
    """BatchNorm calls that are not gone by their rows."""
    return sum(entry.count(place) - entry.count(place, GONE) for place in ("adjacent", "apart"))


def _tool(folded: Sequence[Entry], key: str, heading: str) -> list[object]:
    both = [entry for entry in folded if key in entry.tools.get("left", {})]
    before = sum(entry.tools["left"].get("before", entry.norms) for entry in both)
    left, ours = sum(entry.tools["left"][key] for entry in both), sum(entry.fold["remaining"] for entry in both)
    return [heading, len(both), before, left, ours]


def _verdict(entries: Sequence[Entry], missed: Callable[[Entry], bool]) -> str:
    names = [entry.name for entry in entries if missed(entry)]
    return f"missed by {len(names)} ({', '.join(names)})" if names else "met"


def _reasons(folded: Sequence[Entry]) -> list[list[object]]:
    reasons: Counter[str] = Counter()
    networks: Counter[str] = Counter()
    for entry in folded:
        reasons.update(entry.fold["reasons"])
        networks.update(dict.fromkeys(entry.fold["reasons"], 1))
    return [[count, networks[reason], reason] for reason, count in reasons.most_common()]


def _costs(folded: Sequence[Entry]) -> list[list[str]]:
    costs = {entry.name: {key: cost["middle"] for key, cost in entry.fold["cost"].items()} for entry in folded}
    found = []
    for key, ratio, what in (("fold", "ratio", "without the proofs"), ("proved", "ratio_proved", "with the proofs")):
        if costs:
            worst = max(costs, key=lambda name: costs[name][ratio])
            middle = statistics.median(cost[ratio] for cost in costs.values())
            total, traced = (sum(cost[name] for cost in costs.values()) for name in (key, "trace"))
            together = f"{total / traced:.2f} ({total:.0f} s of {traced:.0f} s)"
            found.append([what, f"{middle:.2f}", f"{costs[worst][ratio]:.2f} ({worst})", together])
    return found


def _cells(entry: Entry) -> list[object]:
    left, failed = entry.tools.get("left", {}), entry.tools.get("failed", {})
    tools = [left.get(key, "failed" if key in failed else _NOTHING) for key in TOOLS]
    head = [entry.name, (entry.fold or entry.tools)["shape"][-1]]
    if "calls" not in entry.fold:
        return [*head, entry.norms, *[_NOTHING] * 5, *tools, *[_NOTHING] * 5]
    fold, cost = entry.fold, entry.fold["cost"]
    counts = [entry.count("adjacent"), entry.count("apart"), entry.count("apart", GONE)]
    clamps = fold["clamped"]["remaining"] if "clamped" in fold else _NOTHING
    check = f"{_size(fold['check_error'])} ({_size(fold['check_noise'])}){' WRONG' if fold['wrong'] else ''}"
    trace = f"{cost['trace']['low']:.2f} (n = {cost['trace']['n']})"
    ratios = [f"{cost[key]['low']:.2f} to {cost[key]['high']:.2f}" for key in ("ratio", "ratio_proved")]
    ours = [sum(counts[:2]), *counts, fold["remaining"], clamps]
    return [*head, *ours, *tools, _size(fold["error"]), check, trace, *ratios]


def _failures(entries: Sequence[Entry]) -> list[list[str]]:
    found = [[entry.name, part, why] for entry in entries for part, why in entry.problems.items()]
    failed = [(entry.name, item) for entry in entries for item in entry.tools.get("failed", {}).items()]
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
