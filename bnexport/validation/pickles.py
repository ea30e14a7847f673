"""Pickles in torch's files: their steps, the names that they may use, and the tensors that they rebuild.

A pickle is walked through without being run. Written by hand on purpose: fickling is under the LGPL, and checks imports only.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
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
#: Names in a pickle of weights: tensors and plain containers of them.
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
#: Called names whose result is a mapping.
MAPPINGS = frozenset({"collections.OrderedDict", "collections.defaultdict", "builtins.dict"})
#: Plain values that training scripts save in addition to the weights. The reader of weights files calls none of these names:
#: it keeps the arguments as data.
HARMLESS = (
    WEIGHTS
    | MAPPINGS
    | {f"builtins.{kind}" for kind in ("list", "tuple", "frozenset", "int", "float", "bool", "str", "bytes", "bytearray")}
    | {f"datetime.{kind}" for kind in ("datetime", "date", "time", "timedelta", "timezone")}
    | {"argparse.Namespace", "types.SimpleNamespace", "collections.deque", "decimal.Decimal", "fractions.Fraction", "uuid.UUID"}
)  # fmt: skip
#: Harmless names of several versions of a library.
_VERSIONS = re.compile(
    r"numpy\.(?:_?core\.(?:multiarray\.(?:scalar|_reconstruct)|numeric\._frombuffer)|ndarray|dtype|dtypes\.\w+DType"
    r"|bool_?|u?int\d*|float\d*|complex\d*|longdouble|str_|bytes_|datetime64|timedelta64)"
    r"|pathlib\.(?:_local\.)?(?:Pure)?(?:Posix|Windows)?Path"
    r"|(?:pytorch_)?lightning(?:_fabric|\.fabric|\.pytorch)?\.utilities\.(?:parsing|data)\.AttributeDict"
)
#: Element types of numpy arrays of plain values; "O" is an array of Python objects.
_ELEMENTS = re.compile(r"[<>=|]?[?biufcSUVmM]\d*(?:\[\w+\])?")
#: Modules by their names in Python 2, which pickles of protocol 2 use.
_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}
_DTYPE = re.compile(r"torch\.(?:float|bfloat|complex|u?int|bool|qu?int|float8_e|float4_e)[0-9a-z_]*")
#: Classes that the archive's own code defines. ``torch.classes`` are written in C++, and some open files or sockets.
_SCRIPT_CLASS = re.compile(r"__torch__\.(?!torch\.classes\.)[A-Za-z0-9_.]+")


def is_weight_name(name: str) -> bool:
    """Return True if a pickle of weights may use a name."""
    return name in WEIGHTS or name in STORAGES or _DTYPE.fullmatch(name) is not None


def is_checkpoint_name(name: str) -> bool:
    """Return True if a user's weights file may use a name: weights, and plain values next to them."""
    name = current_name(name)
    return is_weight_name(name) or name in HARMLESS or _VERSIONS.fullmatch(name) is not None


def current_name(name: str) -> str:
    """Return a name with its module named as in Python 3."""
    module, dot, rest = name.partition(".")
    return _PYTHON_2.get(module, module) + dot + rest


def is_mapping(name: str) -> bool:
    """Return True if the call of a name makes a mapping."""
    return name in MAPPINGS or name.endswith(".AttributeDict")


def is_script_name(name: str) -> bool:
    """Return True if a pickle in a TorchScript archive may use a name."""
    return name in SCRIPT or name in STORAGES or _SCRIPT_CLASS.fullmatch(name) is not None


def read_steps(stream: io.BytesIO, *, modern: bool = False) -> Iterator[tuple[str, Any]]:
    """Yield name and argument of each step, up to the end of one pickle; ``modern`` adds the steps of protocols 3 to 5."""
    opcodes = {**_OPCODES, **_MODERN} if modern else _OPCODES
    while True:
        code = _take(stream, 1)
        if code not in opcodes:
            raise Refusal(f"holds a pickle with the step {code!r}, which weights do not need")
        name, read = opcodes[code]
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


def _bytes(form: str) -> Callable[[io.BytesIO], bytes]:
    """Return a reader of bytes with their number in front."""
    length = _number(form)

    def read(stream: io.BytesIO) -> bytes:
        count = length(stream)
        if count < 0:
            raise Refusal("holds a damaged pickle: it has a text of negative length")
        return _take(stream, count)

    return read


def _text(form: str) -> Callable[[io.BytesIO], str]:
    read = _bytes(form)
    return lambda stream: _decoded(read(stream))


