"""The messages of an ONNX file, as far as a screen has to know them (onnx.proto, IR version 13)."""

from __future__ import annotations

from typing import NamedTuple

from bnexport.screening.wire import BYTES, FIXED32, FIXED64, VARINT


class Known(NamedTuple):
    """A field of a message.

    Attributes:
        wire: How it is written; a repeated number may also be packed into BYTES.
        many: Whether it may be there more than once.
        message: Name of the message inside; "" for a plain value.
    """

    wire: int
    many: bool = False
    message: str = ""


def _one(message: str) -> Known:
    return Known(BYTES, False, message)


def _many(message: str) -> Known:
    return Known(BYTES, True, message)


_TEXT, _TEXTS = Known(BYTES), Known(BYTES, many=True)
_NUMBER, _NUMBERS = Known(VARINT), Known(VARINT, many=True)

#: Message -> field number -> what it is. A field that is not here may come from a newer version: it is only skipped.
MESSAGES: dict[str, dict[int, Known]] = {
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
        1: _TEXT, 2: Known(FIXED32), 3: _NUMBER, 4: _TEXT, 5: _one("Tensor"), 6: _one("Graph"),
        7: Known(FIXED32, many=True), 8: _NUMBERS, 9: _TEXTS, 10: _many("Tensor"), 11: _many("Graph"), 13: _TEXT,
        14: _one("Type"), 15: _many("Type"), 20: _NUMBER, 21: _TEXT, 22: _one("Sparse"), 23: _many("Sparse"),
    },
    "Tensor": {
        1: _NUMBERS, 2: _NUMBER, 3: _one("Segment"), 4: Known(FIXED32, many=True), 5: _NUMBERS, 6: _TEXTS, 7: _NUMBERS,
        8: _TEXT, 9: _TEXT, 10: Known(FIXED64, many=True), 11: _NUMBERS, 12: _TEXT, 13: _many("Entry"), 14: _NUMBER,
        16: _many("Entry"),
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
    """A row of ELEMENTS.

    Attributes:
        bits: Of one element in ``raw_data``; 0 where it can't be there.
        field: Number of the field that holds it otherwise.
        entries: How many entries of that field hold ``elements``.
        elements: See ``entries``.
    """

    bits: int
    field: int
    entries: int = 1
    elements: int = 1


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
