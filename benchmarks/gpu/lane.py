"""The GPU lane: every GPU runtime in every setting, judged by the stages of verification.

The lane consists of parts: the sweeps of a table (``sweeps.py``), the training speed, and the refusals of hidden libraries.
Each part runs in a separate process, so that a crash loses one part, and its result is kept at once. Without a GPU the same
code measures an emulated engine and the CPU's engines, which tests the lane itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.command import side_by_side
from benchmarks.gpu import sweeps as tables
from benchmarks.gpu.measure import MAX_SAMPLES, gpu_machine, measure
from benchmarks.gpu.refusals import REFUSALS, HiddenLibrary, refuse
from benchmarks.gpu.results import TRAINING, Lane, merge, parts_of, read_results, runtime_of, write_results
from benchmarks.gpu.sweeps import Sweep
from bnexport.bundle import MANIFEST, Bundle
from bnexport.environment import environment
from bnexport.errors import RuntimeUnavailable
from bnexport.files import sha256
from bnexport.optional import one_line
from bnexport.runtimes.base import plain_reason
from bnexport.runtimes.catalogue import RUNNERS, RunnerSpec, runner_spec
from bnexport.runtimes.isolation import how_ended, import_path

#: Capability of the tests -> the runtime that needs it.
REQUIRED = {"cuda": "torch-cuda", "ort-cuda": "onnxruntime-cuda", "tensorrt": "onnxruntime-tensorrt"}
#: Seconds for one part; TensorRT may build engines for minutes.
PART_SECONDS = 1800.0
#: Seconds for which a part may continue after the budget is spent, and between two checks of its process.
_GRACE, _POLL = 60.0, 0.05
#: Images of an epoch and of its evaluation, and a batch, in a rehearsal of the training speed on a CPU.
_SMALL: dict[str, Any] = {"train": 512, "test": 64, "batch_sizes": (128,)}
Part = Sweep | HiddenLibrary | None  # None: the training speed


@dataclass(frozen=True)
class LaneInput:
    """The inputs that all parts share."""

    bundle: Bundle  # the bundle to verify
    data_dir: Path | None = None  # the folder of the data set
    max_samples: int = MAX_SAMPLES  # upper bound on the samples of each kind
    real: bool = True  # GPU runtimes are measured; False: the CPU rehearses

    def empty(self) -> Lane:
        """Return a lane without results."""
        return Lane(self.real, sha256(self.bundle.path / MANIFEST), environment=environment())


def run_lane(
    job: LaneInput,
    sweeps: Sequence[Sweep],
    *,
    training: bool = True,
    refusals: Iterable[HiddenLibrary] = REFUSALS,
    seconds: float | None = None,
    jobs: int = 1,
    on_line: Callable[[str], None] = lambda _line: None,
    keep: Callable[[Lane], None] = lambda _lane: None,
) -> Lane:
    """Measure every part whose runtime works here.

    Sweeps run side by side, then the training speed alone, then the refusals (on Linux only) side by side. No part starts
    after ``seconds``, and a part that still runs a minute later is stopped. ``jobs`` parts run side by side, each in a separate
    process; 0: one by one in this process. ``on_line`` receives a line before each part, ``keep`` the results after it.
    """
    begun, stop = time.monotonic(), threading.Event() if jobs > 0 else None
    hidden = {item.part: item for item in refusals if sys.platform.startswith("linux")}
    groups: list[tuple[dict[str, Part], int]] = [
        ({sweep.name: sweep for sweep in sweeps}, jobs), ({TRAINING: None} if training else {}, min(jobs, 1)),
        ({**hidden}, jobs),
    ]  # fmt: skip
    todo = tuple(name for parts, _ in groups for name in parts)
    lane = replace(job.empty(), unreached=todo)
    keep(lane)

    def measured(name: str, part: Part) -> Lane | None:
        left = PART_SECONDS if seconds is None else begun + seconds - time.monotonic()
        if left <= 0 or runtime_of(name) in lane.absent:
            return None
        on_line(name)
        if isinstance(part, HiddenLibrary):
            return replace(job.empty(), refused=(refuse(part, job.bundle.path),))
        if stop is None:
            return list(measure_part(job, part))[-1]
        return _in_child(job, name, min(PART_SECONDS, left + (0 if seconds is None else _GRACE)), stop)

    try:
        for parts, workers in groups:
            for found in side_by_side([partial(measured, *item) for item in parts.items()], workers):
                if found is not None:
                    lane = _in_order(merge([lane, found]), todo)
                    keep(lane)
    finally:
        if stop is not None:
            stop.set()
    return lane


def _in_order(lane: Lane, todo: Sequence[str]) -> Lane:
    """Return a lane in the order of the tables and not of the ends of its parts."""
    sweeps = {name: lane.sweeps[name] for name in sorted(lane.sweeps, key=todo.index)}
    return replace(
        lane, sweeps=sweeps, refused=tuple(sorted(lane.refused, key=lambda item: todo.index(item.refusal.part)))
    )


def table(job: LaneInput) -> tuple[Sweep, ...]:
    """Return the sweeps of a job's kind of device."""
    return tables.gpu_sweeps() if job.real else tables.cpu_sweeps()


