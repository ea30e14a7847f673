"""Pickles in torch's files, read as data: their steps, the names that they may use, and the tensors that they rebuild.

Nothing is imported or called. Written by hand on purpose: fickling is under the LGPL, and only checks imports.
"""

from __future__ import annotations

import io
import re
import struct
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bnexport.files import Refusal
from bnexport.validation.limits import check_view, limit, shown

#: Kinds of storage -> bytes of one element.
STORAGES: Mapping[str, int] = {
    "torch.DoubleStorage": 8, "torch.FloatStorage": 4, "torch.HalfStorage": 2, "torch.BFloat16Storage": 2,
    "torch.LongStorage": 8, "torch.IntStorage": 4, "torch.ShortStorage": 2, "torch.CharStorage": 1, "torch.ByteStorage": 1,
    "torch.BoolStorage": 1, "torch.ComplexDoubleStorage": 16, "torch.ComplexFloatStorage": 8, "torch.QInt8Storage": 1,
    "torch.QUInt8Storage": 1, "torch.QInt32Storage": 4, "torch.QUInt4x2Storage": 1, "torch.QUInt2x4Storage": 1,
    "torch.storage.UntypedStorage": 1, "torch.UntypedStorage": 1,
}  # fmt: skip
#: Functions whose arguments are (storage, offset, sizes, strides, ...).
REBUILDERS = frozenset(f"torch._utils._rebuild_{kind}" for kind in ("tensor", "tensor_v2", "tensor_v3", "qtensor"))
_TENSORS = REBUILDERS | {
    "torch._utils._rebuild_parameter", "torch.Size", "torch.device", "torch.per_tensor_affine", "torch.per_channel_affine",
    "torch.serialization._get_layout", "collections.OrderedDict",
}  # fmt: skip
#: Names in a pickle of weights: tensors and plain containers of them.
WEIGHTS = _TENSORS | {
    "collections.Counter", "torch.nn.parameter.Parameter", "torch._utils._rebuild_parameter_with_state", "torch.Tensor",
    "_codecs.encode", "builtins.set", "builtins.complex",
}  # fmt: skip
#: Allowed as types only: a call with a number would allocate that amount of memory.
NOT_CALLED = frozenset({*STORAGES, "torch.Tensor"})
#: Names in TorchScript's pickles: those of tensors, and the functions that build lists and dictionaries.
SCRIPT = _TENSORS | {
    "torch.jit._pickle.build_intlist", "torch.jit._pickle.build_doublelist", "torch.jit._pickle.build_boollist",
    "torch.jit._pickle.build_tensorlist", "torch.jit._pickle.build_tensor_from_id", "torch.jit._pickle.restore_type_tag",
}  # fmt: skip
#: Called names whose result is a mapping.
MAPPINGS = frozenset({"collections.OrderedDict", "collections.defaultdict", "builtins.dict"})
#: Plain values that training scripts save in addition to the weights. The reader of weights files calls none of these names:
#: it keeps the arguments as data.
HARMLESS = (
    WEIGHTS
    | MAPPINGS
    | {f"builtins.{kind}" for kind in ("list", "tuple", "frozenset", "int", "float", "bool", "str", "bytes", "bytearray")}
    | {f"datetime.{kind}" for kind in ("datetime", "date", "time", "timedelta", "timezone")}
    | {f"typing.{kind}" for kind in ("Any", "Dict", "List", "Optional", "Tuple", "Union")}
    | {"argparse.Namespace", "types.SimpleNamespace", "collections.deque", "decimal.Decimal", "fractions.Fraction", "uuid.UUID"}
    | {"builtins.object", "copyreg._reconstructor"}
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
#: Makes an object of a class in protocols 0 and 1: (class, base class, state of the base class).
_RECONSTRUCTOR = "copyreg._reconstructor"
#: Packages whose names are allowed by the tables above only: no stand-in replaces an object of Python, torch or numpy.
_TABLED = sys.stdlib_module_names | {"__builtin__", "copy_reg", "torch", "numpy"}
_CLASS = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)+")
#: Names in Python 2, which pickles of protocol 2 use.
_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg", "long": "int", "unicode": "str", "xrange": "range"}
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
    """Return a name as in Python 3."""
    module, dot, rest = name.partition(".")
    module = _PYTHON_2.get(module, module)
    return module + dot + (_PYTHON_2.get(rest, rest) if module == "builtins" else rest)