def _whole(form: str) -> Callable[[io.BytesIO], int]:
    read = _bytes(form)
    return lambda stream: int.from_bytes(read(stream), "little", signed=True)


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
    b"\x8a": ("LONG1", _whole("B")),
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
#: The further steps of protocols 3 to 5, which the reader of weights files knows too.
_MODERN: dict[bytes, tuple[str, Callable[[io.BytesIO], Any]]] = {
    b"\x95": ("FRAME", _number("<Q")),
    b"\x94": ("MEMOIZE", _nothing),
    b"\x93": ("STACK_GLOBAL", _nothing),
    b"\x8c": ("BINUNICODE", _text("B")),
    b"\x8d": ("BINUNICODE", _text("<Q")),
    b"C": ("BINBYTES", _bytes("B")),
    b"B": ("BINBYTES", _bytes("<I")),
    b"\x8e": ("BINBYTES", _bytes("<Q")),
    b"\x96": ("BINBYTES", _bytes("<Q")),
    b"\x8b": ("LONG1", _whole("<i")),
    b"\x90": ("ADDITEMS", _nothing),
    b"\x91": ("FROZENSET", _nothing),
    b"\x92": ("NEWOBJ_EX", _nothing),
}


_INT64 = 2**63


@dataclass(frozen=True)
class Storage:
    """The bytes of tensors: the file of the archive, and the size that it must have."""

    key: str
    numel: int
    itemsize: int
    kind: str


@dataclass(frozen=True)
class Name:
    """A class or function that the pickle names."""

    text: str


class Made:
    """A container, or the result of a call that was not made.

    Attributes:
        kind: "tuple", "list", "dict" or "set", or the name of the called class or function.
        items: Values of a container; keys and values in turn of a mapping.
        arguments: Arguments of the call; empty for a container.
        depth: Levels of containers, itself included.
        used: True once it lies inside another one: from then on it must not grow, or it could contain itself.
    """

    __slots__ = ("arguments", "depth", "items", "kind", "used")

    def __init__(self, kind: str, parts: Sequence[Any] = (), *, arguments: Sequence[Any] = ()) -> None:
        self.kind, self.items, self.arguments = kind, list(parts), tuple(arguments)
        self.depth, self.used = 1, False
        self.take([*parts, *arguments])

    def take(self, parts: list[Any]) -> None:
        """Count the levels of values that are put into the container."""
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
    return read_pickle(content, allowed)[1]


def read_pickle(content: bytes, allowed: Callable[[str], bool], *, modern: bool = False) -> tuple[Any, list[Storage]]:
    """Return the value of one pickle that is the whole of ``content``, and the storages that its tensors lie in."""
    stream = io.BytesIO(content)
    value, storages = read_one_pickle(stream, allowed, modern=modern)
    if stream.tell() != len(content):
        raise Refusal("holds a pickle with bytes behind its end")
    return value, storages


def read_one_pickle(
    stream: io.BytesIO, allowed: Callable[[str], bool], *, modern: bool = False
) -> tuple[Any, list[Storage]]:
    """Read one of several pickles in a row, as ``read_pickle`` does; the stream stands behind the pickle afterwards."""
    machine = _Machine(allowed)
    for step, (name, argument) in enumerate(read_steps(stream, modern=modern)):
        if step >= limit("pickle-steps"):
            raise Refusal(f"holds a pickle of more than {limit('pickle-steps')} steps")
        machine.do(name, argument)
    return machine.result(), machine.storages


