"""Measure the strength of the tests: change the program in one place, run the tests, count the changes that no test detects.

Use, from the root of the tree: python tests/mutation/mutate.py --count 60 --seed 1 [--tree PATH] [--slow]

Each mutant is one small change of one file of TESTS: another comparison, another operator, a negated condition, another
number, a call that is left out. A mutant is killed when a test fails, or when the run takes three times as long as it does
without a mutant. The tree is copied first. Standard output gets one line of JSON per mutant and the score as its last line.

A first run without a mutant records the blocks of code that each test and its fixtures run. A mutant is then tested by the
tests that run its block, the shortest first; a mutant outside of functions, or in a function with a cache, by all. The tests
run in a child of this process, which has imported the large libraries already. So a mutant costs seconds.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import importlib
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest

#: Folder of sources -> the tests that have to notice a change in it.
TESTS = {
    "bnexport/folding": ("tests/unit/folding",),
    "bnexport/verification": ("tests/unit/verification", "tests/must_fail"),
}
#: Imported once, before the first child starts.
LARGE = ("torch", "torch._dynamo", "torch.export", "torch.onnx", "torchvision", "onnx", "onnxruntime", "onnxscript")
ROOT = Path(__file__).parents[2]
_NONE_SELECTED = 5

_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
_OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip


@dataclass(frozen=True)
class Change:
    """One possible change of a syntax tree."""

    line: int  # Line of the source
    block: int  # Line at which the block of its function begins; 0 outside of functions
    text: str  # Description: "Lt -> LtE"
    apply: Callable[[], None]  # Make the change in the tree that the change was found in


def _set(node: ast.AST, field: str, value: object) -> Callable[[], None]:
    return lambda: setattr(node, field, value)


def _negated(test: ast.expr) -> ast.expr:
    return ast.copy_location(ast.UnaryOp(ast.Not(), test), test)


def _put(values: list[ast.cmpop], index: int, value: ast.cmpop) -> Callable[[], None]:
    return lambda: values.__setitem__(index, value)


def _of_node(node: ast.AST) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield the changes of one node, each as a description and a function that makes it."""
    match node:
        case ast.Compare(ops=ops):
            for index, found in enumerate(ops):
                other = _COMPARISONS[type(found)]
                yield f"{type(found).__name__} -> {other.__name__}", _put(ops, index, other())
        case ast.BinOp(op=op) | ast.AugAssign(op=op) if type(op) in _OPERATORS:
            changed = _OPERATORS[type(op)]
            yield f"{type(op).__name__} -> {changed.__name__}", _set(node, "op", changed())
        case ast.BoolOp(op=junction):
            swapped = ast.Or() if isinstance(junction, ast.And) else ast.And()
            yield f"{type(junction).__name__} -> {type(swapped).__name__}", _set(node, "op", swapped)
        case ast.If(test=test) | ast.IfExp(test=test) | ast.While(test=test):
            yield "condition negated", _set(node, "test", _negated(test))
        case ast.UnaryOp(op=ast.USub()):
            yield "minus left out", _set(node, "op", ast.UAdd())
        case ast.Constant(value=bool(value)):
            yield f"{value} -> {not value}", _set(node, "value", not value)
        case ast.Constant(value=int(value) | float(value)):
            yield f"{value} -> {value + 1}", _set(node, "value", value + 1)
        case ast.Expr(value=ast.Call()):
            yield "call left out", _set(node, "value", ast.copy_location(ast.Constant(None), node))


def _programs(node: ast.AST, block: int = 0) -> Iterator[tuple[ast.AST, int]]:
    """Yield the nodes that compute something, each with its block: no annotations, and nothing for the type checker alone."""
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return
    yield node, block
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns"):
            continue
        inner = _block(node, value, block)
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _programs(child, inner)


def _block(node: ast.AST, field: Any, block: int) -> int:
    """Return the block of a field of a node: a list of statements in a function without a cache begins one."""
    if not _is_body(field) or isinstance(node, ast.ClassDef):
        return block
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return 0 if any("cache" in ast.unparse(item) for item in node.decorator_list) else field[0].lineno
    return field[0].lineno if block else 0


def _is_body(field: Any) -> bool:
    return isinstance(field, list) and bool(field) and isinstance(field[0], ast.stmt)


