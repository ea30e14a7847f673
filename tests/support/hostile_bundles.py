"""Hostile bundles: the manifest and the places of files; and hostile pictures."""

from __future__ import annotations

import gzip
import os
import pickle
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.hostile import Good, Hostile, forge
from support.hostile_archives import npy, raw


def text(change: Callable[[bytes], bytes]) -> Callable[[Path, Good], Path]:
    """A bundle whose manifest's bytes were changed."""

    def build(folder: Path, good: Good) -> Path:
        file = folder / "manifest.json"
        file.write_bytes(change(file.read_bytes()))
        return folder

    return build


def forged(change: Callable[[dict[str, Any]], object]) -> Callable[[Path, Good], Path]:
    return lambda folder, good: forge(folder, change)


def listed(name: str) -> Callable[[Path, Good], Path]:
    """A bundle that lists model.onnx under another name."""
    return forged(lambda value: value["files"].update({name: value["files"].pop("model.onnx")}))


def inner(key: str, **changes: Any) -> Callable[[Path, Good], Path]:
    return forged(lambda value: value[key].update(changes))


def first_input(**changes: Any) -> Callable[[Path, Good], Path]:
    return forged(lambda value: value["signature"]["inputs"][0].update(changes))


def moved(name: str, link: Callable[[Path, Path], object]) -> Callable[[Path, Good], Path]:
    """A bundle in which one file or folder is replaced by a link to another place."""

    def build(folder: Path, good: Good) -> Path:
        elsewhere = folder.parent / "elsewhere"
        (folder / name).rename(elsewhere)
        link(folder / name, elsewhere)
        return folder

    return build


def pipe(folder: Path, good: Good) -> Path:
    (folder / "model.onnx").unlink()
    os.mkfifo(folder / "model.onnx")
    return folder


def symbolic(place: Path, target: Path) -> None:
    place.symlink_to(target)


def hard(place: Path, target: Path) -> None:
    os.link(target, place)


