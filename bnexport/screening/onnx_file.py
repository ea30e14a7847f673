"""An ONNX file looked at byte by byte, without onnx and protobuf: nothing is built before it is known to be sound.

What protobuf and the engines behind it take on trust is checked here: how deep messages lie in each other, how many
fields there are, that each tensor has the bytes that it says, that functions do not call themselves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

from bnexport.screening import onnx_tensors
from bnexport.screening.limits import limit
from bnexport.screening.onnx_functions import Call, check_calls
from bnexport.screening.onnx_messages import MESSAGES, Known
from bnexport.screening.refusal import Refusal, shown
from bnexport.screening.tensor_sizes import count_elements
from bnexport.screening.wire import BYTES, FIXED32, FIXED64, VARINT, Field, read_fields

#: Operators that make an engine open other files: a program of its own kind, stored or named.
FOREIGN_OPERATORS = frozenset({"EPContext", "PyOp", "PythonOp"})
_Fields = dict[int, list[Field]]


def screen_onnx(content: bytes, *, folder: Path | None = None, inside: bool = True) -> None:
    """Refuse an ONNX file that is damaged or that could harm whoever opens it.

    Args:
        content: The file.
        folder: Where data files of the model may lie; each one named must be a plain file in it, and long enough.
        inside: Whether to refuse a model that keeps data in other files at all.

    Raises:
        Refusal: Why.
    """
    if len(content) > limit("onnx-bytes"):
        raise Refusal("has more than 2 GB, which protobuf can't read")
    scan = _Scan(content, onnx_tensors.Outside(folder, refused=inside))
    scan.message("Model", 0, len(content), 1)
    check_calls(scan.calls, scan.functions)


def screen_tensor(content: bytes) -> None:
    """Refuse a single TensorProto, such as a golden vector, as ``screen_onnx`` does.

    Raises:
        Refusal: Why.
    """
    _Scan(content, onnx_tensors.Outside(None, refused=True)).message("Tensor", 0, len(content), 1)


class _Scan:
    """One walk through a file."""

    def __init__(self, content: bytes, outside: onnx_tensors.Outside) -> None:
        self.content = content
        self.outside = outside
        self.calls: Counter[Call] = Counter()
        self.functions: dict[Call, Counter[Call]] = {}
        self._fields = 0
        self._dense = 0

    def message(self, kind: str, start: int, end: int, depth: int) -> None:
        """Walk through one message and those inside it."""
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
            if not row.many and field.number in found:  # protobuf would melt two into one, unseen by a walk
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
        """A text field; protobuf reads bytes that are no UTF-8 in more than one way."""
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
        onnx_tensors.check(self.content, found, self.text(found, 8), self.outside)

    def sparse(self, found: _Fields) -> None:
        self._dense += count_elements(onnx_tensors.numbers(self.content, found.get(3, [])))
        if self._dense > limit("onnx-dense"):
            raise Refusal(f"has sparse tensors of {self._dense} elements, more than {limit('onnx-dense')}")

    def shape(self, found: _Fields) -> None:
        """Declared sizes of a value; -1 and 0 mean that it is open."""
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


def _check_wire(kind: str, row: Known, field: Field) -> None:
    packed = row.many and field.wire == BYTES and row.wire in (VARINT, FIXED32, FIXED64)
    if field.wire != row.wire and not packed:
        raise Refusal(f"is not ONNX: field {field.number} of its {kind} message is of another kind")


_CHECKS: dict[str, Callable[[_Scan, _Fields], None]] = {
    "Node": _Scan.node,
    "Tensor": _Scan.tensor,
    "Sparse": _Scan.sparse,
    "Shape": _Scan.shape,
}
#: Repeated fields that a check needs; the others are counted and forgotten.
_KEPT: dict[str, tuple[int, ...]] = {"Tensor": (1, 4, 5, 6, 7, 10, 11, 13), "Sparse": (3,), "Shape": (1,)}
