"""Hostile bundles: the manifest and the places of files; and hostile pictures."""

import gzip
import os
import pickle
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.hostile import Good, forge, hostile
from support.hostile_archives import npy, raw
from support.pictures import grey_png


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


BUNDLES = hostile("bundle", {
    "manifest: key twice": (text(lambda t: t.replace(b"{", b'{"name": "x", ', 1)), "'name' twice"),
    "manifest: file twice": (
        text(lambda t: t.replace(b'"files": {', b'"files": {"model.onnx": {}, ', 1)), "'model.onnx' twice",
    ),
    "manifest: NaN": (text(lambda t: t.replace(b'"version": 1', b'"version": NaN', 1)), "number NaN"),
    "manifest: Infinity": (text(lambda t: t.replace(b'"version": 1', b'"version": -Infinity', 1)), "-Infinity"),
    "manifest: number of 4000 digits": (
        text(lambda t: t.replace(b'"version": 1', b'"version": ' + b"1" * 4000, 1)), "4000 digits",
    ),
    "manifest: number beyond a float": (
        text(lambda t: t.replace(b'"version": 1', b'"version": 1e999', 1)), "too large for a float",
    ),
    "manifest: 100,000 levels": (text(lambda t: b'{"a":' * 100_000), "levels deep"),
    "manifest: two million values": (text(lambda t: b"[" + b"0," * 2_100_000), "values"),
    "manifest: ten megabytes": (text(lambda t: t + b" " * 10_000_000), "more than 8388608 bytes"),
    "manifest: quotes without an end": (text(lambda t: b'"\\' * 1_000_000), "is not JSON"),
    "manifest: UTF-16": (text(lambda t: t.decode().encode("utf-16")), "not UTF-8"),
    "manifest: half a character": (inner("environment", odd="\ud800"), "an unpaired surrogate"),
    "manifest: unknown key": (forged(lambda v: v.update(hook="evil.py")), "unknown keys: hook"),
    "manifest: unknown key of the preprocessing": (inner("preprocessing", invert=True), "'invert'"),
    "manifest: unknown key of the network": (inner("network", code="x"), "'code'"),
    "manifest: unknown key of the signature": (inner("signature", state=[]), "'state'"),
    "manifest: unknown key of an input": (first_input(layout="NHWC"), "'layout'"),
    "manifest: unknown key of a file": (forged(lambda v: v["files"]["model.onnx"].update(url="http://x")), "'url'"),
    "manifest: input of a terabyte": (first_input(shape=["batch", 2**20, 2**20]), "elements"),
    "manifest: input whose sizes overflow": (first_input(shape=["batch", 2**40, 2**40]), "64 bits"),
    "manifest: input of negative size": (first_input(shape=["batch", -1, 28, 28]), "negative size"),
    "manifest: size that is a truth": (first_input(shape=["batch", True, 28, 28]), "not a number"),
    "manifest: two inputs of one name": (
        forged(lambda v: v["signature"]["inputs"].append(v["signature"]["inputs"][0])), "have one name",
    ),
    "manifest: negative size of a file": (
        forged(lambda v: v["files"]["model.onnx"].update(size=-1)), "not a SHA-256 and a size",
    ),
    "manifest: file of a terabyte": (
        forged(lambda v: v["files"]["model.onnx"].update(size=2**40)), "has 1099511627776 bytes, more than",
    ),
    "manifest: 10,001 files": (forged(lambda v: v["files"].update({f"{i}": {} for i in range(10_001)})), "files, more than"),
    "name: climbs": (listed("../../etc/passwd"), "has the part '..'"),
    "name: absolute": (listed("/etc/passwd"), "is absolute"),
    "name: drive": (listed("C:model.onnx"), "is absolute"),
    "name: backslash": (listed("..\\model.onnx"), "has a backslash"),
    "name: device": (listed("aux.onnx"), "a device on Windows"),
    "name: device in a folder": (listed("a/COM1"), "a device on Windows"),
    "name: dot at the end": (listed("model.onnx."), "ends with a dot"),
    "name: space at the end": (listed("model.onnx "), "ends with a dot"),
    "name: stream of Windows": (listed("model.onnx:x"), "Windows reserves"),
    "name: NUL": (listed("model.onnx\0.png"), "U+0000"),
    "name: escape": (listed("model\x1b[2J.onnx"), "U+001B"),
    "name: turned around": (listed("model\u202exnno."), "U+202E"),
    "name: isolated": (listed("\u2066model.onnx"), "U+2066"),
    "name: no width": (listed("model\u200b.onnx"), "U+200B"),
    "name: byte order mark": (listed("\ufeffmodel.onnx"), "U+FEFF"),
    "name: odd space": (listed("model\u00a0.onnx"), "U+00A0"),
    "name: slash that is none": (listed("..\u2215model.onnx"), "U+2215"),
    "name: full-width slash": (listed("..\uff0fmodel.onnx"), "U+FF0F"),
    "name: dots that are none": (listed("\u2024\u2024/model.onnx"), "U+2024"),
    "name: decomposed": (listed("mode\u0301l.onnx"), "NFC"),
    "name: private character": (listed("\ue000.onnx"), "U+E000"),
    "name: differs in case": (
        forged(lambda v: v["files"].update({"MODEL.ONNX": v["files"]["model.onnx"]})), "one file on some",
    ),
    "name: the manifest's own": (listed("Manifest.json"), "one file on some"),
    "name: 300 letters": (listed("x" * 300), "more than 255 bytes"),
    "name: 40 folders": (listed("a/" * 40 + "x"), "folders deep"),
    "place: linked file": (moved("model.onnx", symbolic), "through a symbolic link"),
    "place: linked folder": (moved("test_data_set_0", symbolic), "through a symbolic link"),
    "place: linked manifest": (moved("manifest.json", symbolic), "through a symbolic link"),
    "place: hard-linked file": (moved("model.onnx", hard), "2 names (hard links)"),
    "place: hard-linked manifest": (moved("manifest.json", hard), "2 names (hard links)"),
    "place: pipe": (pipe, "is not a plain file"),
})  # fmt: skip


