"""Checkpoints: weights in one safetensors file that also says what they are.

Safetensors holds no code, so opening an unknown file runs nothing. The metadata is JSON under the one key
``bnexport``::

    network        {"source": "bn_lenet", "options": {"norm": "torch", "in_channels": 1, "num_classes": 10}}
    dataset        name of the data set
    labels         class names in the order of the logits
    preprocessing  how an image becomes an input
    training       {"epoch": 3, "epochs": 10, "config": {...}, "history": [{...}, ...]}
    recalibrated   whether the moving statistics were re-estimated over the training set
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from bnexport.errors import ModelError
from bnexport.files import write_atomically
from bnexport.optional import one_line, require

#: Key of the JSON text in the safetensors header.
METADATA_KEY = "bnexport"
_MAX_HEADER_BYTES = 100 * 2**20  # the limit of the format itself
_REMEDY = "Give a file written by bnexport train, or another safetensors file that is whole"


@dataclass(frozen=True)
class Checkpoint:
    """A network's weights and what is known about them.

    Attributes:
        state: State dict, on the CPU when loaded.
        metadata: JSON values; the keys are in this module's docstring.
    """

    state: dict[str, Tensor]
    metadata: dict[str, Any]


def save_checkpoint(path: str | Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint so that a reader sees the old file or the new one, never a part.

    Raises:
        OutputError: The file can't be written.
    """
    safetensors = require("safetensors.torch", purpose="writing a checkpoint")
    # clone: safetensors refuses tensors that share memory, as tied weights do.
    state = {name: value.detach().cpu().clone().contiguous() for name, value in checkpoint.state.items()}
    text = json.dumps(checkpoint.metadata, allow_nan=False)
    write_atomically(Path(path), safetensors.save(state, metadata={METADATA_KEY: text}))


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a file written by ``save_checkpoint``.

    Raises:
        ModelError: The file is missing, empty, damaged, not safetensors, or safetensors without bnexport's metadata.
    """
    state, metadata = read_safetensors(path)
    if METADATA_KEY not in metadata:
        raise ModelError(
            f"{path} holds weights but no bnexport metadata, so its network is unknown",
            remedy="Name the network too, as file.py:factory or package.module:factory with --weights",
        )
    try:
        value = json.loads(metadata[METADATA_KEY])
    except (ValueError, RecursionError) as error:
        raise ModelError(f"the metadata of {path} can't be read: {one_line(error)}", remedy=_REMEDY) from error
    network = value.get("network") if isinstance(value, dict) else None
    if not isinstance(network, dict) or not isinstance(network.get("source"), str):
        raise ModelError(f"the metadata of {path} does not name a network", remedy=_REMEDY)
    return Checkpoint(state, value)


def read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read any safetensors file: its tensors and its string metadata.

    The file is read once, so that what is replaced meanwhile can't be mixed.

    Raises:
        ModelError: The file is missing, empty, damaged or not safetensors.
    """
    safetensors = require("safetensors.torch", purpose="reading a checkpoint")
    content = _read(Path(path))
    try:
        state: dict[str, Tensor] = safetensors.load(content)
        return state, _header_metadata(content)
    except Exception as error:  # safetensors raises its own error, ValueError, TypeError or KeyError (unknown dtype)
        raise ModelError(f"{path} is not a whole safetensors file: {one_line(error)}", remedy=_REMEDY) from error


def _read(path: Path) -> bytes:
    if not path.exists():
        raise ModelError(f"{path} does not exist", remedy="Check the path; bnexport train writes model.safetensors")
    if path.is_dir():
        raise ModelError(f"{path} is a folder, not a checkpoint", remedy="Give the model.safetensors inside it")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path} can't be read: {one_line(error)}", remedy="Check the file's permissions") from error
    if not content:
        raise ModelError(f"{path} is empty", remedy=_REMEDY)
    return content


def _header_metadata(content: bytes) -> dict[str, str]:
    """The ``__metadata__`` entry; a file starts with its header's length (8 little-endian bytes), then the header."""
    length = int.from_bytes(content[:8], "little")
    if length > min(len(content), _MAX_HEADER_BYTES):
        raise ValueError("the header is longer than the file")
    header = json.loads(content[8 : 8 + length])
    return dict(header.get("__metadata__") or {})
