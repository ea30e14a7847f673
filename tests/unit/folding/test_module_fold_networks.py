"""``fold_modules`` on networks of torchvision and timm: class, forward and names kept, equal in float64."""

import copy
from collections import Counter
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from cases import randomise
from module_fold_models import same, state, tensors
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import bnexport

#: Name -> size of the image, and how many BatchNorm calls end in which outcome.
NETWORKS: dict[str, tuple[int, dict[str, int]]] = {
    "torchvision:resnet18": (33, {"backward": 20}),
    "torchvision:mobilenet_v2": (33, {"backward": 52}),
    "torchvision:mobilenet_v3_small": (33, {"backward": 34}),
    "torchvision:efficientnet_b0": (33, {"backward": 49}),
    "torchvision:densenet121": (33, {"backward": 59, "affine": 62}),
    "torchvision:regnet_y_400mf": (33, {"backward": 53}),
    "torchvision:shufflenet_v2_x0_5": (33, {"backward": 56}),
    "torchvision:googlenet": (65, {"backward": 57, "kept": 2}),
    "timm:repvgg_a0": (33, {"backward": 44, "affine": 17}),
    "timm:convmixer_768_32": (32, {"through": 1, "affine": 64}),
    "timm:levit_128s": (224, {"through": 46, "backward": 4, "forward": 2}),
    "timm:tf_efficientnet_b0": (33, {"backward": 49}),
    "timm:mobilenetv3_small_050": (33, {"backward": 34}),
}
FAST = ("torchvision:resnet18", "timm:mobilenetv3_small_050")


def build(name: str, seed: int = 0) -> nn.Module:
    zoo, _, short = name.partition(":")
    options = {"init_weights": False} if short == "googlenet" else {}
    make: Callable[..., nn.Module] = torchvision.models.get_model if zoo == "torchvision" else timm.create_model
    torch.manual_seed(seed)
    model = randomise(make(short, **options), seed).eval()
    for module in model.modules():
        # A network of many layers with tiny variances multiplies its input beyond every type.
        if isinstance(getattr(module, "running_var", None), Tensor):
            module.running_var.clamp_(min=0.2)
    return model


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return tensors(model(x))


def worst(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))


def rounding(model: nn.Module, x: Tensor, reference: list[Tensor]) -> float:
    """Response to a change in the last digit of every float32 weight: a deep network with random statistics amplifies it."""
    wide, generator = copy.deepcopy(model).double(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for item in wide.parameters():
            item.mul_(1 + 2.0**-24 * (torch.randint(0, 2, item.shape, generator=generator) * 2 - 1))
    return worst(outputs(wide, x.double()), reference)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in FAST else [pytest.mark.slow]) for n in NETWORKS])
def test_a_network_keeps_its_class_and_names_and_computes_the_same(name: str) -> None:
    size, expected = NETWORKS[name]
    model = build(name)
    before = state(model)
    result = bnexport.fold_modules(model, torch.randn(2, 3, size, size))
    assert same(state(model), before)
    assert type(result.model) is type(model)
    assert Counter(row.outcome for row in result.report.rows) == expected
    assert all(row.reason for row in result.report.rows if not row.gone)
    assert result.report.error <= 1e-12
    gone = {row.module for row in result.report.rows if row.gone}
    after = result.model.state_dict()
    assert not any(key.rpartition(".")[0] in gone for key in after)
    kept = [key for key in before if key.rpartition(".")[0] not in gone]
    assert all(key in after for key in kept)
    x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(3))
    reference = outputs(copy.deepcopy(model).double(), x.double())
    error = worst(outputs(copy.deepcopy(result.model).double(), x.double()), reference)
    assert error <= max(1e-6, rounding(model, x, reference))
    restored = bnexport.load_folded(build(name, seed=1), after).eval()
    assert all(torch.equal(a, b) for a, b in zip(outputs(restored, x), outputs(result.model, x), strict=True))
    loss = sum(item.square().mean() for item in pytree.tree_leaves(result.model.train()(x.repeat(2, 1, 1, 1))))
    loss.backward()
    assert all(
        item.grad is not None and bool(torch.isfinite(item.grad).all())
        for path in {into for row in result.report.rows if row.gone for into in row.into.split(", ")}
        for item in result.model.get_submodule(path).parameters()
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torchvision:mobilenet_v2", "timm:mobilenetv3_small_050", "timm:levit_128s"])
def test_a_folded_network_is_compiled_exported_and_traced(name: str) -> None:
    size, _ = NETWORKS[name]
    model = build(name)
    x = torch.randn(2, 3, size, size)
    result = bnexport.fold_modules(model, x).model
    reference = outputs(result, x)
    for made in (
        torch.compile(result, backend="eager"),
        torch.export.export(result, (x,)).module(),
        torch.jit.trace(result, x),
        nn.DataParallel(result),
        bnexport.fold(result, x).model,
    ):
        assert worst(outputs(made, x), reference) <= 1e-5
