"""Protobuf messages from plain tables: no generated code, and no name that another package's messages could clash with.

Generated code is tied to the protobuf release that made it, and puts its names into the one pool of the process, where a second
``inference`` package (Triton's client, KServe's) is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from bnexport.optional import require


class FieldRow(NamedTuple):
    """One field of a message.

    Attributes:
        number: On the wire.
        kind: A key of TYPES, or the name of a message or enumeration of the same table.
        many: Whether it is repeated.
        oneof: The group of fields of which one at most is set; "" outside one.
    """

    number: int
    kind: str
    many: bool = False
    oneof: str = ""


#: Message -> field -> its row. "A.B" lies inside A, which comes before it; a name that ends in "Entry" is a map's.
Messages = Mapping[str, Mapping[str, FieldRow]]
#: Enumeration -> value -> number.
Enumerations = Mapping[str, Mapping[str, int]]
#: Kind of a plain field -> FieldDescriptorProto.Type.
TYPES = {
    "double": 1, "float": 2, "int64": 3, "uint64": 4, "int32": 5, "bool": 8, "string": 9, "bytes": 12, "uint32": 13,
}  # fmt: skip
_MESSAGE, _ENUMERATION = 11, 14
_OPTIONAL, _REPEATED = 1, 3


def message_classes(package: str, messages: Messages, enumerations: Enumerations, *, purpose: str) -> dict[str, Any]:
    """The classes of a table's messages, in a pool of their own.

    Args:
        package: Of the messages: "inference".
        messages: The table.
        enumerations: Those that its fields name.
        purpose: What needs them, as the start of a sentence.

    Returns:
        Name, as in the table -> class; without the entries of maps.

    Raises:
        MissingDependency: protobuf is not here.
    """
    descriptors = require("google.protobuf.descriptor_pb2", purpose=purpose)
    pools = require("google.protobuf.descriptor_pool", purpose=purpose)
    factory = require("google.protobuf.message_factory", purpose=purpose)
    file = descriptors.FileDescriptorProto(name=f"{package}.proto", package=package, syntax="proto3")
    made: dict[str, Any] = {}
    for name, fields in messages.items():
        outer, _, own = name.rpartition(".")
        made[name] = made[outer].nested_type.add(name=own) if outer else file.message_type.add(name=own)
        made[name].options.map_entry = own.endswith("Entry")
        for oneof in dict.fromkeys(row.oneof for row in fields.values() if row.oneof):
            made[name].oneof_decl.add(name=oneof)
        for field, row in fields.items():
            _add_field(made[name], field, row, f".{package}.", _ENUMERATION if row.kind in enumerations else _MESSAGE)
    for name, values in enumerations.items():
        outer, _, own = name.rpartition(".")
        enumeration = made[outer].enum_type.add(name=own) if outer else file.enum_type.add(name=own)
        for value, number in values.items():
            enumeration.value.add(name=value, number=number)
    pool = pools.DescriptorPool()
    pool.Add(file)
    return {
        name: factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.{name}"))
        for name in messages
        if not name.endswith("Entry")
    }


def _add_field(message: Any, name: str, row: FieldRow, prefix: str, other: int) -> None:
    field = message.field.add(name=name, number=row.number, label=_REPEATED if row.many else _OPTIONAL)
    if row.kind in TYPES:
        field.type = TYPES[row.kind]
    else:
        field.type, field.type_name = other, prefix + row.kind
    if row.oneof:
        field.oneof_index = next(index for index, oneof in enumerate(message.oneof_decl) if oneof.name == row.oneof)
