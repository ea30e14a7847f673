"""Hostile ONNX files, golden vectors and safetensors."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.hostile import Good, forge, hostile, reseal_file
from support.hostile_archives import raw


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def field(number: int, content: bytes) -> bytes:
    """A field of bytes, in protobuf's wire format."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def number(field_number: int, value: int) -> bytes:
    return varint(field_number << 3) + varint(value % 2**64)


def nested(levels: int) -> bytes:
    """A model with an If in an If in an If: graph, node and attribute at each level."""
    graph = b""
    for _ in range(levels):
        graph = field(1, field(4, b"If") + field(5, field(6, graph)))
    return field(7, graph)


def nested_types(levels: int) -> bytes:
    """An input that is a sequence of sequences of sequences."""
    kind = b""
    for _ in range(levels):
        kind = field(4, field(1, kind))
    return field(7, field(11, field(2, kind)))


def model_with(tensor: bytes) -> bytes:
    """A model of one node and one stored tensor."""
    return number(1, 8) + field(7, field(1, field(4, b"Relu")) + field(5, tensor))


def stored(dims: tuple[int, ...], kind: int = 1, raw: bytes = b"", more: bytes = b"") -> bytes:
    sizes = b"".join(number(1, size) for size in dims)
    return sizes + number(2, kind) + field(8, b"w") + (field(9, raw) if raw else b"") + more


def outside(location: str, **more: str) -> bytes:
    entries = {"location": location, **more}
    texts = b"".join(field(13, field(1, key.encode()) + field(2, value.encode())) for key, value in entries.items())
    return model_with(stored((4,), more=texts + number(14, 1)))


def function(name: str, *calls: str) -> bytes:
    return field(25, field(1, name.encode()) + b"".join(field(7, field(4, call.encode())) for call in calls))


def content(data: bytes) -> Callable[[Path, Good], Path]:
    return raw("model.onnx", data)


def changed(change: Callable[[bytes], bytes]) -> Callable[[Path, Good], Path]:
    return lambda folder, good: content(change(good.onnx.read_bytes()))(folder, good)


def with_data(location: str, place: Callable[[Path], object], **more: str) -> Callable[[Path, Good], Path]:
    """A model with external data, and a file at the place that it names."""

    def build(folder: Path, good: Good) -> Path:
        inner = folder / "inner"
        inner.mkdir()
        (folder / "secret").write_bytes(bytes(16))
        place(inner)
        return content(outside(location, **more))(inner, good)

    return build


def many_fields(folder: Path, good: Good) -> Path:
    """Four megabytes of empty nodes, which protobuf would expand to half a gigabyte."""
    return content(field(7, b"\x0a\x00" * 2_000_001))(folder, good)


def in_training(folder: Path, good: Good) -> Path:
    """A tensor of two parts: protobuf merges them into one with twice the dimensions."""
    one = field(5, field(1, b"v") + field(5, stored((2,), raw=bytes(8))) + field(5, stored((2,), raw=bytes(8))))
    return content(field(7, field(1, field(4, b"Constant") + one)))(folder, good)


NO_DATA: Callable[[Path], object] = lambda inner: None  # noqa: E731
WIDE = tuple([2**31] * 3)
SPARSE = field(15, field(1, stored((1,), raw=bytes(4))) + field(2, stored((1,), 7, bytes(8))) + number(3, 2**40))

