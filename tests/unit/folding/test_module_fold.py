"""``fold_modules``: the user's own class with folded weights; what has no place in a module stays, with its reason."""

import copy
import functools
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from cases import CASES, Case
from module_fold_models import Residual, X, close, difference, residual, same, state
from torch import Tensor, nn
from torch.nn import functional

import bnexport
from bnexport.errors import ModelError
from bnexport.nn.folded import MARKER

#: Cases that only another forward could follow: the outcome here, and part of the reason.
OTHERWISE: dict[str, tuple[str, str]] = {
    **dict.fromkeys(("matmul", "matmul-on-the-left", "batched-product"), ("affine", "called without one")),
    **dict.fromkeys(("before-matmul", "before-matmul-on-the-left"), ("affine", "called without one")),
    **dict.fromkeys(("matmul-add", "changed-in-place-between", "changed-in-place-beside"), ("affine", "in the code")),
    **dict.fromkeys(("scaled-between", "hook-on-conv"), ("affine", "in the code")),
    **dict.fromkeys(("chapter", "functional"), ("kept", "computed in forward itself")),
    **dict.fromkeys(("weight-norm", "weight-norm-by-hook", "spectral-norm", "pruned"), ("affine", "computed in forward")),
    **dict.fromkeys(("relu-between-clamped", "before-relu-clamped", "before-relu6-clamped"), ("affine", "bound per channel")),
    "hook-on-bn": ("kept", "a hook reads its value"),
    "before-zero-padding-map": ("affine", "pads its input with zeros"),
    **dict.fromkeys(
        ("rep-vgg", "rep-vgg-depthwise", "rep-vgg-dilated", "rep-vgg-even-kernel"), ("affine", "other operand is not scaled")
    ),
    "skip-into-convolution": ("affine", "it is an output of the model"),
    **dict.fromkeys(("conv-called-twice-unshared", "conv-with-two-norms-unshared"), ("affine", "is read 2 times")),
}  # fmt: skip

#: Of the cases that fold as in a graph, one for each way; the others are slow.
FAST = {
    "conv-no-bias", "conv-transposed-groups", "two-in-a-row", "called-twice-by-two-convs", "scratch-conv", "frozen", "subclass",
    "norm-with-activation", "relu-in-place", "concat", "before-flatten", "two-that-stay", "before-prelu-sign-rule",
    "conv-and-norm-called-twice", "shared-weight", "training-mode", "unbatched-conv1d", "weight-changed-in-forward",
}  # fmt: skip
_PARAMETERS = [
    pytest.param(case, id=case.name, marks=[] if case.name in FAST | OTHERWISE.keys() else [pytest.mark.slow])
    for case in CASES
]


@functools.cache
def folded(case: Case) -> tuple[nn.Module, dict[str, Tensor], bnexport.ModuleFoldResult]:
    model = case.model()
    before = state(model)
    shapes = {"inputs": (None,) * len(case.shapes)} if case.name.startswith("unbatched") else None
    return model, before, bnexport.fold_modules(model, case.inputs(), dynamic_shapes=shapes)


@pytest.mark.parametrize("case", _PARAMETERS)
def test_the_module_computes_the_same_and_reports_reasons(case: Case) -> None:
    model, before, result = folded(case)
    assert same(state(model), before), "the original was changed"
    assert type(result.model) is type(model)
    assert not result.model.training
    batch = None if case.name.startswith("unbatched") else 3
    assert difference(model, result.model, case.inputs(seed=7, batch=batch)) <= 1e-6
    assert result.report.error <= 1e-12
    assert result.report.warnings == ()
    rows = result.report.rows
    assert all(bool(row.reason) != row.gone for row in rows)
    if case.name in OTHERWISE:
        outcome, reason = OTHERWISE[case.name]
        left = next(row for row in rows if not row.gone)
        assert left.outcome == outcome
        assert reason in left.reason
    else:
        assert tuple((row.module, row.outcome) for row in rows) == case.outcomes


@pytest.mark.parametrize("case", _PARAMETERS)
def test_the_names_are_the_networks_own(case: Case) -> None:
    """Everything but the norms keeps its name; a bias may be added; a norm that is gone has no tensors."""
    _, before, result = folded(case)
    after = state(result.model)
    gone = {row.module for row in result.report.rows if row.gone}
    assert not [name for name in after if name.rpartition(".")[0] in gone]
    norms = {row.module for row in result.report.rows}
    lost = [name for name in before if name not in after and name.rpartition(".")[0] not in norms]
    assert lost == []
    new = {name for name in after if name not in before} - {MARKER}
    assert all(name.endswith("bias") for name in new)
    changed = any(row.rule for row in result.report.rows)
    assert bnexport.is_folded(result.model) == changed == bnexport.is_folded(after)
    fresh = case.model(seed=3)
    if changed:
        restored = bnexport.load_folded(fresh, after)
        assert same(state(restored), after)
        assert type(restored) is type(fresh)


@pytest.fixture(scope="module")
def network() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = Residual()
    result = bnexport.fold_modules(model, torch.randn(2, 3, 8, 8))
    assert [row.outcome for row in result.report.rows] == ["backward"] * 3
    return model.eval(), result.model


def test_a_norm_with_an_activation_becomes_the_activation_alone(network: tuple[nn.Module, nn.Module]) -> None:
    _, result = network
    assert isinstance(result.inner[1], nn.Identity)
    assert type(result.bn_act) is nn.Sequential
    assert isinstance(result.bn_act.act, nn.PReLU)
    assert "bn_act.act.weight" in result.state_dict()
    assert result.last.bias.requires_grad


