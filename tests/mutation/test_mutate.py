"""The mutants of the mutation run: each is one change, it compiles, and a seed always gives the same ones."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mutation.mutate import ROOT, TESTS, changes, marked, mutated, sample

SOURCE = '''
def clip(x: int, most: int = 3) -> int:
    """2 is not a number of the program."""
    if x < 0 and not most:
        print("below")
    return -x * most if x in (1, True) else most
'''
MUTANTS = {
    "3 -> 4": "most: int=4",
    "condition negated": "if not (x < 0 and (not most)):",
    "And -> Or": "if x < 0 or not most:",
    "Lt -> LtE": "if x <= 0",
    "0 -> 1": "if x < 1",
    "call left out": "        None\n",
    "In -> NotIn": "if x not in (1, True)",
    "Mult -> Div": "-x / most",
    "minus left out": "+x * most",
    "1 -> 2": "in (2, True)",
    "True -> False": "in (1, False)",
}


def test_every_kind_of_change_is_made() -> None:
    found = [change.text for change in changes(ast.parse(SOURCE))]
    assert set(found) == set(MUTANTS)
    for index, text in enumerate(found):
        change, source = mutated(SOURCE, index)
        assert change.text == text
        assert source != ast.unparse(ast.parse(SOURCE))
        if found.count(text) == 1:
            assert MUTANTS[text] in source


def test_the_sample_is_the_same_for_a_seed() -> None:
    first = sample(ROOT, 12, seed=1)
    assert first == sample(ROOT, 12, seed=1) != sample(ROOT, 12, seed=2)
    assert len(set(first)) == 12
    for name, index in first:
        source = (ROOT / name).read_text(encoding="utf-8")
        change, text = mutated(source, index)
        compile(text, name, "exec")
        assert ast.dump(ast.parse(text)) != ast.dump(ast.parse(source)), change


NESTED = '''"""Module."""
from __future__ import annotations
import functools
LIMIT = 1

def outer(x):
    """Docstring."""
    if x:
        return [x + 1]
    for _ in range(2):
        x = -1

@functools.cache
def kept(x):
    if x:
        return 2

class Kind:
    size = 3
    def method(self):
        return 4
'''


def test_a_change_names_the_block_that_runs_it() -> None:
    found = {change.text: change.block for change in changes(ast.parse(NESTED)) if change.text[0].isdigit()}
    assert found == {"1 -> 2": 11, "2 -> 3": 0, "3 -> 4": 0, "4 -> 5": 21}
    runs: list[str] = []
    builtins = vars(__import__("builtins"))
    builtins["_block_runs"] = runs.append
    try:
        space: dict[str, Any] = {}
        exec(compile(marked(NESTED, "n.py"), "n.py", "exec"), space)
    finally:
        del builtins["_block_runs"]
    assert (space["__doc__"], space["outer"].__doc__, runs) == ("Module.", "Docstring.", [])
    space["outer"](5)
    assert runs == ["n.py:7", "n.py:9"]
    space["outer"](0)
    space["kept"](1)
    space["Kind"]().method()
    assert runs[2:] == ["n.py:7", "n.py:11", "n.py:11", "n.py:21"]


#: A tree with three mutants: one that a fast test sees, one that only a slow test sees, and a condition.
TREE = {
    "pyproject.toml": "[tool.pytest.ini_options]\nmarkers = ['slow']\n",
    "bnexport/__init__.py": "",
    "bnexport/folding/one.py": "def one(x):\n    return x + x\n\n\ndef two(x):\n    return x - x\n",
    "bnexport/verification/three.py": "def three(x):\n    return x if x else None\n",
    "tests/unit/folding/test_one.py": """
import pytest
from bnexport.folding.one import one, two
def test_one(): assert one(2) == 4
@pytest.mark.slow
def test_two(): assert two(2) == 0
""",
    "tests/unit/verification/test_three.py": """
from bnexport.verification.three import three
def test_three(): assert three(False) is None
""",
    "tests/must_fail/test_none.py": "",
}
PROGRAM = "import sys; from mutation import mutate; mutate.LARGE = (); sys.exit(mutate.main())"


@pytest.mark.slow
def test_the_scores_of_a_small_tree(tmp_path: Path) -> None:
    for name, text in TREE.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    command = [sys.executable, "-c", PROGRAM, "--tree", str(tmp_path), "--count", "9", "--slow"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=240, check=True)
    *lines, score = done.stdout.splitlines()
    found = [json.loads(line) for line in lines]
    assert {(row["change"], row["killed"], row["by slow tests"]) for row in found[2:]} == {
        ("Add -> Sub", True, None),
        ("Sub -> Add", False, True),
        ("condition negated", True, None),
    }
    assert score == "seed 1: the fast tests kill 2 of 3 mutants, all tests 3"
    assert {name: (tmp_path / name).read_text() for name in TREE} == TREE


@pytest.mark.parametrize("folder", [*TESTS, *(path for paths in TESTS.values() for path in paths)])
def test_the_folders_are_there(folder: str) -> None:
    assert any(Path(ROOT / folder).rglob("*.py"))