def marked(source: str, name: str) -> str:
    """Return a source that records in ``Blocks`` which of its blocks run."""
    tree = ast.parse(source)
    for node, block in list(_programs(tree)):
        for _, field in ast.iter_fields(node):
            inner = _block(node, field, block)
            if inner and _is_body(field):
                docstring = isinstance(field[0], ast.Expr) and isinstance(field[0].value, ast.Constant)
                field[int(docstring) : int(docstring)] = ast.parse(f"_block_runs('{name}:{inner}')").body
    future = max((at for at, item in enumerate(tree.body, 1) if _is_first(item)), default=0)
    tree.body[future:future] = ast.parse("_block_runs = getattr(__import__('builtins'), '_block_runs', id)").body
    return ast.unparse(ast.fix_missing_locations(tree))


def _is_first(item: ast.stmt) -> bool:
    return isinstance(item, ast.ImportFrom) and item.module == "__future__"


class Blocks:
    """Plugin of pytest: the seconds of each test, and the blocks that the test and its fixtures run."""

    def __init__(self) -> None:
        self.running: set[str] = set()
        self.fixtures: dict[str, set[str]] = {}
        self.tests: dict[str, tuple[float, list[str]]] = {}
        vars(builtins)["_block_runs"] = self.running.add

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[None]:
        outside = set(self.running)
        self.running.clear()
        try:
            return (yield)
        finally:
            self.fixtures.setdefault(fixturedef.argname, set()).update(self.running)
            self.running.update(outside)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Iterator[None]:
        self.running.clear()
        started = time.monotonic()
        try:
            return (yield)
        finally:
            every = self.running.union(*(self.fixtures.get(name, ()) for name in item.fixturenames))
            self.tests[item.nodeid] = (round(time.monotonic() - started, 3), sorted(every))


def changes(tree: ast.Module) -> list[Change]:
    """Return every change of a module, in the order of the source."""
    return [
        Change(getattr(node, "lineno", 0), block, text, apply)
        for node, block in _programs(tree)
        for text, apply in _of_node(node)
    ]


def mutated(source: str, index: int) -> tuple[Change, str]:
    """Return a change of a source by its index, and the changed source."""
    tree = ast.parse(source)
    change = changes(tree)[index]
    change.apply()
    return change, ast.unparse(ast.fix_missing_locations(tree))


def sample(root: Path, count: int, seed: int, folders: Iterable[str] = TESTS) -> list[tuple[str, int]]:
    """Return files and indices of ``count`` mutants, every change of the sources with the same probability."""
    names = sorted(path.relative_to(root).as_posix() for folder in folders for path in (root / folder).rglob("*.py"))
    every = [
        (name, index)
        for name in names
        for index in range(len(changes(ast.parse((root / name).read_text(encoding="utf-8")))))
    ]
    return random.Random(seed).sample(every, min(count, len(every)))


def passes(
    root: Path, tests: Iterable[str], select: str, limit: float | None, record: Path | None = None
) -> tuple[bool, float]:
    """Run tests of a tree; return whether they pass within ``limit`` seconds, and the seconds.

    ``record`` gets the seconds and blocks of each test.
    """
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        _child(root, ["-x", "-q", "-n", "0", "-p", "no:cacheprovider", "-m", select, *tests], record)
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        seconds = time.monotonic() - started
        if pid:
            return os.waitstatus_to_exitcode(status) in (0, _NONE_SELECTED), seconds
        if limit is not None and seconds > limit:
            os.killpg(child, signal.SIGKILL)  # the processes of the tests too
            os.waitpid(child, 0)
            return False, seconds
        time.sleep(0.1)


def _child(root: Path, words: list[str], record: Path | None) -> NoReturn:
    """Run pytest in this process, which ends with its code."""
    code = 1
    try:
        os.setsid()
        silent = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(silent, stream)
        os.chdir(root)
        os.environ["PYTHONPATH"] = str(root)
        sys.path.insert(0, str(root))  # before the installed package
        blocks = None if record is None else Blocks()
        code = int(pytest.main(words, plugins=[blocks] if blocks else []))
        if blocks is not None and record is not None:
            record.write_text(json.dumps(blocks.tests), encoding="utf-8")
    finally:
        os._exit(code)


Record = dict[str, tuple[float, list[str]]]