BUNDLES: dict[str, Hostile] = {
    "manifest: key twice": Hostile("bundle", text(lambda t: t.replace(b"{", b'{"name": "x", ', 1)), "'name' twice"),
    "manifest: file twice": Hostile(
        "bundle", text(lambda t: t.replace(b'"files": {', b'"files": {"model.onnx": {}, ', 1)), "'model.onnx' twice"
    ),
    "manifest: NaN": Hostile("bundle", text(lambda t: t.replace(b'"version": 1', b'"version": NaN', 1)), "number NaN"),
    "manifest: Infinity": Hostile(
        "bundle", text(lambda t: t.replace(b'"version": 1', b'"version": -Infinity', 1)), "-Infinity"
    ),
    "manifest: number of 4000 digits": Hostile(
        "bundle", text(lambda t: t.replace(b'"version": 1', b'"version": ' + b"1" * 4000, 1)), "4000 digits"
    ),
    "manifest: number beyond a float": Hostile(
        "bundle", text(lambda t: t.replace(b'"version": 1', b'"version": 1e999', 1)), "too large for a float"
    ),
    "manifest: 100,000 levels": Hostile("bundle", text(lambda t: b'{"a":' * 100_000), "levels deep"),
    "manifest: two million values": Hostile("bundle", text(lambda t: b"[" + b"0," * 2_100_000), "values"),
    "manifest: ten megabytes": Hostile("bundle", text(lambda t: t + b" " * 10_000_000), "more than 8388608 bytes"),
    "manifest: quotes without an end": Hostile("bundle", text(lambda t: b'"\\' * 1_000_000), "is not JSON"),
    "manifest: UTF-16": Hostile("bundle", text(lambda t: t.decode().encode("utf-16")), "not UTF-8"),
    "manifest: half a character": Hostile("bundle", inner("environment", odd="\ud800"), "an unpaired surrogate"),
    "manifest: unknown key": Hostile("bundle", forged(lambda v: v.update(hook="evil.py")), "unknown keys: hook"),
    "manifest: unknown key of the preprocessing": Hostile("bundle", inner("preprocessing", invert=True), "'invert'"),
    "manifest: unknown key of the network": Hostile("bundle", inner("network", code="x"), "'code'"),
    "manifest: unknown key of the signature": Hostile("bundle", inner("signature", state=[]), "'state'"),
    "manifest: unknown key of an input": Hostile("bundle", first_input(layout="NHWC"), "'layout'"),
    "manifest: unknown key of a file": Hostile(
        "bundle", forged(lambda v: v["files"]["model.onnx"].update(url="http://x")), "'url'"
    ),
    "manifest: input of a terabyte": Hostile("bundle", first_input(shape=["batch", 2**20, 2**20]), "elements"),
    "manifest: input whose sizes overflow": Hostile("bundle", first_input(shape=["batch", 2**40, 2**40]), "64 bits"),
    "manifest: input of negative size": Hostile("bundle", first_input(shape=["batch", -1, 28, 28]), "negative size"),
    "manifest: size that is a truth": Hostile("bundle", first_input(shape=["batch", True, 28, 28]), "not a number"),
    "manifest: two inputs of one name": Hostile(
        "bundle", forged(lambda v: v["signature"]["inputs"].append(v["signature"]["inputs"][0])), "have one name"
    ),
    "manifest: negative size of a file": Hostile(
        "bundle", forged(lambda v: v["files"]["model.onnx"].update(size=-1)), "not a SHA-256 and a size"
    ),
    "manifest: file of a terabyte": Hostile(
        "bundle", forged(lambda v: v["files"]["model.onnx"].update(size=2**40)), "has 1099511627776 bytes, more than"
    ),
    "manifest: 10,001 files": Hostile(
        "bundle", forged(lambda v: v["files"].update({f"{i}": {} for i in range(10_001)})), "files, more than"
    ),
    "name: climbs": Hostile("bundle", listed("../../etc/passwd"), "has the part '..'"),
    "name: absolute": Hostile("bundle", listed("/etc/passwd"), "is absolute"),
    "name: drive": Hostile("bundle", listed("C:model.onnx"), "is absolute"),
    "name: backslash": Hostile("bundle", listed("..\\model.onnx"), "has a backslash"),
    "name: device": Hostile("bundle", listed("aux.onnx"), "a device on Windows"),
    "name: device in a folder": Hostile("bundle", listed("a/COM1"), "a device on Windows"),
    "name: dot at the end": Hostile("bundle", listed("model.onnx."), "ends with a dot"),
    "name: space at the end": Hostile("bundle", listed("model.onnx "), "ends with a dot"),
    "name: stream of Windows": Hostile("bundle", listed("model.onnx:x"), "Windows reserves"),
    "name: NUL": Hostile("bundle", listed("model.onnx\0.png"), "U+0000"),
    "name: escape": Hostile("bundle", listed("model\x1b[2J.onnx"), "U+001B"),
    "name: turned around": Hostile("bundle", listed("model\u202exnno."), "U+202E"),
    "name: isolated": Hostile("bundle", listed("\u2066model.onnx"), "U+2066"),
    "name: no width": Hostile("bundle", listed("model\u200b.onnx"), "U+200B"),
    "name: byte order mark": Hostile("bundle", listed("\ufeffmodel.onnx"), "U+FEFF"),
    "name: odd space": Hostile("bundle", listed("model\u00a0.onnx"), "U+00A0"),
    "name: slash that is none": Hostile("bundle", listed("..\u2215model.onnx"), "U+2215"),
    "name: full-width slash": Hostile("bundle", listed("..\uff0fmodel.onnx"), "U+FF0F"),
    "name: dots that are none": Hostile("bundle", listed("\u2024\u2024/model.onnx"), "U+2024"),
    "name: decomposed": Hostile("bundle", listed("mode\u0301l.onnx"), "NFC"),
    "name: private character": Hostile("bundle", listed("\ue000.onnx"), "U+E000"),
    "name: differs in case": Hostile(
        "bundle", forged(lambda v: v["files"].update({"MODEL.ONNX": v["files"]["model.onnx"]})), "one file on some"
    ),
    "name: the manifest's own": Hostile("bundle", listed("Manifest.json"), "one file on some"),
    "name: 300 letters": Hostile("bundle", listed("x" * 300), "more than 255 bytes"),
    "name: 40 folders": Hostile("bundle", listed("a/" * 40 + "x"), "folders deep"),
    "place: linked file": Hostile("bundle", moved("model.onnx", symbolic), "through a symbolic link"),
    "place: linked folder": Hostile("bundle", moved("test_data_set_0", symbolic), "through a symbolic link"),
    "place: linked manifest": Hostile("bundle", moved("manifest.json", symbolic), "through a symbolic link"),
    "place: hard-linked file": Hostile("bundle", moved("model.onnx", hard), "2 names (hard links)"),
    "place: hard-linked manifest": Hostile("bundle", moved("manifest.json", hard), "2 names (hard links)"),
    "place: pipe": Hostile("bundle", pipe, "is not a plain file"),
}  # fmt: skip


