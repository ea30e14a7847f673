"""Pickles in torch's files: their steps, the names that they may use, and the tensors that they rebuild.

A pickle is walked through without being run. Written by hand on purpose: fickling is under the LGPL, and checks imports only.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bnexport.files import Refusal
from bnexport.validation.limits import check_view, limit, shown

#: Kinds of storage -> bytes of one element.
STORAGES: Mapping[str, int] = {
    "torch.DoubleStorage": 8,
    "torch.FloatStorage": 4,
    "torch.HalfStorage": 2,
    "torch.BFloat16Storage": 2,
    "torch.LongStorage": 8,
    "torch.IntStorage": 4,
    "torch.ShortStorage": 2,
    "torch.CharStorage": 1,
    "torch.ByteStorage": 1,
    "torch.BoolStorage": 1,
    "torch.ComplexDoubleStorage": 16,
    "torch.ComplexFloatStorage": 8,
    "torch.QInt8Storage": 1,
    "torch.QUInt8Storage": 1,
    "torch.QInt32Storage": 4,
    "torch.QUInt4x2Storage": 1,
    "torch.QUInt2x4Storage": 1,
    "torch.storage.UntypedStorage": 1,
    "torch.UntypedStorage": 1,
}
#: Functions whose arguments are (storage, offset, sizes, strides, ...).
REBUILD = frozenset(f"torch._utils._rebuild_{kind}" for kind in ("tensor", "tensor_v2", "tensor_v3", "qtensor"))
_TENSORS = REBUILD | {
    "torch._utils._rebuild_parameter",
    "torch.Size",
    "torch.device",
    "torch.per_tensor_affine",
    "torch.per_channel_affine",
    "torch.serialization._get_layout",
    "collections.OrderedDict",
}
#: What torch.load reads as weights: tensors and plain containers of them.
WEIGHTS = _TENSORS | {
    "collections.Counter",
    "torch.nn.parameter.Parameter",
    "torch._utils._rebuild_parameter_with_state",
    "torch.Tensor",
    "_codecs.encode",
    "builtins.set",
    "builtins.complex",
}
#: Named as a type only: called with a number they would take so much memory.
NOT_CALLED = frozenset({*STORAGES, "torch.Tensor"})
#: What TorchScript's own reader builds lists and dictionaries with.
SCRIPT = _TENSORS | {
    "torch.jit._pickle.build_intlist",
    "torch.jit._pickle.build_doublelist",
    "torch.jit._pickle.build_boollist",
    "torch.jit._pickle.build_tensorlist",
    "torch.jit._pickle.build_tensor_from_id",
    "torch.jit._pickle.restore_type_tag",
}
_DTYPE = re.compile(r"torch\.(?:float|bfloat|complex|u?int|bool|qu?int|float8_e|float4_e)[0-9a-z_]*")
#: Classes that the archive's own code defines. ``torch.classes`` are written in C++, and some open files or sockets.
_SCRIPT_CLASS = re.compile(r"__torch__\.(?!torch\.classes\.)[A-Za-z0-9_.]+")


def is_weight_name(name: str) -> bool:
    """Return True if a pickle of weights may use a name."""
    return name in WEIGHTS or name in STORAGES or _DTYPE.fullmatch(name) is not None


def is_script_name(name: str) -> bool:
    """Return True if a pickle in a TorchScript archive may use a name."""
    return name in SCRIPT or name in STORAGES or _SCRIPT_CLASS.fullmatch(name) is not None


def read_steps(stream: io.BytesIO) -> Iterator[tuple[str, Any]]:
    """Yield name and argument of each step, up to the end of one pickle."""
    while True:
        code = _take(stream, 1)
        if code not in _OPCODES:
            raise Refusal(f"holds a pickle with the step {code!r}, which weights do not need")
        name, read = _OPCODES[code]
        yield name, read(stream)
        if name == "STOP":
            return


def _take(stream: io.BytesIO, count: int) -> bytes:
    content = stream.read(count)
    if len(content) < count:
        raise Refusal("holds a damaged pickle: it ends inside a step")
    return content


def _nothing(_: io.BytesIO) -> None:
    return None


def _number(form: str) -> Callable[[io.BytesIO], Any]:
    size = struct.calcsize(form)
    return lambda stream: struct.unpack(form, _take(stream, size))[0]


def _text(form: str) -> Callable[[io.BytesIO], str]:
    """Return a reader of a text with its length in front."""
    length = _number(form)

    def read(stream: io.BytesIO) -> str:
        count = length(stream)
        if count < 0:
            raise Refusal("holds a damaged pickle: it has a text of negative length")
        return _decoded(_take(stream, count))

    return read


def _whole(stream: io.BytesIO) -> int:
    return int.from_bytes(_take(stream, _take(stream, 1)[0]), "little", signed=True)


def _name(stream: io.BytesIO) -> str:
    """Read module and name, each on a separate line."""
    lines = [stream.readline(), stream.readline()]
    if not all(line.endswith(b"\n") for line in lines):
        raise Refusal("holds a damaged pickle: it ends inside a name")
    return ".".join(_decoded(line[:-1]) for line in lines)


def _decoded(content: bytes) -> str:
    # Texts may hold any bytes (a shared constant of a network): what is no UTF-8 is only looked at, never used.
    return content.decode("utf-8", "replace")


#: Byte -> name and the reader of its argument: what ``weights_only`` and TorchScript know, and no more.
_OPCODES: dict[bytes, tuple[str, Callable[[io.BytesIO], Any]]] = {
    b"\x80": ("PROTO", _number("B")),
    b".": ("STOP", _nothing),
    b"(": ("MARK", _nothing),
    b")": ("EMPTY_TUPLE", _nothing),
    b"]": ("EMPTY_LIST", _nothing),
    b"}": ("EMPTY_DICT", _nothing),
    b"\x8f": ("EMPTY_SET", _nothing),
    b"N": ("NONE", _nothing),
    b"\x88": ("NEWTRUE", _nothing),
    b"\x89": ("NEWFALSE", _nothing),
    b"J": ("BININT", _number("<i")),
    b"K": ("BININT1", _number("B")),
    b"M": ("BININT2", _number("<H")),
    b"\x8a": ("LONG1", _whole),
    b"G": ("BINFLOAT", _number(">d")),
    b"X": ("BINUNICODE", _text("<I")),
    b"T": ("BINSTRING", _text("<i")),
    b"U": ("SHORT_BINSTRING", _text("B")),
    b"q": ("BINPUT", _number("B")),
    b"r": ("LONG_BINPUT", _number("<I")),
    b"h": ("BINGET", _number("B")),
    b"j": ("LONG_BINGET", _number("<I")),
    b"t": ("TUPLE", _nothing),
    b"\x85": ("TUPLE1", _nothing),
    b"\x86": ("TUPLE2", _nothing),
    b"\x87": ("TUPLE3", _nothing),
    b"a": ("APPEND", _nothing),
    b"e": ("APPENDS", _nothing),
    b"s": ("SETITEM", _nothing),
    b"u": ("SETITEMS", _nothing),
    b"c": ("GLOBAL", _name),
    b"R": ("REDUCE", _nothing),
    b"\x81": ("NEWOBJ", _nothing),
    b"b": ("BUILD", _nothing),
    b"Q": ("BINPERSID", _nothing),
}


_INT64 = 2**63


@dataclass(frozen=True)
class Storage:
    """The bytes of tensors: the file of the archive, and the size that it must have."""

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
        items: Items of a tuple; empty for anything else.
        depth: Levels of containers, itself included.
        used: True once it lies inside another one: from then on it must not grow, or it could contain itself.
    """

    __slots__ = ("depth", "items", "used")

    def __init__(self, parts: list[Any], items: tuple[Any, ...] = ()) -> None:
        self.items, self.depth, self.used = items, 1, False
        self.take(parts)

    def take(self, parts: list[Any]) -> None:
        """Put values into the container."""
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

    Returns:
        The storages that its tensors lie in.
    """
    stream = io.BytesIO(content)
    storages = check_one_pickle(stream, allowed)
    if stream.tell() != len(content):
        raise Refusal("holds a pickle with bytes behind its end")
    return storages


def check_one_pickle(stream: io.BytesIO, allowed: Callable[[str], bool]) -> list[Storage]:
    """Check one of several pickles in a row, as ``check_pickle`` does; the stream stands behind the pickle afterwards."""
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
    """Refuse a rebuilt tensor beyond its storage: torch would enlarge the storage."""
    match arguments:
        case (Storage(numel=numel), int(offset), Made(items=sizes), Made(items=strides), *_):
            check_view(numel, offset, sizes, strides)
        case _:
            raise Refusal("holds a pickle with a tensor that is not made of a storage, sizes and strides")
