"""From what a user names to a module in eval mode.

Four kinds of source::

    runs/bn_lenet                 a run directory of bnexport train
    model.safetensors             a checkpoint of bnexport train
    bn_lenet                      a network that bnexport knows, with weights
    file.py:factory               a function without arguments that returns a module
    package.module:factory
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import pickle
import sys
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bnexport.errors import ModelError, UsageError
from bnexport.nn.checkpoint import METADATA_KEY, Checkpoint, load_checkpoint, read_safetensors
from bnexport.nn.lenet import bn_lenet
from bnexport.optional import one_line

#: Networks that are rebuilt from their name and options alone, without a user's code.
KNOWN: dict[str, Callable[..., nn.Module]] = {"bn_lenet": bn_lenet}
#: First byte of a pickle, which torch's older format is.
_PICKLE = b"\x80"
#: The files of a run directory that hold weights, the finished one first.
RUN_FILES = ("model.safetensors", "checkpoint.safetensors")


@dataclass(frozen=True)
class LoadedModel:
    """A network with its weights and what is known about it.

    Attributes:
        module: In eval mode, on the CPU.
        name: A short name for titles and folders.
        network: How to build it again: ``{"source": ..., "options": {...}}``.
        input_shape: Shape of one sample, when the source says it.
        dataset: Data set that it was trained on, if known.
        labels: Class names in the order of the logits, if known.
        preprocessing: JSON of the preprocessing, if known.
        training: What the checkpoint says about the training.
    """

    module: nn.Module
    name: str
    network: Mapping[str, Any]
    input_shape: tuple[int, ...] | None = None
    dataset: str | None = None
    labels: tuple[str, ...] | None = None
    preprocessing: Mapping[str, Any] | None = None
    training: Mapping[str, Any] = field(default_factory=dict)


def load_source(source: str, *, weights: Path | None = None) -> LoadedModel:
    """Load what a user names.

    Args:
        source: One of the kinds in this module's docstring. ``file.py:factory`` runs that file.
        weights: Safetensors or a torch state dict (read without running code); for a checkpoint it must be None.

    Raises:
        ModelError: Something is missing, damaged, or does not fit together.
        UsageError: ``weights`` given for a checkpoint.
    """
    path = Path(source)
    if path.exists():
        if path.suffix == ".py":
            raise ModelError(
                f"{source} names no factory", remedy=f"Write {source}:NAME, a function that returns the network"
            )
        if weights is not None:
            raise UsageError(f"{source} brings its own weights", remedy="Name the network's code: file.py:factory")
        return _from_checkpoint(checkpoint_file(path))
    if source in KNOWN:
        if weights is None:
            raise ModelError(f"{source} needs weights", remedy="Pass --weights FILE")
        network = {"source": source, "options": _options_of(weights)}
        module = build_known(network)
        load_weights(module, weights)
        return LoadedModel(_in_eval_mode(module), source, network, _sample_shape(network))
    if not all(source.rpartition(":")[::2]):
        raise ModelError(
            f"{source!r} does not exist" if not source.strip(":") else f"{source} does not exist",
            remedy="Give a run directory, a .safetensors checkpoint, or file.py:factory of your own network",
        )
    module = _call_factory(source)
    if weights is not None:
        load_weights(module, weights)
    name = source.rpartition(":")[2]
    return LoadedModel(_in_eval_mode(module), name, {"source": source, "options": {}})


def build_known(network: Mapping[str, Any]) -> nn.Module:
    """Build a network that bnexport knows from what a checkpoint or manifest says about it, without weights.

    Raises:
        ModelError: The network is not in the table KNOWN, or its options are not its own.
    """
    source, options = network.get("source"), network.get("options") or {}
    if source not in KNOWN:
        raise ModelError(
            f"bnexport does not know how to build {source!r} by itself",
            remedy="Name its code: --source file.py:factory or --source package.module:factory",
        )
    try:
        return KNOWN[str(source)](**options)
    except TypeError as error:
        raise ModelError(f"{source} has no such options: {one_line(error)}", remedy="Write the file again") from error


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


def _from_checkpoint(path: Path) -> LoadedModel:
    checkpoint = load_checkpoint(path)
    metadata = checkpoint.metadata
    module = build_known(metadata["network"])
    try:
        module.load_state_dict(checkpoint.state)
    except RuntimeError as error:
        raise ModelError(
            f"{path} does not hold the weights of the network that it names: {one_line(error)}", remedy="Train again"
        ) from error
    labels = metadata.get("labels")
    return LoadedModel(
        _in_eval_mode(module),
        str(metadata["network"]["source"]),
        metadata["network"],
        _sample_shape(metadata["network"]),
        metadata.get("dataset"),
        None if labels is None else tuple(labels),
        metadata.get("preprocessing"),
        {**(metadata.get("training") or {}), "recalibrated": metadata.get("recalibrated")},
    )


def checkpoint_of(loaded: LoadedModel) -> Checkpoint:
    """A loaded network as a checkpoint: what ``load_source`` reads back."""
    training = {key: value for key, value in loaded.training.items() if key != "recalibrated"}
    metadata = {
        "network": dict(loaded.network),
        "dataset": loaded.dataset,
        "labels": None if loaded.labels is None else list(loaded.labels),
        "preprocessing": None if loaded.preprocessing is None else dict(loaded.preprocessing),
        "training": training,
        "recalibrated": bool(loaded.training.get("recalibrated")),
    }
    return Checkpoint(loaded.module.state_dict(), metadata)


def checkpoint_file(path: Path) -> Path:
    """The checkpoint that a path stands for: itself, or the best file of a run directory.

    Raises:
        ModelError: A folder without a checkpoint.
    """
    if not path.is_dir():
        return path
    for name in RUN_FILES:
        if (path / name).is_file():
            return path / name
    raise ModelError(
        f"{path} holds no {' or '.join(RUN_FILES)}",
        remedy="Give a run directory of bnexport train, or a checkpoint file",
    )


def _options_of(weights: Path) -> Any:
    """Options that a bnexport checkpoint states; none for plain weights."""
    if not _is_safetensors(weights) or METADATA_KEY not in read_safetensors(weights)[1]:
        return {}
    return load_checkpoint(weights).metadata["network"].get("options") or {}


def _sample_shape(network: Mapping[str, Any]) -> tuple[int, int, int]:
    """Shape of one image of a network in the table KNOWN."""
    return int((network.get("options") or {}).get("in_channels", 1)), 28, 28


def _call_factory(source: str) -> nn.Module:
    place = source.rpartition(":")[0]
    file = Path(place) if place.endswith(".py") else None
    # A file finds its own neighbours, as by python FILE; a package in the current folder is found, as by python -m.
    # What the user's code prints is no result of ours: on standard output it would break --json.
    with (
        _importing_from("" if file is None else str(file.parent.resolve())),
        contextlib.redirect_stdout(sys.stderr),
    ):
        module = _import_module(place) if file is None else _import_file(file)
        return _made_by(module, source)


def _made_by(module: Any, source: str) -> nn.Module:
    place, _, name = source.rpartition(":")
    factory = getattr(module, name, None)
    if not callable(factory):
        raise ModelError(
            f"{place} has no function {name!r}", remedy="Name a function or class that returns the network"
        )
    try:
        network = factory()
    except (Exception, SystemExit) as error:
        raise ModelError(
            f"{source} failed{_line_of(error, place)}: {type(error).__name__}: {one_line(error)}",
            remedy="The factory is called without arguments and must return a torch.nn.Module",
        ) from error
    if not isinstance(network, nn.Module):
        raise ModelError(
            f"{source} returned a {type(network).__name__}, not a torch.nn.Module",
            remedy="Return the network itself from the factory",
        )
    return network


def _import_file(path: Path) -> Any:
    if not path.is_file():
        raise ModelError(f"{path} does not exist", remedy="Give the path of a Python file, then a colon and a function")
    name = f"bnexport_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles of the user's module look themselves up here
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        sys.modules.pop(name, None)
        if not isinstance(error, (Exception, SystemExit)):
            raise
        raise ModelError(
            f"{path} can't be run{_line_of(error, str(path))}: {type(error).__name__}: {one_line(error)}",
            remedy="Mend that line; python FILE shows the whole error",
        ) from error
    return module


def _import_module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise ModelError(
            f"the module {name} can't be imported: {type(error).__name__}: {one_line(error)}",
            remedy="Install it, run from the folder that holds it, or name its file: path/file.py:factory",
        ) from error


@contextlib.contextmanager
def _importing_from(folder: str) -> Iterator[None]:
    """Let imports look into ``folder`` first; what the user's code adds to the path meanwhile stays."""
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)


