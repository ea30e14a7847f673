"""Loading of a user's source as a module in eval mode: the table of source kinds, and the networks that need no user code."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from bnexport.bundle import MANIFEST
from bnexport.errors import ModelError, UsageError
from bnexport.loading.checkpoint import METADATA_KEY, Checkpoint, checkpoint_file, load_checkpoint, read_safetensors
from bnexport.loading.weights import WeightsFile, is_safetensors, load_weights
from bnexport.loading.zoo import build_from_zoo, zoo_facts, zoo_of, zoo_problem
from bnexport.nn.calling import to_eval_mode
from bnexport.nn.lenet import bn_lenet
from bnexport.nn.statistics import eps_of
from bnexport.optional import one_line
from bnexport.validation.file_kinds import refuse_other_kinds

#: bnexport's own networks. The networks of ``loading.zoo.ZOOS`` are known too, if their package is installed.
KNOWN: dict[str, Callable[..., nn.Module]] = {"bn_lenet": bn_lenet}


def unknown_reason(network: Mapping[str, Any]) -> str | None:
    """Return the reason why a network can't be rebuilt here, as the end of a sentence; None if it can.

    ``network`` is the entry of a checkpoint or manifest: ``{"source": ..., "options": {...}}``.
    """
    source = network.get("source")
    if source in KNOWN:
        return None
    if isinstance(source, str) and zoo_of(source) is not None:
        problem = zoo_problem(source)
        return None if problem is None else f"{source}, which can't be built here: {problem}"
    return f"whose code is not in the bundle ({source})"


def build_known(network: Mapping[str, Any]) -> nn.Module:
    """Build a known network from its entry in a checkpoint or manifest, without weights."""
    source, options = network.get("source"), network.get("options") or {}
    if isinstance(source, str) and zoo_of(source) is not None:
        return build_from_zoo(source, options)
    if source not in KNOWN:
        raise ModelError(
            f"bnexport can't build {source!r} without its code",
            remedy="Name its code: --source file.py:factory or --source package.module:factory",
        )
    try:
        return KNOWN[str(source)](**options)
    except TypeError as error:
        raise ModelError(
            f"{source} can't be built with these options: {one_line(error)}",
            remedy="Check --model-option, or write the file again",
        ) from error


def sample_facts(network: Mapping[str, Any], module: nn.Module) -> tuple[tuple[int, ...] | None, dict[str, Any] | None]:
    """Return the shape of one sample of a known network, and its zoo's preprocessing as JSON; None for unknown facts."""
    source, options = str(network["source"]), network.get("options") or {}
    if zoo_of(source) is not None:
        return zoo_facts(source, options, module)
    return (int(options.get("in_channels", 1)), 28, 28), None


#: Metadata on moving statistics, which a loaded network has in ``training``.
_RECALIBRATED = ("recalibrated", "recalibration")


@dataclass(frozen=True)
class LoadedModel:
    """A network with its weights and the known facts about it."""

    module: nn.Module  # The network in eval mode, on the CPU
    name: str  # Short name for titles and folders
    network: Mapping[str, Any]  # Source and options to build it again: ``{"source": ..., "options": {...}}``
    input_shape: tuple[int, ...] | None = None  # Shape of one sample, if known
    dataset: str | None = None  # Data set of the training, if known
    labels: tuple[str, ...] | None = None  # Class names in the order of the logits, if known
    preprocessing: Mapping[str, Any] | None = None  # JSON of the preprocessing, if known
    training: Mapping[str, Any] = field(default_factory=dict)  # The checkpoint's metadata on the training
    notes: tuple[str, ...] = ()  # Sentences for the user about choices in the weights file
    assumed: str = ""  # Sentence on an assumed preprocessing; "" if the file, the package or the options state it


def _from_path(source: str, weights: WeightsFile | None, options: Mapping[str, Any]) -> LoadedModel:
    path = Path(source)
    if path.suffix == ".py":
        raise ModelError(
            f"{source} does not name a factory", remedy=f"Write {source}:NAME, a function that returns the network"
        )
    if weights is not None:
        raise UsageError(
            f"{source} contains its own weights, so --weights does not apply",
            remedy="Leave --weights out, or name the network's code: file.py:factory",
        )
    if options:
        raise UsageError(
            f"{source} contains its own options, so --model-option does not apply", remedy="Leave --model-option out"
        )
    if (path / MANIFEST).is_file():
        raise ModelError(
            f"{source} is a bundle, the result of fold-and-export",
            remedy=f"Name the network and take the bundle's unfolded weights: file.py:factory --weights {source}",
        )
    file = checkpoint_file(path)
    refuse_other_kinds(file, "safetensors")
    return _from_checkpoint(file)


