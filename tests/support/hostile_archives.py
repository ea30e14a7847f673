"""Hostile archives: TorchScript, .pt2, checkpoints, .npz."""

import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from support.hostile import Good, Member, hostile, members_of, replaced, write_zip, zeros_deflated

_BIG = 2**30


class Code:
    """An object whose pickle runs code when it is loaded."""

    def __reduce__(self) -> tuple[object, ...]:
        import os

        return os.mkdir, ("hacked",)


def call(name: str, argument: bytes = b"X\x06\x00\x00\x00hacked") -> bytes:
    """A pickle of protocol 2 that calls a function by its name."""
    module, _, function = name.rpartition(".")
    return b"\x80\x02c" + module.encode() + b"\n" + function.encode() + b"\n" + argument + b"\x85R."


def tensor(
    sizes: tuple[int, ...], strides: tuple[int, ...], numel: int, offset: int = 0, kind: str = "FloatStorage"
) -> bytes:
    """A pickle of one tensor in the storage "0"."""

    def numbers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(number(value) for value in values) + b"t"

    def number(value: int) -> bytes:
        raw = value.to_bytes(9, "little", signed=True)
        return b"\x8a" + bytes([len(raw)]) + raw

    storage = (
        b"(X\x07\x00\x00\x00storagectorch\n" + kind.encode() + b"\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
        + number(numel) + b"tQ"
    )  # fmt: skip
    rest = number(offset) + numbers(sizes) + numbers(strides) + b"\x89ccollections\nOrderedDict\n)R"
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage + rest + b"tR."


def script(ending: str, data: bytes) -> Callable[[Path, Good], Path]:
    return lambda folder, good: write_zip(
        folder / "model.pt", replaced(members_of(good.bundle / "model.pt"), ending, data)
    )


def script_with(change: Callable[[list[Member]], object], **options: Any) -> Callable[[Path, Good], Path]:
    def build(folder: Path, good: Good) -> Path:
        members = members_of(good.bundle / "model.pt")
        change(members)
        return write_zip(folder / "model.pt", members, **options)

    return build


def code(line: str) -> Callable[[Path, Good], Path]:
    """A TorchScript file whose forward has one more line."""

    def build(folder: Path, good: Good) -> Path:
        members = members_of(good.bundle / "model.pt")
        for member in members:
            if member.name.endswith(".py"):
                member.data = member.data.replace(b"  return", f"  {line}\n  return".encode(), 1)
                member.__post_init__()
        return write_zip(folder / "model.pt", members)

    return build


def checkpoint(data: bytes, *more: Member) -> Callable[[Path, Good], Path]:
    members = [Member("x/data.pkl", data), Member("x/version", b"3\n"), Member("x/data/0", bytes(16)), *more]
    return lambda folder, good: write_zip(folder / "weights.pt", members)


def raw(name: str, content: bytes) -> Callable[[Path, Good], Path]:
    def build(folder: Path, good: Good) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return build


def saved(value: object) -> Callable[[Path, Good], Path]:
    def build(folder: Path, good: Good) -> Path:
        torch.save(value, folder / "weights.pt")
        return folder / "weights.pt"

    return build


def old_checkpoint_cut(folder: Path, good: Good) -> Path:
    content = good.old_checkpoint.read_bytes()
    (folder / "weights.pt").write_bytes(content[:-40])
    return folder / "weights.pt"


def npy(header: str, data: bytes = b"") -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


def npz(*members: Member, **options: Any) -> Callable[[Path, Good], Path]:
    return lambda folder, good: write_zip(folder / "samples.npz", list(members), **options)


ARRAY = npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }", bytes(8))
PLAIN = Member("x.npy", ARRAY)
#: Each level holds the one before in another tuple, so a recursive reader runs out of stack.
DEEP = b"\x80\x02)" + b"\x85" * 5000 + b"."
SELF = b"\x80\x02]q\x00h\x00\x85a."
MANY = [Member(f"{index:05}.npy", b"") for index in range(65_537)]
BOMB = Member("model/code/bomb.py", b"", 8, size=_BIG, packed=zeros_deflated(_BIG))
LIAR = Member("model/code/bomb.py", b"", 8, size=10, packed=zeros_deflated(2**28))


