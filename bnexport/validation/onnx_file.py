"""ONNX files and single tensors, validated on the wire before any engine opens them (onnx.proto, IR version 13)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

from bnexport.files import Refusal
from bnexport.optional import one_line
from bnexport.protobuf_wire import BYTES, FIXED32, FIXED64, VARINT, Field, read_fields, read_packed
from bnexport.validation.limits import count_elements, limit, shown
from bnexport.validation.paths import name_problem, place_problem


class MessageField(NamedTuple):
    """A field of a message."""

    wire: int  # Wire type; a repeated number may also be packed into BYTES
    many: bool = False  # True for a repeated field
    message: str = ""  # Name of the message inside; "" for a plain value


def _one(message: str) -> MessageField:
    return MessageField(BYTES, False, message)


def _many(message: str) -> MessageField:
    return MessageField(BYTES, True, message)


_TEXT, _TEXTS = MessageField(BYTES), MessageField(BYTES, many=True)
_NUMBER, _NUMBERS = MessageField(VARINT), MessageField(VARINT, many=True)

#: Message -> field number -> field. Other fields may come from a newer version and are skipped.
MESSAGES: dict[str, dict[int, MessageField]] = {
    "Model": {
        1: _NUMBER, 2: _TEXT, 3: _TEXT, 4: _TEXT, 5: _NUMBER, 6: _TEXT, 7: _one("Graph"), 8: _many("Opset"),
        14: _many("Entry"), 20: _many("Training"), 25: _many("Function"),
    },
    "Graph": {
        1: _many("Node"), 2: _TEXT, 5: _many("Tensor"), 10: _TEXT, 11: _many("Value"), 12: _many("Value"),
        13: _many("Value"), 15: _many("Sparse"), 16: _many("Entry"),
    },
    "Node": {
        1: _TEXTS, 2: _TEXTS, 3: _TEXT, 4: _TEXT, 5: _many("Attribute"), 6: _TEXT, 7: _TEXT, 8: _TEXT,
        9: _many("Entry"),
    },
    "Attribute": {
        1: _TEXT, 2: MessageField(FIXED32), 3: _NUMBER, 4: _TEXT, 5: _one("Tensor"), 6: _one("Graph"),
        7: MessageField(FIXED32, many=True), 8: _NUMBERS, 9: _TEXTS, 10: _many("Tensor"), 11: _many("Graph"), 13: _TEXT,
        14: _one("Type"), 15: _many("Type"), 20: _NUMBER, 21: _TEXT, 22: _one("Sparse"), 23: _many("Sparse"),
    },
    "Tensor": {
        1: _NUMBERS, 2: _NUMBER, 3: _one("Segment"), 4: MessageField(FIXED32, many=True), 5: _NUMBERS, 6: _TEXTS,
        7: _NUMBERS, 8: _TEXT, 9: _TEXT, 10: MessageField(FIXED64, many=True), 11: _NUMBERS, 12: _TEXT,
        13: _many("Entry"), 14: _NUMBER, 16: _many("Entry"),
    },
    "Sparse": {1: _one("Tensor"), 2: _one("Tensor"), 3: _NUMBERS},
    "Function": {
        1: _TEXT, 4: _TEXTS, 5: _TEXTS, 6: _TEXTS, 7: _many("Node"), 8: _TEXT, 9: _many("Opset"), 10: _TEXT,
        11: _many("Attribute"), 12: _many("Value"), 13: _TEXT, 14: _many("Entry"),
    },
    "Training": {1: _one("Graph"), 2: _one("Graph"), 3: _many("Entry"), 4: _many("Entry")},
    "Value": {1: _TEXT, 2: _one("Type"), 3: _TEXT, 4: _many("Entry")},
    "Type": {
        1: _one("TensorType"), 4: _one("Wrapped"), 5: _one("MapType"), 6: _TEXT, 8: _one("TensorType"),
        9: _one("Wrapped"),
    },
    "TensorType": {1: _NUMBER, 2: _one("Shape")},
    "Wrapped": {1: _one("Type")},
    "MapType": {1: _NUMBER, 2: _one("Type")},
    "Shape": {1: _many("Dimension")},
    "Dimension": {1: _NUMBER, 2: _TEXT, 3: _TEXT},
    "Opset": {1: _TEXT, 2: _NUMBER},
    "Entry": {1: _TEXT, 2: _TEXT},
    "Segment": {1: _NUMBER, 2: _NUMBER},
}  # fmt: skip


class Element(NamedTuple):
    """A row of ELEMENTS."""

    bits: int  # Bits of one element in ``raw_data``; 0 if it can't be there
    field: int  # Number of the field that holds it otherwise
    entries: int = 1  # Number of entries of that field that hold ``elements``
    elements: int = 1  # See ``entries``


#: TensorProto.DataType -> how elements are stored (comments of onnx.proto).
ELEMENTS: dict[int, Element] = {
    1: Element(32, 4),
    **dict.fromkeys((2, 3, 9, 17, 18, 19, 20, 24), Element(8, 5)),
    **dict.fromkeys((4, 5, 10, 16), Element(16, 5)),
    6: Element(32, 5),
    7: Element(64, 7),
    8: Element(0, 6),
    11: Element(64, 10),
    12: Element(32, 11),
    13: Element(64, 11),
    14: Element(64, 4, entries=2),
    15: Element(128, 10, entries=2),
    **dict.fromkeys((21, 22, 23), Element(4, 5, elements=2)),
    **dict.fromkeys((25, 26), Element(2, 5, elements=4)),
}
#: Fields of a Tensor that hold its elements one by one.
TYPED = (4, 5, 6, 7, 10, 11)
#: Domain, name, overload.
Call = tuple[str, str, str]


def check_calls(main: Counter[Call], functions: Mapping[Call, Counter[Call]]) -> None:
    """Refuse functions that call each other in a circle, or that grow a file to millions of nodes."""
    inner = {call: [used for used in nodes if used in functions] for call, nodes in functions.items()}
    sizes: dict[Call, int] = {}
    try:
        for call in TopologicalSorter(inner).static_order():
            sizes[call] = _expanded(functions[call], sizes)
    except CycleError as error:
        raise Refusal(f"has the function {shown(error.args[1][0][1])}, which calls itself") from error
    if (nodes := _expanded(main, sizes)) > limit("onnx-expanded"):
        raise Refusal(f"has functions that grow it to {min(nodes, 10**18)} nodes, more than {limit('onnx-expanded')}")


def _expanded(nodes: Counter[Call], sizes: Mapping[Call, int]) -> int:
    """Count the nodes after calls are replaced, up to a limit, because nested calls give numbers of millions of digits."""
    return min(sum(count * sizes.get(call, 1) for call, count in nodes.items()), 10**18)


_FIXED = {4: (FIXED32, 4), 10: (FIXED64, 8)}
_LAST_BYTES = bytes(range(0x80))


class Outside(NamedTuple):
    """Rules for data in other files."""

    folder: Path | None  # Folder of the files; None: the model has no folder, so its reader will refuse them
    refused: bool  # True if no such file is allowed


def _check_tensor(content: bytes, found: Mapping[int, list[Field]], name: str, outside: Outside) -> None:
    """Refuse a tensor whose sizes, type and data do not match."""
    elements = count_elements(numbers(content, found.get(1, [])))
    number = found[2][0].value if 2 in found else 0
    kind = ELEMENTS.get(number)
    if kind is None:
        raise Refusal(f"has the tensor {shown(name)} of the unknown element type {number}")
    if 3 in found:
        raise Refusal(f"has the tensor {shown(name)} in segments, which readers do not support")
    typed = sum(_entries(content, number, found[number]) for number in TYPED if number in found)
    location = found[14][0].value if 14 in found else 0
    if location:  # 1 is outside; protobuf reads only 32 bits of the number
        if 9 in found or typed:
            raise Refusal(f"has the tensor {shown(name)} inside and in another file")
        _check_outside(content, found.get(13, []), name, (elements * kind.bits + 7) // 8, outside)
    elif 9 in found:
        if typed:
            raise Refusal(f"has the tensor {shown(name)} with its data twice")
        there, needed = found[9][0].end - found[9][0].start, (elements * kind.bits + 7) // 8
        if not kind.bits:
            raise Refusal(f"has the tensor {shown(name)} of strings as raw bytes")
        if there != needed:
            raise Refusal(f"declares {needed} bytes for the tensor {shown(name)}, but has {there}")
    elif typed != -(-elements // kind.elements) * kind.entries or (
        typed and any(number in found and number != kind.field for number in TYPED)
    ):
        raise Refusal(f"declares {elements} elements for the tensor {shown(name)}, but has {typed} entries of data")


def numbers(content: bytes, fields: Sequence[Field]) -> list[int]:
    """Return a repeated int64, at most one number more than the allowed dimensions of a tensor."""
    values: list[int] = []
    for field in fields:
        for value in read_packed(content, field):
            values.append(value)
            if len(values) > limit("onnx-rank"):
                return values
    return values


def _entries(content: bytes, number: int, fields: Sequence[Field]) -> int:
    """Count the values of a repeated field."""
    wire, width = _FIXED.get(number, (VARINT, 0))
    if number == 6:
        return len(fields)
    total = 0
    for field in fields:
        length = field.end - field.start
        if field.wire == wire:
            total += 1
        elif width:
            if length % width:
                raise Refusal("has a tensor whose packed numbers are cut off")
            total += length // width
        else:
            # Each number ends with a byte below 128, so the number of these bytes is counted, without a loop.
            total += length - len(content[field.start : field.end].translate(None, _LAST_BYTES))
    return total


def _check_outside(content: bytes, fields: Sequence[Field], name: str, needed: int, outside: Outside) -> None:
    if outside.refused:
        raise Refusal(f"keeps {shown(name)} in another file")
    entries = _texts(content, fields, name)
    location = entries.get("location", "")
    what = f"keeps {shown(name)} in the file {shown(location)}"
    if location.startswith("/") or ".." in location.split("/"):
        raise Refusal(f"{what}, which is not inside its folder")
    if (problem := name_problem(location)) is not None:
        raise Refusal(f"{what}, which {problem}")
    offset, length = _whole(entries.get("offset", "0"), what), _whole(entries.get("length", str(needed)), what)
    if length != needed:
        raise Refusal(f"{what} with {length} bytes; its sizes need {needed}")
    if outside.folder is None:
        return
    try:
        if (found := place_problem(outside.folder, location)) is not None:
            raise Refusal(f"{what}, which is not inside its folder as a plain file: {found}")
        place = outside.folder / location
        if place.exists() and offset + length > place.stat().st_size:
            raise Refusal(f"{what}, which is shorter than the model declares")
    except OSError as error:
        raise Refusal(f"{what}, which can't be read: {one_line(error)}") from error


def _texts(content: bytes, fields: Sequence[Field], name: str) -> dict[str, str]:
    """Return key -> value; refuse a repeated key, because readers disagree on its meaning."""
    entries: dict[str, str] = {}
    for field in fields:
        parts = {
            inner.number: content[inner.start : inner.end]
            for inner in read_fields(content, field.start, field.end)
            if inner.wire == BYTES
        }
        try:
            key, value = parts.get(1, b"").decode("utf-8"), parts.get(2, b"").decode("utf-8")
        except UnicodeDecodeError as error:
            raise Refusal(f"keeps {shown(name)} in a file whose name is not UTF-8") from error
        if key in entries:
            raise Refusal(f"keeps {shown(name)} in another file and states {shown(key)} twice")
        entries[key] = value
    return entries


def _whole(text: str, what: str) -> int:
    if not (text.isascii() and text.isdigit()) or len(text) > limit("json-digits"):
        raise Refusal(f"{what}, with the invalid number {shown(text)}")
    return int(text)


#: Operators that make an engine open other files: a stored or named program.
FOREIGN_OPERATORS = frozenset({"EPContext", "PyOp", "PythonOp"})
_Fields = dict[int, list[Field]]


def validate_onnx(content: bytes, *, folder: Path | None = None, inside: bool = True) -> None:
    """Refuse an ONNX file that is damaged or that could harm the process that opens it.

    ``inside`` refuses any model that keeps data in other files. Otherwise each of them must be a plain file in ``folder``, and
    long enough.
    """
    if len(content) > limit("onnx-bytes"):
        raise Refusal("has more than 2 GB, which protobuf can't read")
    scan = _Scan(content, Outside(folder, refused=inside))
    scan.message("Model", 0, len(content), 1)
    check_calls(scan.calls, scan.functions)


def validate_tensor(content: bytes) -> None:
    """Refuse a single TensorProto, such as a golden vector, as ``validate_onnx`` does."""
    _Scan(content, Outside(None, refused=True)).message("Tensor", 0, len(content), 1)


class _Scan:
    """One walk through a file."""

    def __init__(self, content: bytes, outside: Outside) -> None:
        self.content = content
        self.outside = outside
        self.calls: Counter[Call] = Counter()
        self.functions: dict[Call, Counter[Call]] = {}
        self._fields = 0
        self._dense = 0

    def message(self, kind: str, start: int, end: int, depth: int) -> None:
        """Check one message and the messages inside it."""
        if depth > limit("onnx-depth"):
            raise Refusal(f"has messages more than {limit('onnx-depth')} levels deep")
        known, found = MESSAGES[kind], _Fields()
        if kind == "Function":
            outer, self.calls = self.calls, Counter()
        for field in read_fields(self.content, start, end):
            self._fields += 1
            if self._fields > limit("onnx-fields"):
                raise Refusal(f"has more than {limit('onnx-fields')} fields")
            if (row := known.get(field.number)) is None:
                continue
            _check_wire(kind, row, field)
            if not row.many and field.number in found:  # protobuf would merge the two, this walk does not
                raise Refusal(f"has field {field.number} twice in one {kind} message")
            if field.number in _KEPT.get(kind, ()) or not row.many:
                found.setdefault(field.number, []).append(field)
            if row.message:
                self.message(row.message, field.start, field.end, depth + 1)
        if (check := _CHECKS.get(kind)) is not None:
            check(self, found)
        if kind == "Function":
            self._define(found, outer)

    def text(self, found: _Fields, number: int) -> str:
        """Return a text field; refuse bytes that are not UTF-8, because readers disagree on their meaning."""
        field = found.get(number)
        if field is None:
            return ""
        try:
            return self.content[field[-1].start : field[-1].end].decode("utf-8")
        except UnicodeDecodeError as error:
            raise Refusal(f"has a name at byte {field[-1].start} that is not UTF-8") from error

    def node(self, found: _Fields) -> None:
        operator, domain = self.text(found, 4), self.text(found, 7)
        if operator in FOREIGN_OPERATORS:
            raise Refusal(f"has a node {operator}, which makes an engine run another file or program")
        self.calls[_call(domain, operator, self.text(found, 8))] += 1

    def tensor(self, found: _Fields) -> None:
        _check_tensor(self.content, found, self.text(found, 8), self.outside)

    def sparse(self, found: _Fields) -> None:
        self._dense += count_elements(numbers(self.content, found.get(3, [])))
        if self._dense > limit("onnx-dense"):
            raise Refusal(f"has sparse tensors of {self._dense} elements, more than {limit('onnx-dense')}")

    def shape(self, found: _Fields) -> None:
        """Check the declared sizes of a value; -1 and 0 stand for an unknown size."""
        if len(found.get(1, [])) > limit("onnx-rank"):
            raise Refusal(f"declares a value with {len(found[1])} dimensions, more than {limit('onnx-rank')}")
        sizes = [
            inner.value
            for field in found.get(1, [])
            for inner in read_fields(self.content, field.start, field.end)
            if inner.number == 1 and inner.value < 2**63
        ]
        count_elements(sizes)

    def _define(self, found: _Fields, outer: Counter[Call]) -> None:
        call = _call(self.text(found, 10), self.text(found, 1), self.text(found, 13))
        if call in self.functions:
            raise Refusal(f"defines the function {shown(call[1])} twice")
        self.functions[call], self.calls = self.calls, outer


def _call(domain: str, name: str, overload: str) -> Call:
    return "" if domain == "ai.onnx" else domain, name, overload


def _check_wire(kind: str, row: MessageField, field: Field) -> None:
    packed = row.many and field.wire == BYTES and row.wire in (VARINT, FIXED32, FIXED64)
    if field.wire != row.wire and not packed:
        raise Refusal(f"is not ONNX: field {field.number} of its {kind} message is of another kind")


_CHECKS: dict[str, Callable[[_Scan, _Fields], None]] = {
    "Node": _Scan.node,
    "Tensor": _Scan.tensor,
    "Sparse": _Scan.sparse,
    "Shape": _Scan.shape,
}
#: Repeated fields that a check needs; the others are only counted.
_KEPT: dict[str, tuple[int, ...]] = {"Tensor": (1, 4, 5, 6, 7, 10, 11, 13), "Sparse": (3,), "Shape": (1,)}
