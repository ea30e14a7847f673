"""One process per runtime, number of threads and number of sessions: it loads, then measures one batch size per message.

Processes keep the engines' threads, memory and settings apart, so that the memory, CPU time and load time of a variant are its
process's. All of them stay open, and the parent lets one after the other measure. A message is one of ``runtimes.isolation``.
``python -m bnexport.benchmarking.benchmark_worker`` is started by ``Worker`` alone.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import numpy as np

from bnexport.bundle import Bundle, Manifest
from bnexport.environment import cpu_seconds, peak_memory
from bnexport.errors import BnexportError, RuntimeUnavailable
from bnexport.onnx_files.models import read_validated
from bnexport.optional import one_line
from bnexport.runtimes.base import RunSettings
from bnexport.runtimes.catalogue import runner_spec
from bnexport.runtimes.isolation import child_pipes, how_ended, receive, send, start_child
from bnexport.runtimes.onnxruntime_session import load_engine
from bnexport.runtimes.replay import incomparable, largest_error, scale
from bnexport.tensors import Array

Feeds = Mapping[str, Array]
Run = Callable[[Feeds], Mapping[str, Array]]
#: One of this many timed calls gets the golden inputs; their answers are compared after the measurement.
GOLDEN_EVERY = 16
#: Largest number of different inputs of one batch size.
MOST_INPUTS = 64
#: Share of a round for calls before the timed ones: other processes have used the caches since the last round.
_WARM_UP = 0.1
#: Engine -> the package whose import is timed apart from opening the file.
_PACKAGES = {"onnxruntime": "onnxruntime", "openvino": "openvino", "reference": "onnx"}


@dataclass(frozen=True)
class Inputs:
    """Inputs of one batch size, all different, and the golden inputs with their answers; the golden ones are the first."""

    feeds: Sequence[Feeds]
    expected: Feeds
    scales: Mapping[str, float]

    def error(self, answers: Feeds) -> float:
        """Return the error of scale of answers to the golden inputs; infinity if they can't be compared."""
        if any(incomparable(name, answers[name], array) for name, array in self.expected.items()):
            return float("inf")
        errors = [
            largest_error(answers[name], array) * scale(array) / self.scales[name]
            for name, array in self.expected.items()
        ]
        return max(errors, default=0.0)


def inputs_of(samples: Feeds, golden: Feeds, answers: Feeds, batch: int) -> Inputs:
    """Return the inputs of a batch size: the golden ones, repeated or cut, then windows of the samples."""
    there = len(next(iter(samples.values())))
    windows = [
        {name: array[start : start + batch] for name, array in samples.items()}
        for start in range(min(there - batch + 1, MOST_INPUTS))
    ]
    index = np.arange(batch) % len(next(iter(golden.values())))
    return Inputs(
        [{name: array[index] for name, array in golden.items()}, *windows],
        {name: array[index] for name, array in answers.items()},
        {name: scale(array) for name, array in answers.items()},
    )


def order_of(count: int, start: int = 0) -> Iterator[int]:
    """Yield the number of the input of each call: 0 first and then every GOLDEN_EVERY-th time, and no input twice in a row."""
    others = itertools.cycle([1 + (start + step) % (count - 1) for step in range(count - 1)])
    for call in itertools.count():
        yield 0 if call % GOLDEN_EVERY == 0 else next(others)


def timed_calls(
    run: Run, inputs: Inputs, seconds: float, *, start: int = 0, clock: Callable[[], float] = time.perf_counter
) -> tuple[list[float], list[Mapping[str, Array]]]:
    """Call for some seconds; return the time of each call, and the answers to the golden inputs."""
    times, answers = [], []
    until = clock() + seconds
    for number in order_of(len(inputs.feeds), start):
        feeds = inputs.feeds[number]
        before = clock()
        answer = run(feeds)
        after = clock()
        times.append(after - before)
        if number == 0:
            answers.append(answer)
        if after >= until:
            return times, answers
    raise AssertionError("order_of does not end")


