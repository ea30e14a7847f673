"""Kinds of model files, recognised by content, so that an error can name the kind of a file in the wrong place.

A file may have any name ending, so only its bytes count. Nothing in a file is run.
"""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from bnexport.errors import ModelError
from bnexport.files import Refusal
from bnexport.validation.archives import OLD_TORCH, names_in
from bnexport.validation.limits import limit, shown
from bnexport.validation.pickles import Vocabulary, current_name, is_checkpoint_name, read_one_pickle
from bnexport.validation.zip_directory import MAGIC, read_directory, read_entry

#: Bytes at the start of a file that decide its kind.
_START = 4096


@dataclass(frozen=True)
class _Content:
    """The parts of a file that show its kind, read when a test needs them."""

    file: BinaryIO
    start: bytes
    size: int

    @property
    def text(self) -> bytes:
        """The start without a byte order mark and white space in front."""
        return self.start.removeprefix(b"\xef\xbb\xbf").lstrip()

    @functools.cached_property
    def names(self) -> frozenset[str]:
        """Names of the files inside a zip archive."""
        return names_in(self.file) if self.start[:4] == MAGIC else frozenset()

    @functools.cached_property
    def code(self) -> list[str]:
        """Names in a pickle of torch.save that are neither tensors nor plain values."""
        return [name for name in _pickled_names(self.file) if not is_checkpoint_name(name)]


class FileKind(NamedTuple):
    """A row of KINDS."""

    name: str  # Short name
    fact: str  # Predicate of a sentence about such a file
    remedy: str  # Remedy for such a file; ``{path}`` is the file
    matches: Callable[[_Content], bool]  # Returns True for a file of this kind


def _starts(*magics: bytes, at: int = 0) -> Callable[[_Content], bool]:
    return lambda content: content.start[at:].startswith(magics)


def _is_safetensors(content: _Content) -> bool:
    length = int.from_bytes(content.start[:8], "little")  # a larger number if the file is text
    return content.start[8:9] == b"{" and content.start[:4] != MAGIC and 1 < length < 2**32


def _is_onnx(content: _Content) -> bool:
    # The first field of a ModelProto is its IR version. A safetensors file has its header's length there, then JSON.
    return content.start[:1] == b"\x08" and content.start[8:9] != b"{"


