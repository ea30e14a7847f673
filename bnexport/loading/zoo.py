"""Networks of torchvision and timm by name: ``torchvision:resnet18``, ``timm:repvgg_a0``.

They are built without pretrained weights, so nothing is downloaded; weights come from a file.
"""

from __future__ import annotations

import difflib
import inspect
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from bnexport.errors import MissingDependency, ModelError
from bnexport.optional import installed, no_warnings, one_line, require

#: Shape of one sample and preprocessing as JSON; None for an unknown fact.
Facts = tuple[tuple[int, ...] | None, dict[str, Any] | None]

#: Options that would download or open files: weights come from the user's file alone.
_FETCHING = (
    "weights", "weights_backbone", "pretrained", "progress", "quantize", "checkpoint_path", "cache_dir", "pretrained_cfg",
    "pretrained_cfg_overlay",
)  # fmt: skip
#: Sub-package of torchvision.models -> the reason why its networks can't be exported.
_REFUSED = {
    "detection": "takes a list of images and returns boxes, not a batch of tensors",
    "quantization": "is meant for integer arithmetic; name the float network without quantized_",
    "optical_flow": "returns a list of refinements for its training code, not one answer per sample",
}
#: Height and width for a segmentation network, which accepts any. torchvision evaluates at 520, which is not a multiple of 32
#: and whose proof in float64 takes minutes. --input requests another size, --dynamic-size all sizes.
_SEGMENTATION_SIZE = 256
#: Frames of a video in torchvision's training recipes.
_FRAMES = 16
#: Networks that change their input when built with torchvision's own weights; an option decides their preprocessing.
_TRANSFORMING = ("googlenet", "inception_v3")
_MAX_HINTS = 3


@dataclass(frozen=True)
class Zoo:
    """A package with networks by name."""

    package: str  # Import name
    install: str  # Name for pip install
    names: Callable[[], list[str]]  # Returns all names
    build: Callable[[str, Mapping[str, Any]], nn.Module]  # Returns a network with random weights
    facts: Callable[[str, Mapping[str, Any], nn.Module], Facts]  # Returns the shape of one sample and the preprocessing


def zoo_of(source: str) -> Zoo | None:
    """Return the zoo of a source that starts with ``torchvision:`` or ``timm:``; None for another kind of source."""
    prefix, colon, _ = source.partition(":")
    return ZOOS.get(prefix) if colon else None


def zoo_problem(source: str) -> str | None:
    """Return the reason why a zoo's network can't be built here, without building it; None if none is found."""
    zoo, name = ZOOS[source.partition(":")[0]], source.partition(":")[2]
    if not installed(zoo.package):
        return f"{zoo.package} is not installed (pip install '{zoo.install}')"
    return None if name in zoo.names() else f"this {zoo.package} has no model {name!r}"


def build_from_zoo(source: str, options: Mapping[str, Any]) -> nn.Module:
    """Build ``torchvision:NAME`` or ``timm:NAME`` with random weights; ``options`` are arguments of its constructor."""
    zoo, name = ZOOS[source.partition(":")[0]], source.partition(":")[2]
    try:
        require(zoo.package, purpose=source)
    except MissingDependency as error:
        raise MissingDependency(error.message, remedy=f"Install it: pip install '{zoo.install}'") from error
    names = zoo.names()
    if name not in names:
        raise ModelError(f"{zoo.package} has no model {name!r}", remedy=_hint(name, names, zoo.package))
    if not isinstance(options, Mapping):
        raise ModelError(f"the options of {source} are {options!r}, not a table", remedy="Write the file again")
    if fetching := [key for key in options if key in _FETCHING]:
        raise ModelError(
            f"{source} takes no option {fetching[0]!r} here, because bnexport downloads no weights",
            remedy="Give the weights as a file",
        )
    try:
        with no_warnings:  # warnings about initialisation: the weights come from a file
            return zoo.build(name, options)
    except ModelError:
        raise
    except Exception as error:  # a constructor raises any class for a wrong value
        raise _not_built(source, options, error) from error


def zoo_facts(source: str, options: Mapping[str, Any], module: nn.Module) -> Facts:
    """Return the shape of one sample and the preprocessing as JSON, as the package states them."""
    zoo, name = ZOOS[source.partition(":")[0]], source.partition(":")[2]
    return zoo.facts(name, options, module)


def _hint(name: str, names: list[str], package: str) -> str:
    close = difflib.get_close_matches(name.lower(), names, n=_MAX_HINTS)
    return f"Did you mean {' or '.join(close)}?" if close else f"{package}.list_models() lists the names"


def _not_built(source: str, options: Mapping[str, Any], error: Exception) -> ModelError:
    if isinstance(error, TypeError) and (match := re.search(r"unexpected keyword argument '(\w+)'", str(error))):
        return _no_option(source, match[1])
    given = ", ".join(f"{key}={value}" for key, value in options.items())
    return ModelError(
        f"{source} can't be built{f' with {given}' if given else ''}: {type(error).__name__}: {one_line(error)}",
        remedy="Check the values given with --model-option" if given else "Try another version of the package",
    )


