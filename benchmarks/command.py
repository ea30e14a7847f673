"""The frame of every benchmark's command line: its parser, its lines of progress, and bnexport's exit codes."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, NoReturn, TypeVar

from bnexport import interrupts
from bnexport.cli.main import EXIT_CODES, EXIT_INTERRUPTED
from bnexport.errors import BnexportError, RuntimeUnavailable

_T = TypeVar("_T")


def options(name: str, text: str | None) -> argparse.ArgumentParser:
    """Return a parser of ``python -m benchmarks.NAME`` with a module's docstring as its help."""
    return argparse.ArgumentParser(
        f"python -m benchmarks.{name}", description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def known(parser: argparse.ArgumentParser, names: Sequence[str], table: Sequence[str], kind: str) -> list[str]:
    """Return the names, or the whole table without any; end with code 2 at a name that is not in the table."""
    if unknown := sorted(set(names) - set(table)):
        parser.error(f"unknown {kind} {unknown[0]}")
    return list(names or table)


def progress(line: str) -> None:
    """Print a line of progress to standard error."""
    print(line, file=sys.stderr, flush=True)


def output_of(
    command: Sequence[str], failed: Callable[[str], BnexportError], *, timeout: float | None = None, **options: Any
) -> str:
    """Return a program's standard output; raise ``failed(messages)`` if it fails or takes more than ``timeout`` seconds."""
    done: subprocess.CompletedProcess[str]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, **options)
    except subprocess.TimeoutExpired as error:
        raise failed(f"no end after {timeout:g} s") from error
    if done.returncode != 0:
        raise failed(done.stderr.strip() or done.stdout.strip())
    return done.stdout


def last_line(text: str) -> str:
    """Return at most 200 characters of the last line of a text."""
    return (text.strip().splitlines() or ["no output"])[-1][:200]


def measured_in_child(
    what: str, *words: str, remedy: str, env: Mapping[str, str] | None = None, timeout: float | None = None
) -> Any:
    """Run ``python -m`` with these words, and return the JSON of the last line that it prints.

    RuntimeUnavailable: it failed, or took more than ``timeout`` seconds; the message has the last line of its errors.
    """

    def failed(text: str) -> RuntimeUnavailable:
        return RuntimeUnavailable(f"{what} can't be measured: {last_line(text)}", remedy=remedy)

    found = output_of([sys.executable, "-m", *words], failed, timeout=timeout, env=env)
    return json.loads(found.strip().splitlines()[-1])


def side_by_side(calls: Sequence[Callable[[], _T]], workers: int) -> Iterator[_T]:
    """Yield results as they come from threads that wait for processes; with 0 workers one after the other in this thread."""
    if workers < 1:
        yield from (call() for call in calls)
        return
    pool = ThreadPoolExecutor(workers)
    try:
        for future in as_completed([pool.submit(call) for call in calls]):
            yield future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def finish(name: str, action: Callable[[], int | None]) -> NoReturn:
    """Run a benchmark and end the process: 0 done, 1 verdict FAIL, 2 bad input, 3 the machine lacks something.

    SIGINT and SIGTERM end it with code 130, after its servers and files have been cleaned up.
    """
    try:
        with interrupts.terminable():
            code = action() or 0
    except KeyboardInterrupt:
        progress(f"{name}: interrupted, so there is no result")
        code = EXIT_INTERRUPTED
    except BnexportError as error:
        progress(f"{name}: {error}")
        code = next(code for kind, code in EXIT_CODES if isinstance(error, kind))
    sys.exit(code)
