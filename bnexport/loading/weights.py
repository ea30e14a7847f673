"""Loading of a user's weights file into a network: every tensor is accounted for, and no code runs (docs/weights.md)."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bnexport.bundle import MANIFEST, WEIGHTS, Bundle
from bnexport.errors import ModelError, UsageError
from bnexport.files import Refusal, input_errors
from bnexport.loading.checkpoint import RUN_FILES, checkpoint_file, read_safetensors
from bnexport.loading.matching import Match, Misfit, match_names
from bnexport.nn.folded import is_folded
from bnexport.optional import no_warnings, one_line
from bnexport.validation.archives import SAVE_WEIGHTS, Saved, read_saved
from bnexport.validation.file_kinds import kind_of, refuse_other_kinds
from bnexport.validation.json_text import parse_json
from bnexport.validation.limits import limit, refusing
from bnexport.validation.paths import check_name, check_regular
from bnexport.validation.pickles import REBUILDERS, Made, Name, Storage

#: Keys under which training scripts save weights, the first choice first; averaged weights count only if no others fit.
KEYS = (
    "state_dict", "model_state_dict", "model", "net", "network", "module", "params", "weights",
    "state_dict_ema", "model_ema", "ema_state_dict", "ema", "ema_model", "params_ema",
)  # fmt: skip
#: Calls around a tensor that make it a parameter.
_PARAMETER = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
#: Levels of dictionaries that are searched for sets of weights.
_LEVELS = 4
#: Values by name; a tensor is made when its function is called.
Tensors = dict[str, Callable[[], Tensor]]
#: Limits of a message: number of names, and characters of one name.
_SHOWN, _LONGEST = 6, 60


@dataclass(frozen=True)
class WeightsFile:
    """The weights that a user names."""

    path: Path  # The file
    key: str | None = None  # The chosen set of weights, or the prefix of the chosen names; None: the set that fits

    @classmethod
    def of(cls, weights: Any, key: str | None = None) -> WeightsFile | None:
        """Return the weights file of a path: of a bundle, the best one of a run directory, or the file itself."""
        if weights is None:
            if key is not None:
                raise UsageError(f"the key {key!r} needs a weights file", remedy="Pass --weights FILE")
            return None
        if not isinstance(weights, str | os.PathLike):
            raise UsageError(
                f"weights is a {type(weights).__name__}, not the path of a file",
                remedy="Give a path. Weights in memory: module.load_state_dict(weights), and the module as the source",
            )
        path = Path(weights)
        if not (path / MANIFEST).is_file():
            if path.is_dir() and not any((path / name).is_file() for name in RUN_FILES):
                raise ModelError(
                    f"{path} is a folder without weights: it holds no {MANIFEST} and no {' or '.join(RUN_FILES)}",
                    remedy="Give a weights file, the folder of a bundle, or a run directory of bnexport train",
                )
            return cls(checkpoint_file(path), key)
        bundle = Bundle.open(path)
        bundle.check()
        return cls(bundle.file(WEIGHTS), key)


def load_weights(module: nn.Module, weights: WeightsFile | Path) -> tuple[str, ...]:
    """Load a weights file into a module; every tensor must be accounted for.

    Accepts safetensors, files of ``torch.save`` and the index of either in several files. A file of ``torch.save`` is read as
    data and not unpickled. It may have the weights under keys, next to plain values. Names may have the prefixes of wrappers
    (``matching``). The result is sentences for the user about choices in the file. A ModelError refuses a file that is missing,
    damaged, of another kind, names code, or does not fit the module.
    """
    weights = weights if isinstance(weights, WeightsFile) else WeightsFile(weights)
    expected = module.state_dict(keep_vars=True)
    with _opened(weights.path) as sets:
        chosen, notes = _chosen(sets, weights, expected, type(module).__name__)
        if is_folded(sets[chosen]) and not is_folded(expected):
            raise ModelError(
                f"{weights.path} holds folded weights, which contain the BatchNorms, but {type(module).__name__} still has its"
                " BatchNorms",
                remedy="Give the weights from before the fold; bnexport.load_folded(model, state) returns the folded network",
            )
        fit = match_names(expected, sets[chosen], aliases=_aliases(expected))
        if isinstance(fit, Misfit):
            state = {name: make() for name, make in sets[chosen].items()}
            if not _accepts(module, state):
                raise _misfit(weights.path, type(module).__name__, fit, sets, chosen, len(expected))
            module.load_state_dict(state)
            return notes
        state = {name: sets[chosen][place]() for name, place in fit.names.items()}
    _check_values(weights.path, type(module).__name__, state, expected)
    aliases = _aliases(expected)
    for name in fit.absent:
        tied = [state[other] for other in aliases.get(name, ()) if other in state]
        state[name] = tied[0] if tied else expected[name].detach()
    module.load_state_dict(state)
    if not fit.ignored:
        return notes
    ignored = _some(list(fit.ignored))
    return (*notes, f"{weights.path} holds counters, which are not weights and were ignored: {ignored}")


def _aliases(expected: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return name -> the other names of the same tensor, for tied weights."""
    names: dict[int, list[str]] = {}
    for name, value in expected.items():
        names.setdefault(id(value), []).append(name)
    return {name: group for group in names.values() if len(group) > 1 for name in group}


