"""The page docs/zoo.md, written from the lines of a measured zoo."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bnexport.benchmarking.pages import write_page
from bnexport.benchmarking.zoo_fold import PLACES, WRONG_FACTOR, WRONG_SHARE
from bnexport.benchmarking.zoo_subject import CALIBRATION, EXAMPLE
from bnexport.environment import describe
from bnexport.folding.report import GONE, OUTCOMES
from bnexport.folding.torch_backend.proof import MAX_ERROR

#: Column of the tools -> its heading.
TOOLS: dict[str, str] = {
    "torch.onnx.export": "torch.onnx.export",
    "torch.jit.freeze": "torch.jit.freeze",
    "onnxruntime": "ONNX Runtime",
    "onnxslim": "onnxslim",
}
_NOTHING = "-"
_HEAD = """# The zoo: what is left of BatchNorm in networks that people use

Every classification network of torchvision and a fixed choice of timm's, with random weights and random statistics per
channel, folded by bnexport and by the tools that most people have. Written by `python scripts/zoo.py`.
"""


@dataclass(frozen=True, eq=False)
class Entry:
    """One network, both parts; empty where a part was not measured or failed.

    Attributes:
        name: As in the lines.
        fold: The result of the part "fold".
        tools: The result of the part "tools".
        problems: Part -> why it failed.
    """

    name: str
    fold: Mapping[str, Any]
    tools: Mapping[str, Any]
    problems: Mapping[str, str]

    @property
    def norms(self) -> int:
        """BatchNorm modules of the network; 0 when they are not known."""
        return int((self.fold or self.tools).get("norms", 0))

    def count(self, place: str, outcomes: Sequence[str], *, clamped: bool = False) -> int:
        """BatchNorm calls at a place with one of the outcomes, by a fold without or with ``clamps``."""
        fold = self.fold.get("clamped", {}) if clamped else self.fold
        found = fold.get("outcomes", {}).get(place, {})
        return sum(int(found.get(outcome, 0)) for outcome in outcomes)

    @property
    def standing(self) -> int:
        """BatchNorm calls whose row says that they are not gone."""
        return sum(
            self.count(place, [name for name in OUTCOMES if name not in GONE]) for place in ("adjacent", "apart")
        )


def write_document(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the page.

    Args:
        lines: As ``zoo.read_lines`` gives them.
        path: The file.

    Raises:
        OutputError: The file can't be written.
    """
    entries = entries_of(lines)
    folded = [entry for entry in entries if "calls" in entry.fold]
    parts = [_HEAD, *_conditions(lines), *_totals(entries, folded), *_targets(folded), *_reasons(folded)]
    parts += [*_cost(folded), *_table(entries), *_failures(entries)]
    write_page(parts, path)


def entries_of(lines: Sequence[Mapping[str, Any]]) -> list[Entry]:
    """The lines by network, in the order of their names."""
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