def _from_factory(source: str, weights: WeightsFile | None, options: Mapping[str, Any]) -> LoadedModel:
    """Load a user's own network; a checkpoint of this factory adds its options, labels and other metadata."""
    stated = _metadata_of(weights)
    if stated and Path(stated["network"]["source"]).name != Path(source).name:  # the folder may have moved
        stated = {}
    options = {**((stated.get("network") or {}).get("options") or {}), **options}
    network = {"source": source, "options": options}
    module = call_factory(source, options)
    notes = () if weights is None else load_weights(module, weights)
    return replace(_described(module, network, None, stated), notes=notes)


def _from_name(source: str, weights: WeightsFile | None, options: Mapping[str, Any]) -> LoadedModel:
    if weights is None and source in KNOWN:
        raise ModelError(f"{source} needs weights", remedy="Pass --weights FILE")
    found = _metadata_of(weights).get("network") or {}
    stated = (found.get("options") or {}) if found.get("source") == source else {}
    network = {"source": source, "options": {**stated, **options} if options else stated}
    module = build_known(network)
    notes = () if weights is None else load_weights(module, weights)
    shape, preprocessing = sample_facts(network, module)
    name = source.rpartition(":")[2]
    return LoadedModel(_in_eval_mode(module), name, network, shape, preprocessing=preprocessing, notes=notes)


def _from_checkpoint(path: Path) -> LoadedModel:
    checkpoint = load_checkpoint(path)
    metadata = checkpoint.metadata
    source = str(metadata["network"]["source"])
    if source not in KNOWN and zoo_of(source) is None:
        raise ModelError(
            f"{path} holds the weights of your own network {source}, but not its code",
            remedy=f"Name its code and these weights: {source} --weights {path}",
        )
    module = build_known(metadata["network"])
    try:
        module.load_state_dict(checkpoint.state)
    except RuntimeError as error:
        raise ModelError(
            f"the weights in {path} do not fit its network: {one_line(error)}", remedy="Train again"
        ) from error
    return _described(module, metadata["network"], sample_facts(metadata["network"], module)[0], metadata)


def _described(
    module: nn.Module, network: Mapping[str, Any], shape: tuple[int, ...] | None, metadata: Mapping[str, Any]
) -> LoadedModel:
    """Return a network with its checkpoint's metadata; ``shape`` of a sample if the metadata have none."""
    labels, image = metadata.get("labels"), metadata.get("preprocessing")
    if isinstance(image, dict):  # a zoo's network may be trained on another size than its package names
        sides = [side for name in ("channels", "height", "width") if isinstance(side := image.get(name), int)]
        shape = tuple(sides) if len(sides) == 3 else shape
    return LoadedModel(
        _in_eval_mode(module),
        str(network["source"]).rpartition(":")[2],
        network,
        shape,
        metadata.get("dataset"),
        None if labels is None else tuple(labels),
        image,
        {**(metadata.get("training") or {}), **{key: metadata.get(key) for key in _RECALIBRATED if key in metadata}},
    )


@dataclass(frozen=True)
class SourceKind:
    """One row of SOURCE_KINDS."""

    form: str  # The kind as a user writes it
    matches: Callable[[str], bool]  # Returns True if a source is of this kind
    # Loads a network from the source, the weights and the options
    load: Callable[[str, WeightsFile | None, Mapping[str, Any]], LoadedModel]


#: The kinds of source, in the order in which they are tried. A run directory and a checkpoint have their own weights. The
#: function of a user's file or module returns the network; its options are in the checkpoint of a run that trained it.
SOURCE_KINDS: tuple[SourceKind, ...] = (
    SourceKind("a run directory, a .safetensors checkpoint", lambda source: Path(source).exists(), _from_path),
    SourceKind("bn_lenet", KNOWN.__contains__, _from_name),
    SourceKind("torchvision:NAME, timm:NAME", lambda source: zoo_of(source) is not None, _from_name),
    SourceKind(
        "file.py:FACTORY, package.module:FACTORY", lambda source: all(source.rpartition(":")[::2]), _from_factory
    ),
)