def _no_option(source: str, key: str) -> ModelError:
    return ModelError(
        f"{source} takes no option {key!r}", remedy="Leave it out of --model-option, or check its spelling"
    )


def _torchvision_names() -> list[str]:
    models = require("torchvision.models", purpose="a torchvision network")
    return list(models.list_models())


def _build_torchvision(name: str, options: Mapping[str, Any]) -> nn.Module:
    models = require("torchvision.models", purpose="a torchvision network")
    builder = models.get_model_builder(name)
    kind = _torchvision_kind(builder)
    if kind in _REFUSED:
        raise ModelError(
            f"torchvision:{name} {_REFUSED[kind]}",
            remedy="Write a file.py:factory around the part of it that takes and returns tensors",
        )
    if unknown := sorted(set(options) - _options_of(builder)):
        raise _no_option(f"torchvision:{name}", unknown[0])
    # Segmentation networks would download their backbone's weights.
    without = {key: None for key in ("weights", "weights_backbone") if key in inspect.signature(builder).parameters}
    network: nn.Module = builder(**without, **options)
    return network


def _torchvision_kind(builder: Callable[..., Any]) -> str:
    """Return "segmentation" for torchvision.models.segmentation.fcn; "" for a classifier, which is in models itself."""
    parts = builder.__module__.split(".")
    return parts[2] if len(parts) > 3 else ""


def _options_of(builder: Callable[..., Any]) -> set[str]:
    """Return the names of the options that a builder accepts.

    Some builders pass **options to a configuration or a class that ignores unknown ones without a TypeError. If a builder has
    a parameter for the number of classes, only its own parameters count; otherwise also those of the functions and networks of
    its module.
    """
    own = set(inspect.signature(builder).parameters)
    if "num_classes" in own:
        return own
    module = sys.modules[builder.__module__]
    found = [item for item in vars(module).values() if getattr(item, "__module__", "") == module.__name__]
    functions = [inspect.signature(item).parameters for item in found if inspect.isfunction(item)]
    networks = [item for item in found if inspect.isclass(item) and issubclass(item, nn.Module)]
    classes = [inspect.signature(item).parameters for item in networks]
    return own.union(*functions, *(names for names in classes if "num_classes" in names))


def _torchvision_facts(name: str, options: Mapping[str, Any], module: nn.Module) -> Facts:
    models = require("torchvision.models", purpose="a torchvision network")
    weights = models.get_model_weights(name)
    kind = _torchvision_kind(models.get_model_builder(name))
    transforms = next(iter([weights.DEFAULT] if len(weights) else []), None)
    recipe: Any = None if transforms is None else transforms.transforms()
    # A transformer is built for one image size, which may differ from that of its newest weights.
    size = getattr(module, "image_size", None) or (getattr(recipe, "crop_size", None) or [224])[0]
    if kind == "segmentation":
        size = _SEGMENTATION_SIZE
    if kind == "video":
        return (3, _FRAMES, size, size), None
    shape = (3, size, size)
    if recipe is None or (name in _TRANSFORMING and options.get("transform_input") is not True):
        return shape, None
    return shape, _image(shape, recipe.mean, recipe.std)


def _timm_names() -> list[str]:
    timm = require("timm", purpose="a timm network")
    return [*timm.list_models(), *timm.list_models(pretrained=True)]  # the second list has tags: resnet18.a1_in1k


def _build_timm(name: str, options: Mapping[str, Any]) -> nn.Module:
    timm = require("timm", purpose="a timm network")
    network: nn.Module = timm.create_model(name, pretrained=False, **options)
    return network


def _timm_facts(_name: str, options: Mapping[str, Any], module: nn.Module) -> Facts:
    config: Any = getattr(module, "pretrained_cfg", None) or {}
    if "input_size" not in config:
        return None, None
    channels, height, width = config["input_size"]
    size = options.get("img_size")
    shape = (int(options.get("in_chans", channels)), int(size or height), int(size or width))
    mean, std = config.get("mean"), config.get("std")
    if mean is None or std is None or not len(mean) == len(std) == shape[0]:
        return shape, None
    return shape, _image(shape, mean, std)


def _image(shape: tuple[int, ...], mean: Any, std: Any) -> dict[str, Any]:
    """Return the JSON of a ``data.preprocessing.Preprocessing``; both packages state it for pixels of 0 to 1."""
    channels, height, width = shape
    return {
        "channels": channels, "height": height, "width": width, "scale": 1 / 255,
        "mean": list(map(float, mean)), "std": list(map(float, std)),
    }  # fmt: skip


#: Prefix of a source -> the zoo.
ZOOS: dict[str, Zoo] = {
    "torchvision": Zoo("torchvision", "torchvision", _torchvision_names, _build_torchvision, _torchvision_facts),
    "timm": Zoo("timm", "bnexport[timm]", _timm_names, _build_timm, _timm_facts),
}