@pytest.mark.parametrize(
    "through",
    [
        lambda model: torch.compile(model, backend="eager"),
        lambda model: torch.export.export(model, (X,)).module(),
        lambda model: torch.jit.trace(model, X),
        lambda model: torch.jit.freeze(torch.jit.trace(model, X)),
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: nn.DataParallel(model),
        lambda model: bnexport.fold(model, X).model,
        lambda model: bnexport.fold_modules(model, X).model,
        pytest.param(torch.compile, marks=pytest.mark.slow),
    ],
    ids=[
        "compile",
        "export",
        "jit-trace",
        "jit-freeze",
        "deepcopy",
        "pickle",
        "data-parallel",
        "fold",
        "again",
        "compiler",
    ],
)
def test_the_result_goes_through(
    network: tuple[nn.Module, nn.Module], through: Callable[[nn.Module], Callable[[Tensor], Tensor]]
) -> None:
    original, result = network
    with torch.no_grad():
        assert close(through(result)(X), original(X))


def test_further_training_is_that_of_a_network_without_batch_norm(network: tuple[nn.Module, nn.Module]) -> None:
    """In training mode the outputs are those of eval mode, every weight gets a gradient, and a step changes the outputs."""
    original, result = network
    model = copy.deepcopy(result).train()
    assert close(model(X), original(X))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(3):
        loss = functional.cross_entropy(model(X), torch.tensor([0, 1, 2, 3]))
        optimiser.zero_grad()
        loss.backward()
        assert all(item.grad is not None and bool(torch.isfinite(item.grad).all()) for item in model.parameters())
        assert model.last.bias.grad.abs().max() > 0
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[2] < losses[0]
    assert not close(model(X), original(X))
    assert close(model(X)[:1], model(X[:1])), "a sample's output depends on its batch"


def test_frozen_weights_stay_frozen() -> None:
    model = residual()
    for parameter in model.conv1.parameters():
        parameter.requires_grad_(False)
    result = bnexport.fold_modules(model, X).model
    assert not result.conv1.weight.requires_grad
    assert not result.conv1.bias.requires_grad
    assert result.conv2.bias.requires_grad


@pytest.mark.parametrize("prefix", ["", "module.", "model.module."])
def test_folded_weights_are_found(network: tuple[nn.Module, nn.Module], prefix: str) -> None:
    original, result = network
    weights = {prefix + name: value for name, value in result.state_dict().items()}
    assert bnexport.is_folded(weights)
    assert not bnexport.is_folded(original)
    assert not bnexport.is_folded(original.state_dict())
    restored = bnexport.load_folded(Residual(), weights)
    with torch.no_grad():
        assert torch.equal(restored(X), result(X))
    with pytest.raises(RuntimeError, match=MARKER):
        Residual().load_state_dict(result.state_dict())
    assert MARKER in Residual().load_state_dict(result.state_dict(), strict=False).unexpected_keys
    with pytest.raises(RuntimeError, match=MARKER):
        result.load_state_dict(original.state_dict())


def test_folded_parts_of_a_larger_network(network: tuple[nn.Module, nn.Module]) -> None:
    _, result = network
    whole = nn.Sequential(result, nn.Linear(4, 2))
    assert bnexport.is_folded(whole)
    fresh = nn.Sequential(Residual(), nn.Linear(4, 2))
    restored = bnexport.load_folded(fresh, whole.state_dict())
    with torch.no_grad():
        assert torch.equal(restored(X), whole(X))
    assert not bnexport.is_folded(fresh)


def test_load_folded_refuses_other_weights(network: tuple[nn.Module, nn.Module]) -> None:
    original, result = network
    with pytest.raises(ModelError, match="not of a folded network"):
        bnexport.load_folded(Residual(), original.state_dict())
    with pytest.raises(ModelError, match="not of this Sequential"):
        bnexport.load_folded(nn.Sequential(nn.Conv2d(3, 6, 3)), result.state_dict())
    text = bytes(result.state_dict()[MARKER].tolist()).replace(b'"format":1', b'"format":9')
    newer = {**result.state_dict(), MARKER: torch.tensor(list(text), dtype=torch.uint8)}
    with pytest.raises(ModelError, match="format 9"):
        bnexport.load_folded(Residual(), newer)
    damaged = {**result.state_dict(), MARKER: torch.zeros(3, dtype=torch.uint8)}
    with pytest.raises(ModelError, match="not of this Residual"):
        bnexport.load_folded(Residual(), damaged)


def test_a_saved_file_is_whole_and_loads(network: tuple[nn.Module, nn.Module], tmp_path: Path) -> None:
    _, result = network
    torch.save(result.state_dict(), tmp_path / "folded.pth")
    loaded = torch.load(tmp_path / "folded.pth", weights_only=True)
    assert bnexport.is_folded(loaded)
    assert torch.equal(bnexport.load_folded(Residual(), loaded).eval()(X), result(X))


def test_facts_about_other_tools_in_the_documentation() -> None:
    """docs/folding.md compares: an added bias gets no gradient in torch's function; timm folds where a module defines it."""
    layer, norm = nn.Conv2d(3, 6, 3, bias=False).eval(), nn.BatchNorm2d(6).eval()
    assert not torch.nn.utils.fuse_conv_bn_eval(layer, norm).bias.requires_grad
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))
    reparameterised = timm.utils.reparameterize_model(model)
    assert isinstance(reparameterised[1], nn.BatchNorm2d)
    assert reparameterised is not model