_LOAD = "torch.save({}, 'weights.pt'), and give weights.pt next to the network's code, file.py:factory"
_AGAIN = "Export the network to ONNX, and give the .onnx file"
#: The kinds, in the order in which they are tried.
KINDS: tuple[FileKind, ...] = (
    FileKind("empty", "is empty", "Copy or download the file again", lambda content: content.size == 0),
    FileKind(
        "lfs", "is a Git LFS pointer, a text that stands for the file itself",
        "Fetch the file: run git lfs pull in its repository, or download it", _starts(b"version https://git-lfs"),
    ),
    FileKind(
        "html", "is an HTML page, not the file behind it",
        "Download the file itself; the page may ask for a login or show an error",
        lambda content: content.text.lower().startswith((b"<!doctype html", b"<html", b"<head", b"<?xml")),
    ),
    FileKind(
        "index", "is the index of weights in several files",
        "Name the network's code and give the index with --weights {path}",
        lambda content: content.text[:1] == b"{" and b'"weight_map"' in content.start,
    ),
    FileKind(
        "torchscript", "is a TorchScript file of torch.jit.save",
        "Take its weights: " + _LOAD.format("torch.jit.load({path!r}).state_dict()"),
        lambda content: "constants.pkl" in content.names and "data.pkl" in content.names,
    ),
    FileKind(
        "pt2", "is an exported program of torch.export (.pt2)",
        "Take its weights: " + _LOAD.format("dict(torch.export.load({path!r}).state_dict)"),
        lambda content: "models/model.json" in content.names or "serialized_exported_program.json" in content.names,
    ),
    FileKind(
        "module", "is a pickled module: it names {code}, code which bnexport does not run",
        "Save the weights alone, where you trust the file: "
        + _LOAD.format("torch.load({path!r}, weights_only=False).state_dict()"),
        lambda content: any(current_name(name).startswith("torch.nn.modules.") for name in content.code),
    ),
    FileKind(
        "torch", "is a file of torch.save with weights and without the network",
        "Name the network's code and these weights: file.py:factory --weights {path}",
        lambda content: "data.pkl" in content.names or content.start[2:].startswith(OLD_TORCH),
    ),
    FileKind(
        "pickle", "is a pickle, and not a file of torch.save",
        "Load it with Python where you trust the file, and save the weights with torch.save(state_dict, 'weights.pt')",
        _starts(b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"),
    ),
    FileKind(
        "safetensors", "is a safetensors file with weights and without the network",
        "Name the network's code and these weights: file.py:factory --weights {path}", _is_safetensors,
    ),
    FileKind(
        "ort", "is a model in ONNX Runtime's .ort format", "Give the .onnx file from which it was made",
        _starts(b"ORTM", at=4),
    ),
    FileKind("tflite", "is a TensorFlow Lite model", _AGAIN, _starts(b"TFL3", at=4)),
    FileKind("hdf5", "is an HDF5 file, as Keras writes them", _AGAIN, _starts(b"\x89HDF\r\n\x1a\n")),
    FileKind("gzip", "is packed with gzip", "Unpack it: gunzip, or tar -xzf", _starts(b"\x1f\x8b")),
    FileKind(
        "old", "is a file of PyTorch before 0.1.10, a tar archive",
        "Where you trust the file, convert it: torch.save(torch.load({path!r}, weights_only=False), 'weights.pt')",
        lambda content: content.start[257:].startswith(b"ustar") and content.start.startswith(b"sys_info\0"),
    ),
    FileKind("tar", "is a tar archive", "Unpack it: tar -xf {path}", _starts(b"ustar", at=257)),
    FileKind(
        "onnx", "is an ONNX model", "Give it as SOURCE of fold-and-export by itself, or to bnexport.fold_onnx",
        _is_onnx,
    ),
)  # fmt: skip


def kind_of(path: Path) -> FileKind | None:
    """Return the kind of a file, with its sentences completed; None for an unknown kind or an unreadable file."""
    try:
        if not path.is_file():
            return None
        with path.open("rb") as file:
            content = _Content(file, file.read(_START), file.seek(0, 2))
            for kind in KINDS:
                if kind.matches(content):
                    names = {"code": shown(content.code[0]) if kind.name == "module" else "", "path": str(path)}
                    return kind._replace(fact=kind.fact.format(**names), remedy=kind.remedy.format(**names))
    except OSError:
        return None
    return None


def refuse_other_kinds(path: Path, *wanted: str) -> str:
    """Refuse (ModelError) a file of a known kind that is not wanted; return its kind, "" for an unknown one, which passes."""
    kind = kind_of(path)
    if kind is not None and kind.name not in wanted:
        raise ModelError(f"{path} {kind.fact}", remedy=kind.remedy)
    return kind.name if kind is not None else ""


def _pickled_names(file: BinaryIO) -> list[str]:
    """Return the names in a file of torch.save, as far as its pickles can be read."""
    names: list[str] = []

    def noted(name: str) -> bool:
        names.append(name)
        return True

    with contextlib.suppress(Refusal):
        stream = io.BytesIO(_pickle_of(file))
        while stream.tell() < len(stream.getbuffer()):
            read_one_pickle(stream, Vocabulary(noted, modern=True))
    return names


def _pickle_of(file: BinaryIO) -> bytes:
    file.seek(0)
    if file.read(4) != MAGIC:
        file.seek(0)
        return file.read(limit("pickle-bytes"))
    for entry in read_directory(file):
        if entry.name.endswith("/data.pkl"):
            return read_entry(file, entry, limit("pickle-bytes"))
    return b""