ONNX = hostile("onnx", {
    "onnx: text": (content(b"this is not a model"), "is not"),
    "onnx: cut off": (changed(lambda data: data[: len(data) // 2]), "cut off"),
    "onnx: one byte short": (changed(lambda data: data[:-1]), "cut off"),
    "onnx: length beyond the end": (content(b"\x3a\xff\xff\xff\xff\x07abc"), "reaches beyond"),
    "onnx: length of 64 bits": (content(b"\x3a" + b"\xff" * 9 + b"\x01abc"), "reaches beyond"),
    "onnx: number that does not end": (content(b"\x08" + b"\xff" * 12), "does not end"),
    "onnx: group": (content(b"\x0b" * 99), "no field of the kind 3"),
    "onnx: field zero": (content(b"\x00\x01"), "reaches beyond"),
    "onnx: 500 graphs in each other": (content(nested(500)), "levels deep"),
    "onnx: 22 graphs in each other": (content(nested(22)), "levels deep"),
    "onnx: types in each other": (content(nested_types(200)), "levels deep"),
    "onnx: two million empty nodes": (many_fields, "fields"),
    "onnx: two graphs": (changed(lambda data: data + field(7, b"")), "twice"),
    "onnx: tensor in two parts": (in_training, "twice"),
    "onnx: name of another kind": (content(field(7, number(2, 5))), "of another kind"),
    "onnx: name that is not UTF-8": (content(field(7, field(1, field(4, b"\xff\xfe")))), "not UTF-8"),
    "onnx: more elements than data": (content(model_with(stored((1000,), raw=bytes(8)))), "4000 bytes"),
    "onnx: a terabyte without data": (content(model_with(stored((2**38,)))), "0 entries"),
    "onnx: more data than elements": (content(model_with(stored((1,), raw=bytes(8)))), "but has 8"),
    "onnx: sizes that overflow": (content(model_with(stored(WIDE, raw=b"x"))), "beyond 64 bits"),
    "onnx: sizes that overflow to zero": (content(model_with(stored((2**32, 2**32), raw=b"x"))), "beyond 64 bits"),
    "onnx: negative size": (content(model_with(stored((-4,), raw=b"x"))), "negative size"),
    "onnx: two negative sizes": (content(model_with(stored((-2, -2), raw=bytes(16)))), "negative size"),
    "onnx: 65 dimensions": (content(model_with(stored((1,) * 65, raw=bytes(4)))), "65 dimensions"),
    "onnx: declared with 65 dimensions": (
        content(field(7, field(11, field(2, field(1, field(2, field(1, b"") * 65)))))), "65 dimensions",
    ),
    "onnx: unknown element type": (content(model_with(stored((1,), 99, bytes(4)))), "element type 99"),
    "onnx: texts as raw bytes": (content(model_with(stored((1,), 8, b"x"))), "of strings as raw bytes"),
    "onnx: data inside and outside": (
        content(model_with(stored((1,), raw=bytes(4), more=number(14, 1)))), "inside and in another file",
    ),
    "onnx: data outside by more than 32 bits": (
        content(model_with(stored((1,), raw=bytes(4), more=number(14, 2**32 + 1)))), "inside and in another file",
    ),
    "onnx: place stated twice": (
        content(model_with(stored((1,), more=field(13, field(1, b"location") + field(2, b"a")) * 2 + number(14, 1)))),
        "states 'location' twice",
    ),
    "onnx: place that is not UTF-8": (
        content(model_with(stored((1,), more=field(13, field(1, b"location") + field(2, b"\xff")) + number(14, 1)))),
        "not UTF-8",
    ),
    "onnx: packed numbers cut off": (content(model_with(stored((1,), more=field(4, bytes(3))))), "cut off"),
    "onnx: data twice": (content(model_with(stored((1,), raw=bytes(4), more=field(4, bytes(4))))), "data twice"),
    "onnx: segments": (content(model_with(stored((1,), raw=bytes(4), more=field(3, b"")))), "segments"),
    "onnx: data of another type": (content(model_with(stored((2,), more=field(7, b"\0\0")))), "elements"),
    "onnx: declared sizes that overflow": (
        content(field(7, field(11, field(2, field(1, field(2, b"".join(field(1, number(1, 2**40)) for _ in range(2)))))))),
        "beyond 64 bits",
    ),
    "onnx: sparse and huge": (content(field(7, SPARSE)), "sparse tensors of"),
    "onnx: function that calls itself": (content(function("f", "f") + field(7, b"")), "calls itself"),
    "onnx: functions in a circle": (content(function("f", "g") + function("g", "h") + function("h", "f")), "calls itself"),
    "onnx: a billion nodes from ten functions": (
        content(
            b"".join(function(f"f{i}", *[f"f{i + 1}"] * 10) for i in range(10))
            + function("f10", "Relu") + field(7, field(1, field(4, b"f0")))
        ),
        "grow it to 10000000000 nodes",
    ),
    "onnx: function twice": (content(function("f", "Relu") * 2), "twice"),
    "onnx: program of an engine": (content(field(7, field(1, field(4, b"EPContext")))), "EPContext"),
    "onnx: data above its folder": (with_data("../secret", NO_DATA), "not inside its folder"),
    "onnx: data at an absolute place": (with_data("/etc/passwd", NO_DATA), "not inside its folder"),
    "onnx: data in a folder above by a detour": (with_data("a/../../secret", NO_DATA), "not inside"),
    "onnx: data behind a symbolic link": (
        with_data("w.bin", lambda inner: (inner / "w.bin").symlink_to("../secret")), "symbolic link",
    ),
    "onnx: data in a linked folder": (
        with_data("sub/secret", lambda inner: (inner / "sub").symlink_to("..")), "symbolic link",
    ),
    "onnx: data behind a hard link": (
        with_data("w.bin", lambda inner: os.link(inner.parent / "secret", inner / "w.bin")), "hard links",
    ),
    "onnx: data in a pipe": (with_data("w.bin", lambda inner: os.mkfifo(inner / "w.bin")), "plain file"),
    "onnx: data shorter than said": (
        with_data("w.bin", lambda inner: (inner / "w.bin").write_bytes(b"1234")), "shorter than the model declares",
    ),
    "onnx: data of another length": (with_data("w.bin", NO_DATA, length="17"), "its sizes need 16"),
    "onnx: data at a negative place": (with_data("w.bin", NO_DATA, offset="-4"), "invalid number '-4'"),
    "onnx: data at a place of 30 digits": (with_data("w.bin", NO_DATA, offset="9" * 30), "invalid number"),
    "onnx: data with a name that turns around": (with_data("w\u202enib.bin", NO_DATA), "U+202E"),
    "onnx: data with a name that is a device": (with_data("CON.bin", NO_DATA), "a device on Windows"),
    "onnx: data with a slash that is none": (with_data("..\u2215secret", NO_DATA), "U+2215"),
    "onnx: a pipe": (lambda folder, good: _pipe(folder / "model.onnx"), "not a plain file"),
})  # fmt: skip


def _pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def golden(data: bytes) -> Callable[[Path, Good], Path]:
    return lambda folder, good: reseal_file(folder, "test_data_set_0/input_0.pb", data)


def huge_golden(folder: Path, good: Good) -> Path:
    """Three gigabytes that take no room on the disk."""
    file = folder / "test_data_set_0/input_0.pb"
    os.truncate(file, 3 * 2**30)
    return forge(folder, lambda value: value["files"]["test_data_set_0/input_0.pb"].update(size=3 * 2**30))


GOLDEN = hostile("golden", {
    "golden: three gigabytes": (huge_golden, "more than 2 GB"),
    "golden: cut off": (golden(stored((9,), raw=bytes(36))[:-5]), "cut off"),
    "golden: larger than its data": (golden(stored((2**38,), raw=bytes(8))), "but has 8"),
    "golden: sizes that overflow": (golden(stored((2**40, 2**40), raw=bytes(8))), "beyond 64 bits"),
    "golden: in another file": (
        golden(stored((4,), more=field(13, field(1, b"location") + field(2, b"/etc/passwd")) + number(14, 1))),
        "in another file",
    ),
    "golden: text": (golden(b"\xff\xff no tensor"), "is not a tensor"),
})  # fmt: skip


def safe(header: object, data: bytes = b"", *, length: int | None = None) -> Callable[[Path, Good], Path]:
    def build(folder: Path, good: Good) -> Path:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        size = len(text) if length is None else length
        (folder / "weights.safetensors").write_bytes(size.to_bytes(8, "little") + text + data)
        return folder / "weights.safetensors"

    return build


def entry(shape: list[Any], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


SAFETENSORS = hostile("safetensors", {
    "safetensors: header longer than the file": (safe(b"{}", length=2**40), "longer than the file"),
    "safetensors: header of 20 MB": (safe(b"{" + b" " * (20 * 2**20) + b"}"), "more than"),
    "safetensors: outside the file": (safe({"a": entry([2], 0, 8)}, bytes(4)), "but has 4"),
    "safetensors: far outside the file": (safe({"a": entry([2**40], 0, 2**42)}, bytes(4)), "but has 4"),
    "safetensors: overlapping": (safe({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12)), "overlaps another"),
    "safetensors: gap": (safe({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, bytes(12)), "leaves a gap"),
    "safetensors: backwards": (safe({"a": entry([1], 8, 4)}, bytes(8)), "impossible offset"),
    "safetensors: negative size": (safe({"a": entry([-1, -1], 0, 4)}, bytes(4)), "negative size"),
    "safetensors: sizes that overflow": (safe({"a": entry([2**32, 2**32], 0, 0)}), "beyond 64 bits"),
    "safetensors: sizes that do not fit": (safe({"a": entry([3], 0, 8)}, bytes(8)), "need 12"),
    "safetensors: unknown type": (safe({"a": entry([1], 0, 4, "X9")}, bytes(4)), "type 'X9'"),
    "safetensors: sizes that are a text": (
        safe({"a": {**entry([1], 0, 4), "shape": "1"}}, bytes(4)), "not a type, sizes and a place",
    ),
    "safetensors: truth for a number": (safe({"a": entry([True], 0, 4)}, bytes(4)), "not a number"),
    "safetensors: key twice": (
        safe(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
             bytes(4)),
        "'a' twice",
    ),
    "safetensors: unknown key": (safe({"a": {**entry([1], 0, 4), "code": "x"}}, bytes(4)), "not a type, sizes and a place"),
    "safetensors: metadata of numbers": (safe({"__metadata__": {"a": 1}}), "not strings"),
    "safetensors: nested deep": (safe(b'{"a":' + b"[" * 100_000), "levels deep"),
    "safetensors: a list": (safe([1]), "not a table"),
    "safetensors: infinity": (safe(b'{"__metadata__":{"a":Infinity}}'), "Infinity"),
    "safetensors: not UTF-8": (safe(b'{"\xff":1}'), "not UTF-8"),
    "safetensors: metadata with half a character": (safe(b'{"__metadata__":{"a":"\\ud800"}}'), "an unpaired surrogate"),
})  # fmt: skip