def measure_part(job: LaneInput, sweep: Sweep | None) -> Iterator[Lane]:
    """Measure a sweep, or the training speed, in this process; yield the results each time there are more."""
    if sweep is not None and (reason := plain_reason_of(sweep.spec)):
        yield replace(job.empty(), absent={sweep.spec.name: reason})
    elif sweep is not None:
        result = measure(sweep, job.bundle, data_dir=job.data_dir, max_samples=job.max_samples)
        yield replace(job.empty(), sweeps={sweep.name: result}, machine=_machine(job))
    else:
        import torch

        from benchmarks.gpu.training import gpu_speeds

        if job.real and not torch.cuda.is_available():
            yield replace(job.empty(), absent={TRAINING: "torch sees no CUDA device"})
            return
        found = replace(job.empty(), machine=_machine(job))
        for row in gpu_speeds(torch.device("cuda" if job.real else "cpu"), **({} if job.real else _SMALL)):
            found = replace(found, training=(*found.training, row))
            yield found


def _machine(job: LaneInput) -> dict[str, str]:
    return (gpu_machine() or {"GPU": "without a name"}) if job.real else {}


def _in_child(job: LaneInput, part: str, seconds: float, stop: threading.Event) -> Lane:
    """Measure one part in a separate process; a process that ends without all results is a failure of this part."""
    with tempfile.TemporaryDirectory() as folder:
        out, printed = Path(folder) / "part.json", Path(folder) / "printed"
        data_dir = None if job.data_dir is None else str(job.data_dir.resolve())
        shared = {"max_samples": job.max_samples, "real": job.real, "data_dir": data_dir}
        request = {"part": part, "bundle": str(job.bundle.path.resolve()), "out": str(out), **shared}
        command = [sys.executable, "-P", "-m", "benchmarks.gpu.lane", json.dumps(request)]
        with printed.open("wb") as output:
            problem = _problem_of(command, output.fileno(), seconds, stop)
        found = read_results(out) if out.is_file() else job.empty()
        if not problem and not parts_of(found) and not found.absent:
            problem = "ended without a result"
        if not problem:
            return found
        lines = printed.read_text(encoding="utf-8", errors="replace").strip().split("\n")
        why = one_line(RuntimeError(lines[-1]), 200) if lines[-1] else ""
        return replace(found, failed={part: f"its process {problem}" + (f" ({why})" if why else "")})


def _problem_of(command: Sequence[str], output: int, seconds: float, stop: threading.Event) -> str:
    """Run a command until it ends or the lane stops; return why its result can't be trusted, or ""."""
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=os.environ | {"PYTHONPATH": import_path()}
    )
    end = time.monotonic() + seconds
    try:
        while (code := child.poll()) is None and time.monotonic() < end:
            if stop.wait(_POLL):
                return "was interrupted"
    finally:
        child.kill()  # its engines' processes end with their input
        child.wait()
    if code is None:
        return f"was stopped after {seconds:.0f} s"
    return "" if code == 0 else f"ended: {how_ended(code)}"


def require(names: str) -> None:
    """Raise RuntimeUnavailable if a device is missing; ``names``: a list as in BNEXPORT_REQUIRE; others are ignored."""
    for name in (part.strip() for part in names.split(",")):
        if name in REQUIRED:
            runner_spec(REQUIRED[name]).require()


def absent_runtimes() -> dict[str, str]:
    """Return each GPU runtime that does not work here, and why; every runtime computes a small model."""
    return {spec.name: reason for spec in RUNNERS if spec.device != "cpu" and (reason := plain_reason_of(spec))}


def plain_reason_of(spec: RunnerSpec) -> str:
    """Return why a runtime is missing, without its name; "" if it works."""
    reason = spec.available()
    return "" if reason is None else plain_reason(spec.name, RuntimeUnavailable(reason, remedy=""))


def main() -> None:
    """Measure the part that the request names, in this process, and write its results each time there are more."""
    request = json.loads(sys.argv[1])
    data_dir = None if request["data_dir"] is None else Path(request["data_dir"])
    job = LaneInput(Bundle.open(request["bundle"]), data_dir, request["max_samples"], request["real"])
    part = request["part"]
    sweep = None if part == TRAINING else {each.name: each for each in table(job)}[part]
    for found in measure_part(job, sweep):
        write_results(found, Path(request["out"]))


if __name__ == "__main__":
    main()