def _line_of(error: BaseException, place: str) -> str:
    if isinstance(error, SyntaxError) and error.lineno:
        return f" at line {error.lineno}"
    place = str(Path(place))  # ./net.py is net.py in a traceback
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename.endswith(place)]
    return f" at line {lines[-1]}" if lines else ""


def _read_weights(path: Path) -> Any:
    if not path.exists():
        raise ModelError(f"{path} does not exist", remedy="Check the path of the weights")
    if path.is_dir():
        raise ModelError(f"{path} is a folder, not a weights file", remedy="Give a file")
    if path.stat().st_size == 0:
        raise ModelError(f"{path} is empty", remedy="Copy or write the weights again")
    if _is_safetensors(path):
        return read_safetensors(path)[0]
    try:
        # Given a name, torch would choose the format by the name's ending.
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch remarks on old pickle protocols; what matters is raised
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{path} is not a plain state dict: it holds Python objects or code, which bnexport does not run,"
            " or it is no torch file",
            remedy="Save the weights alone: torch.save(model.state_dict(), FILE), or safetensors.torch.save_file",
        ) from error
    except Exception as error:  # torch.load raises RuntimeError, KeyError, EOFError, ValueError on foreign bytes
        raise ModelError(
            f"{path} is neither safetensors nor a torch state dict ({type(error).__name__}: {one_line(error, 120)})",
            remedy="Save the weights with torch.save(model.state_dict(), FILE), or as .safetensors",
        ) from error


def _is_safetensors(path: Path) -> bool:
    """Whether a file is to be read as safetensors: by its content, a JSON header after 8 bytes, else by its name."""
    if not path.is_file() or zipfile.is_zipfile(path):
        return False
    with path.open("rb") as file:
        start = file.read(9)
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


def _in_eval_mode(module: nn.Module) -> nn.Module:
    """Switch a network to eval mode; one whose root is in eval mode already may hold layers in training mode on purpose."""
    return module.eval() if module.training else module


def _list(what: str, names: list[str]) -> str:
    if not names:
        return ""
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} {what} ({shown}) "


def _misfit(given: Tensor, expected: Tensor) -> bool:
    return not is_lazy(expected) and given.shape != expected.shape


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a scalar"
