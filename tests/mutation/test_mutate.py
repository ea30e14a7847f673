"""The mutants of the mutation run: each is one change, it compiles, and a seed always gives the same ones."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from mutation.mutate import ROOT, TESTS, changes, mutated, sample

SOURCE = '''
def clip(x: int, most: int = 3) -> int:
    """2 is no number of the program."""
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


@pytest.mark.parametrize("folder", [*TESTS, *(path for paths in TESTS.values() for path in paths)])
def test_the_folders_are_there(folder: str) -> None:
    assert any(Path(ROOT / folder).rglob("*.py"))
