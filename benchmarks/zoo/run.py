"""Measure every network of the zoo in its own process; each finished network and part is one JSON line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.command import side_by_side
from bnexport.environment import environment, versions_of
from bnexport.errors import BnexportError, DataError, UsageError
from bnexport.optional import one_line, require
from bnexport.runtimes.isolation import how_ended

#: Part of the measurement -> module and function that measures it: (source, seed) -> JSON. A part can be run again alone.
PARTS = {"fold": ("benchmarks.zoo.fold", "measure_fold"), "tools": ("benchmarks.zoo.tools", "measure_tools")}


@dataclass(frozen=True)
class ZooRun:
    """The settings of one run."""

    out: Path  # the file of JSON lines; networks in it are not measured again
    names: tuple[str, ...] = ()  # empty: all
    parts: tuple[str, ...] = tuple(PARTS)
    limit: int = 0  # at most this many networks; 0: all
    jobs: int = 2  # processes at a time, one thread each
    seconds: float = 300.0  # a network that takes longer is given up
    memory_gb: float = 10.0  # of data in one process
    again: bool = False  # measure networks in the file again; the new line counts
    seed: int = 0  # of weights, statistics and inputs


def run_zoo(run: ZooRun, *, on_line: Callable[[str], None] = lambda _line: None) -> list[dict[str, Any]]:
    """Measure the missing networks, append them to the file, and return its lines as ``read_lines`` does.

    Raises:
        UsageError: A network or part is unknown.
        DataError: The file has other content.
        MissingDependency: torchvision is not installed.
    """
    todo = _todo(run)
    if todo:
        here = environment()
        here |= {"packages": here["packages"] | versions_of("timm", "onnxslim")}
        for part in run.parts:
            _append(run.out, {"part": "conditions", "name": part, "seed": run.seed, "jobs": run.jobs, **here})
        calls = [partial(_measure, part, source, run) for source, part in todo]
        for number, line in enumerate(side_by_side(calls, run.jobs), 1):
            _append(run.out, line)
            on_line(f"{number}/{len(todo)} {line['name']} {line['part']}: {line.get('problem') or line['seconds']}")
    return read_lines(run.out)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file of measurements; of several for one network and part, the last.

    DataError: the file can't be read or has other content.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path} can't be read: {one_line(error)}", remedy="Name the file that was measured") from error
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for number, raw in enumerate(text.splitlines(), 1):
        try:
            line = json.loads(raw)
            found[str(line["part"]), str(line["name"])] = line
        except (ValueError, KeyError, TypeError) as error:
            problem = f"line {number} of {path} is not a measurement"
            raise DataError(problem, remedy="Remove it, or name another file") from error
    return list(found.values())


def networks() -> tuple[str, ...]:
    """Return every network as ``torchvision:NAME``, then those of timm.txt as ``timm:NAME``.

    MissingDependency: torchvision is not installed.
    """
    models = require("torchvision.models", purpose="the measurement of networks")
    lines = Path(__file__).with_name("timm.txt").read_text(encoding="utf-8").splitlines()
    timm = [name for line in lines if not line.startswith("#") for name in line.split()]
    known = sorted(models.list_models(module=models))
    return (*(f"torchvision:{name}" for name in known), *(f"timm:{name}" for name in timm))


def _todo(run: ZooRun) -> list[tuple[str, str]]:
    if unknown := [part for part in run.parts if part not in PARTS]:
        raise UsageError(f"there is no part {unknown[0]!r}", remedy=f"Choose of {', '.join(PARTS)}")
    if unknown := [name for name in run.names if name.partition(":")[0] not in ("torchvision", "timm")]:
        raise UsageError(f"{unknown[0]!r} names no network", remedy="Write it as torchvision:NAME or timm:NAME")
    done: set[tuple[str, str]] = set()
    if run.out.exists() and not run.again:
        done = {(line["name"], line["part"]) for line in read_lines(run.out)}
    todo = [(name, part) for name in run.names or networks() for part in run.parts if (name, part) not in done]
    kept = list(dict.fromkeys(name for name, _ in todo))[: run.limit or None]
    return [(name, part) for name, part in todo if name in set(kept)]


def _measure(part: str, source: str, run: ZooRun) -> dict[str, Any]:
    """Return the line of one network, measured in one process; a failure is a line, too."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.zoo.run", part, source, str(run.seed), str(run.memory_gb)]
    line: dict[str, Any] = {"problem": f"longer than {run.seconds:g} s"}
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=run.seconds, check=False
        )
        ended = {"problem": f"its process ended: {how_ended(done.returncode)}"}
        line = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else ended
    except subprocess.TimeoutExpired:
        pass
    except (ValueError, IndexError):
        line = {"problem": "its process printed no result"}
    return {"name": source, "part": part, **line, "seconds": round(time.perf_counter() - started, 2)}


def _append(path: Path, line: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, allow_nan=False) + "\n")


def child(part: str, source: str, seed: int, memory_gb: float) -> None:
    """Limit the memory of this process, measure a network with one thread, and print its line."""
    import resource

    import torch

    limit = int(memory_gb * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    torch.set_num_threads(1)
    try:
        module, function = PARTS[part]
        line: dict[str, Any] = {"result": getattr(import_module(module), function)(source, seed=seed)}
    except BnexportError as error:
        line = {"problem": f"{type(error).__name__}: {error.message}"}
    except MemoryError:
        line = {"problem": f"more than {memory_gb:g} GB of memory"}
    except Exception as error:  # a fault of a network or of bnexport is a line of the table, too
        line = {"problem": f"{type(error).__name__}: {one_line(error)}"}
    print("\n" + json.dumps(line), flush=True)


if __name__ == "__main__":
    child(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
    os._exit(0)  # so that no package prints after the line
