"""The page docs/gpu.md, written from a run of the GPU lane."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.gpu.lane import Lane, Run
from benchmarks.gpu.training import speed_table
from benchmarks.pages import write_page
from bnexport.environment import describe
from bnexport.errors import UsageError

#: Stands in the page as long as no GPU was measured, and tells a later run that nothing is lost by writing it again.
NOT_MEASURED = "No GPU has been measured yet."
_NOTHING = "-"
#: Prose is one line a paragraph; the page's writer wraps it.
_HEAD = (
    "# GPU runtimes\n\n"
    "Every GPU runtime in every way in which people call it, judged by the stages of verification: strict float32 against a "
    "fixed bound, and the precision that is served against the noise that emulation predicts for this very model "
    "([verification.md](verification.md)). Written by `python scripts/gpu_lane.py`.\n"
)
_EMULATED = (
    f"{NOT_MEASURED} The lane ran on a CPU instead, which shows that it works and nothing about any GPU: the engine "
    "`emulated-cpu` is numpy that rounds as TF32 and bfloat16 do, so it is judged by a prediction of its own kind; the engines "
    "of the CPU are real.\n"
)
_COLUMNS = (
    "error: largest |difference| from float64 / largest |reference|, on the worst batch. x predicted: that error over the "
    "noise predicted for its batch. told by the error: the precision that it looks like. repeat: two runs in one session. "
    "batches: the same samples in batches of 1, 2, 7, 64 and all. labels: top-1 labels that changed, over all batches; each is "
    "explained by its margin, or the run fails. nodes: where they ran, or in which precision.\n"
)
_SESSIONS = (
    "The same inputs in two sessions, largest |difference| / largest |output|. An exhaustive search chooses algorithms by the "
    "stopwatch, so it may choose others next time.\n"
)
_REFUSALS = (
    "`bnexport verify --runtime NAME` in a process from which something is hidden: it must end with exit code 3 and the name "
    "of what is missing, never with an answer from the CPU. Libraries are hidden by empty files of their names, which the "
    "loader finds first.\n"
)


def write_document(lane: Lane, path: Path) -> None:
    """Write the page.

    Raises:
        UsageError: The page there holds measurements of a GPU, and this lane none.
        OutputError: The file can't be written.
    """
    if not lane.real and path.is_file() and NOT_MEASURED not in path.read_text(encoding="utf-8", errors="replace"):
        raise UsageError(
            f"{path} holds measurements of a GPU, which an emulation must not replace",
            remedy="Run the lane on a machine with a GPU, or give another --out",
        )
    write_page(page(lane), path)


def page(lane: Lane) -> Iterator[str]:
    """The page, part by part."""
    yield _HEAD
    yield _measured(lane) if lane.real else _EMULATED
    verdict = "PASS" if lane.passed else "FAIL"
    yield (
        f"{verdict}: {len(lane.runs)} settings of {len(_names(lane))} runtimes, against {lane.reference}. "
        f"{describe(dict(lane.environment))}.\n"
    )
    yield "## Runs\n"
    yield _COLUMNS
    for name in _names(lane):
        yield from _runs(name, [run for run in lane.runs if run.runtime == name])
    yield from _failures(lane)
    yield from _sessions(lane)
    yield from _drift(lane)
    yield from _refusals(lane)
    yield from _absent(lane)
    yield from speed_table(lane.training)
    yield _HOW


def _measured(lane: Lane) -> str:
    return f"Measured on {', '.join(f'{name} {value}' for name, value in lane.machine.items())}.\n"


def _names(lane: Lane) -> list[str]:
    return list(dict.fromkeys(run.runtime for run in lane.runs))


def _runs(name: str, runs: Sequence[Run]) -> Iterator[str]:
    yield f"### {name}\n"
    yield "| settings | stage | error | bound | x predicted | told by the error | repeat | batches | labels | nodes | |"
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for run in runs:
        cells = (
            run.settings or "float32",
            run.stage,
            _number(run.error),
            _number(run.bound),
            f"{run.error / run.predicted:.1f}" if run.error is not None and run.predicted else _NOTHING,
            run.detected or _NOTHING,
            _number(run.repeat),
            _number(run.batches),
            str(run.changed),
            ", ".join(f"{n} {_provider(provider)}" for provider, n in (run.nodes or {}).items()) or _NOTHING,
            "PASS" if run.passed else "**FAIL**",
        )
        yield _line(cells)
    yield ""


def _failures(lane: Lane) -> Iterator[str]:
    failed = [f"- {run.runtime}, {run.settings or 'float32'}: {run.reason}" for run in lane.runs if not run.passed]
    failed += [f"- {name}: {reason}" for name, reason in lane.broken.items()]
    if failed:
        yield "## What failed\n"
        yield from failed
        yield ""


def _sessions(lane: Lane) -> Iterator[str]:
    if not lane.sessions:
        return
    yield "## Two sessions\n"
    yield _SESSIONS
    yield "| runtime | settings | difference |"
    yield "|---|---|---|"
    for (name, settings), difference in lane.sessions.items():
        yield _line((name, settings or "float32", _number(difference)))
    yield ""


def _drift(lane: Lane) -> Iterator[str]:
    if not lane.drift:
        return
    yield "## Layer by layer\n"
    for name, layer in lane.drift.items():
        told = "no layer leaves its prediction" if layer is None else f"`{layer}` is the first to leave its prediction"
        yield f"- {name}: {told}"
    yield ""


def _refusals(lane: Lane) -> Iterator[str]:
    if not lane.refused:
        return
    yield "## Missing libraries\n"
    yield _REFUSALS
    yield "| hidden | runtime | exit code | what it says | |"
    yield "|---|---|---|---|---|"
    for item in lane.refused:
        hidden = ", ".join(item.refusal.hidden) or ", ".join(f"{k}={v}" for k, v in item.refusal.environment.items())
        said = item.said.removeprefix("Error: ").replace("|", "\\|")
        code = _NOTHING if item.code is None else str(item.code)
        verdict = "PASS" if item.passed else "**FAIL**"
        yield _line((f"{item.refusal.name} (`{hidden}`)", item.refusal.runtime, code, said, verdict))
    yield ""


def _absent(lane: Lane) -> Iterator[str]:
    if lane.absent:
        yield "## Not here\n"
        yield from (f"- {name}: {reason}" for name, reason in lane.absent.items())
        yield ""


_HOW = (
    "## How to run it\n\n"
    "```sh\n"
    "$ python scripts/gpu_lane.py --data-dir DIR\n"
    "$ BNEXPORT_REQUIRE=cuda,ort-cuda python -m pytest tests/gpu\n"
    "```\n\n"
    "From a checkout with `PYTHONPATH=.`, or where bnexport is installed; torch 2.11 or newer. The tests skip what the machine "
    "lacks; `BNEXPORT_REQUIRE` makes such a skip a failure, for both commands.\n"
)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(value: float | None) -> str:
    if value is None:
        return _NOTHING
    return "0" if value == 0 else f"{value:.1e}"


def _provider(name: str) -> str:
    return name.removesuffix("ExecutionProvider").replace("Tensorrt", "TensorRT")