def _is_script_name(name: str) -> bool:
    return name in SCRIPT or name in STORAGES or _SCRIPT_CLASS.fullmatch(name) is not None


@dataclass(frozen=True)
class Vocabulary:
    """The names and the steps that a pickle may have."""

    allows: Callable[[str], bool]
    modern: bool = False  # Allows the steps of protocols 3 to 5
    stand_ins: bool = False  # Allows objects of other classes; StandIn has the rule

    def check(self, name: str) -> None:
        """Refuse a name of code."""
        if not self.allows(name):
            raise Refusal(f"holds a pickle that names {shown(name)}, code which bnexport does not run")


#: State dicts that torch itself will read.
WEIGHTS_ALONE = Vocabulary(is_weight_name)
#: Pickles in TorchScript archives.
TORCHSCRIPT = Vocabulary(_is_script_name)
#: A user's weights files, which bnexport reads by itself.
CHECKPOINT = Vocabulary(is_checkpoint_name, modern=True, stand_ins=True)


_INT64 = 2**63


@dataclass(frozen=True)
class Storage:
    """The elements of a tensor: a file of the archive, or a part of a file as PyTorch before 0.4 wrote it."""

    key: str
    numel: int
    itemsize: int
    kind: str
    start: int = 0  # Elements of the file in front of the part

    def cut(self, content: bytes) -> bytes:
        """Return the bytes of the part from those of the file."""
        return content[self.start * self.itemsize : (self.start + self.numel) * self.itemsize]


@dataclass(frozen=True)
class Name:
    """A class or function that the pickle names."""

    text: str


class StandIn:
    """An object of an unknown class. The class is not imported, and the object is not made.

    Only steps that make an object without a call have a stand-in: NEWOBJ, and ``copyreg._reconstructor`` of older protocols.
    All values in the object's arguments and state are validated like any others, and then dropped.
    """


class Made:
    """A container, or the result of a call that was not made.

    Attributes:
        kind: "tuple", "list", "dict" or "set", or the name of the called class or function.
        items: Values of a container; keys and values in turn of a mapping.
        arguments: Arguments of the call; empty for a container.
        depth: Levels of containers, itself included.
        used: True once it is inside another container. It must not grow then, because it could contain itself.
    """

    __slots__ = ("arguments", "depth", "items", "kind", "used")

    def __init__(self, kind: str, parts: Sequence[Any] = (), *, arguments: Sequence[Any] = ()) -> None:
        self.kind, self.items, self.arguments = kind, list(parts), tuple(arguments)
        self.depth, self.used = 1, False
        self.take([*parts, *arguments])

    @property
    def is_mapping(self) -> bool:
        """True for a dictionary, and for the call of a class of dictionaries."""
        return self.kind == "dict" or self.kind in MAPPINGS or self.kind.endswith(".AttributeDict")

    def pairs(self) -> Iterator[tuple[Any, Any]]:
        """Yield the keys and values of a mapping."""
        for argument in self.arguments:  # Python 2 gives an OrderedDict its items as a list of pairs
            for pair in argument.items if isinstance(argument, Made) and argument.kind == "list" else ():
                if isinstance(pair, Made) and len(pair.items) == 2:
                    yield pair.items[0], pair.items[1]
        yield from zip(self.items[::2], self.items[1::2], strict=True)

    def take(self, parts: list[Any]) -> None:
        """Count the levels of values that are put into the container."""
        for part in parts:
            if isinstance(part, Made):
                if part is self:
                    raise Refusal("holds a pickle with a self-referencing value")
                part.used = True
                self.depth = max(self.depth, part.depth + 1)
        if self.depth > limit("pickle-depth"):
            raise Refusal(f"holds a pickle with more than {limit('pickle-depth')} levels of values")


