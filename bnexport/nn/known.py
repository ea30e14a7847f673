"""Networks that are rebuilt from their name and options alone, without a user's code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from bnexport.errors import ModelError
from bnexport.nn.lenet import bn_lenet
from bnexport.nn.zoo import build_from_zoo, zoo_facts, zoo_of, zoo_problem
from bnexport.optional import one_line

#: bnexport's own networks. Those of the zoos (``nn.zoo.ZOOS``) are known too, where their package is installed.
KNOWN: dict[str, Callable[..., nn.Module]] = {"bn_lenet": bn_lenet}


def unknown_reason(network: Mapping[str, Any]) -> str | None:
    """Why a network can't be rebuilt here, as the end of a sentence; None when it can.

    Args:
        network: What a checkpoint or manifest says: ``{"source": ..., "options": {...}}``.
    """
    source = network.get("source")
    if source in KNOWN:
        return None
    if isinstance(source, str) and zoo_of(source) is not None:
        problem = zoo_problem(source)
        return None if problem is None else f"{source}, which can't be built here: {problem}"
    return f"whose code ({source}) only its author has"


def build_known(network: Mapping[str, Any]) -> nn.Module:
    """Build a network that bnexport knows from what a checkpoint or manifest says about it, without weights.

    Raises:
        ModelError: Not a network that bnexport knows, or its options are not its own.
        MissingDependency: The package that defines it is not installed.
    """
    source, options = network.get("source"), network.get("options") or {}
    if isinstance(source, str) and zoo_of(source) is not None:
        return build_from_zoo(source, options)
    if source not in KNOWN:
        raise ModelError(
            f"bnexport does not know how to build {source!r} by itself",
            remedy="Name its code: --source file.py:factory or --source package.module:factory",
        )
    try:
        return KNOWN[str(source)](**options)
    except TypeError as error:
        raise ModelError(
            f"{source} has no such options: {one_line(error)}", remedy="Check --model-option, or write the file again"
        ) from error


def sample_facts(network: Mapping[str, Any], module: nn.Module) -> tuple[tuple[int, ...] | None, dict[str, Any] | None]:
    """Shape of one sample of a known network, and its zoo's preprocessing as JSON; None for what is not known."""
    source, options = str(network["source"]), network.get("options") or {}
    if zoo_of(source) is not None:
        return zoo_facts(source, options, module)
    return (int(options.get("in_channels", 1)), 28, 28), None
