"""Checkpoints: weights and their metadata in one safetensors file.

Safetensors holds no code, so opening an unknown file runs nothing. The metadata is JSON under the one key
``bnexport``::

    format         number of this layout, FORMAT; the oldest files have none
    network        {"source": "bn_lenet", "options": {"norm": "torch", "in_channels": 1, "num_classes": 10}}
    dataset        name of the data set
    labels         class names in the order of the logits
    preprocessing  conversion of an image to an input
    training       {"epoch": 3, "epochs": 10, "config": {...}, "history": [{...}, ...]}
    eps            {"bn1": 1e-05, ...}: eps of each BatchNorm, in the network's order; older files have none
    recalibrated   true if the moving statistics were re-estimated over the training set
    recalibration  settings, if ``bnexport recalibrate`` re-estimated them:
                   {"definition": "batch", "dataset": ..., "images": 60000, "batch_size": 256, "seed": 0}

A checkpoint from which a training resumes also has the optimiser's state, under names that start with ``optimizer/``.
Readers of weights leave it out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bnexport.errors import ModelError
from bnexport.files import input_errors, write_atomically
from bnexport.optional import one_line, require
from bnexport.tensors import Array
from bnexport.validation.json_text import parse_json
from bnexport.validation.limits import limit, refusing
from bnexport.validation.paths import check_regular
from bnexport.validation.safetensors import validate_safetensors

if TYPE_CHECKING:
    from torch import Tensor


#: Key of the JSON text in the safetensors header.
METADATA_KEY = "bnexport"
#: Number of the layout of written files. It grows if an older version would misread them; older versions refuse such files.
FORMAT = 1
#: Start of the names of the optimiser's tensors; no module has a slash in its name.
OPTIMIZER = "optimizer/"
#: The files of a run directory that hold weights, the finished one first.
RUN_FILES = ("model.safetensors", "checkpoint.safetensors")
#: Element types of safetensors that numpy has, and bfloat16 as its bits.
_NUMPY: dict[str, str] = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U8": "u1", "BOOL": "?",
}  # fmt: skip
_REMEDY = "Give a file written by bnexport train, or another complete safetensors file"


@dataclass(frozen=True)
class Checkpoint:
    """A network's weights and their metadata."""

    state: dict[str, Tensor]  # State dict, on the CPU when loaded
    # JSON values with the keys of this module's docstring, except ``format``, which belongs to the file
    metadata: dict[str, Any]
    # The optimiser's tensors by name; {} for an optimiser without state
    optimizer: dict[str, Tensor] = field(default_factory=dict)


def save_checkpoint(path: str | Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint atomically: a reader sees the old file or the new one."""
    named = {**checkpoint.state, **{OPTIMIZER + name: value for name, value in checkpoint.optimizer.items()}}
    text = json.dumps({"format": FORMAT, **checkpoint.metadata}, allow_nan=False)
    save_tensors(path, named, {METADATA_KEY: text})


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, whole or not at all."""
    safetensors = require("safetensors.torch", purpose="writing a checkpoint")
    # clone: safetensors refuses tensors that share memory, as tied weights do.
    state = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    write_atomically(Path(path), safetensors.save(state, metadata=dict(metadata)))


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a file written by ``save_checkpoint``; a ModelError refuses any other file, and one of a newer format."""
    every, metadata = _read_tensors(path)
    state = _weights_of(every)
    optimizer = {name.removeprefix(OPTIMIZER): value for name, value in every.items() if name not in state}
    if METADATA_KEY not in metadata:
        raise ModelError(
            f"{path} holds weights but no bnexport metadata, so its network is unknown",
            remedy="Name the network too, as file.py:factory or package.module:factory with --weights",
        )
    with refusing(f"the metadata of {path} can't be read: it", ModelError, remedy=_REMEDY):
        value = parse_json(metadata[METADATA_KEY].encode(), max_bytes=limit("safetensors-header"))
    if isinstance(value, dict):
        _check_format(path, value.pop("format", FORMAT))
    network = value.get("network") if isinstance(value, dict) else None
    if not isinstance(network, dict) or not isinstance(network.get("source"), str):
        raise ModelError(f"the metadata of {path} contain no network", remedy=_REMEDY)
    return Checkpoint(state, value, optimizer)


def _check_format(path: str | Path, found: Any) -> None:
    if type(found) is not int or found < 1:
        raise ModelError(
            f"the metadata of {path} state the format {found!r}, which is not a positive whole number", remedy=_REMEDY
        )
    if found > FORMAT:
        raise ModelError(
            f"{path} has format {found}, but this bnexport reads formats up to {FORMAT}",
            remedy="Update bnexport: pip install --upgrade bnexport",
        )


def read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read any safetensors file: its weights and its string metadata.

    The file is read once, so that header and data are of the same version of the file.
    """
    state, metadata = _read_tensors(path)
    return _weights_of(state), metadata


def _weights_of(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if not name.startswith(OPTIMIZER)}


def _read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    safetensors = require("safetensors.torch", purpose="reading a checkpoint")
    content, header = _read(Path(path))
    try:
        state: dict[str, Tensor] = safetensors.load(content)
        return state, dict(header.get("__metadata__") or {})
    except Exception as error:  # safetensors raises its own error, ValueError, TypeError or KeyError (unknown dtype)
        raise ModelError(f"{path} is not a complete safetensors file: {one_line(error)}", remedy=_REMEDY) from error


def read_arrays(path: str | Path) -> tuple[dict[str, Array], dict[str, str]]:
    """Read a safetensors file into numpy arrays, without torch and safetensors, which serving machines lack.

    bfloat16 becomes float32; tensors of types that numpy lacks (8-bit floats) are left out.
    """
    content, header = _read(Path(path))
    data = memoryview(content)[8 + int.from_bytes(content[:8], "little") :]
    metadata = dict(header.pop("__metadata__", None) or {})
    arrays = {
        name: _array(data[slice(*entry["data_offsets"])], entry["dtype"]).reshape(entry["shape"])
        for name, entry in header.items()
        if entry["dtype"] in _NUMPY
    }
    return _weights_of(arrays), metadata


def _array(data: memoryview, dtype: str) -> Array:
    array: Array = np.frombuffer(data, _NUMPY[dtype])
    return (array.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else array


def checkpoint_file(path: Path) -> Path:
    """Return the checkpoint at a path: the file itself, or the best file of a run directory."""
    if not path.is_dir():
        return path
    for name in RUN_FILES:
        if (path / name).is_file():
            return path / name
    raise ModelError(
        f"{path} holds no {' or '.join(RUN_FILES)}",
        remedy="Give a run directory of bnexport train, or a checkpoint file",
    )


def _read(path: Path) -> tuple[bytes, dict[str, Any]]:
    """Return the file's bytes and its header, which is validated before the rest is read."""
    if not path.exists():
        raise ModelError(f"{path} does not exist", remedy="Check the path; bnexport train writes model.safetensors")
    if path.is_dir():
        raise ModelError(f"{path} is a folder, not a checkpoint", remedy="Give the model.safetensors inside it")
    with (
        input_errors(path, ModelError, remedy="Check the file's permissions"),
        refusing(f"{path} is not a complete safetensors file: it", ModelError, remedy=_REMEDY),
    ):
        check_regular(path)
        with path.open("rb") as file:
            if not file.read(1):
                raise ModelError(f"{path} is empty", remedy=_REMEDY)
            header = validate_safetensors(file)
            file.seek(0)
            return file.read(), header
