"""Everything that a GPU can show, in the order of its value, within minutes: ``scripts/gpu_session OUT_DIR``.

Each step is a process with a time limit. Its output and exit code are recorded when it ends, and a step that fails or is
stopped does not stop the rest. The folder receives at most 8 files, all of them while the session runs:
``summary.json`` (state, exit code, duration and last line of each step), ``log.txt`` (the output of all steps),
``verify.json``, and of the GPU lane ``gpu.json`` and ``gpu.md``.
Exit codes: 0 every step ran and passed; 1 a step failed, was stopped, or was not reached; 2 bad input; 3 no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import util
from pathlib import Path
from typing import IO

from benchmarks.gpu.sweeps import cpu_sweeps, gpu_sweeps
from bnexport.errors import BnexportError, OutputError
from bnexport.files import output_errors, write_atomically
from bnexport.runtimes.isolation import import_path

ROOT = Path(__file__).parents[2]
SECONDS = 420.0
#: A step that has less time is not started.
_LEAST = 5.0
#: Reserved for writing the summary after a step was stopped.
_RESERVE = 2.0
#: The log stays below this size, so that the folder can be fetched; a step's output is cut at its share.
_LOG_BYTES = 12 << 20
#: Tests that measure the same as the lane's sweeps and refusals, which are steps themselves.
_NOT_TWICE = "not every_way and not hidden_is_refused"


@dataclass(frozen=True)
class Step:
    """One process of a session.

    Attributes:
        name: A word for tables.
        command: The process and its arguments.
        limit: Seconds after which the step is stopped; None: what the limits of the later steps leave.
        environment: Further environment variables.
        decides: Exit code 3 of this step ends the session: there is no GPU.
        budget_option: An option that gives the process its own limit, a few seconds below the step's.
    """

    name: str
    command: tuple[str, ...]
    limit: float | None
    environment: Mapping[str, str] = field(default_factory=dict, hash=False)
    decides: bool = False
    budget_option: str = ""


@dataclass(frozen=True)
class Record:
    """The state of one step in the summary.

    Attributes:
        name: Name of the step.
        state: "not reached", "running", "passed", "failed", "incomplete" (what ran passed, and its time was up), "stopped"
            (at its limit), or "not available" (exit code 3).
        code: Exit code; None if the step did not end by itself.
        seconds: Duration.
        limit: Seconds that the step had.
        last_line: Last line of its output.
        command: The command line.
    """

    name: str
    state: str = "not reached"
    code: int | None = None
    seconds: float = 0.0
    limit: float = 0.0
    last_line: str = ""
    command: str = ""


def run_session(steps: Sequence[Step], out: Path, *, seconds: float = SECONDS) -> int:
    """Run the steps one after the other and return the exit code.

    Args:
        steps: In the order of their value.
        out: Folder of the summary and the log; made if it is missing.
        seconds: Budget of the whole session.

    Raises:
        OutputError: The folder can't be written.
    """
    begun = time.monotonic()
    summary = _Summary(out / "summary.json", [Record(step.name, command=" ".join(step.command)) for step in steps])
    with output_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        log = (out / "log.txt").open("wb")
    with log:
        for at, step in enumerate(steps):
            left = seconds - (time.monotonic() - begun) - _RESERVE
            later = sum(other.limit or 0.0 for other in steps[at + 1 :])
            limit = min(left, left - later if step.limit is None else step.limit)
            if limit < _LEAST:
                continue
            summary.put(at, replace(summary.records[at], state="running", limit=round(limit, 1)))
            summary.put(at, _run(step, summary.records[at], limit, log, _LOG_BYTES // len(steps)))
            if step.decides and summary.records[at].code == 3:
                return summary.end(3)
    return summary.end(0 if all(record.state == "passed" for record in summary.records) else 1)


class _Summary:
    """summary.json, written again after each change."""

    def __init__(self, path: Path, records: list[Record]) -> None:
        self.records = records
        self._path, self._begun = path, time.time()
        self._write("RUNNING", None)

    def put(self, at: int, record: Record) -> None:
        """Replace one record."""
        self.records[at] = record
        self._write("RUNNING", None)
        if record.state != "running":
            print(f"{record.state:13} {record.seconds:6.1f} s  {record.name}: {record.last_line}", flush=True)

    def end(self, code: int) -> int:
        """Write and print the verdict; return the exit code."""
        others = [f"{record.name} {record.state}" for record in self.records if record.state != "passed"]
        verdict = {0: "PASS: every step ran and passed", 3: "NO GPU: nothing was measured"}.get(
            code, f"FAIL: {len(others)} of {len(self.records)} steps: {', '.join(others)}"
        )
        self._write(verdict, code)
        print(verdict, flush=True)
        return code

    def _write(self, verdict: str, code: int | None) -> None:
        content = {
            "verdict": verdict,
            "code": code,
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._begun)),
            "seconds": round(time.time() - self._begun, 1),
            "steps": [asdict(record) for record in self.records],
        }
        write_atomically(self._path, (json.dumps(content, indent=1) + "\n").encode())


def _run(step: Step, record: Record, limit: float, log: IO[bytes], log_bytes: int) -> Record:
    """Run one step with its output in the log; all its processes end with it."""
    log.write(f"\n== {step.name} ({limit:.0f} s): {' '.join(step.command)}\n".encode())
    log.flush()
    start = log.tell()
    budget = (step.budget_option, str(max(1.0, limit - 10.0))) if step.budget_option else ()
    begun = time.monotonic()
    try:
        child = subprocess.Popen(
            (*step.command, *budget), cwd=ROOT, env=_environment(step), start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=log.fileno(), stderr=subprocess.STDOUT,
        )  # fmt: skip
    except OSError as error:
        return replace(record, state="failed", last_line=str(error))
    try:
        code: int | None = child.wait(limit)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        with contextlib.suppress(ProcessLookupError):  # also what it left behind
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    last = _last_line(Path(log.name), start, log, log_bytes)
    state = "stopped" if code is None else {0: "passed", 3: "not available"}.get(code, "failed")
    if state == "failed" and last.startswith("INCOMPLETE"):
        state = "incomplete"
    return replace(record, state=state, code=code, seconds=round(time.monotonic() - begun, 1), last_line=last)


def _last_line(path: Path, start: int, log: IO[bytes], most: int) -> str:
    """Return the line with the verdict, or else the last line, and cut the output at its share of the log."""
    with path.open("rb") as reader:
        reader.seek(max(start, path.stat().st_size - 4096))
        lines = reader.read().decode(errors="replace").strip().split("\n")
    if path.stat().st_size > start + most:
        log.truncate(start + most)
    log.seek(0, os.SEEK_END)
    verdicts = (line for line in reversed(lines) if line.startswith(("PASS:", "FAIL:", "INCOMPLETE:")))
    return next(verdicts, lines[-1]).strip()[:300]


def _environment(step: Step) -> dict[str, str]:
    rest = {name: value for name, value in os.environ.items() if name != "BNEXPORT_REQUIRE"}
    return {**rest, "PYTHONPATH": import_path(), "PYTHONUNBUFFERED": "1", **step.environment}


def session_steps(
    out: Path, *, rehearse: bool = False, data_dir: Path | None = None, max_samples: int | None = None
) -> tuple[Step, ...]:
    """Return the steps in the order of their value.

    Args:
        out: Folder of the results.
        rehearse: Use CPU runtimes and the emulated engine in place of the GPU's.
        data_dir: Folder of the data set.
        max_samples: Upper bound on the samples of each kind; None: the lane's own.
    """
    python = (sys.executable, "-m")
    rehearsal = ("--rehearse",) if rehearse else ()
    data = () if data_dir is None else ("--data-dir", str(data_dir.resolve()))
    few = () if max_samples is None else ("--max-samples", str(max_samples))
    results = ("--json", str(out / "gpu.json"), "--out", str(out / "gpu.md"), "--add")
    lane = (*python, "benchmarks.gpu", *results, *data, *few, *rehearsal)
    only_sweeps = ("--no-training", "--no-refusals")
    device = "cpu" if rehearse else "cuda"
    served = "emulated-cpu" if rehearse else "onnxruntime-cuda"
    torch = [f"{engine}-{device}" for engine in ("torch", "torchscript", "torch-export")]
    rest = [s.name for s in (cpu_sweeps() if rehearse else gpu_sweeps()) if s.name not in (served, *torch)]
    verify = (*python, "bnexport", "verify", str(ROOT / "models" / "bn_lenet" / "1"))
    tests = (*python, "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider", "-k", _NOT_TWICE)
    return (
        Step("machine", (*python, "benchmarks.gpu.machine", *rehearsal), 60, decides=not rehearse),
        Step("doctor", (*python, "bnexport", "doctor", "--require", f"onnxruntime-{device}"), 60),
        Step(
            "verify",
            (*verify, "--runtime", f"onnxruntime-{device}", "--json", str(out / "verify.json"), *data, *few),
            90,
        ),
        Step("torch", (*lane, *only_sweeps, *_sweeps(torch)), 120, budget_option="--seconds"),
        Step("served", (*lane, *only_sweeps, *_sweeps([served])), 90, budget_option="--seconds"),
        Step("training", (*lane, "--no-sweeps", "--no-refusals"), 90, budget_option="--seconds"),
        *([Step("tests", tests, 120, _required(rehearse=rehearse))] if util.find_spec("pytest") else []),
        Step("combinations", (*lane, *only_sweeps, *_sweeps(rest)), None, budget_option="--seconds"),
        Step("refusals", (*lane, "--no-sweeps", "--no-training"), 30, budget_option="--seconds"),
    )


def _sweeps(names: Sequence[str]) -> list[str]:
    return [word for name in names for word in ("--sweep", name)]


def _required(*, rehearse: bool) -> dict[str, str]:
    """Return BNEXPORT_REQUIRE of the tests: a GPU, and ONNX Runtime on it where onnxruntime-gpu is there."""
    if rehearse:
        return {}
    spec = util.find_spec("onnxruntime")
    capi = Path(spec.origin).parent / "capi" if spec is not None and spec.origin else None
    has_gpu = capi is not None and any(capi.glob("*onnxruntime_providers_cuda.*"))
    return {"BNEXPORT_REQUIRE": "cuda,ort-cuda" if has_gpu else "cuda"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the session and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="gpu_session", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="budget of all steps; default: 420")
    parser.add_argument("--rehearse", action="store_true", help="run the same steps with CPU runtimes")
    parser.add_argument("--data-dir", type=Path, help="folder of the data set; default: BNEXPORT_DATA, then the cache")
    parser.add_argument("--max-samples", type=int, help="upper bound on the samples of each kind")
    given = parser.parse_args(arguments)
    out = given.out.resolve()
    steps = session_steps(out, rehearse=given.rehearse, data_dir=given.data_dir, max_samples=given.max_samples)
    try:
        if (out / "gpu.json").exists():
            raise OutputError(f"{out} holds the results of a session already", remedy="Choose another folder")
        return run_session(steps, out, seconds=given.seconds)
    except BnexportError as error:
        print(f"gpu_session: {error}. {error.remedy}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
