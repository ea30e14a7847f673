import copy
import inspect
import pickle
import re

import pytest

from bnexport import errors
from bnexport.errors import BnexportError

CLASSES = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if kind.__module__ == errors.__name__]


def drawn() -> dict[str, str]:
    """Class -> its parent, as the tree in the module's docstring draws it."""
    parents: dict[str, str] = {}
    above: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"    ([|` -]*)([A-Z]\w+)(?:\s{2,}.*)?$", line)
        if match is None:
            continue
        depth, name = len(match[1]), match[2]
        above = [entry for entry in above if entry[0] < depth]
        parents[name] = above[-1][1] if above else "Exception"
        above.append((depth, name))
    return parents


def test_the_drawn_tree_is_the_tree():
    assert len(CLASSES) > 10
    assert drawn() == {kind.__name__: kind.__base__.__name__ for kind in CLASSES}


@pytest.mark.parametrize("kind", CLASSES)
def test_every_class_has_its_own_docstring(kind):
    assert (kind.__dict__.get("__doc__") or "").strip().split("\n")[0].endswith(".")


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("send", [lambda error: pickle.loads(pickle.dumps(error)), copy.copy, copy.deepcopy])
def test_an_error_survives_the_way_to_another_process(kind, send):
    sent = send(kind("what is wrong", remedy="What to do"))
    assert type(sent) is kind
    assert (sent.message, sent.remedy, str(sent)) == ("what is wrong", "What to do", "what is wrong. What to do")


def test_a_remedy_is_required_and_may_be_empty():
    with pytest.raises(TypeError, match="remedy"):
        BnexportError("what is wrong")
    assert str(BnexportError("what is wrong", remedy="")) == "what is wrong"