def not_utf8(folder: Path, good: Good) -> Path:
    path = npz(Member("xy.npy", ARRAY))(folder, good)
    path.write_bytes(path.read_bytes().replace(b"xy.npy", b"\xff\xfe.npy"))
    return path


def wide(*, length: int = 44, shift: int = 0, count: int = 1) -> Callable[[Path, Good], Path]:
    """An .npz file with a 64-bit end record."""

    def build(folder: Path, good: Good) -> Path:
        path = write_zip(folder / "samples.npz", [Member("x.npy", ARRAY)])
        content, end = path.read_bytes()[:-22], path.read_bytes()[-22:]
        size, start = struct.unpack("<2I", end[12:20])
        record = struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", length, 45, 45, 0, 0, count, count, size, start)
        locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, len(content) + shift, 1)
        path.write_bytes(content + record + locator + end)
        return path

    return build


def several_parts(folder: Path, good: Good) -> Path:
    path = write_zip(folder / "weights.pt", [Member("x/data.pkl", b"\x80\x02).")])
    content = bytearray(path.read_bytes())
    content[-18] = 1  # the number of this part
    path.write_bytes(content)
    return path


def overlapping(members: list[Member]) -> None:
    """Two entries over the same bytes, as in the bombs that unpack to much more than their ratio implies."""
    first = next(member for member in members if member.name.endswith("data.pkl"))
    members.append(Member(first.name + "2", first.data, header=0))


def in_the_directory(**changes: Any) -> Callable[[list[Member]], object]:
    def change(members: list[Member]) -> None:
        for name, value in changes.items():
            setattr(members[0], name, value)

    return change


def append(member: Member) -> Callable[[list[Member]], object]:
    return lambda members: members.append(member)


