"""A weights file into a module: safetensors or a torch state dict, every tensor accounted for, no code run."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bnexport.errors import ModelError
from bnexport.loading.checkpoint import read_safetensors
from bnexport.nn.folded import is_folded
from bnexport.optional import no_warnings, one_line
from bnexport.validation.archives import validate_weights
from bnexport.validation.limits import refusing
from bnexport.validation.paths import check_regular
from bnexport.validation.zip_directory import MAGIC

#: First byte of a pickle, which torch's older format is.
_PICKLE = b"\x80"
_SAVE = "Save the weights alone: torch.save(model.state_dict(), FILE), or safetensors.torch.save_file"


def load_weights(module: nn.Module, path: Path) -> None:
    """Load a weights file into a module, every tensor accounted for.

    Accepts safetensors and files of ``torch.save`` (read with ``weights_only``, so that no code runs): a state dict, or a
    dict with one under "state_dict" or "model". A common prefix "module." (DistributedDataParallel) is dropped.

    Raises:
        ModelError: The file is missing, empty, damaged, holds code, or its tensors are not this module's.
    """
    state = _unwrap(_read_weights(path))
    if state and all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    expected = module.state_dict()
    if is_folded(state) and not is_folded(expected):
        raise ModelError(
            f"{path} holds folded weights, which contain the BatchNorms, but {type(module).__name__} still has its BatchNorms",
            remedy="Give the weights from before the fold; bnexport.load_folded(model, state) returns the folded network",
        )
    missing = sorted(set(expected) - set(state))
    unexpected = sorted(set(state) - set(expected))
    misshapen = sorted(key for key in set(state) & set(expected) if _misfit(state[key], expected[key]))
    if missing or unexpected:
        raise ModelError(
            f"{path} does not fit {type(module).__name__}: {_list('missing', missing)}{_list('unexpected', unexpected)}"
            f"of {len(expected)} tensors",
            remedy="Give the weights of this very network, or the factory that builds the network of these weights",
        )
    if misshapen:
        key = misshapen[0]
        raise ModelError(
            f"{path} does not fit {type(module).__name__}: {key} is {_shape(state[key])} in the file and"
            f" {_shape(expected[key])} in the network ({len(misshapen)} tensors differ in shape)",
            remedy="Check the network's options, such as the number of classes",
        )
    module.load_state_dict(state)


def _read_weights(path: Path) -> Any:
    if not path.exists():
        raise ModelError(f"{path} does not exist", remedy="Check the path of the weights")
    if path.is_dir():
        raise ModelError(f"{path} is a folder, not a weights file", remedy="Give a file")
    if path.stat().st_size == 0:
        raise ModelError(f"{path} is empty", remedy="Copy or write the weights again")
    if is_safetensors(path):
        return read_safetensors(path)[0]
    _screen(path)
    try:
        # Given a name, torch would choose the format by the name's ending.
        with path.open("rb") as file, no_warnings:  # torch remarks on old pickle protocols; what matters is raised
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{path} is not a plain state dict: it holds Python objects or code, which bnexport does not run,"
            " or it is no torch file",
            remedy=_SAVE,
        ) from error
    except Exception as error:  # torch.load raises RuntimeError, KeyError, EOFError, ValueError on foreign bytes
        raise ModelError(
            f"{path} is neither safetensors nor a torch state dict ({type(error).__name__}: {one_line(error, 120)})",
            remedy="Save the weights with torch.save(model.state_dict(), FILE), or as .safetensors",
        ) from error


def _screen(path: Path) -> None:
    """Refuse what is more than tensors, before torch opens it."""
    try:
        with refusing(f"{path} is not a plain state dict: it", ModelError, remedy=_SAVE):
            check_regular(path)
            with path.open("rb") as file:
                validate_weights(file)
    except OSError as error:
        raise ModelError(f"{path} can't be read: {one_line(error)}", remedy="Check the file's permissions") from error


def is_safetensors(path: Path) -> bool:
    """Return whether a file is safetensors: by its content, a JSON header after 8 bytes, else by its name."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(9)
    if start[:4] == MAGIC:  # a zip archive: what torch.save writes
        return False
    return start[8:] == b"{" or (path.suffix == ".safetensors" and start[:1] != _PICKLE)


def _unwrap(value: Any) -> dict[str, Tensor]:
    for key in ("state_dict", "model"):
        if isinstance(value, Mapping) and isinstance(value.get(key), Mapping):
            value = value[key]
    if not isinstance(value, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items()
    ):
        raise ModelError(
            f"the weights file holds a {type(value).__name__} that is not a state dict (names with tensors)",
            remedy="Save model.state_dict()",
        )
    return dict(value)


def _list(what: str, names: list[str]) -> str:
    if not names:
        return ""
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} {what} ({shown}) "


def _misfit(given: Tensor, expected: Tensor) -> bool:
    return not is_lazy(expected) and given.shape != expected.shape


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a scalar"