def load_source(
    source: str | os.PathLike[str],
    *,
    weights: str | os.PathLike[str] | None = None,
    weights_key: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> LoadedModel:
    """Load a network by the source that a user names.

    Args:
        source: One of SOURCE_KINDS. ``file.py:factory`` runs that file.
        weights: A weights file, a bundle or a run directory (read without running code); for a checkpoint it must be None.
            Without it, a zoo's network has random weights.
        weights_key: The set of weights to take from a file with several, or the prefix of the names to take.
        options: Named arguments of the network's constructor, or of the factory; a checkpoint has its own.

    Raises:
        ModelError: Something is missing, damaged, or does not fit together.
        MissingDependency: The package that defines the network is not installed.
        UsageError: ``weights`` or ``options`` given for a checkpoint.
    """
    source = os.fspath(source)
    file = WeightsFile.of(weights, weights_key)
    for kind in SOURCE_KINDS:
        if kind.matches(source):
            return kind.load(source, file, dict(options or {}))
    raise ModelError(
        f"{source!r} does not exist" if not source.strip(":") else f"{source} does not exist",
        remedy="Give a run directory, a .safetensors checkpoint, torchvision:NAME, timm:NAME, or file.py:factory of"
        " your own network",
    )


def checkpoint_of(loaded: LoadedModel) -> Checkpoint:
    """Return a loaded network as a checkpoint, which ``load_source`` can read."""
    training = {key: value for key, value in loaded.training.items() if key not in _RECALIBRATED}
    metadata: dict[str, Any] = {
        "network": dict(loaded.network),
        "dataset": loaded.dataset,
        "labels": None if loaded.labels is None else list(loaded.labels),
        "preprocessing": None if loaded.preprocessing is None else dict(loaded.preprocessing),
        "training": training,
        "eps": eps_of(loaded.module),
        "recalibrated": bool(loaded.training.get("recalibrated")),
    }
    if (how := loaded.training.get("recalibration")) is not None:
        metadata["recalibration"] = how
    return Checkpoint(loaded.module.state_dict(), metadata)


def _metadata_of(weights: WeightsFile | None) -> Mapping[str, Any]:
    """Return the metadata of a bnexport checkpoint; {} for plain weights."""
    if weights is None or not is_safetensors(weights.path) or METADATA_KEY not in read_safetensors(weights.path)[1]:
        return {}
    return load_checkpoint(weights.path).metadata


def _in_eval_mode(module: nn.Module) -> nn.Module:
    """Switch a network in training mode to eval mode; others may have layers in training mode on purpose."""
    return to_eval_mode(module) if module.training else module


# --- a user's own code ---


def call_factory(source: str, options: Mapping[str, Any]) -> nn.Module:
    """Import the code of ``file.py:factory`` or ``package.module:factory``, and call the factory with named arguments.

    A ModelError reports code that is missing, fails at a line, or does not return a module.
    """
    place, _, name = source.rpartition(":")
    if not place:
        raise ModelError(
            f"{source!r} is not a network", remedy="Write torchvision:NAME, timm:NAME, or file.py:factory of your own"
        )
    file = Path(place) if place.endswith(".py") else None
    # A file can import its neighbours, as with python FILE; a package in the current folder is found, as with python -m.
    # The user's code may print, which on standard output would break --json.
    with (
        _importing_from("" if file is None else str(file.parent.resolve())),
        contextlib.redirect_stdout(sys.stderr),
    ):
        module = _import_module(place) if file is None else _import_file(file)
        factory = getattr(module, name, None)
        if not callable(factory):
            raise ModelError(
                f"{place} has no function {name!r}", remedy="Name a function or class that returns the network"
            )
        try:
            network = factory(**options)
        except (Exception, SystemExit) as error:
            raise ModelError(
                f"{source} failed{_line_of(error, place)}: {type(error).__name__}: {one_line(error)}",
                remedy="The factory is called without arguments (or the given ones) and must return a torch.nn.Module",
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
            remedy="Fix that line; python FILE shows the whole error",
        ) from error
    return module


def _import_module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise ModelError(
            f"the module {name} can't be imported: {type(error).__name__}: {one_line(error)}",
            remedy="Install it, run from its folder, or name its file: path/file.py:factory",
        ) from error


@contextlib.contextmanager
def _importing_from(folder: str) -> Iterator[None]:
    """Search ``folder`` first for imports; folders that the user's code adds to the path stay."""
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