def idx(dims: tuple[int, ...], data: bytes = b"") -> bytes:
    return bytes([0, 0, 8, len(dims)]) + b"".join(struct.pack(">I", dim) for dim in dims) + data


def sparse_file(folder: Path, good: Good) -> Path:
    """A picture of a terabyte that takes no room on the disk."""
    (folder / "x.png").write_bytes(grey_png(28, 28, zlib.compress(bytes(29 * 28))))
    os.truncate(folder / "x.png", 2**40)
    return folder / "x.png"


def picture_pipe(folder: Path, good: Good) -> Path:
    os.mkfifo(folder / "x.png")
    return folder / "x.png"


PICTURES = hostile("images", {
    "picture: bomb": (raw("x.png", grey_png(60_000, 60_000, zlib.compress(b""))), "pixels"),
    "picture: more than 50 million pixels": (raw("x.png", grey_png(8000, 8000, zlib.compress(b""))), "the limit is"),
    "picture: sizes beyond 31 bits": (raw("x.png", grey_png(2**31 - 1, 2**31 - 1, b"")), "pixels"),
    "picture: cut off": (raw("x.png", grey_png(28, 28, zlib.compress(bytes(29 * 28)))[:-30]), "can't be read"),
    "picture: data of a terabyte": (sparse_file, "the limit is"),
    "picture: a pipe": (picture_pipe, "is not a plain file"),
    "picture: a script": (raw("x.png", b"%!PS-Adobe\n(hacked) (w) file"), "not a PNG"),
    "npy: objects": (
        raw("x.npy", npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", pickle.dumps([1]))),
        "not of plain numbers",
    ),
    "npy: larger than said": (
        raw("x.npy", npy("{'descr': '|u1', 'fortran_order': False, 'shape': (99999999999,), }")), "declares an array of",
    ),
    "npy: sizes that overflow": (
        raw("x.npy", npy(f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({2**40}, {2**40}), }}")), "64 bits",
    ),
    "npy: header that is code": (raw("x.npy", npy("__import__('os').mkdir('hacked')")), "header"),
    "idx: 17 exabytes": (raw("x.idx", idx((2**32 - 1, 2**32 - 1, 1))), "above the limit"),
    "idx: gzip bomb": (raw("x.gz", gzip.compress(idx((1, 28, 28)) + bytes(2**26))), "longer than"),
    "idx: cut off": (raw("x.gz", gzip.compress(idx((1, 28, 28)) + bytes(784))[:-9]), "truncated"),
})  # fmt: skip
