"""Pickles read without running them: a machine that knows the few steps of weights, and builds nothing.

A pickle is a program. This machine walks through it with markers in the place of values: names are checked against a
table, tensors against the bytes that are there for them. Whatever torch's own readers would do later (its
``weights_only`` unpickler, and the one in C++ for TorchScript) they do on a program that held nothing else.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bnexport.screening.limits import limit
from bnexport.screening.pickle_names import NOT_CALLED, REBUILD, STORAGES
from bnexport.screening.pickle_steps import read_steps
from bnexport.screening.refusal import Refusal, shown
from bnexport.screening.tensor_sizes import check_view

_INT64 = 2**63


@dataclass(frozen=True)
class Storage:
    """The bytes behind tensors: which file of the archive, and how many it must hold."""

    key: str
    numel: int
    itemsize: int


@dataclass(frozen=True)
class Name:
    """A class or function that the pickle names."""

    text: str


class Made:
    """A container or object; only its depth is kept, its items if a tensor may be rebuilt from them.

    Attributes:
        items: Of a tuple; empty for anything else.
        depth: Levels of containers, itself included.
        used: Whether it lies inside another one: from then on it must not grow, or it could come to hold itself.
    """

    __slots__ = ("depth", "items", "used")

    def __init__(self, parts: list[Any], items: tuple[Any, ...] = ()) -> None:
        self.items, self.depth, self.used = items, 1, False
        self.take(parts)

    def take(self, parts: list[Any]) -> None:
        """Put values into it."""
        for part in parts:
            if isinstance(part, Made):
                if part is self:
                    raise Refusal("holds a pickle with a value that holds itself")
                part.used = True
                self.depth = max(self.depth, part.depth + 1)
        if self.depth > limit("pickle-depth"):
            raise Refusal(f"holds a pickle with more than {limit('pickle-depth')} levels of values")


def check_pickle(content: bytes, allowed: Callable[[str], bool]) -> list[Storage]:
    """Walk through one pickle that is the whole of ``content``.

    Args:
        content: The bytes.
        allowed: Whether a name may be used.

    Returns:
        The storages that its tensors lie in.

    Raises:
        Refusal: A name or a step that weights do not need, a tensor beyond its storage, or too much of anything.
    """
    stream = io.BytesIO(content)
    storages = check_one_pickle(stream, allowed)
    if stream.tell() != len(content):
        raise Refusal("holds a pickle with bytes behind its end")
    return storages


def check_one_pickle(stream: io.BytesIO, allowed: Callable[[str], bool]) -> list[Storage]:
    """As ``check_pickle``, for one of several pickles in a row; the stream stands behind it afterwards."""
    machine = _Machine(allowed)
    for step, (name, argument) in enumerate(read_steps(stream)):
        if step >= limit("pickle-steps"):
            raise Refusal(f"holds a pickle of more than {limit('pickle-steps')} steps")
        machine.do(name, argument)
    return machine.storages


class _Machine:
    """A stack of markers."""

    def __init__(self, allowed: Callable[[str], bool]) -> None:
        self.storages: list[Storage] = []
        self._allowed = allowed
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def do(self, name: str, argument: Any) -> None:
        if name in _CONSTANTS:
            self._stack.append(_VALUES.get(name, argument))
        elif name in _EMPTY:
            self._stack.append(Made([]))
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._put(argument)
        elif name in ("BINGET", "LONG_BINGET"):
            if argument not in self._memo:
                raise Refusal("holds a damaged pickle: it gets what was never put")
            self._stack.append(self._memo[argument])
        elif (step := _STEPS.get(name)) is not None:
            step(self, argument)

    def _put(self, place: int) -> None:
        if place > limit("pickle-steps"):  # torch's reader makes room for every number below it
            raise Refusal(f"holds a pickle that puts something at the place {place}")
        self._memo[place] = self._top()

    def _top(self) -> Any:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise Refusal("holds a damaged pickle: it takes more than is there")
        return self._stack[-1]

    def _pop(self, count: int) -> list[Any]:
        if len(self._stack) - (self._marks[-1] if self._marks else 0) < count:
            raise Refusal("holds a damaged pickle: it takes more than is there")
        taken = self._stack[len(self._stack) - count :]
        del self._stack[len(self._stack) - count :]
        return taken

    def _pop_to_mark(self) -> list[Any]:
        if not self._marks:
            raise Refusal("holds a damaged pickle: it has no mark")
        mark = self._marks.pop()
        taken = self._stack[mark:]
        del self._stack[mark:]
        return taken

    def mark(self, _: Any) -> None:
        self._marks.append(len(self._stack))

    def tuple_to_mark(self, _: Any) -> None:
        items = self._pop_to_mark()
        self._stack.append(Made(items, tuple(items)))

    def tuple_of(self, count: int) -> None:
        items = self._pop(count)
        self._stack.append(Made(items, tuple(items)))

    def grow(self, items: list[Any]) -> None:
        target = self._top()
        if not isinstance(target, Made) or target.items or target.used:
            raise Refusal("holds a pickle that changes a value after its use")
        target.take(items)

    def append(self, _: Any) -> None:
        self.grow(self._pop(1))

    def set_item(self, _: Any) -> None:
        self.grow(self._pop(2))

    def grow_to_mark(self, _: Any) -> None:
        self.grow(self._pop_to_mark())

    def name(self, dotted: str) -> None:
        if not self._allowed(dotted):
            raise Refusal(f"holds a pickle that names {shown(dotted)}, code which bnexport does not run")
        self._stack.append(Name(dotted))

    def call(self, _: Any) -> None:
        function, arguments = self._pop(2)
        if not isinstance(function, Name) or not isinstance(arguments, Made):
            raise Refusal("holds a pickle that calls something that is no name")
        if function.text in NOT_CALLED:
            raise Refusal(f"holds a pickle that calls {shown(function.text)}, which takes as much memory as it is told")
        if function.text in REBUILD:
            _check_tensor(arguments.items)
        self._stack.append(Made([arguments]))

    def build(self, _: Any) -> None:
        self.grow(self._pop(1))

    def persistent(self, _: Any) -> None:
        (identity,) = self._pop(1)
        items = identity.items if isinstance(identity, Made) else ()
        match items:
            case ("storage", Name(kind), str(key), str(), int(numel), *_) if kind in STORAGES:
                if not 0 <= numel < _INT64:
                    raise Refusal(f"holds a pickle with a storage of {numel} elements")
                storage = Storage(key, numel, STORAGES[kind])
            case _:
                raise Refusal("holds a pickle with something kept outside that is no storage of a tensor")
        self.storages.append(storage)
        self._stack.append(storage)


_VALUES: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_CONSTANTS = frozenset(
    {"NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"}
    | {"SHORT_BINSTRING", "BINSTRING"}
)
_EMPTY = frozenset({"EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"})
#: Step -> what it does; the steps that ``weights_only`` and TorchScript know, and no more.
_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": _Machine.mark,
    "TUPLE": _Machine.tuple_to_mark,
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "APPEND": _Machine.append,
    "APPENDS": _Machine.grow_to_mark,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.grow_to_mark,
    "GLOBAL": _Machine.name,
    "REDUCE": _Machine.call,
    "NEWOBJ": _Machine.call,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.persistent,
}


def _check_tensor(arguments: tuple[Any, ...]) -> None:
    """A rebuilt tensor must lie inside its storage: torch makes the storage larger when it does not."""
    match arguments:
        case (Storage(numel=numel), int(offset), Made(items=sizes), Made(items=strides), *_):
            check_view(numel, offset, sizes, strides)
        case _:
            raise Refusal("holds a pickle with a tensor that is not made of a storage, sizes and strides")