def measure(
    sessions: Sequence[Run], inputs: Inputs, seconds: float, *, warm: bool = True
) -> tuple[dict[str, float], list[float]]:
    """Let every session call in its thread, at least once; return facts of the round, and the time of every call.

    The facts are "elapsed" and "cpu" (of this process, all threads), "busy" and "total" (of the machine; 0 if it does not
    report them), all in seconds, and "golden", the largest error of scale of an answer to the golden inputs.
    """
    failed: list[BaseException] = []
    found: list[tuple[list[float], list[Mapping[str, Array]]]] = []
    ready = threading.Barrier(len(sessions) + 1)

    def work(run: Run, start: int) -> None:
        try:
            if warm:
                timed_calls(run, inputs, seconds * _WARM_UP, start=start)
            ready.wait()
            found.append(timed_calls(run, inputs, seconds, start=start))
        except BaseException as error:  # reported by the thread that started this one
            failed.append(error)
            ready.abort()

    step = max(1, len(inputs.feeds) // len(sessions))
    threads = [threading.Thread(target=work, args=(run, step * at)) for at, run in enumerate(sessions)]
    for thread in threads:
        thread.start()
    with contextlib.suppress(threading.BrokenBarrierError):
        ready.wait()
    before, cpu, machine = time.perf_counter(), time.process_time(), cpu_seconds()
    for thread in threads:
        thread.join()
    elapsed, cpu, after = time.perf_counter() - before, time.process_time() - cpu, cpu_seconds()
    if failed:
        raise next((error for error in failed if not isinstance(error, threading.BrokenBarrierError)), failed[0])
    busy, total = (end - start for start, end in zip(machine, after, strict=True))
    errors = [inputs.error(answer) for _, answers in found for answer in answers]
    facts = {"elapsed": elapsed, "cpu": cpu, "busy": busy, "total": total, "golden": min(max(errors), 1e300)}
    return facts, [time for times, _ in found for time in times]


class Worker:
    """The parent's side of one process; it ends with the ``with`` block. RuntimeUnavailable if it can't open its file.

    ``name`` is the runtime, for messages. ``request`` has "manifest", and "bundle" or "file"; "runtime", "threads", "sessions",
    "batches" (in rising order), and "inputs", the folder that ``save_inputs`` wrote.
    """

    def __init__(self, name: str, request: Mapping[str, Any]) -> None:
        self._name = name
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 -- as long as the process
        self._process = start_child("bnexport.benchmarking.benchmark_worker", name, self._stderr)
        try:
            #: "import" and "load" in seconds, "description"; "first" (seconds) and "memory" (bytes) by batch size, as text
            self.loaded = self._exchange(request)[0]
        except BaseException:
            self.close()
            raise

    def measure(self, batch: int, seconds: float) -> tuple[dict[str, float], list[float]]:
        """Measure one batch size for some seconds; see ``measure``."""
        facts, arrays = self._exchange({"batch": batch, "seconds": seconds})
        return facts, arrays["times"].tolist()

    def _exchange(self, head: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Array]]:
        try:
            send(cast(BinaryIO, self._process.stdin), head)
            answer, arrays = receive(cast(BinaryIO, self._process.stdout))
        except (EOFError, OSError, ValueError) as error:
            self._process.kill()
            how = how_ended(self._process.wait())
            raise RuntimeUnavailable(
                f"the process of {self._name} ended: {how}", remedy="Give fewer sessions or smaller batches"
            ) from error
        if "error" in answer:
            raise RuntimeUnavailable(answer["error"], remedy=answer["remedy"])
        return answer, arrays

    def close(self) -> None:
        """End the process."""
        self._process.kill()  # it has nothing to finish
        self._process.communicate()
        self._stderr.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def save_inputs(folder: Path, samples: Feeds, golden: Feeds, answers: Feeds) -> None:
    """Write the arrays that every process maps into its memory, so that they are in memory once."""
    for kind, arrays in (("samples", samples), ("golden", golden), ("answers", answers)):
        for number, array in enumerate(arrays.values()):
            np.save(folder / f"{kind}_{number}.npy", np.ascontiguousarray(array))


