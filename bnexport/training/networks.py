"""The network that a configuration asks for, with its initial weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bnexport.data.preprocessing import Preprocessing
from bnexport.errors import BnexportError, ModelError
from bnexport.loading.sources import KNOWN, build_known
from bnexport.loading.user_code import call_factory
from bnexport.loading.zoo import zoo_of
from bnexport.optional import one_line
from bnexport.reproducibility import seeded
from bnexport.training.config import LENET, TrainingConfig

_LENET_SIDE = 28


def network_facts(config: TrainingConfig, classes: int, preprocessing: Preprocessing) -> dict[str, Any]:
    """How to build the network again, as a checkpoint states it: ``{"source": ..., "options": {...}}``."""
    options: dict[str, Any] = dict(config.model_options)
    if config.model == LENET:
        options = {"norm": config.norm, "in_channels": preprocessing.channels, "num_classes": classes}
    elif zoo_of(config.model) is not None:
        options.setdefault("num_classes", classes)
    return {"source": config.model, "options": options}


def build_network(config: TrainingConfig, classes: int, preprocessing: Preprocessing) -> nn.Module:
    """Build the network, with weights drawn from the configuration's seed; the caller's random state is left alone.

    Raises:
        ModelError: It can't be built, does not take such images, or gives another number of scores.
        MissingDependency: The package that defines it is not installed.
    """
    facts = network_facts(config, classes, preprocessing)
    with seeded(config.seed):
        if facts["source"] in KNOWN or zoo_of(facts["source"]) is not None:
            network = build_known(facts)
        else:
            network = call_factory(facts["source"], facts["options"])
        _check_scores(network, facts, classes, preprocessing)
    return network.train()


def leaves_parameters_unused(network: nn.Module, preprocessing: Preprocessing) -> bool:
    """Whether a step gives some parameter no gradient, as one of a head that is switched off; a copy is tried."""
    twin = copy.deepcopy(network).train()
    with seeded(0), torch.enable_grad():
        scores = twin(torch.rand(2, preprocessing.channels, preprocessing.height, preprocessing.width))
        if not isinstance(scores, Tensor):  # the first step will say what is wrong
            return False
        torch.autograd.backward(scores.sum())
    return any(parameter.requires_grad and parameter.grad is None for parameter in twin.parameters())


def _check_scores(network: nn.Module, facts: Mapping[str, Any], classes: int, preprocessing: Preprocessing) -> None:
    """Try the network on two grey images, in eval mode, so that nothing in it changes."""
    shape = (preprocessing.channels, preprocessing.height, preprocessing.width)
    text, source = "x".join(map(str, shape)), facts["source"]
    remedy = "Give the shape that it takes with --input, as 3x64x64, and its own options with --model-option"
    if source == LENET and shape[1:] != (_LENET_SIDE, _LENET_SIDE):
        raise ModelError(f"bn_lenet takes images of 28x28, not {text}", remedy="Pass --input 1x28x28 or 3x28x28")
    try:
        with torch.no_grad():
            scores = network.eval()(torch.full((2, *shape), 0.5))
    except BnexportError:
        raise
    except Exception as error:
        raise ModelError(f"{source} does not take images of {text}: {one_line(error)}", remedy=remedy) from error
    if not isinstance(scores, Tensor) or scores.dim() != 2 or len(scores) != 2:
        raise ModelError(
            f"{source} gives no table of scores (images, classes)", remedy="Train a classifier that returns its logits"
        )
    if scores.shape[1] != classes:
        raise ModelError(
            f"{source} gives {scores.shape[1]} scores per image, the data set has {classes} classes",
            remedy="Pass the number of classes to it: --model-option num_classes="
            f"{classes}, or whatever its constructor calls it",
        )
