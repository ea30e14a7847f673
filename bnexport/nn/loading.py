"""From what a user names to a module in eval mode.

Kinds of source, tried in this order::

    runs/bn_lenet                 a run directory of bnexport train
    model.safetensors             a checkpoint of bnexport train
    bn_lenet                      a network of bnexport, with weights
    torchvision:resnet18          a network of torchvision by its name
    timm:repvgg_a0                a network of timm by its name
    file.py:factory               a function that returns a module; with a run's checkpoint as weights, also what it says
    package.module:factory
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from bnexport.errors import ModelError, UsageError
from bnexport.nn.checkpoint import METADATA_KEY, Checkpoint, checkpoint_file, load_checkpoint, read_safetensors
from bnexport.nn.factories import call_factory
from bnexport.nn.known import KNOWN, build_known, sample_facts
from bnexport.nn.weights import is_safetensors, load_weights
from bnexport.nn.zoo import zoo_of
from bnexport.optional import one_line

#: What a checkpoint says about its moving statistics; a loaded network has it beside the words on its training.
_RECALIBRATED = ("recalibrated", "recalibration")


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


def load_source(source: str, *, weights: Path | None = None, options: Mapping[str, Any] | None = None) -> LoadedModel:
    """Load what a user names.

    Args:
        source: One of the kinds in this module's docstring. ``file.py:factory`` runs that file.
        weights: Safetensors or a torch state dict (read without running code); for a checkpoint it must be None. Without
            it, a zoo's network has random weights.
        options: Named arguments of the network's constructor, or of the factory; a checkpoint has its own.

    Raises:
        ModelError: Something is missing, damaged, or does not fit together.
        MissingDependency: The package that defines the network is not installed.
        UsageError: ``weights`` or ``options`` given for a checkpoint.
    """
    path, options = Path(source), dict(options or {})
    if path.exists():
        return _from_path(path, source, weights, options)
    if source in KNOWN or zoo_of(source) is not None:
        return _from_name(source, weights, options)
    if not all(source.rpartition(":")[::2]):
        raise ModelError(
            f"{source!r} does not exist" if not source.strip(":") else f"{source} does not exist",
            remedy="Give a run directory, a .safetensors checkpoint, torchvision:NAME, timm:NAME, or file.py:factory of"
            " your own network",
        )
    return _from_factory(source, weights, options)


def _from_path(path: Path, source: str, weights: Path | None, options: Mapping[str, Any]) -> LoadedModel:
    if path.suffix == ".py":
        raise ModelError(
            f"{source} names no factory", remedy=f"Write {source}:NAME, a function that returns the network"
        )
    if weights is not None:
        raise UsageError(f"{source} brings its own weights", remedy="Name the network's code: file.py:factory")
    if options:
        raise UsageError(f"{source} brings its own options", remedy="Leave --model-option out")
    return _from_checkpoint(checkpoint_file(path))


def _from_factory(source: str, weights: Path | None, options: Mapping[str, Any]) -> LoadedModel:
    """A user's own network; a checkpoint that was trained with this very factory tells its options, labels and the rest."""
    told: Mapping[str, Any] = {}
    if weights is not None and is_safetensors(weights) and METADATA_KEY in read_safetensors(weights)[1]:
        metadata = load_checkpoint(weights).metadata
        if Path(metadata["network"]["source"]).name == Path(source).name:  # the folder may have moved
            told = metadata
    options = {**((told.get("network") or {}).get("options") or {}), **options}
    network = {"source": source, "options": options}
    module = call_factory(source, options)
    if weights is not None:
        load_weights(module, weights)
    return _told(module, network, None, told)


def _from_name(source: str, weights: Path | None, options: Mapping[str, Any]) -> LoadedModel:
    if weights is None and source in KNOWN:
        raise ModelError(f"{source} needs weights", remedy="Pass --weights FILE")
    stated = {} if weights is None else _options_of(weights, source)
    network = {"source": source, "options": {**stated, **options} if options else stated}
    module = build_known(network)
    if weights is not None:
        load_weights(module, weights)
    shape, preprocessing = sample_facts(network, module)
    name = source.rpartition(":")[2]
    return LoadedModel(_in_eval_mode(module), name, network, shape, preprocessing=preprocessing)


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
            f"{path} does not hold the weights of the network that it names: {one_line(error)}", remedy="Train again"
        ) from error
    return _told(module, metadata["network"], sample_facts(metadata["network"], module)[0], metadata)


def _told(
    module: nn.Module, network: Mapping[str, Any], shape: tuple[int, ...] | None, metadata: Mapping[str, Any]
) -> LoadedModel:
    """A network with what its checkpoint's metadata say; ``shape`` of a sample where they do not."""
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


def checkpoint_of(loaded: LoadedModel) -> Checkpoint:
    """A loaded network as a checkpoint: what ``load_source`` reads back."""
    training = {key: value for key, value in loaded.training.items() if key not in _RECALIBRATED}
    metadata: dict[str, Any] = {
        "network": dict(loaded.network),
        "dataset": loaded.dataset,
        "labels": None if loaded.labels is None else list(loaded.labels),
        "preprocessing": None if loaded.preprocessing is None else dict(loaded.preprocessing),
        "training": training,
        "recalibrated": bool(loaded.training.get("recalibrated")),
    }
    if (how := loaded.training.get("recalibration")) is not None:
        metadata["recalibration"] = how
    return Checkpoint(loaded.module.state_dict(), metadata)


def _options_of(weights: Path, source: str) -> Any:
    """Options that a bnexport checkpoint of this network states; none for plain weights."""
    if not is_safetensors(weights) or METADATA_KEY not in read_safetensors(weights)[1]:
        return {}
    network = load_checkpoint(weights).metadata["network"]
    return (network.get("options") or {}) if network["source"] == source else {}


def _in_eval_mode(module: nn.Module) -> nn.Module:
    """Switch a network to eval mode; one whose root is in eval mode already may hold layers in training mode on purpose."""
    return module.eval() if module.training else module
