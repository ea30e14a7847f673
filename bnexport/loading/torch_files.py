"""Tensors of a file of torch.save, made from its data. torch's own unpickler is not used, and nothing in the file is called."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnexport.errors import ModelError
from bnexport.files import Refusal
from bnexport.optional import one_line
from bnexport.validation.archives import Saved
from bnexport.validation.limits import refusing
from bnexport.validation.pickles import REBUILD, Made, Name, Storage

_PARAMETER = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
#: Levels of dictionaries that are searched for sets of weights.
_LEVELS = 4
#: Values by name; a tensor is made when its function is called.
Tensors = dict[str, Callable[[], Tensor]]


def tensor_sets(saved: Saved, path: Path) -> dict[str, Tensors]:
    """Return every dictionary of named tensors in a saved value, by its keys from the outermost on, joined by dots."""
    made: dict[tuple[Storage, str], Tensor] = {}
    sets: dict[str, Tensors] = {}
    for place, pairs in _tables(saved.value, "", _LEVELS, set()):
        tensors = {name: part for name, value in pairs if (part := _plain_tensor(value)) is not None}
        if tensors:
            sets[place] = {name: _maker(part, saved, path, made) for name, part in tensors.items()}
    return sets


def _tables(value: Any, place: str, levels: int, seen: set[int]) -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    """Yield the place and the named values of each dictionary; a repeated dictionary is yielded once."""
    if not isinstance(value, Made) or not value.is_mapping or id(value) in seen:
        return
    seen.add(id(value))
    pairs = [(key, item) for key, item in value.pairs() if isinstance(key, str)]
    yield place, pairs
    for key, item in pairs if levels > 1 else ():
        yield from _tables(item, f"{place}.{key}" if place else key, levels - 1, seen)


def _plain_tensor(value: Any) -> Made | None:
    """Return the call that makes a tensor, without the parameter around it; None for another value."""
    while isinstance(value, Made) and value.kind in _PARAMETER and value.arguments:
        value = value.arguments[0]
    return value if isinstance(value, Made) and value.kind in REBUILD else None


def _maker(call: Made, saved: Saved, path: Path, made: dict[tuple[Storage, str], Tensor]) -> Callable[[], Tensor]:
    def make() -> Tensor:
        try:
            with refusing(path, ModelError, remedy="Copy or download the file again"):
                return _tensor(call, saved, made)
        except (RuntimeError, ValueError, TypeError, AttributeError, OSError) as error:  # torch's errors for odd sizes
            raise ModelError(
                f"{path} holds a tensor that can't be made: {one_line(error, 120)}",
                remedy="Copy or download the file again",
            ) from error

    return make


def _tensor(call: Made, saved: Saved, made: dict[tuple[Storage, str], Tensor]) -> Tensor:
    storage, offset, sizes, strides, *rest = call.arguments
    if call.kind.endswith("qtensor"):
        raise Refusal("holds quantized tensors; give the weights of the float network")
    types = [part.text for part in rest if isinstance(part, Name)]  # of _rebuild_tensor_v3
    kind = types[0] if types else storage.kind
    if (storage, kind) not in made:
        made[storage, kind] = _flat(storage, kind, saved)
    tensor = made[storage, kind].as_strided(sizes.items, strides.items, offset)
    if any(isinstance(part, Made) and part.kind == "dict" and part.items for part in rest):
        raise Refusal("holds a conjugated or negated view; save tensor.resolve_conj().resolve_neg()")
    return tensor


def _flat(storage: Storage, kind: str, saved: Saved) -> Tensor:
    """Return all elements of a storage in one dimension."""
    found: Any = getattr(torch, kind.rpartition(".")[2])
    dtype: torch.dtype = found if isinstance(found, torch.dtype) else found.dtype
    content = saved.bytes_of(storage)
    if len(content) != storage.numel * storage.itemsize:
        raise Refusal(f"ends inside the tensor storage {storage.key!r}")
    if saved.swapped:
        width = dtype.itemsize // (2 if dtype.is_complex else 1)
        content = np.frombuffer(content, np.uint8).reshape(-1, width)[:, ::-1].tobytes()
    return torch.frombuffer(bytearray(content), dtype=dtype) if content else torch.empty(0, dtype=dtype)