SCRIPTS = hostile("torchscript", {
    "script: pickle with code": (script("data.pkl", call("os.mkdir")), "names 'os.mkdir'"),
    "script: constants with code": (script("constants.pkl", call("builtins.eval")), "names 'builtins.eval'"),
    "script: debug pickle with code": (script("debug_pkl", call("posix.system")), "names 'posix.system'"),
    "script: native class": (script("data.pkl", call("__torch__.torch.classes.dist_c10d.Store")), "dist_c10d"),
    "script: code saves a file": (code('torch.save(input, "hacked")'), "calls save"),
    "script: code saves by its operator": (code('ops.aten.save(input, "hacked")'), "calls save"),
    "script: code maps a file": (code('_9 = torch.from_file("/etc/passwd", False, 9)'), "calls from_file"),
    "script: code gives save another name": (code("_9 = torch.save"), "calls save"),
    "script: code saves in brackets": (code('(torch.save)(input, "hacked")'), "calls save"),
    "script: code gives torch another name": (code("_9 = torch"), "gives torch another name"),
    "script: code gives ops.aten another name": (code("_9 = ops.aten"), "another name"),
    "script: code fetches save by a text": (code('getattr(torch, "sa" "ve")(input, "hacked")'), "another name"),
    "script: code fetches save in pieces": (
        code('getattr(self.x, "sa" "ve")(input, "hacked")'), "fetches an operator by a string",
    ),
    "script: code fetches save by escapes": (code('getattr(self.x, "s\\x61ve")(input, "hacked")'), "calls save"),
    "script: code in a comment's quotes": (code("_8 = 1 # \"\n  torch.save(input, 'hacked') # \""), "calls save"),
    "script: quote without an end": (code('_9 = "'), "unterminated string"),
    "script: operators of others": (code("_9 = ops.evil.run(input)"), "operators of 'evil'"),
    "script: code makes a native object": (
        code("_9 = __torch__.torch.classes.dist_c10d.Store.__new__()"), "native class 'dist_c10d'",
    ),
    "script: bomb of a gigabyte": (script_with(append(BOMB)), "unpacks to"),
    "script: bomb that lies": (script_with(append(LIAR)), "is damaged"),
    "script: 65537 files": (script_with(lambda members: members.extend(MANY)), "files, more than 65536"),
    "script: one name twice": (script_with(lambda members: members.append(members[0])), "one file on some systems"),
    "script: names that differ in case": (
        script_with(lambda m: m.append(Member(m[0].name.upper(), b""))), "one file on some systems",
    ),
    "script: name that climbs": (script_with(append(Member("model/../../hacked", b""))), "has the part '..'"),
    "script: absolute name": (script_with(append(Member("/tmp/hacked", b""))), "is absolute"),
    "script: name of Windows": (script_with(append(Member("C:/hacked", b""))), "is absolute"),
    "script: two folders": (script_with(append(Member("other/x", b""))), "outside its folder"),
    "script: symbolic link": (script_with(in_the_directory(attributes=0o120777 << 16)), "is a symbolic link"),
    "script: encrypted": (script_with(in_the_directory(flags=0x0801)), "is encrypted"),
    "script: packed by another method": (script_with(in_the_directory(method=12)), "method 12"),
    "script: two names for one file": (script_with(in_the_directory(central_name="model/data.pkx")), "in two ways"),
    "script: two sizes for one file": (script_with(in_the_directory(local_size=3)), "two sizes"),
    "script: sizes of 64 bits without their field": (script_with(in_the_directory(size=2**32 - 1)), "invalid 64-bit size"),
    "script: overlapping files": (script_with(overlapping), "overlaps the next file"),
    "script: bytes in front": (script_with(lambda m: None, front=b"GIF89a"), "not a zip archive"),
    "script: archive in front": (script_with(lambda m: None, front=b"PK\x03\x04" * 9), "extra bytes"),
    "script: bytes behind": (script_with(lambda m: None, behind=b"x"), "something follows"),
    "script: comment": (script_with(lambda m: None, comment=b"hi"), "its end is missing"),
    "script: fewer files than said": (script_with(lambda m: None, count=99), "cut off"),
    "script: more files than said": (script_with(lambda m: None, count=2), "more entries"),
    "script: table elsewhere": (
        script_with(lambda m: None, gap=b"PK\x01\x02" * 9, table_size=7), "not at the place in its end record",
    ),
    "script: cut off": (
        lambda folder, good: raw("model.pt", (good.bundle / "model.pt").read_bytes()[:-300])(folder, good),
        "its end is missing",
    ),
    "script: no code, a checkpoint": (
        lambda folder, good: raw("model.pt", good.checkpoint.read_bytes())(folder, good), "is not a TorchScript",
    ),
    "script: values 5000 levels deep": (script("constants.pkl", DEEP), "levels of values"),
    "script: place far away": (script("constants.pkl", b"\x80\x02Nr\xff\xff\xff\xff."), "at the place 4294967295"),
    "script: empty stack": (script("constants.pkl", b"\x80\x02R."), "an empty stack"),
    "script: puts what is not there": (script("constants.pkl", b"\x80\x02q\x00."), "an empty stack"),
    "script: length beyond the end": (script("constants.pkl", b"\x80\x02X\xff\xff\xff\x7fabc"), "damaged pickle"),
    "script: tensor beyond its storage": (script("constants.pkl", tensor((2**40,), (1,), 4)), "of a storage of 4"),
    "script: storage beyond its file": (script("constants.pkl", tensor((2,), (1,), 2**40)), "declares a tensor storage of"),
    "script: step with a warning": (script("constants.pkl", b"S'\\o'\n."), "do not need"),
    "script: text of negative length": (script("constants.pkl", b"\x80\x02T\xff\xff\xff\xff."), "negative length"),
    "script: name cut off": (script("constants.pkl", b"\x80\x02ctorch"), "inside a name"),
    "script: value that was never put": (script("constants.pkl", b"\x80\x02h\x07."), "never put"),
    "script: no mark": (script("constants.pkl", b"\x80\x02Nt."), "has no mark"),
    "script: bytes behind a pickle": (script("constants.pkl", b"\x80\x02).cos\n"), "after its end"),
    "script: calls a number": (script("constants.pkl", b"\x80\x02K\x01)R."), "which is not a name"),
    "script: something kept outside": (script("constants.pkl", b"\x80\x02NQ."), "not the storage"),
    "script: storage of negative size": (script("constants.pkl", tensor((1,), (1,), -4)), "-4 elements"),
    "script: tensor of nothing": (
        script("constants.pkl", b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R."), "is not made of",
    ),
    "script: two million steps": (script("constants.pkl", b"\x80\x02" + b"N" * 2_000_001), "opcodes"),
    "script: two small bombs": (
        script_with(lambda members: members.extend(
            Member(f"model/code/{name}.py", b"", 8, size=5 * 2**19, packed=b"x") for name in "abc")),
        "to more than 200 times its size",
    ),
    "script: packed code that is none": (
        script_with(append(Member("model/code/x.py", b"", 8, size=99, packed=b"\xff\xff\xff"))), "can't be unpacked",
    ),
    "script: foreign file": (script_with(append(Member("model/x.so", b"\x7fELF"))), "not part of a TorchScript"),
})  # fmt: skip
CHECKPOINTS = hostile("weights", {
    "checkpoint: code": (checkpoint(call("os.mkdir")), "names 'os.mkdir'"),
    "checkpoint: code of pickle.dumps": (raw("weights.pt", pickle.dumps(Code())), "names 'posix.mkdir'"),
    "checkpoint: code in the old format": (
        raw("weights.pt", pickle.dumps(0x1950A86A20F9469CFC6C, 2) + call("os.mkdir")), "names 'os.mkdir'",
    ),
    "checkpoint: old format cut off": (old_checkpoint_cut, "declares tensors of"),
    "checkpoint: a whole module": (saved(torch.nn.ReLU()), "names 'torch.nn.modules.activation.ReLU'"),
    "checkpoint: getattr": (checkpoint(call("builtins.getattr")), "names 'builtins.getattr'"),
    "checkpoint: name with dots": (
        checkpoint(b"\x80\x02ctorch\nserialization.os.mkdir\n)R."), "names 'torch.serialization.os.mkdir'",
    ),
    "checkpoint: tensor beyond its storage": (checkpoint(tensor((2**40,), (1,), 4)), "of a storage of 4"),
    "checkpoint: sizes that overflow": (checkpoint(tensor((2**32, 2**32), (0, 0), 4)), "beyond 64 bits"),
    "checkpoint: one number a terabyte wide": (checkpoint(tensor((2**38,), (0,), 4)), "repeats 4 elements"),
    "checkpoint: negative offset": (checkpoint(tensor((2,), (1,), 4, -9)), "an offset that do"),
    "checkpoint: storage beyond its file": (checkpoint(tensor((2,), (1,), 2**40)), "declares a tensor storage of"),
    "checkpoint: storage that is not there": (
        lambda folder, good: write_zip(folder / "weights.pt", [Member("x/data.pkl", tensor((2,), (1,), 4))]),
        "has no data for",
    ),
    "checkpoint: storage of a terabyte by a call": (
        checkpoint(call("torch.FloatStorage", b"\x8a\x06\0\0\0\0\0\x01")), "allocates any amount of memory",
    ),
    "checkpoint: list in itself": (checkpoint(b"\x80\x02]q\x00h\x00a."), "self-referencing value"),
    "checkpoint: list that holds itself": (checkpoint(SELF), "changes a value after its use"),
    "checkpoint: values 5000 levels deep": (checkpoint(DEEP), "levels of values"),
    "checkpoint: bomb": (
        checkpoint(b"\x80\x02).", Member("x/z", b"", 8, size=_BIG, packed=zeros_deflated(_BIG))), "unpacks to",
    ),
    "checkpoint: ratio of a thousand": (
        checkpoint(b"\x80\x02).", Member("x/z", b"", 8, size=2**26, packed=zeros_deflated(2**26))), "times",
    ),
    "checkpoint: no pickle": (
        lambda folder, good: write_zip(folder / "weights.pt", [Member("x/version", b"3")]), "has no data.pkl",
    ),
    "checkpoint: an empty archive": (
        lambda folder, good: write_zip(
        folder / "weights.pt", [Member("x/data.pkl", b"")], count=0, table_size=0, gap=b""),
        "not at the place in its end record",
    ),
    "checkpoint: an archive of nothing": (
        lambda folder, good: write_zip(folder / "weights.pt", [], gap=b"PK\x03\x04"), "an empty archive",
    ),
    "checkpoint: several parts": (several_parts, "in several parts"),
    "checkpoint: text": (raw("weights.pt", b"import os\n" * 9), "nor a file of torch.save"),
})  # fmt: skip

ARRAYS = hostile("npz", {
    "npz: bomb beside an honest file": (
        npz(Member("x.npy", b"", 8, size=2**24, packed=zeros_deflated(2**24)),
            Member("y.npy", b"", 8, size=2**20, packed=bytes(2**20))),
        "unpacks 'x.npy' to",
    ),
    "npz: objects": (
        npz(Member("x.npy", npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", pickle.dumps([1])))),
        "not of plain numbers",
    ),
    "npz: larger than said": (
        npz(Member("x.npy", npy("{'descr': '<f4', 'fortran_order': False, 'shape': (9999999999,), }"))),
        "declares an array of",
    ),
    "npz: sizes that overflow": (
        npz(Member("x.npy", npy(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({2**33}, {2**33}), }}"))),
        "beyond 64 bits",
    ),
    "npz: header that is code": (npz(Member("x.npy", npy("__import__('os').mkdir('hacked')"))), "header"),
    "npz: header nested deep": (npz(Member("x.npy", npy("(" * 9000))), "header"),
    "npz: 64-bit end record elsewhere": (wide(shift=4), "not where it should be"),
    "npz: 64-bit end record of another length": (wide(length=99), "invalid 64-bit end record"),
    "npz: two end records that differ": (wide(count=2), "end records differ"),
    "npz: packed data that are none": (npz(Member("x.npy", b"", 8, size=99, packed=b"\xff\xff\xff")), "can't be unpacked"),
    "npz: no header": (npz(Member("x.npy", b"\x93NUMPY")), "not a complete .npy"),
    "npz: header of 60 kB": (npz(Member("x.npy", npy(" " * 60_000))), "header of 60001 bytes"),
    "npz: header without a shape": (npz(Member("x.npy", npy("{'descr': '<f4'}"))), "has no shape"),
    "npz: header that is a list": (npz(Member("x.npy", npy("['<f4']"))), "is not a dictionary"),
    "npz: name that is not UTF-8": (not_utf8, "not UTF-8"),
    "npz: foreign file": (npz(PLAIN, Member("x.exe", ARRAY)), "which is not an array"),
    "npz: name that climbs": (npz(Member("../x.npy", ARRAY)), "has the part '..'"),
    "npz: hidden letters": (npz(Member("x\u202eypn.npy", ARRAY)), "hidden character U+202E"),
    "npz: bomb": (npz(Member("x.npy", b"", 8, size=_BIG, packed=zeros_deflated(_BIG))), "times"),
    "npz: no archive": (raw("samples.npz", ARRAY), "not a zip archive"),
    "npz: 65537 files": (npz(*MANY[:20], count=0xFFFF), "cut off"),
})  # fmt: skip