def _accepts(module: nn.Module, state: Mapping[str, Tensor]) -> bool:
    """Return True if the network itself accepts these names; some networks translate older names."""
    try:
        copy.deepcopy(module).load_state_dict(state)
    except Exception:  # torch raises RuntimeError; the network's own code may raise anything
        return False
    return True


def _check_values(path: Path, title: str, state: Mapping[str, Tensor], expected: Mapping[str, Any]) -> None:
    sized = [name for name in state if not is_lazy(expected[name])]
    misshapen = [name for name in sized if state[name].shape != expected[name].shape]
    if misshapen:
        name = min(misshapen)
        raise ModelError(
            f"{path} does not fit {title}: {name} is {_shape(state[name])} in the file and"
            f" {_shape(expected[name])} in the network ({len(misshapen)} tensors differ in shape)",
            remedy="Check the network's options, such as the number of classes",
        )
    for name, value in state.items():
        want = expected[name].dtype
        integers = want.is_floating_point and not value.dtype.is_floating_point
        if integers or (value.is_complex() and not want.is_complex):
            raise ModelError(
                f"{path} does not fit {title}: {name} is {value.dtype} in the file and {want} in the network",
                remedy="Give the weights of the float network, not quantized ones",
            )


def _misfit(path: Path, title: str, misfit: Misfit, sets: Mapping[str, Tensors], chosen: str, count: int) -> ModelError:
    below = f" under {chosen!r}" if chosen else ""
    text = (
        f"{path} does not fit {title}{below}: {_list('missing', misfit.missing)}{_list('unexpected', misfit.unexpected)}"
        f"of {count} tensors"
    )
    if misfit.candidates:
        keys = [f"{chosen}.{name}" if chosen else name for name in misfit.candidates]
        return ModelError(
            f"{text}. The names below {_some(keys)} fit without the others",
            remedy=f"If one of them is this network: --weights-key {keys[0]} takes only the names below it",
        )
    return ModelError(
        text + _listing(sets),
        remedy="Give the weights of this network, or the factory that builds the network of these weights",
    )


def _chosen(
    sets: dict[str, Tensors], weights: WeightsFile, expected: Mapping[str, Any], title: str
) -> tuple[str, tuple[str, ...]]:
    """Return the key of the set of weights to load, and sentences on the choice. A prefix becomes a set."""
    path, key = weights.path, weights.key
    if key is not None:
        return _by_key(sets, path, key), ()
    last_parts = {name.rpartition(".")[2] for name in expected}
    serious = [place for place, names in sets.items() if last_parts & {name.rpartition(".")[2] for name in names}]
    if not sets:
        raise ModelError(
            f"{path} holds a value that is not a state dict (names with tensors)", remedy="Save model.state_dict()"
        )
    if len(serious) < 2:
        place = serious[0] if serious else min(sets, key=lambda place: (_rank(place), place))
        return place, () if _is_known(place) else (f"the weights were taken from {place!r} in {path}",)
    fitting = [
        place for place in serious if isinstance(match_names(expected, sets[place], aliases=_aliases(expected)), Match)
    ]
    known = sorted((place for place in fitting if _is_known(place)), key=_rank)
    if known:
        taken, others = known[0], [place for place in fitting if place != known[0]]
        note = (
            f"{path} holds {len(fitting)} sets of weights that fit: {taken or 'the top level'} was taken; --weights-key takes"
            f" {_some([other or 'the top level' for other in others])} instead"
        )
        return taken, (note,) if others else ()
    if fitting:
        raise ModelError(
            f"{path} holds several sets of weights, and the choice is ambiguous{_listing(sets)}",
            remedy=f"Choose one: --weights-key {fitting[0]}; it fits {title}",
        )
    return min(serious, key=lambda place: (not _is_known(place), _rank(place), place)), ()


def _by_key(sets: dict[str, Tensors], path: Path, key: str) -> str:
    if key in sets:
        return key
    below: dict[str, Tensors] = {}
    for place, tensors in sets.items():
        inside = key.removeprefix(place + ".") if place else key
        names = {
            name.removeprefix(inside + "."): make for name, make in tensors.items() if name.startswith(inside + ".")
        }
        if names:
            below[f"{place}.{inside}" if place else inside] = names
    if len(below) == 1:
        sets.update(below)
        return next(iter(below))
    what = (
        f"several sets of weights with names below {key!r}: {_some(list(below))}"
        if below
        else f"no weights under {key!r}"
    )
    raise ModelError(f"{path} has {what}{_listing(sets)}", remedy="Choose one of the names with --weights-key")


