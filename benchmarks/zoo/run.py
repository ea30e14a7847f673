"""Measure every network of the zoo, each in a process of its own, and keep what is done: one JSON line a network and part."""

from __future__ import annotations

import json
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.zoo.names import sources
from bnexport.environment import environment, versions_of
from bnexport.errors import BnexportError, DataError, UsageError
from bnexport.optional import one_line


def _fold(source: str, seed: int) -> dict[str, Any]:
    from benchmarks.zoo.fold import measure_fold

    return measure_fold(source, seed=seed)


def _tools(source: str, seed: int) -> dict[str, Any]:
    from benchmarks.zoo.tools import measure_tools

    return measure_tools(source, seed=seed)


#: Part of the measurement -> what measures it: (source, seed) -> JSON. Each can be run again without the others.
PARTS: dict[str, Callable[[str, int], dict[str, Any]]] = {"fold": _fold, "tools": _tools}
#: Loaded once, before the processes are made from it.
_PRELOAD = [
    "torch",
    "torch._dynamo",
    "torch.export",
    "torch.onnx",
    "torchvision",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "benchmarks.zoo.run",
]
_OPTIONAL_PRELOAD = ["timm", "onnxslim"]
#: Seconds that a process which has sent its line gets to end by itself.
_PATIENCE = 5.0


@dataclass(frozen=True)
class ZooRun:
    """How to measure.

    Attributes:
        out: The file of JSON lines; what it holds already is not measured again.
        names: Networks; empty: all.
        parts: Keys of PARTS.
        limit: Measure at most so many networks; 0: all.
        jobs: Processes at a time, one thread each.
        seconds: A network that takes longer is given up.
        memory_gb: Of data that one process may hold.
        again: Measure what is there already, too; the new line counts.
        seed: Of weights, statistics and inputs.
    """

    out: Path
    names: tuple[str, ...] = ()
    parts: tuple[str, ...] = tuple(PARTS)
    limit: int = 0
    jobs: int = 2
    seconds: float = 300.0
    memory_gb: float = 10.0
    again: bool = False
    seed: int = 0


def run_zoo(run: ZooRun, *, tell: Callable[[str], None] = lambda _line: None) -> list[dict[str, Any]]:
    """Measure what is not done yet and append it to the file.

    Args:
        run: What, and within which limits.
        tell: Gets a line for each finished network.

    Returns:
        Every line of the file that counts, as ``read_lines``.

    Raises:
        UsageError: A network or part that there is not.
        DataError: The file holds something else.
        MissingDependency: torchvision is not installed.
    """
    todo = _todo(run)
    if todo:
        for part in run.parts:
            _append(run.out, {"part": "conditions", "name": part, "seed": run.seed, "jobs": run.jobs, **_conditions()})
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOAD + _OPTIONAL_PRELOAD)
        with ThreadPoolExecutor(run.jobs) as pool:
            waiting = {pool.submit(_measure, context, part, source, run): None for source, part in todo}
            for number, done in enumerate(as_completed(waiting), 1):
                line = done.result()
                _append(run.out, line)
                tell(f"{number}/{len(todo)} {line['name']} {line['part']}: {line.get('problem') or line['seconds']}")
    return read_lines(run.out)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of measurements; of several for one network and part, the last.

    Raises:
        DataError: It can't be read, or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path} can't be read: {one_line(error)}", remedy="Name the file that was measured") from error
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for number, raw in enumerate(text.splitlines(), 1):
        try:
            line = json.loads(raw)
            key = (str(line["part"]), str(line["name"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"line {number} of {path} is no measurement", remedy="Remove it, or name another file"
            ) from error
        found[key] = line
    return list(found.values())


def _conditions() -> dict[str, Any]:
    """Hardware and versions, those of the tools among them."""
    record = environment()
    return record | {"packages": record["packages"] | versions_of("timm", "onnxslim")}


def _todo(run: ZooRun) -> list[tuple[str, str]]:
    if unknown := [part for part in run.parts if part not in PARTS]:
        raise UsageError(f"there is no part {unknown[0]!r}", remedy=f"Choose of {', '.join(PARTS)}")
    every = sources()
    if unknown := [name for name in run.names if name.partition(":")[0] not in ("torchvision", "timm")]:
        raise UsageError(f"{unknown[0]!r} names no network", remedy="Write it as torchvision:NAME or timm:NAME")
    done: set[tuple[str, str]] = set()
    if run.out.exists() and not run.again:
        done = {(line["name"], line["part"]) for line in read_lines(run.out)}
    names = run.names or every
    todo = [(name, part) for name in names for part in run.parts if (name, part) not in done]
    kept = list(dict.fromkeys(name for name, _ in todo))[: run.limit or None]
    return [(name, part) for name, part in todo if name in set(kept)]


def _measure(context: Any, part: str, source: str, run: ZooRun) -> dict[str, Any]:
    """One network in one process; what stops it is a line, not an error."""
    started = time.perf_counter()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, part, source, run.seed, run.memory_gb), daemon=True)
    process.start()
    sender.close()
    try:
        line: dict[str, Any] = (
            receiver.recv() if receiver.poll(run.seconds) else {"problem": f"longer than {run.seconds:g} s"}
        )
    except EOFError:
        process.join(_PATIENCE)
        line = {"problem": f"its process ended by {_ending(process.exitcode)}"}
    if "result" in line:
        process.join(_PATIENCE)
    process.kill()
    process.join()
    receiver.close()
    return {"name": source, "part": part, **line, "seconds": round(time.perf_counter() - started, 2)}


def _child(sender: Connection, part: str, source: str, seed: int, memory_gb: float) -> None:
    """What a process does: limit itself, measure, send."""
    import resource

    import torch

    limit = int(memory_gb * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    torch.set_num_threads(1)
    try:
        line: dict[str, Any] = {"result": PARTS[part](source, seed)}
    except BnexportError as error:
        line = {"problem": f"{type(error).__name__}: {error.message}"}
    except MemoryError:
        line = {"problem": f"more than {memory_gb:g} GB of memory"}
    except Exception as error:  # a fault of a network or of bnexport is a line of the table, too
        line = {"problem": f"{type(error).__name__}: {one_line(error)}"}
    sender.send(line)


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        return signal.Signals(-code).name
    return f"exit code {code}"


def _append(path: Path, line: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, allow_nan=False) + "\n")


def chosen(names: Iterable[str]) -> tuple[str, ...]:
    """Names as given on a command line, a comma between two; one without a zoo is timm's."""
    parts = [part.strip() for name in names for part in name.split(",") if part.strip()]
    return tuple(part if ":" in part else f"timm:{part}" for part in parts)
