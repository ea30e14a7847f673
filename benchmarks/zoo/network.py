"""One network of the zoo, with random weights and with statistics that expose a wrong fold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from bnexport.errors import ModelError
from bnexport.loading.zoo import build_from_zoo, zoo_facts
from bnexport.nn.calling import to_eval_mode
from bnexport.optional import one_line, quiet

#: Heights and widths tried before the network's own; the fold does not depend on them, but its time does.
SIZES = (64, 96, 128)
#: Samples behind the statistics, and samples of the traced example.
CALIBRATION, EXAMPLE = 8, 2
_EPS = (1e-5, 1e-3, 3e-2)


@dataclass(frozen=True)
class ZooNetwork:
    """A network that is measured: in eval mode, float32."""

    module: nn.Module
    shape: tuple[int, ...]  # of one sample
    norms: int  # BatchNorm modules

    def batch(self, size: int, seed: int) -> Tensor:
        """Return noise of this seed, (size, *shape)."""
        return torch.randn(size, *self.shape, generator=torch.Generator().manual_seed(seed))


def make_zoo_network(source: str, *, seed: int = 0) -> ZooNetwork:
    """Build a network with random weights and statistics; the same seed gives the same network.

    ModelError: the network is unknown, or runs on none of the sizes. MissingDependency: its package is not installed.
    """
    torch.manual_seed(seed)
    with quiet():
        module = to_eval_mode(build_from_zoo(source, {}))
    norms = [item for item in module.modules() if isinstance(item, _BatchNorm)]
    subject = ZooNetwork(module, _sample_shape(source, module), len(norms))
    if norms:
        randomise(module, subject.batch(CALIBRATION, seed), seed=seed)
    return subject


def randomise(module: nn.Module, batch: Tensor, *, seed: int = 0) -> None:
    """Make every BatchNorm in place far from the identity, while the values keep their size through the deepest network.

    Fresh networks hide faults: their gammas are 1, their statistics 0 and 1, and layer scales of 1e-6 switch whole
    branches off. Here gamma has both signs per channel and some 0, the mean is shifted and the variance spread over two
    decades. One batch of several samples runs through the network meanwhile, so each layer is set by its real input.
    """
    generator = torch.Generator().manual_seed(seed)
    _wake(module, generator)
    module.train()
    to_eval_mode(module)  # some networks cache values computed from their weights in eval mode
    hooks: dict[nn.Module, RemovableHandle] = {}

    def calibrate(norm: Any, inputs: tuple[Tensor, ...]) -> None:
        """Set moving statistics from the input of the first call, perturbed per channel."""
        hooks.pop(norm).remove()
        if norm.running_mean is None:
            return
        values = inputs[0].transpose(0, 1).flatten(1)  # (channels, samples and positions)
        mean, var = values.mean(1), values.var(1, correction=0)
        var = torch.where(var < 1e-12, torch.ones_like(var), var)  # a channel that a gamma of 0 made constant
        normal, uniform = (draw(var.shape, generator=generator) for draw in (torch.randn, torch.rand))
        norm.running_mean.copy_(mean + 0.3 * var.sqrt() * normal)
        # Without the factor the mean of 1 / var would double at each layer.
        norm.running_var.copy_(var * 10 ** (2 * uniform - 1) * 2.15)
        norm.num_batches_tracked.fill_(1)

    norms = [item for item in module.modules() if isinstance(item, _BatchNorm)]
    for number, norm in enumerate(norms):
        norm.eps = _EPS[number % len(_EPS)]
        _set_affine(norm, generator)
        hooks[norm] = norm.register_forward_pre_hook(calibrate)
    try:
        outputs_of(module, batch)
    finally:
        for hook in hooks.values():
            hook.remove()


def outputs_of(module: nn.Module, batch: Tensor) -> list[Tensor]:
    """Return a network's outputs for a batch as a flat list of tensors."""
    with torch.no_grad(), quiet():
        return [item for item in pytree.tree_leaves(module(batch)) if isinstance(item, Tensor)]


def _set_affine(norm: Any, generator: torch.Generator) -> None:
    """Draw gammas of 0.5 to 1.5, a quarter of them negative, one in fifty 0, and betas of small noise."""
    if norm.weight is None:
        return
    draw = torch.rand(3, norm.num_features, generator=generator)
    gamma = (0.5 + draw[0]) * torch.where(draw[1] < 0.25, -1.0, 1.0)
    gamma[draw[2] < 0.02] = 0.0
    gamma[-1] = -gamma[-1].abs().clamp(min=0.5)
    with torch.no_grad():
        norm.weight.copy_(gamma)
        norm.bias.copy_(0.3 * torch.randn(norm.num_features, generator=generator))


def _wake(module: nn.Module, generator: torch.Generator) -> None:
    """Replace constant parameters near 0 of a fresh network: biases, layer scales, gains that switch a branch off."""
    inside = {id(item) for norm in module.modules() if isinstance(norm, _BatchNorm) for item in norm.parameters()}
    with torch.no_grad():
        for parameter in module.parameters():
            if id(parameter) in inside or not parameter.numel():
                continue
            first = float(parameter.flatten()[0])
            if abs(first) >= 0.01 or not bool((parameter == first).all()):
                continue
            if first:
                parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
            else:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def _sample_shape(source: str, module: nn.Module) -> tuple[int, ...]:
    """Return the smallest of SIZES on which the network runs, else its own size."""
    own = zoo_facts(source, {}, module)[0] or (3, 224, 224)
    problem = ""
    for shape in (*((own[0], size, size) for size in SIZES), own):
        try:
            outputs = outputs_of(module, torch.randn(EXAMPLE, *shape))
        except Exception as error:  # any error of a network on an image of another size
            problem = one_line(error, 200)
            continue
        if outputs and all(bool(torch.isfinite(item).all()) for item in outputs):
            return shape
        problem = "its outputs are not finite"
    raise ModelError(f"{source} can't run on an image: {problem}", remedy="Try another version of its package")
