"""The page docs/gpu.md, written from the results of the GPU lane."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.gpu.measure import Run
from benchmarks.gpu.results import TRAINING, Lane, parts_of, runtime_of
from benchmarks.gpu.sweeps import cpu_sweeps, gpu_sweeps
from benchmarks.pages import write_page
from bnexport.environment import describe
from bnexport.errors import UsageError

#: Stands in the page as long as no GPU was measured. A later call may replace such a page without loss.
NOT_MEASURED = "No GPU has been measured yet."
_NOTHING = "-"
#: Prose is one line per paragraph; the page's writer wraps it.
_HEAD = (
    "# GPU runtimes\n\n"
    "Every GPU runtime in every way in which people call it, judged by the stages of verification: strict float32 against a "
    "fixed bound, and the precision that is served against the noise that emulation predicts for this very model "
    "([verification.md](verification.md)). Written by `scripts/gpu_lane`.\n"
)
_EMULATED = (
    f"{NOT_MEASURED} The lane ran on a CPU instead. This shows that the lane works; it shows nothing about any GPU. The engine "
    "`emulated-cpu` is numpy that rounds as TF32 and bfloat16 do, so it agrees with its own prediction. The engines of the CPU "
    "are real.\n"
)
_COLUMNS = (
    ("error", "largest |difference| from float64 / largest |reference|, on the worst batch"),
    ("x predicted", "that error / the noise predicted for its batch"),
    ("precision", "the precision that the error indicates"),
    ("repeat", "two runs in one session"),
    ("batches", "the same samples in batches of 1, 2, 7, 64 and all"),
    ("labels", "top-1 labels that changed, over all batches; a change that its margin does not explain fails the run"),
    ("nodes", "number of nodes on each execution provider, or in each precision"),
)
_SESSIONS = (
    "The same inputs in two sessions, largest |difference| / largest |output|. Since ONNX Runtime 1.20 the setting of the "
    "convolution search selects a list of cuDNN's heuristics (`EXHAUSTIVE`: mode B, `HEURISTIC`: mode A, `DEFAULT`: the "
    "fallback list) and measures no time. Before 1.20 `EXHAUSTIVE` timed the algorithms, so two sessions could choose "
    "different ones.\n"
)
_REFUSALS = (
    "`bnexport verify --runtime NAME` in a process from which a library or the device is hidden. The process must end with "
    "exit code 3 and name the missing part; it must never answer from the CPU. An empty file of a library's name, which the "
    "loader finds first, hides the library.\n"
)
_TRAINING = (
    "BN-LeNet on random images in the GPU's memory; 10 epochs, each with an evaluation, after 2 epochs that are not counted. "
    "Images/s of an epoch with its evaluation.\n"
)
_NO_TRAINING = (
    "Not measured yet. The code for it (data on the device, the step recorded as a CUDA graph, sums read once per epoch) is "
    "tested where there is a GPU, by `tests/gpu/test_gpu_training.py`.\n"
)
_HOW = (
    "## How to run it\n\n"
    "```sh\n"
    "scripts/gpu_lane --data-dir DIR                  # all; writes this page and runs/gpu_lane.json after each part\n"
    "scripts/gpu_lane --seconds 300 --only onnxruntime-cuda\n"
    "scripts/gpu_lane --merge FIRST.json SECOND.json  # one page from several calls; measures nothing\n"
    "scripts/gpu_session OUT_DIR                      # the most valuable parts first, within 420 seconds\n"
    "BNEXPORT_REQUIRE=cuda,ort-cuda python -m pytest tests/gpu\n"
    "```\n\n"
    "`scripts/gpu_session` suits a machine that is available for minutes. It writes at most 8 files into the folder while it "
    "runs, so a kill loses only the current step: `summary.json` has the state, the exit code and the duration of each step, "
    "`log.txt` their output, `gpu.json` the measurements. Afterwards `scripts/gpu_lane --merge OUT_DIR/gpu.json` writes this "
    "page. With `--rehearse` the same steps run on a CPU.\n\n"
    "Both commands start from a checkout; bnexport need not be installed. They need torch 2.11 or newer and the other "
    "dependencies in `pyproject.toml`, of which `platformdirs` may be missing. The first step of a session lists what is "
    "missing. For a machine without a package index, download the missing wheels elsewhere and take them along:\n\n"
    "```sh\n"
    "pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 -d wheels NAME\n"
    "pip install --no-index --no-deps --target site wheels/*.whl && export PYTHONPATH=$PWD/site  # on the GPU machine\n"
    "```\n\n"
    "Such a machine often has ONNX Runtime for the CPU only. Take `onnxruntime-gpu` of the same CUDA major version as torch; "
    "its CUDA libraries are found in the `nvidia-*` packages on which torch depends.\n\n"
    "The tests skip what the machine lacks; `BNEXPORT_REQUIRE` makes such a skip a failure, also in `scripts/gpu_lane`.\n"
)


def refuse_replacing(path: Path, *, real: bool) -> None:
    """Refuse to replace measurements of a GPU by a rehearsal.

    Raises:
        UsageError: The page holds measurements of a GPU, and ``real`` is false.
    """
    if not real and path.is_file() and NOT_MEASURED not in path.read_text(encoding="utf-8", errors="replace"):
        raise UsageError(
            f"{path} holds measurements of a GPU, which a rehearsal must not replace",
            remedy="Run the lane on a machine with a GPU, or give another --out",
        )


def write_document(lane: Lane, path: Path) -> None:
    """Write the page; a reader finds the old page or the new.

    Raises:
        UsageError: The page there holds measurements of a GPU, and this lane has none.
        OutputError: The file can't be written.
    """
    refuse_replacing(path, real=lane.measured)
    write_page(page(lane), path)


def page(lane: Lane) -> Iterator[str]:
    """Yield the page, part by part."""
    yield _HEAD
    yield f"Measured on {', '.join(f'{k} {v}' for k, v in lane.machine.items())}.\n" if lane.measured else _EMULATED
    unreached = f" {len(lane.unreached)} requested parts were not reached." if lane.unreached else ""
    yield (
        f"{lane.verdict}: {len(lane.runs)} settings of {len(_names(lane))} runtimes, against {lane.reference}.{unreached} "
        f"{describe(dict(lane.environment))}.\n"
    )
    yield "## Runs\n"
    yield from (f"- {name}: {text}." for name, text in _COLUMNS)
    yield ""
    for name in _names(lane):
        yield from _runs(name, [run for run in lane.runs if run.runtime == name])
    yield from _failures(lane)
    yield from _sessions(lane)
    yield from _drift(lane)
    yield from _refusals(lane)
    yield from _not_measured(lane)
    yield from _absent(lane)
    yield from training_table(lane)
    yield _HOW


def _names(lane: Lane) -> list[str]:
    return list(dict.fromkeys(run.runtime for run in lane.runs))


def _runs(name: str, runs: Sequence[Run]) -> Iterator[str]:
    yield f"### {name}\n"
    yield "| settings | stage | error | bound | x predicted | precision | repeat | batches | labels | nodes | |"
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
        yield "## Failures\n"
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
        result = (
            "every layer keeps its prediction" if layer is None else f"`{layer}` is the first to leave its prediction"
        )
        yield f"- {name}: {result}"
    yield ""


def _refusals(lane: Lane) -> Iterator[str]:
    if not lane.refused:
        return
    yield "## Missing libraries\n"
    yield _REFUSALS
    yield "| hidden | runtime | exit code | message | |"
    yield "|---|---|---|---|---|"
    for item in lane.refused:
        hidden = ", ".join(item.refusal.hidden) or ", ".join(f"{k}={v}" for k, v in item.refusal.environment.items())
        said = item.said.removeprefix("Error: ").replace("|", "\\|")
        code = _NOTHING if item.code is None else str(item.code)
        verdict = "PASS" if item.passed else "**FAIL**"
        yield _line((f"{item.refusal.name} (`{hidden}`)", item.refusal.runtime, code, said, verdict))
    yield ""


def _not_measured(lane: Lane) -> Iterator[str]:
    """Yield the parts without a result, so that the page does not look complete where it is not."""
    table = [sweep.name for sweep in (gpu_sweeps() if lane.real else cpu_sweeps())]
    done = parts_of(lane) | set(lane.unreached)
    missing = [f"- {name}: not reached, because the time was up" for name in lane.unreached]
    missing += [
        f"- {name}: not requested" for name in table if name not in done and runtime_of(name) not in lane.absent
    ]
    if missing:
        yield "## Not measured\n"
        yield from missing
        yield ""


def _absent(lane: Lane) -> Iterator[str]:
    if lane.absent:
        yield "## Not available on this machine\n"
        yield from (f"- {name}: {reason}" for name, reason in lane.absent.items())
        yield ""


def training_table(lane: Lane) -> Iterator[str]:
    """Yield the section on training speed, line by line."""
    yield f"## {TRAINING.capitalize()}\n"
    if not (lane.measured and lane.training):
        yield _NO_TRAINING
        return
    yield _TRAINING
    yield "| norm | batch | images per epoch | step | slowest, images/s | median | fastest | 10 epochs, s |"
    yield "|---|---|---|---|---|---|---|---|"
    for row in lane.training:
        spread, step = row.images_per_s, "recorded as a CUDA graph" if row.captured else "one kernel at a time"
        speeds = (f"{value:,.0f}" for value in (spread.low, spread.middle, spread.high))
        yield _line((row.norm, str(row.batch_size), f"{row.images:,}", step, *speeds, f"{row.total_s:.2f}"))
    yield ""


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(value: float | None) -> str:
    if value is None:
        return _NOTHING
    return "0" if value == 0 else f"{value:.1e}"


def _provider(name: str) -> str:
    return name.removesuffix("ExecutionProvider").replace("Tensorrt", "TensorRT")