def png(width: int, height: int, data: bytes) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">2I5B", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def idx(dims: tuple[int, ...], data: bytes = b"") -> bytes:
    return bytes([0, 0, 8, len(dims)]) + b"".join(struct.pack(">I", dim) for dim in dims) + data


def sparse_file(folder: Path, good: Good) -> Path:
    """A picture of a terabyte that takes no room on the disk."""
    (folder / "x.png").write_bytes(png(28, 28, zlib.compress(bytes(29 * 28))))
    os.truncate(folder / "x.png", 2**40)
    return folder / "x.png"


def picture_pipe(folder: Path, good: Good) -> Path:
    os.mkfifo(folder / "x.png")
    return folder / "x.png"


PICTURES: dict[str, Hostile] = {
    "picture: bomb": Hostile("images", raw("x.png", png(60_000, 60_000, zlib.compress(b""))), "pixels"),
    "picture: more than 50 million pixels": Hostile(
        "images", raw("x.png", png(8000, 8000, zlib.compress(b""))), "the limit is"
    ),
    "picture: sizes beyond 31 bits": Hostile("images", raw("x.png", png(2**31 - 1, 2**31 - 1, b"")), "pixels"),
    "picture: cut off": Hostile("images", raw("x.png", png(28, 28, zlib.compress(bytes(29 * 28)))[:-30]), "can't be read"),
    "picture: data of a terabyte": Hostile("images", sparse_file, "the limit is"),
    "picture: a pipe": Hostile("images", picture_pipe, "is not a plain file"),
    "picture: a script": Hostile("images", raw("x.png", b"%!PS-Adobe\n(hacked) (w) file"), "not a PNG"),
    "npy: objects": Hostile(
        "images",
        raw("x.npy", npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", pickle.dumps([1]))),
        "not of plain numbers",
    ),
    "npy: larger than said": Hostile(
        "images", raw("x.npy", npy("{'descr': '|u1', 'fortran_order': False, 'shape': (99999999999,), }")),
        "declares an array of",
    ),
    "npy: sizes that overflow": Hostile(
        "images", raw("x.npy", npy(f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({2**40}, {2**40}), }}")), "64 bits"
    ),
    "npy: header that is code": Hostile("images", raw("x.npy", npy("__import__('os').mkdir('hacked')")), "header"),
    "idx: 17 exabytes": Hostile("images", raw("x.idx", idx((2**32 - 1, 2**32 - 1, 1))), "above the limit"),
    "idx: gzip bomb": Hostile("images", raw("x.gz", gzip.compress(idx((1, 28, 28)) + bytes(2**26))), "longer than"),
    "idx: cut off": Hostile("images", raw("x.gz", gzip.compress(idx((1, 28, 28)) + bytes(784))[:-9]), "truncated"),
}  # fmt: skip