class _Machine:
    """A stack of values. Calls are recorded and not made."""

    def __init__(self, allowed: Callable[[str], bool]) -> None:
        self.storages: list[Storage] = []
        self._allowed = allowed
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def do(self, name: str, argument: Any) -> None:
        if name in _CONSTANTS:
            self._stack.append(_VALUES.get(name, argument))
        elif (kind := _EMPTY.get(name)) is not None:
            self._stack.append(Made(kind))
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._put(argument)
        elif name == "MEMOIZE":
            self._put(len(self._memo))
        elif name in ("BINGET", "LONG_BINGET"):
            if argument not in self._memo:
                raise Refusal("holds a damaged pickle: it gets what was never put")
            self._stack.append(self._memo[argument])
        elif (step := _STEPS.get(name)) is not None:
            step(self, argument)

    def result(self) -> Any:
        """Return the value on top of the stack."""
        return self._top()

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
        self._stack.append(Made("tuple", self._pop_to_mark()))

    def frozen_set(self, _: Any) -> None:
        self._stack.append(Made("set", self._pop_to_mark()))

    def tuple_of(self, count: int) -> None:
        self._stack.append(Made("tuple", self._pop(count)))

    def _growing(self, parts: list[Any]) -> Made:
        target = self._top()
        if not isinstance(target, Made) or target.kind == "tuple" or target.used:
            raise Refusal("holds a pickle that changes a value after its use")
        target.take(parts)
        return target

    def _extend(self, items: list[Any]) -> None:
        target = self._growing(items)
        if target.kind == "dict" or is_mapping(target.kind):
            raise Refusal("holds a damaged pickle: it appends to a mapping")
        if not target.arguments:
            target.items += items

    def _set(self, pairs: list[Any]) -> None:
        target = self._growing(pairs)
        if target.kind in ("list", "set") or len(pairs) % 2:
            raise Refusal("holds a damaged pickle: it sets a key of something that is not a mapping")
        target.items += pairs

    def append(self, _: Any) -> None:
        self._extend(self._pop(1))

    def append_to_mark(self, _: Any) -> None:
        self._extend(self._pop_to_mark())

    def set_item(self, _: Any) -> None:
        self._set(self._pop(2))

    def set_to_mark(self, _: Any) -> None:
        self._set(self._pop_to_mark())

    def name(self, dotted: str) -> None:
        if not self._allowed(dotted):
            raise Refusal(f"holds a pickle that names {shown(dotted)}, code which bnexport does not run")
        self._stack.append(Name(dotted))

    def name_of_texts(self, _: Any) -> None:
        module, name = self._pop(2)
        if not isinstance(module, str) or not isinstance(name, str):
            raise Refusal("holds a damaged pickle: it names something that is not a text")
        self.name(f"{module}.{name}")

    def call(self, _: Any) -> None:
        self._call(*self._pop(2))

    def call_with_names(self, _: Any) -> None:
        function, arguments, named = self._pop(3)
        self._call(function, arguments, named)

    def _call(self, function: Any, arguments: Any, *named: Any) -> None:
        if not isinstance(function, Name) or not isinstance(arguments, Made):
            raise Refusal("holds a pickle that calls something that is no name")
        if function.text in NOT_CALLED:
            raise Refusal(f"holds a pickle that calls {shown(function.text)}, which takes as much memory as it is told")
        if function.text in REBUILD:
            _check_tensor(arguments.items)
        if function.text == "numpy.dtype":
            _check_elements(arguments.items)
        arguments.used = True
        self._stack.append(Made(current_name(function.text), arguments=[*arguments.items, *named]))

    def build(self, _: Any) -> None:
        self._growing(self._pop(1))

    def persistent(self, _: Any) -> None:
        (identity,) = self._pop(1)
        items = identity.items if isinstance(identity, Made) and identity.kind == "tuple" else ()
        match items:
            case ["storage", Name(_), str(_), str(), int(_), Made()]:
                raise Refusal("holds a pickle with a part of a storage, as PyTorch before 0.4 wrote it")
            case ["storage", Name(kind), str(key), str(), int(numel), *_] if kind in STORAGES:
                if not 0 <= numel < _INT64:
                    raise Refusal(f"holds a pickle with a storage of {numel} elements")
                storage = Storage(key, numel, STORAGES[kind], kind)
            case _:
                raise Refusal("holds a pickle with something kept outside that is no storage of a tensor")
        self.storages.append(storage)
        self._stack.append(storage)


_VALUES: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_CONSTANTS = frozenset(
    {"NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"}
    | {"SHORT_BINSTRING", "BINSTRING", "BINBYTES"}
)
_EMPTY = {"EMPTY_TUPLE": "tuple", "EMPTY_LIST": "list", "EMPTY_DICT": "dict", "EMPTY_SET": "set"}
#: Step -> its function.
_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": _Machine.mark,
    "TUPLE": _Machine.tuple_to_mark,
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "APPEND": _Machine.append,
    "APPENDS": _Machine.append_to_mark,
    "ADDITEMS": _Machine.append_to_mark,
    "FROZENSET": _Machine.frozen_set,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_to_mark,
    "GLOBAL": _Machine.name,
    "STACK_GLOBAL": _Machine.name_of_texts,
    "REDUCE": _Machine.call,
    "NEWOBJ": _Machine.call,
    "NEWOBJ_EX": _Machine.call_with_names,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.persistent,
}


def _check_tensor(arguments: Sequence[Any]) -> None:
    """Refuse a rebuilt tensor beyond its storage: torch would enlarge the storage."""
    match arguments:
        case [
            Storage(numel=numel),
            int(offset),
            Made(kind="tuple", items=sizes),
            Made(kind="tuple", items=strides),
            *_,
        ]:
            check_view(numel, offset, sizes, strides)
        case _:
            raise Refusal("holds a pickle with a tensor that is not made of a storage, sizes and strides")


def _check_elements(arguments: Sequence[Any]) -> None:
    """Refuse a numpy array whose elements are Python objects."""
    kind = arguments[0] if arguments else None
    if not isinstance(kind, str) or _ELEMENTS.fullmatch(kind) is None:
        raise Refusal(f"holds a numpy array of {shown(str(kind))}, which may contain code")