def recorded(root: Path, folder: str, file: Path) -> Record:
    """Return the seconds and blocks of each fast test of a folder of sources; run the tests if ``file`` is missing."""
    if not file.is_file():
        sources = {path: path.read_text(encoding="utf-8") for path in (root / folder).rglob("*.py")}
        for path, source in sources.items():
            path.write_text(marked(source, path.relative_to(root).as_posix()), encoding="utf-8")
        right, _ = passes(root, TESTS[folder], "not slow", None, file)
        for path, source in sources.items():
            path.write_text(source, encoding="utf-8")
        if not right:
            file.unlink(missing_ok=True)
            print(f"mutate.py: the tests of {folder} fail without a mutant", file=sys.stderr)
            sys.exit(2)
    found: Record = json.loads(file.read_text(encoding="utf-8"))
    return found


def tests_of(record: Record, name: str, change: Change) -> dict[str, float]:
    """Return the tests that run a change, the shortest first, with their seconds."""
    block = f"{name}:{change.block}"
    chosen = {test: seconds for test, (seconds, blocks) in record.items() if not change.block or block in blocks}
    return dict(sorted(chosen.items(), key=lambda item: item[1]))


def judged(root: Path, tests: dict[str, float], slow: Sequence[str]) -> tuple[bool, bool | None, float]:
    """Return whether the fast tests kill the mutant of a tree, whether the tests ``slow`` do, and the seconds.

    The slow tests run only if the fast tests miss the mutant.
    """
    right, seconds = passes(root, tests, "not slow", 3 * sum(tests.values()) + 60) if tests else (True, 0.0)
    if not right or not slow:
        return not right, None, seconds
    right, more = passes(root, slow, "slow", None)
    return False, not right, seconds + more


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tree", type=Path, default=ROOT, help="Root of the tree to test (default: this one).")
    parser.add_argument("--count", type=int, default=60, help="Number of mutants.")
    parser.add_argument("--skip", type=int, default=0, help="Leave out the first mutants, which an earlier run tested.")
    parser.add_argument(
        "--seed", type=int, default=1, help="Seed of the sample; the same sources give the same mutants."
    )
    parser.add_argument("--only", choices=TESTS, help="One folder of sources (default: all).")
    parser.add_argument("--minutes", type=float, default=math.inf, help="Start no mutant after this time.")
    parser.add_argument("--record", type=Path, help="Folder that keeps the record of the run without a mutant.")
    parser.add_argument(
        "--slow", action="store_true", help="Run the slow tests on what the fast ones miss; print both scores."
    )
    return parser.parse_args()


def main() -> int:
    given, started = _arguments(), time.monotonic()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for library in LARGE:
        importlib.import_module(library)
    tested = fast = both = 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve() / "tree"
        shutil.copytree(
            given.tree, root, ignore=shutil.ignore_patterns(".git", ".venv*", "runs", "__pycache__", ".*_cache")
        )
        record = (given.record or Path(folder)).resolve()
        folders = [given.only] if given.only else list(TESTS)
        records = {name: recorded(root, name, record / f"{Path(name).name}.json") for name in folders}
        for name, tests in records.items():
            seconds = round(sum(seconds for seconds, _ in tests.values()), 1)
            print(json.dumps({"without mutant": name, "tests": len(tests), "seconds": seconds}), flush=True)
        mutants = sample(root, given.count, given.seed, folders)[given.skip :]
        for name, index in mutants:
            if time.monotonic() - started > 60 * given.minutes:
                break
            source = (root / name).read_text(encoding="utf-8")
            change, text = mutated(source, index)
            (root / name).write_text(text, encoding="utf-8")
            where = next(item for item in folders if name.startswith(item))
            chosen = tests_of(records[where], name, change)
            killed, later, seconds = judged(root, chosen, TESTS[where] if given.slow else ())
            (root / name).write_text(source, encoding="utf-8")
            tested, fast, both = tested + 1, fast + killed, both + (killed or bool(later))
            found = {"file": name, "line": change.line, "change": change.text, "killed": killed, "by slow tests": later}
            print(json.dumps({**found, "tests": len(chosen), "seconds": round(seconds, 1)}), flush=True)
    print(f"seed {given.seed}: the fast tests kill {fast} of {tested} mutants" + f", all tests {both}" * given.slow)
    return 0


if __name__ == "__main__":
    sys.exit(main())
