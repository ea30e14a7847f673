"""The compiled descriptors are those of the .proto files, and no name of them is in protobuf's default pool."""

import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool

from bnexport.proto_messages import DESCRIPTORS, FOLDER, HEALTH, INFERENCE, message_classes
from bnexport.tensors import ELEMENT_TYPES

FILES = ("inference.proto", "health.proto")
#: Type in the text -> FieldDescriptorProto.Type.
SCALARS = {
    name: descriptor_pb2.FieldDescriptorProto.Type.Value(f"TYPE_{name.upper()}")
    for name in ("double", "float", "int64", "uint64", "int32", "bool", "string", "bytes", "uint32")
}
REPEATED = descriptor_pb2.FieldDescriptorProto.LABEL_REPEATED


def compiled() -> descriptor_pb2.FileDescriptorSet:
    return descriptor_pb2.FileDescriptorSet.FromString(DESCRIPTORS.read_bytes())


def compiler() -> list[str] | None:
    if importlib.util.find_spec("grpc_tools"):
        return [sys.executable, "-m", "grpc_tools.protoc"]
    return [found] if (found := shutil.which("protoc")) else None


@pytest.mark.skipif(compiler() is None, reason="neither grpcio-tools nor protoc is installed")
def test_the_compiler_makes_the_same_descriptors(tmp_path: Path) -> None:
    out = tmp_path / "set"
    words = [f"-I{FOLDER}", "--include_imports", f"--descriptor_set_out={out}", *FILES]
    subprocess.run([*compiler(), *words], check=True, timeout=240)
    assert descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()) == compiled()


#: Statements of the part of proto3 that the files use.
STATEMENT = re.compile(
    r"(?P<end>\})"
    r"|(?P<block>message|enum|oneof|service)\s+(?P<name>\w+)\s*\{"
    r"|rpc\s+(?P<rpc>\w+)\s*\((?P<ins>stream )?(?P<input>\w+)\)\s*returns\s*\((?P<outs>stream )?(?P<output>\w+)\)\s*(?:;|\{\})"
    r"|map<(?P<key>\w+),\s*(?P<value>\w+)>\s+(?P<map>\w+)\s*=\s*(?P<mapnumber>\d+);"
    r"|(?:syntax|package|import)\b[^;]*;"
    r"|(?P<many>repeated\s+)?(?P<type>\w+)\s+(?P<field>\w+)\s*=\s*(?P<number>\d+);"
    r"|(?P<option>\w+)\s*=\s*(?P<optionnumber>\d+);"
)


def statements(text: str) -> Iterator[re.Match[str]]:
    text = re.sub(r"//[^\n]*", "", text).strip()
    at = 0
    while at < len(text):
        found = STATEMENT.match(text, at)
        assert found is not None, f"this test does not read {text[at : at + 60]!r}"
        yield found
        at = re.compile(r"\s*").match(text, found.end()).end()


def declared(text: str) -> set[tuple[Any, ...]]:
    """One tuple for each field, value, map and method that a file declares."""
    found: set[tuple[Any, ...]] = set()
    path: list[tuple[str, str]] = []
    for item in statements(text):
        inside = ".".join(name for kind, name in path if kind != "oneof")
        oneof = path[-1][1] if path and path[-1][0] == "oneof" else ""
        if item["end"]:
            path.pop()
        elif item["block"]:
            path.append((item["block"], item["name"]))
            found |= {(".".join(name for kind, name in path if kind != "oneof"),)}
        elif item["rpc"]:
            found.add((inside, item["rpc"], item["input"], bool(item["ins"]), item["output"], bool(item["outs"])))
        elif item["map"]:
            found.add((inside, item["map"], int(item["mapnumber"]), item["key"], item["value"]))
        elif item["field"]:
            found.add((inside, item["field"], int(item["number"]), item["type"], bool(item["many"]), oneof))
        elif item["option"]:
            found.add((inside, item["option"], int(item["optionnumber"])))
    assert not path
    return found


def kind_of(field: descriptor_pb2.FieldDescriptorProto) -> str:
    """A scalar's name, or the last part of a message's or enumeration's."""
    names = {number: name for name, number in SCALARS.items()}
    return field.type_name.rpartition(".")[2] if field.type_name else names[field.type]


def described(file: descriptor_pb2.FileDescriptorProto) -> set[tuple[Any, ...]]:
    """Return the result of ``declared``, from a descriptor."""
    found: set[tuple[Any, ...]] = set()

    def enumeration(inside: str, item: descriptor_pb2.EnumDescriptorProto) -> None:
        found.update({(inside + item.name,), *((inside + item.name, v.name, v.number) for v in item.value)})

    def message(inside: str, item: descriptor_pb2.DescriptorProto) -> None:
        path = inside + item.name
        found.add((path,))
        maps = {nested.name: nested for nested in item.nested_type if nested.options.map_entry}
        for nested in item.nested_type:
            if nested.name not in maps:
                message(path + ".", nested)
        for inner in item.enum_type:
            enumeration(path + ".", inner)
        for field in item.field:
            if (entry := maps.get(kind_of(field))) is not None:
                found.add((path, field.name, field.number, *map(kind_of, entry.field)))
                continue
            oneof = item.oneof_decl[field.oneof_index].name if field.HasField("oneof_index") else ""
            found.add((path, field.name, field.number, kind_of(field), field.label == REPEATED, oneof))

    for item in file.message_type:
        message("", item)
    for item in file.enum_type:
        enumeration("", item)
    for service in file.service:
        found.add((service.name,))
        for method in service.method:
            ends = [name.rpartition(".")[2] for name in (method.input_type, method.output_type)]
            found.add((service.name, method.name, ends[0], method.client_streaming, ends[1], method.server_streaming))
    return found


def test_the_descriptors_hold_what_the_text_declares() -> None:
    files = {file.name: file for file in compiled().file}
    assert set(files) == {path.name for path in FOLDER.glob("*.proto")}
    for name, file in files.items():
        text = (FOLDER / name).read_text(encoding="utf-8")
        assert file.package == re.search(r"^package ([\w.]+);", text, re.MULTILINE)[1]
        assert (file.syntax, list(file.dependency)) == ("proto3", re.findall(r'^import "([^"]+)";', text, re.MULTILINE))
        assert declared(text) == described(file), name


def test_no_name_is_in_the_default_pool() -> None:
    classes: Mapping[str, Any] = message_classes("a test")
    assert {kind.DESCRIPTOR.file.package for kind in classes.values()} == {INFERENCE, HEALTH}
    for kind in classes.values():
        with pytest.raises(KeyError):
            descriptor_pool.Default().FindMessageTypeByName(kind.DESCRIPTOR.full_name)


def test_messages_of_maps_and_groups_work() -> None:
    request = message_classes("a test")["ModelInferRequest"](model_name="m")
    request.parameters["x"].int64_param = 3
    request.parameters["x"].bool_param = True
    again = type(request).FromString(request.SerializeToString())
    assert again == request
    assert again.parameters["x"].WhichOneof("parameter_choice") == "bool_param"


def test_the_table_of_element_types_names_what_the_messages_declare() -> None:
    classes = message_classes("a test")
    contents = classes["InferTensorContents"].DESCRIPTOR.fields_by_name
    triton = classes["ModelConfig"].DESCRIPTOR.file.enum_types_by_name["DataType"].values_by_name
    for name, row in ELEMENT_TYPES.items():
        assert f"TYPE_{row.datatype}" in triton
        assert row.contents == "" or row.contents in contents, name
    assert [name for name, row in ELEMENT_TYPES.items() if not row.contents] == ["float16"]