def read_pickle(content: bytes, vocabulary: Vocabulary) -> tuple[Any, list[Storage]]:
    """Return the value of one pickle that is the whole of ``content``, and the storages of its tensors."""
    stream = io.BytesIO(content)
    value, storages = read_one_pickle(stream, vocabulary)
    if stream.tell() != len(content):
        raise Refusal("holds a pickle with bytes after its end")
    return value, storages


def read_one_pickle(stream: io.BytesIO, vocabulary: Vocabulary) -> tuple[Any, list[Storage]]:
    """Read one of several consecutive pickles, as ``read_pickle`` does, and leave the stream at its end."""
    steps = {**_STEPS, **_MODERN_STEPS} if vocabulary.modern else _STEPS
    machine = _Machine(vocabulary)
    for _ in range(limit("pickle-steps")):
        code = _take(stream, 1)
        if code not in steps:
            raise Refusal(f"holds a pickle with the opcode {code!r}, which weights do not need")
        read, act = steps[code]
        act(machine, read(stream))
        if code == _STOP:
            return machine.result(), machine.storages
    raise Refusal(f"holds a pickle of more than {limit('pickle-steps')} opcodes")


class _Machine:
    """A stack of values. Calls are recorded and not made."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.storages: list[Storage] = []
        self._vocabulary = vocabulary
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def result(self) -> Any:
        """Return the value on top of the stack. No value may name an unknown class, except to make an object of it."""
        value = self._top()
        rest, seen = list(self._stack), set[int]()
        while self._vocabulary.stand_ins and rest:
            part = rest.pop()
            if isinstance(part, Name):
                self._vocabulary.check(part.text)
            elif isinstance(part, Made) and id(part) not in seen:
                seen.add(id(part))
                rest += [*part.items, *part.arguments]
        return value

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def put(self, place: int) -> None:
        if place > limit("pickle-steps"):  # torch's reader allocates memory for every smaller number
            raise Refusal(f"holds a pickle that puts a value at the place {place}")
        self._memo[place] = self._top()

    def memoize(self, _: Any) -> None:
        self.put(len(self._memo))

    def get(self, place: int) -> None:
        if place not in self._memo:
            raise Refusal("holds a damaged pickle: it gets a value that was never put")
        self.push(self._memo[place])

    def _top(self) -> Any:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise Refusal("holds a damaged pickle: it takes a value from an empty stack")
        return self._stack[-1]

    def pop(self, count: int) -> list[Any]:
        at = len(self._stack) - count
        if at < (self._marks[-1] if self._marks else 0):
            raise Refusal("holds a damaged pickle: it takes a value from an empty stack")
        taken = self._stack[at:]
        del self._stack[at:]
        return taken

    def pop_to_mark(self) -> list[Any]:
        if not self._marks:
            raise Refusal("holds a damaged pickle: it has no mark")
        return self.pop(len(self._stack) - self._marks.pop())

    def mark(self, _: Any) -> None:
        self._marks.append(len(self._stack))

    def _growing(self, parts: list[Any]) -> Made | None:
        """Return the value on top of the stack, which takes the parts; None if it is a stand-in, which drops them."""
        target = self._top()
        if isinstance(target, StandIn):
            return None
        if not isinstance(target, Made) or target.kind == "tuple" or target.used:
            raise Refusal("holds a pickle that changes a value after its use")
        target.take(parts)
        return target

    def extend(self, items: list[Any]) -> None:
        target = self._growing(items)
        if target is not None and target.is_mapping:
            raise Refusal("holds a damaged pickle: it appends to a mapping")
        if target is not None and not target.arguments:
            target.items += items

    def set_items(self, pairs: list[Any]) -> None:
        target = self._growing(pairs)
        if len(pairs) % 2 or (target is not None and target.kind in ("list", "set")):
            raise Refusal("holds a damaged pickle: it sets a key of a value that is not a mapping")
        if target is not None:
            target.items += pairs

    def name(self, dotted: str) -> None:
        foreign = dotted.partition(".")[0] not in _TABLED and _CLASS.fullmatch(dotted) is not None
        if not (self._vocabulary.stand_ins and foreign):
            self._vocabulary.check(dotted)
        self.push(Name(dotted))

    def name_of_texts(self, _: Any) -> None:
        module, name = self.pop(2)
        if not isinstance(module, str) or not isinstance(name, str):
            raise Refusal("holds a damaged pickle: a name in it is not a string")
        self.name(f"{module}.{name}")

    def call(self, _: Any) -> None:
        function, arguments = self.pop(2)
        match function, arguments:
            case Name(text), Made(items=[Name() as kind, Name(base), None]) if current_name(text) == _RECONSTRUCTOR:
                if current_name(base) != "builtins.object":
                    raise Refusal(f"holds a pickle that makes an object from {shown(base)}")
                self.make(kind, Made("tuple"))
            case Name(text), Made():
                self._vocabulary.check(text)
                self.make(function, arguments)
            case _:
                raise Refusal("holds a pickle that calls a value which is not a name")

    def make(self, function: Any, arguments: Any, *named: Any) -> None:
        if not isinstance(function, Name) or not isinstance(arguments, Made):
            raise Refusal("holds a pickle that calls a value which is not a name")
        if not self._vocabulary.allows(function.text):
            self.push(StandIn())
            return
        if function.text in NOT_CALLED:
            raise Refusal(f"holds a pickle that calls {shown(function.text)}, which allocates any amount of memory")
        if function.text in REBUILDERS:
            _check_tensor(arguments.items)
        if function.text == "numpy.dtype":
            _check_elements(arguments.items)
        arguments.used = True
        self.push(Made(current_name(function.text), arguments=[*arguments.items, *named]))

    def build(self, _: Any) -> None:
        self._growing(self.pop(1))

    def persistent(self, _: Any) -> None:
        (identity,) = self.pop(1)
        items = identity.items if isinstance(identity, Made) and identity.kind == "tuple" else ()
        match items:
            case ["storage", Name(kind), str(key), str(), int(numel), *rest] if kind in STORAGES:
                if not 0 <= numel < _INT64:
                    raise Refusal(f"holds a pickle with a storage of {numel} elements")
                storage = Storage(key, numel, STORAGES[kind], kind)
            case _:
                raise Refusal("holds a pickle that refers to an outside value which is not the storage of a tensor")
        self.storages.append(storage)
        self.push(_part(storage, rest[0]) if rest and rest[0] is not None else storage)


def _part(storage: Storage, view: Any) -> Storage:
    """Return the part of a storage that PyTorch before 0.4 describes: a name, the first element, the number of elements."""
    match view:
        case Made(kind="tuple", items=[str(), int(start), int(numel)]) if 0 <= start <= start + numel <= storage.numel:
            return Storage(storage.key, numel, storage.itemsize, storage.kind, start)
    raise Refusal("holds a pickle with a part of a storage that lies outside of the storage")


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


def _take(stream: io.BytesIO, count: int) -> bytes:
    content = stream.read(count)
    if len(content) < count:
        raise Refusal("holds a damaged pickle: it ends inside an opcode")
    return content


def _nothing(_: io.BytesIO) -> None:
    return None


def _number(form: str) -> Callable[[io.BytesIO], Any]:
    size = struct.calcsize(form)
    return lambda stream: struct.unpack(form, _take(stream, size))[0]


def _bytes(form: str, convert: Callable[[bytes], Any] = bytes) -> Callable[[io.BytesIO], Any]:
    """Return a reader of bytes with their number in front, which are converted to another type."""
    length = _number(form)

    def read(stream: io.BytesIO) -> Any:
        count = length(stream)
        if count < 0:
            raise Refusal("holds a damaged pickle: it has a string of negative length")
        return convert(_take(stream, count))

    return read


def _name(stream: io.BytesIO) -> str:
    """Read module and name, each on a separate line."""
    lines = [stream.readline(), stream.readline()]
    if not all(line.endswith(b"\n") for line in lines):
        raise Refusal("holds a damaged pickle: it ends inside a name")
    return ".".join(_decoded(line[:-1]) for line in lines)


def _decoded(content: bytes) -> str:
    # A text may hold any bytes (a shared constant of a network). A text that is not UTF-8 is checked and never used.
    return content.decode("utf-8", "replace")


def _whole(content: bytes) -> int:
    return int.from_bytes(content, "little", signed=True)


def _ignore(_machine: _Machine, _argument: Any) -> None:
    return None


def _constant(value: Any) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine.push(value)


def _empty(kind: str) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine.push(Made(kind))


def _tuple(count: int) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine.push(Made("tuple", machine.pop(count)))


def _to_mark(kind: str) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine.push(Made(kind, machine.pop_to_mark()))


_STOP = b"."
_Steps = dict[bytes, tuple[Callable[[io.BytesIO], Any], Callable[[_Machine, Any], None]]]
#: Byte -> the reader of the step's argument, and its action. ``weights_only`` and TorchScript have the same steps.
_STEPS: _Steps = {
    b"\x80": (_number("B"), _ignore),  # PROTO
    _STOP: (_nothing, _ignore),
    b"(": (_nothing, _Machine.mark),
    b")": (_nothing, _empty("tuple")),
    b"]": (_nothing, _empty("list")),
    b"}": (_nothing, _empty("dict")),
    b"\x8f": (_nothing, _empty("set")),
    b"N": (_nothing, _constant(None)),
    b"\x88": (_nothing, _constant(True)),
    b"\x89": (_nothing, _constant(False)),
    b"J": (_number("<i"), _Machine.push),  # BININT
    b"K": (_number("B"), _Machine.push),
    b"M": (_number("<H"), _Machine.push),
    b"\x8a": (_bytes("B", _whole), _Machine.push),  # LONG1
    b"G": (_number(">d"), _Machine.push),  # BINFLOAT
    b"X": (_bytes("<I", _decoded), _Machine.push),  # BINUNICODE
    b"T": (_bytes("<i", _decoded), _Machine.push),  # BINSTRING
    b"U": (_bytes("B", _decoded), _Machine.push),
    b"q": (_number("B"), _Machine.put),  # BINPUT
    b"r": (_number("<I"), _Machine.put),
    b"h": (_number("B"), _Machine.get),  # BINGET
    b"j": (_number("<I"), _Machine.get),
    b"t": (_nothing, _to_mark("tuple")),
    b"\x85": (_nothing, _tuple(1)),
    b"\x86": (_nothing, _tuple(2)),
    b"\x87": (_nothing, _tuple(3)),
    b"a": (_nothing, lambda machine, _: machine.extend(machine.pop(1))),
    b"e": (_nothing, lambda machine, _: machine.extend(machine.pop_to_mark())),
    b"s": (_nothing, lambda machine, _: machine.set_items(machine.pop(2))),
    b"u": (_nothing, lambda machine, _: machine.set_items(machine.pop_to_mark())),
    b"c": (_name, _Machine.name),  # GLOBAL
    b"R": (_nothing, _Machine.call),  # REDUCE
    b"\x81": (_nothing, lambda machine, _: machine.make(*machine.pop(2))),  # NEWOBJ
    b"b": (_nothing, _Machine.build),
    b"Q": (_nothing, _Machine.persistent),  # BINPERSID
}
#: Further steps, of protocols 3 to 5.
_MODERN_STEPS: _Steps = {
    b"\x95": (_number("<Q"), _ignore),  # FRAME
    b"\x94": (_nothing, _Machine.memoize),
    b"\x93": (_nothing, _Machine.name_of_texts),  # STACK_GLOBAL
    b"\x8c": (_bytes("B", _decoded), _Machine.push),
    b"\x8d": (_bytes("<Q", _decoded), _Machine.push),
    b"C": (_bytes("B"), _Machine.push),  # BINBYTES
    b"B": (_bytes("<I"), _Machine.push),
    b"\x8e": (_bytes("<Q"), _Machine.push),
    b"\x96": (_bytes("<Q"), _Machine.push),
    b"\x8b": (_bytes("<i", _whole), _Machine.push),  # LONG4
    b"\x90": (_nothing, lambda machine, _: machine.extend(machine.pop_to_mark())),  # ADDITEMS
    b"\x91": (_nothing, _to_mark("set")),
    b"\x92": (_nothing, lambda machine, _: machine.make(*machine.pop(3))),
}
