"""Optimisers, and the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bnexport.errors import ModelError
from bnexport.optional import one_line
from bnexport.training.config import START_ANEW, TrainingConfig


def make_optimizer(model: nn.Module, config: TrainingConfig, device: torch.device) -> torch.optim.Optimizer:
    """Return the optimiser of a network's trained parameters.

    Weight decay leaves out vectors (biases, gamma, beta). On CUDA the learning rate is a tensor on the device, so that a
    recorded step reads a new value.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ModelError(f"{config.model} has no trainable parameter", remedy="Return a network with trainable weights")
    decayed, others = [p for p in trained if p.dim() > 1], [p for p in trained if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = _MAKERS[config.optimizer]([group for group in groups if group["params"]], config, device)
    if device.type != "cpu":  # after the constructor, whose comparison of the rate would wait for the device
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(config.lr, device=device)
    _fill_momentum(optimizer)
    return optimizer


def _sgd(groups: list[dict[str, Any]], config: TrainingConfig, _: torch.device) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=True)


def _adamw(groups: list[dict[str, Any]], config: TrainingConfig, device: torch.device) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=config.lr, fused=True, capturable=device.type == "cuda")


#: Name in the configuration -> constructor. One kernel for all parameters ("fused") was the fastest on CPU and GPU.
_MAKERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"sgd": _sgd, "adamw": _adamw}


def _fill_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Add a momentum buffer of -0 to each parameter without one.

    torch's fused SGD (2.11 to 2.14) allocates the buffers in its first step and leaves them uninitialised when that step is
    skipped, as the scaling of float16 losses does; the second step then adds to them. AdamW fills its moments with zeros.
    The first step equals torch's, bit for bit: momentum * -0 + gradient is the gradient, also for a gradient of -0.
    """
    for group in optimizer.param_groups:
        if group.get("momentum"):
            for parameter in group["params"]:
                optimizer.state[parameter].setdefault("momentum_buffer", torch.full_like(parameter, -0.0))


def learning_rate(config: TrainingConfig, step: int, steps_per_epoch: int) -> float:
    """Return the learning rate of a step, counted from 0 over the whole training.

    It depends on the step's number alone, so a resumed run continues with the same values.
    """
    warmup, total = config.warmup_epochs * steps_per_epoch, config.epochs * steps_per_epoch
    if step < warmup:
        return config.lr * (step + 1) / math.ceil(warmup)
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))
    return config.lr


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set the learning rate of all groups; a tensor is filled without a wait for the device."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(value)
        else:
            group["lr"] = value


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return an optimiser's state (momentum, moments, counts of steps): ``"<parameter's number>.<name>"`` -> tensor."""
    state: Mapping[int, Mapping[str, Any]] = optimizer.state_dict()["state"]
    return {
        f"{number}.{name}": value if isinstance(value, Tensor) else torch.tensor(float(value))
        for number, entry in state.items()
        for name, value in entry.items()
        if value is not None
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Restore the result of ``optimizer_tensors``; ModelError for tensors of another optimiser."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    try:
        for key, value in tensors.items():
            number, _, name = key.partition(".")
            if int(number) not in range(len(parameters)):
                raise ValueError(f"{key} belongs to no parameter")
            if value.dim() and value.shape != parameters[int(number)].shape:
                raise ValueError(f"{key} has shape {tuple(value.shape)}")
            state.setdefault(int(number), {})[name] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        _fill_momentum(optimizer)  # for parameters without a gradient in a run of an older version
    except (ValueError, KeyError) as error:
        raise ModelError(
            f"the optimiser's state in the checkpoint does not fit the network: {one_line(error)}", remedy=START_ANEW
        ) from error
