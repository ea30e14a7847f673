"""Measure what the tests see: change the program in one place, run the tests, count the changes that no test notices.

Use, from the root of the tree: python tests/mutation/mutate.py --count 60 --seed 1 [--tree PATH] [--slow]

Each mutant is one small change of one file of TESTS: another comparison, another operator, a negated condition, another
number, a call that is left out. A mutant is killed when a test fails, or when the run takes three times as long as it does
without a mutant. The tree is copied first. Standard output gets one line of JSON per mutant and the score as its last line.

The tests run in a child of this process, which has imported the large libraries already. So a mutant costs seconds.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

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


def _programs(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes that compute something: no annotations, and nothing for the type checker alone."""
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return
    yield node
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _programs(child)


def changes(tree: ast.Module) -> list[Change]:
    """Return every change of a module, in the order of the source."""
    return [
        Change(getattr(node, "lineno", 0), text, apply) for node in _programs(tree) for text, apply in _of_node(node)
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


def passes(root: Path, tests: Iterable[str], select: str, limit: float | None) -> tuple[bool, float]:
    """Run tests of a tree; return whether they pass within ``limit`` seconds, and the seconds."""
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        _child(root, ["-x", "-q", "-n", "0", "-p", "no:cacheprovider", "-m", select, *tests])
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


def _child(root: Path, words: list[str]) -> NoReturn:
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
        code = int(pytest.main(words))
    finally:
        os._exit(code)


def judged(root: Path, name: str, *, slow: bool, limit: float) -> tuple[bool, bool | None, float]:
    """Return whether the fast tests kill the mutant in a file, whether the slow tests do, and the seconds.

    The slow tests run only if ``slow`` is set, and only for a mutant that the fast tests miss.
    """
    tests = next(tests for folder, tests in TESTS.items() if name.startswith(folder))
    right, seconds = passes(root, tests, "not slow", limit)
    if not right or not slow:
        return not right, None, seconds
    right, more = passes(root, tests, "slow", None)
    return False, not right, seconds + more


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tree", type=Path, default=ROOT, help="Root of the tree to test (default: this one).")
    parser.add_argument("--count", type=int, default=60, help="Number of mutants.")
    parser.add_argument(
        "--seed", type=int, default=1, help="Seed of the sample; the same sources give the same mutants."
    )
    parser.add_argument("--only", choices=TESTS, help="One folder of sources (default: all).")
    parser.add_argument(
        "--slow", action="store_true", help="Run the slow tests on what the fast ones miss; print both scores."
    )
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for library in LARGE:
        importlib.import_module(library)
    fast = both = 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve() / "tree"
        shutil.copytree(
            given.tree, root, ignore=shutil.ignore_patterns(".git", ".venv*", "runs", "__pycache__", ".*_cache")
        )
        limits = {}
        folders = [given.only] if given.only else list(TESTS)
        for name in folders:
            right, seconds = passes(root, TESTS[name], "not slow", None)
            if not right:
                print(f"mutate.py: the tests of {name} fail without a mutant", file=sys.stderr)
                return 2
            print(json.dumps({"without mutant": name, "seconds": round(seconds, 1)}), flush=True)
            limits[name] = 3 * seconds + 60
        mutants = sample(root, given.count, given.seed, folders)
        for name, index in mutants:
            source = (root / name).read_text(encoding="utf-8")
            change, text = mutated(source, index)
            (root / name).write_text(text, encoding="utf-8")
            limit = next(limit for folder, limit in limits.items() if name.startswith(folder))
            killed, later, seconds = judged(root, name, slow=given.slow, limit=limit)
            (root / name).write_text(source, encoding="utf-8")
            fast, both = fast + killed, both + (killed or bool(later))
            found = {"file": name, "line": change.line, "change": change.text, "killed": killed, "by slow tests": later}
            print(json.dumps({**found, "seconds": round(seconds, 1)}), flush=True)
    print(
        f"seed {given.seed}: the fast tests kill {fast} of {len(mutants)} mutants" + f", all tests {both}" * given.slow
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