def _loaded_inputs(folder: Path, manifest: Manifest, batch: int) -> Inputs:
    signature = manifest.signature
    samples, golden, answers = (
        {spec.name: np.load(folder / f"{kind}_{number}.npy", mmap_mode="c") for number, spec in enumerate(specs)}
        for kind, specs in (
            ("samples", signature.inputs), ("golden", signature.inputs), ("answers", signature.outputs),
        )
    )  # fmt: skip
    return inputs_of(samples, golden, answers, batch)


def _open(request: Mapping[str, Any], manifest: Manifest) -> tuple[Run, dict[str, Any]]:
    """Open one session; return the function that runs a batch, and the engine's description."""
    if "file" in request:
        return _open_bare(Path(request["file"]), manifest, request["threads"])
    # The parent's manifest, which was checked; the folder's may have changed.
    bundle = Bundle(Path(request["bundle"]), manifest)
    runner = runner_spec(request["runtime"]).open(bundle, settings=RunSettings(threads=request["threads"]))
    return runner.run_fitting, runner.description


def _open_bare(file: Path, manifest: Manifest, threads: int) -> tuple[Run, dict[str, Any]]:
    """Open a file as any program does: onnxruntime's session with its defaults and a number of threads."""
    ort = load_engine()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(read_validated(file), options, providers=["CPUExecutionProvider"])
    theirs, ours = [item.name for item in session.get_inputs()], [spec.name for spec in manifest.signature.inputs]
    if len(theirs) != len(ours):
        raise RuntimeUnavailable(
            f"{file} takes {len(theirs)} inputs, but the bundle has {len(ours)}", remedy="Give the bundle's own model"
        )
    names = dict(zip(ours, theirs, strict=True))

    def run(feeds: Feeds) -> Mapping[str, Array]:
        session.run(None, {names[name]: array for name, array in feeds.items()})
        return {}

    return run, {"engine": "onnxruntime", "version": str(ort.__version__), "device": "cpu"}


def _load(request: Mapping[str, Any], manifest: Manifest) -> tuple[list[Run], dict[int, Inputs], dict[str, Any]]:
    """Open the sessions, and run the first batch of every size, the smallest first: memory never shrinks."""
    start = time.perf_counter()
    importlib.import_module(_PACKAGES.get(request["runtime"].rpartition("-")[0], "torch"))
    before = time.perf_counter()
    run, description = _open(request, manifest)
    imported, loaded = before - start, time.perf_counter() - before
    sessions = [run, *(_open(request, manifest)[0] for _ in range(request["sessions"] - 1))]
    every: dict[int, Inputs] = {}
    first, memory = {}, {}
    for batch in request["batches"]:
        every[batch] = inputs = _loaded_inputs(Path(request["inputs"]), manifest, batch)
        if "file" in request:  # another network's answers can differ
            inputs = every[batch] = Inputs(inputs.feeds, {}, {})
        before = time.perf_counter()
        sessions[0](inputs.feeds[0])
        first[str(batch)] = time.perf_counter() - before
        for other in sessions[1:]:
            other(inputs.feeds[0])
        memory[str(batch)] = peak_memory()
    facts = {"import": imported, "load": loaded, "first": first, "memory": memory, "description": description}
    return sessions, every, facts


def main() -> None:
    """Load what the first message names, then measure one batch size per message."""
    requests, answers = child_pipes()
    with contextlib.suppress(EOFError, BrokenPipeError):  # the parent has ended
        try:
            request, _ = receive(requests)
            sessions, inputs, facts = _load(request, Manifest.from_json(request["manifest"]))
            send(answers, facts)
            while True:
                wanted, _ = receive(requests)
                batch, seconds = wanted["batch"], wanted["seconds"]
                warm = facts["first"][str(batch)] < seconds  # one call of a slow network suffices
                found, times = measure(sessions, inputs[batch], seconds, warm=warm)
                send(answers, found, {"times": np.array(times)})
        except (EOFError, BrokenPipeError):
            raise
        except BnexportError as error:
            send(answers, {"error": error.message, "remedy": error.remedy})
        except Exception as error:  # engines raise various classes without a common base
            send(answers, {"error": one_line(error), "remedy": ""})


if __name__ == "__main__":
    main()