def _is_known(place: str) -> bool:
    return not place or all(part in KEYS for part in place.split("."))


def _rank(place: str) -> list[int]:
    return [KEYS.index(part) if part in KEYS else len(KEYS) for part in place.split(".")] if place else []


def _listing(sets: Mapping[str, Tensors]) -> str:
    """Return the sets of weights in a file as the end of a sentence; "" for one at the top level."""
    if set(sets) <= {""}:
        return ""
    return ". Found: " + _some(
        [f"{place[:40] or 'top level'} (tensors: {len(names)})" for place, names in sets.items()]
    )


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[dict[str, Tensors]]:
    """Open a weights file and yield its sets of weights by key, "" for the top level; tensors are made while it is open."""
    if not path.exists():
        raise ModelError(f"{path} does not exist", remedy="Check the path of the weights")
    kind = refuse_other_kinds(path, "safetensors", "torch", "index", "pickle")
    with contextlib.ExitStack() as stack:
        if kind == "index":
            yield {"": _sharded(path, stack)}
        else:
            yield _sets(path, stack)


def _sets(path: Path, stack: contextlib.ExitStack) -> dict[str, Tensors]:
    if is_safetensors(path):
        return {"": {name: value.detach for name, value in read_safetensors(path)[0].items()}}
    with (
        input_errors(path, ModelError, remedy="Check the file's permissions"),
        refusing(f"{path} is not a plain state dict: it", ModelError, remedy=SAVE_WEIGHTS),
    ):
        check_regular(path)
        saved = read_saved(stack.enter_context(path.open("rb")))
        stack.enter_context(no_warnings)  # torch's classes of storages warn that they are deprecated
        return _tensor_sets(saved, path)


def _sharded(path: Path, stack: contextlib.ExitStack) -> Tensors:
    """Return the tensors of an index and of the files that it names, which lie next to it."""
    with refusing(f"{path} is not an index of weights: it", ModelError, remedy="Download the index again"):
        check_regular(path)
        index = parse_json(path.read_bytes(), max_bytes=limit("safetensors-header"))
        places = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
            raise ModelError(f"{path} does not contain the table weight_map", remedy="Download the index again")
        for place in sorted(set(places.values())):
            check_name(place)
    shards: dict[str, Tensors] = {}
    for place in sorted(set(places.values())):
        shard = path.parent / place
        if not shard.is_file():
            raise ModelError(f"{shard} is missing, but {path.name} lists it", remedy="Download every file of the index")
        refuse_other_kinds(shard, "safetensors", "torch")
        shards[place] = _sets(shard, stack).get("", {})
    for name, place in places.items():
        if name not in shards[place]:
            raise ModelError(
                f"{path.parent / place} does not contain {name}, but {path.name} lists it there",
                remedy="Download both again",
            )
    return {name: shards[place][name] for name, place in places.items()}


def is_safetensors(path: Path) -> bool:
    """Return True for a safetensors file, by its content, or by its name if the content is of an unknown kind."""
    kind = kind_of(path)
    return path.is_file() and (path.suffix == ".safetensors" if kind is None else kind.name == "safetensors")


def _list(what: str, names: tuple[str, ...]) -> str:
    return f"{len(names)} {what} ({_some(list(names), 3)}) " if names else ""


def _some(names: list[str], most: int = _SHOWN) -> str:
    """Return the first names, each cut if it is long."""
    cut = [name if len(name) <= _LONGEST else name[: _LONGEST - 3] + "..." for name in names[:most]]
    return ", ".join(cut) + (", ..." if len(names) > most else "")


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a scalar"


# --- tensors of a file of torch.save, made from its data: nothing in the file is unpickled or called ---


def _tensor_sets(saved: Saved, path: Path) -> dict[str, Tensors]:
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
    return value if isinstance(value, Made) and value.kind in REBUILDERS else None


def _maker(call: Made, saved: Saved, path: Path, made: dict[tuple[Storage, str], Tensor]) -> Callable[[], Tensor]:
    def make() -> Tensor:
        remedy = "Copy or download the file again"
        try:
            with refusing(path, ModelError, remedy=remedy):
                return _tensor(call, saved, made)
        except (RuntimeError, ValueError, TypeError, AttributeError, OSError) as error:  # torch's errors for odd sizes
            text = f"{path} holds a tensor that can't be made: {one_line(error, 120)}"
            raise ModelError(text, remedy=remedy) from error

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