def _conditions(lines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield "## Conditions\n"
    for line in lines:
        if line["part"] == "conditions":
            processes = f"{line['jobs']} at a time, each a process of one thread"
            yield f"- {line['name']}: {describe(dict(line))}; seed {line['seed']}, {processes}"
    yield (
        f"- images: the smallest of 64, 96 and 128 pixels that the network takes, else its own size; traced with a batch of"
        f" {EXAMPLE}, statistics from {CALIBRATION} samples of noise"
    )
    yield (
        "- BatchNorm: gammas of both signs and some 0, shifted means, variances spread over two decades per channel, eps of"
        " 1e-5, 1e-3 and 3e-2; layer scales and biases drawn anew"
    )
    yield (
        "- tools: `torch.onnx.export` with its default optimiser; `torch.jit.trace` and `torch.jit.freeze`; ONNX Runtime's"
        " extended level (the next one turns BatchNorms into convolutions for one kind of processor) and onnxslim on an export"
        " without optimiser, its constants computed\n"
    )


def _totals(entries: Sequence[Entry], folded: Sequence[Entry]) -> Iterator[str]:
    yield "## Totals\n"
    without = [entry for entry in entries if not entry.norms and not entry.problems]
    calls = sum(_calls(entry) for entry in folded)
    yield (
        f"{len(entries)} networks, {len(entries) - len(without)} of them with BatchNorm; {len(folded)} folded, with {calls}"
        f" BatchNorm calls: {sum(entry.count('adjacent', list(OUTCOMES)) for entry in folded)} adjacent"
        f" ({PLACES['adjacent']}) and {sum(entry.count('apart', list(OUTCOMES)) for entry in folded)} apart."
    )
    if arithmetic := sum(entry.count("arithmetic", list(OUTCOMES)) for entry in folded):
        yield f"The account has {arithmetic} more rows, which are not counted here: {PLACES['arithmetic']}."
    yield "\n| outcome | adjacent | apart | what it means |"
    yield "|---|---|---|---|"
    for outcome, meaning in OUTCOMES.items():
        counts = [sum(entry.count(place, [outcome]) for entry in folded) for place in ("adjacent", "apart")]
        yield f"| {outcome} | {counts[0]} | {counts[1]} | {meaning} |"
    yield "\nNorm operators left, on the networks on which bnexport and the tool both ran:\n"
    yield "| tool | networks | BatchNorms before | left by the tool | left by bnexport |"
    yield "|---|---|---|---|---|"
    for key, heading in TOOLS.items():
        both = [entry for entry in folded if key in entry.tools.get("left", {})]
        before = sum(entry.tools["left"].get("before", entry.norms) for entry in both)
        left, ours = sum(entry.tools["left"][key] for entry in both), sum(entry.fold["remaining"] for entry in both)
        yield f"| {heading} | {len(both)} | {before} | {left} | {ours} |"
    yield ""


def _targets(folded: Sequence[Entry]) -> Iterator[str]:
    wrong = [entry.name for entry in folded if entry.fold["wrong"]]
    warned = [entry.name for entry in folded if any("failed its proof" in text for text in entry.fold["warnings"])]
    adjacent = [entry for entry in folded if entry.count("adjacent", list(OUTCOMES)) > entry.count("adjacent", GONE)]
    apart, gone = sum(e.count("apart", list(OUTCOMES)) for e in folded), sum(e.count("apart", GONE) for e in folded)
    more = [entry.name for entry in folded if entry.fold["remaining"] > entry.standing]
    yield "## Targets\n"
    yield (
        f"- No network wrong: {_verdict(wrong)}. Wrong is a folded network whose float32 error, on other inputs and another"
        f" batch size than were traced, is more than {WRONG_FACTOR:g} times the network's own plus {WRONG_SHARE:g}, both"
        " against the unfolded network in float64."
    )
    yield f"- No fold failed its own proof: {_verdict(warned)}."
    yield from _exactness(folded)
    yield f"- No adjacent BatchNorm left: {_verdict([entry.name for entry in adjacent])}."
    if apart:
        yield f"- Apart and gone: {gone} of {apart} ({100 * gone / apart:.1f} %)."
    yield f"- No more norm operators in the graph than rows say: {_verdict(more)}."
    yield from _clamped([entry for entry in folded if "clamped" in entry.fold], apart)
    yield ""


def _exactness(folded: Sequence[Entry]) -> Iterator[str]:
    """How many wholes agree to 1e-12, and which networks amplify rounding so that theirs do not."""
    errors = {entry: entry.fold["error"] for entry in folded if entry.fold["error"] is not None}
    exact = [error for error in errors.values() if error <= MAX_ERROR]
    if not errors:
        return
    yield (
        f"- Exact in float64: {len(exact)} of {len(errors)} networks to {MAX_ERROR:g} of the scale (worst"
        f" {max(exact, default=0.0):.1e}). The others turn the last digit of their input into more than that; each of their"
        " folds was proved alone: "
        + (
            ", ".join(
                f"{entry.name} ({error:.1e}, its own float32 error {_size(entry.fold['check_noise'])})"
                for entry, error in errors.items()
                if error > MAX_ERROR
            )
            or "none"
        )
        + "."
    )


def _clamped(folded: Sequence[Entry], apart: int) -> Iterator[str]:
    if not folded or not apart:
        return
    found = [entry.fold["clamped"] for entry in folded]
    gone = sum(entry.count("apart", GONE, clamped=True) for entry in folded)
    wrong = [
        entry.name
        for entry, item in zip(folded, found, strict=True)
        if item["wrong"] or any("failed its proof" in text for text in item["warnings"])
    ]
    yield (
        f"- With `--clamps` (a bound per channel in place of a BatchNorm before or after a ReLU; no faster on a CPU,"
        f" [affine_form.md](affine_form.md)): apart and gone {gone} of {apart} ({100 * gone / apart:.1f} %); norm operators"
        f" left {sum(item['remaining'] for item in found)} instead of {sum(entry.fold['remaining'] for entry in folded)};"
        f" no network wrong and no proof failed: {_verdict(wrong)}."
    )


def _reasons(folded: Sequence[Entry]) -> Iterator[str]:
    reasons: Counter[str] = Counter()
    networks: Counter[str] = Counter()
    for entry in folded:
        reasons.update(entry.fold["reasons"])
        networks.update(dict.fromkeys(entry.fold["reasons"], 1))
    if not reasons:
        return
    yield "## Why the rest is left\n"
    yield "| calls | networks | reason |"
    yield "|---|---|---|"
    for reason, count in reasons.most_common():
        yield f"| {count} | {networks[reason]} | {_cell(reason)} |"
    yield ""


def _cost(folded: Sequence[Entry]) -> Iterator[str]:
    if not folded:
        return
    yield "## Cost\n"
    yield "Seconds of a fold without its `torch.export` as a multiple of that, once each, two networks at a time.\n"
    yield "| | median network | largest | all networks together |"
    yield "|---|---|---|---|"
    for key, ratio, what in (("fold", "ratio", "without the proofs"), ("proved", "ratio_proved", "with the proofs")):
        ratios = {entry.name: entry.fold["cost"][ratio]["middle"] for entry in folded}
        worst = max(ratios, key=lambda name: ratios[name])
        total = sum(entry.fold["cost"][key]["middle"] for entry in folded)
        traced = sum(entry.fold["cost"]["trace"]["middle"] for entry in folded)
        middle = statistics.median(ratios.values())
        together = f"{total / traced:.2f} ({total:.0f} s of {traced:.0f} s)"
        yield f"| {what} | {middle:.2f} | {ratios[worst]:.2f} ({worst}) | {together} |"
    yield ""


def _table(entries: Sequence[Entry]) -> Iterator[str]:
    yield "## Every network\n"
    yield (
        "left: norm operators that remain, by bnexport and by each tool. error: folded against unfolded, both in float64."
        " check: folded in float32 against unfolded in float64, in brackets unfolded in float32. trace: seconds of"
        " torch.export, least disturbed of n. fold: of everything else as a multiple of it, without and with the proofs,"
        " smallest and largest.\n"
    )
    heads = [
        "network",
        "pixels",
        "BatchNorms",
        "adjacent",
        "apart",
        "apart, gone",
        "left: bnexport",
        "with clamps",
        *TOOLS.values(),
    ]
    heads += ["error", "check", "trace, s", "fold", "with proofs"]
    yield "| " + " | ".join(heads) + " |"
    yield "|" + "---|" * len(heads)
    for entry in entries:
        if entry.norms and (entry.fold or entry.tools):
            yield "| " + " | ".join(_cells(entry)) + " |"
    if without := [entry.name for entry in entries if not entry.norms and not entry.problems]:
        yield f"\nWithout BatchNorm: {', '.join(without)}."
    yield ""


def _cells(entry: Entry) -> list[str]:
    left, failed = entry.tools.get("left", {}), entry.tools.get("failed", {})
    tools = [str(left[key]) if key in left else "failed" if key in failed else _NOTHING for key in TOOLS]
    pixels = str((entry.fold or entry.tools)["shape"][-1])
    if "calls" not in entry.fold:
        return [entry.name, pixels, str(entry.norms), *[_NOTHING] * 5, *tools, *[_NOTHING] * 5]
    fold = entry.fold
    cost = fold["cost"]
    ours = [str(_calls(entry)), str(entry.count("adjacent", list(OUTCOMES))), str(entry.count("apart", list(OUTCOMES)))]
    ours += [str(entry.count("apart", GONE)), str(fold["remaining"])]
    ours += [str(fold["clamped"]["remaining"]) if "clamped" in fold else _NOTHING]
    check = f"{_size(fold['check_error'])} ({_size(fold['check_noise'])}){' WRONG' if fold['wrong'] else ''}"
    trace = f"{cost['trace']['low']:.2f} (n = {cost['trace']['n']})"
    ratios = [f"{cost[key]['low']:.2f} to {cost[key]['high']:.2f}" for key in ("ratio", "ratio_proved")]
    return [entry.name, pixels, *ours, *tools, _size(fold["error"]), check, trace, *ratios]


def _failures(entries: Sequence[Entry]) -> Iterator[str]:
    found = [(entry.name, part, why) for entry in entries for part, why in entry.problems.items()]
    found += [
        (entry.name, TOOLS.get(tool, "export for the tools"), why)
        for entry in entries
        for tool, why in entry.tools.get("failed", {}).items()
    ]
    yield "## Failures\n"
    if not found:
        yield "None."
        return
    yield "| network | what | why |"
    yield "|---|---|---|"
    for name, part, why in found:
        yield f"| {name} | {part} | {_cell(why)} |"


def _calls(entry: Entry) -> int:
    return sum(entry.count(place, list(OUTCOMES)) for place in ("adjacent", "apart"))


def _verdict(names: Sequence[str]) -> str:
    return f"missed by {len(names)} ({', '.join(names)})" if names else "met"


def _size(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:.1e}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
