"""Read an ONNX model from a file, bytes or a ModelProto: parsed, valid, and with every weight inside."""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import ModelProto, TensorProto, numpy_helper

from bnexport.errors import ModelError
from bnexport.files import input_errors
from bnexport.onnx_files.models import graphs, nodes
from bnexport.onnx_files.normalisation import normalise
from bnexport.optional import one_line
from bnexport.validation.file_kinds import refuse_other_kinds
from bnexport.validation.limits import refusing
from bnexport.validation.onnx_file import validate_onnx
from bnexport.validation.paths import check_regular

#: protobuf reads and writes messages below this size.
MAX_BYTES = 2**31 - 1
_CHECK = "Check the file with onnx.checker, or export it again"


@dataclass(frozen=True)
class SourceFile:
    """A valid model in the common spelling, with every weight inside; the caller may change it.

    ``name`` is the file's path, or "the model". ``normalised`` names the rows of ``NORMALISATIONS`` that changed the spelling.
    """

    model: ModelProto
    name: str
    normalised: tuple[str, ...]


def read_source(source: str | Path | bytes | ModelProto) -> SourceFile:
    """Read a model and bring its spelling into the common form (``onnx_files.normalisation``).

    The external data of a file must be in the same folder. A file that is missing or refused raises ModelError.
    """
    if isinstance(source, ModelProto):
        model, folder, name = deepcopy(source), None, "the model"
    elif isinstance(source, bytes):
        model, folder, name = _parsed(source, "the model", None), None, "the model"
    else:
        path = Path(source)
        model, folder, name = _parsed(_content(path), str(path), path.parent), path.parent, str(path)
    if not model.graph.node or not model.graph.output:
        raise ModelError(f"{name} is an ONNX file without nodes", remedy="Export the network again")
    for tensor in _tensors(model):
        if tensor.data_location == TensorProto.EXTERNAL:
            _load_external(tensor, folder, name)
    normalised = normalise(model)
    check_valid(model, name)
    return SourceFile(model, name, normalised)


def check_valid(model: ModelProto, name: str) -> None:
    """Run onnx's checker on a model; raise ModelError if the checker refuses it."""
    try:
        onnx.checker.check_model(model)
        _check_sizes(model)
    except Exception as error:  # the checker's errors share no base class
        raise ModelError(f"{name} is not valid ONNX: {one_line(error, 200)}", remedy=_CHECK) from error


def is_fully_valid(model: ModelProto) -> bool:
    """Return True if the checker's full check, with shape inference, accepts a model."""
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception:  # the checker's and the shape inference's errors share no base class
        return False
    return True


def _content(path: Path) -> bytes:
    with input_errors(path, ModelError, remedy="Check the path"):
        if path.is_dir():
            raise ModelError(f"{path} is a folder, not an ONNX file", remedy="Give the file itself")
        with refusing(path, ModelError, remedy=_CHECK):
            check_regular(path)
        if path.stat().st_size > MAX_BYTES:
            raise ModelError(f"{path} is larger than 2 GB, so it is not an ONNX file", remedy=_CHECK)
        refuse_other_kinds(path, "onnx")
        return path.read_bytes()


def _parsed(content: bytes, name: str, folder: Path | None) -> ModelProto:
    with refusing(f"{name} is not an ONNX model that bnexport opens: it", ModelError, remedy=_CHECK):
        validate_onnx(content, folder=folder, inside=False)
    try:
        return onnx.load_model_from_string(content)
    except Exception as error:  # protobuf's DecodeError has no stable import path
        raise ModelError(f"{name} is not an ONNX model: {one_line(error, 160)}", remedy="Check the file") from error


def _tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Yield every stored tensor: initializers and attributes of all graphs."""
    for graph in graphs(model):
        yield from graph.initializer
    for node in nodes(model):
        for attribute in node.attribute:
            if attribute.type == attribute.TENSOR:
                yield attribute.t
            yield from attribute.tensors


def _check_sizes(model: ModelProto) -> None:
    """Compare each tensor's sizes with its data, which the checker does not do."""
    for tensor in _tensors(model):
        if any(size < 0 for size in tensor.dims):
            raise ValueError(f"{tensor.name!r} has a negative size")
        numpy_helper.to_array(tensor)


def _load_external(tensor: TensorProto, folder: Path | None, name: str) -> None:
    """Read a tensor's bytes into the model, only from a plain file inside the model's own folder."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    what = f"{name} keeps {tensor.name!r} in the file {location!r}"
    if folder is None:
        raise ModelError(f"{what}, but the folder is unknown", remedy="Give the path of the model's file")
    home, path = folder.resolve(), (folder / location).resolve()
    if not location or not path.is_relative_to(home):
        raise ModelError(f"{what}, which is not inside its folder", remedy="Put the data next to the model")
    if not path.is_file():
        raise ModelError(f"{what}, which does not exist", remedy="Copy the data file into the model's folder")
    try:
        offset = int(entries.get("offset") or 0)
        length = int(entries.get("length") or path.stat().st_size - offset)
        if offset < 0 or length < 0 or offset + length > path.stat().st_size:
            raise ValueError("the file is shorter than the model states")
        if length > MAX_BYTES:
            raise ValueError("one tensor has more than 2 GB")
        with path.open("rb") as file:
            file.seek(offset)
            content = file.read(length)
        if len(content) != _bytes_of(tensor):
            raise ValueError(f"it holds {len(content)} bytes, expected {_bytes_of(tensor)}")
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{what}, which can't be used: {one_line(error)}", remedy="Copy both files again") from error
    tensor.raw_data = content
    tensor.data_location = TensorProto.DEFAULT
    del tensor.external_data[:]


def _bytes_of(tensor: TensorProto) -> int:
    return int(math.prod(tensor.dims) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
