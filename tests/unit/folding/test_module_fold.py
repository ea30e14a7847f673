"""``fold_modules``: the user's own class with folded weights; what has no place in a module stays, with its reason."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import timm
import torch
from cases import CASES, Case
from support.models import Graph, bn, conv, graph, linear, positive, randomise, sequential
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

import bnexport
from bnexport.errors import ModelError, ProofError, UntracedError
from bnexport.folding.torch_backend import modules
from bnexport.nn.folded import MARKER, ScaleShift

IMAGE = torch.zeros(2, 3, 8, 8)
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


def tensors(outputs: object) -> list[Tensor]:
    return [item for item in pytree.tree_leaves(outputs) if isinstance(item, Tensor)]


def difference(one: nn.Module, other: nn.Module, inputs: tuple[Tensor, ...]) -> float:
    """Largest difference in float64, as a share of the largest value."""
    found = []
    for model in (one, other):
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            found.append(tensors(double(model)(*(item.double() for item in inputs))))
    return max((float((a - b).abs().max() / a.abs().max()) for a, b in zip(*found, strict=True)), default=0.0)


def double(model: nn.Module) -> nn.Module:
    values = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    return copy.deepcopy(model, {id(value): value.detach().clone() for value in values}).double()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


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
    assert result.report.error is not None
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


def residual() -> nn.Module:
    """Two blocks, a shortcut, a head: small, and with everything that training needs."""

    def forward(m: Graph, x: Tensor) -> Tensor:
        y = torch.relu(m.bn1(m.conv1(x)))
        z = m.act(m.bn2(m.conv2(y)) + y)
        return m.fc(z.mean((2, 3)))

    layers = {
        "conv1": conv(bias=False, padding=1),
        "bn1": bn(),
        "conv2": conv(6, 6, bias=False, padding=1),
        "bn2": bn(),
        "act": lambda: nn.ReLU(inplace=True),
        "fc": linear(6, 4),
    }
    torch.manual_seed(0)
    return randomise(graph(forward, **layers)())


class Residual(nn.Module):
    """As ``residual``, picklable."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(*residual().children())
        self.bn_act = randomise(BatchNormAct2d(4, act_layer=nn.PReLU))
        self.last = nn.Conv2d(4, 4, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        conv1, bn1, conv2, bn2, act, fc = self.inner
        y = torch.relu(bn1(conv1(x)))
        z = act(bn2(conv2(y)) + y)
        return self.bn_act(self.last(fc(z.mean((2, 3)))[:, :, None, None])).flatten(1)


@pytest.fixture(scope="module")
def network() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = Residual()
    result = bnexport.fold_modules(model, torch.randn(2, 3, 8, 8))
    assert [row.outcome for row in result.report.rows] == ["backward"] * 3
    return model.eval(), result.model


X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(5))


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-5 * expected.abs().max())


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
    ],
    ids=["compile", "export", "jit-trace", "jit-freeze", "deepcopy", "pickle", "data-parallel", "fold", "again"],
)
def test_the_result_goes_through(
    network: tuple[nn.Module, nn.Module], through: Callable[[nn.Module], Callable[[Tensor], Tensor]]
) -> None:
    original, result = network
    with torch.no_grad():
        assert close(through(result)(X), original(X))


@pytest.mark.slow
def test_the_result_goes_through_the_compiler(network: tuple[nn.Module, nn.Module]) -> None:
    original, result = network
    with torch.no_grad():
        assert close(torch.compile(result)(X), original(X))


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


def test_a_scale_that_moves_leaves_a_shift() -> None:
    """``f(s x + t) = s f(x + t / s)``: the module keeps one addition, also in training mode."""
    torch.manual_seed(0)
    model = positive(randomise(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3, padding=1))))
    result = bnexport.fold_modules(model, IMAGE)
    assert [row.outcome for row in result.report.rows] == ["affine"]
    rest = result.model[0]
    assert isinstance(rest, ScaleShift)
    assert rest.weight is None
    x = torch.randn(3, 3, 8, 8)
    assert difference(model.eval(), result.model, (x,)) <= 1e-6
    assert close(result.model.train()(x), model(x))
    restored = bnexport.load_folded(copy.deepcopy(model), result.model.state_dict())
    assert torch.equal(restored(x), result.model(x))


class ReadsMean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.other = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(self.other(x))) - self.bn.running_mean.mean()


class AsksForBias(ReadsMean):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.other(x))
        return self.bn(y if self.conv.bias is None else y * 2)


class AsksForClass(ReadsMean):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(self.other(x)))
        return y if isinstance(self.bn, nn.BatchNorm2d) else -y


class IgnoresBias(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return functional.conv2d(input, self.weight)


class Doubles(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return torch.sigmoid(super().forward(input))


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = torch.jit.trace(randomise(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))).eval(), IMAGE)
        self.bn = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.part(x))


def tied() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.Sigmoid())
    model.register_parameter("weight_of_a_loss", model[0].weight)
    return model


def twice() -> nn.Module:
    """One BatchNorm: once behind a convolution, once in front of nothing that takes it in."""
    return Graph(lambda m, x: m.bn(torch.sigmoid(m.bn(m.conv(x)))), conv=conv()(), bn=bn()())


def in_place_after() -> nn.Module:
    """A scale alone, which the next layer could take in; then the product would be written into the sigmoid's memory."""

    def forward(m: Graph, x: Tensor) -> Tensor:
        y = torch.sigmoid(m.a(x))
        z = m.bn(y)
        z.mul_(m.gate(y))
        return m.out(z) + y.mean()

    return Graph(forward, a=conv()(), bn=bn(affine=False)(), gate=nn.Sigmoid(), out=conv(6, 3)())


def weight_normed() -> nn.Module:
    return nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 6, 3)), nn.BatchNorm2d(6))


#: Name -> network, path of the BatchNorm that stays, part of its reason.
KEPT: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "reads-running-mean": (ReadsMean, "bn", "forward uses it for more than calling it"),
    "asks-for-bias": (AsksForBias, "bn", "is called without one"),
    "asks-for-class": (AsksForClass, "bn", "forward uses it for more than calling it"),
    "ignores-bias": (lambda: nn.Sequential(IgnoresBias(3, 6, 3, bias=False), nn.BatchNorm2d(6)), "1", "called without one"),
    "norm-that-does-more": (lambda: nn.Sequential(nn.Conv2d(3, 6, 3), Doubles(6)), "1", "does more than this scale and shift"),
    "one-memory": (tied, "1", "is shared with"),
    "weight-norm": (weight_normed, "1", "its weight is computed in forward"),
    "called-twice": (twice, "bn", "the calls would fold differently"),
}  # fmt: skip


@pytest.mark.parametrize("name", KEPT)
def test_folds_without_a_place_in_the_modules_are_not_made(name: str) -> None:
    build, path, reason = KEPT[name]
    torch.manual_seed(0)
    model = randomise(build()).eval()
    before = state(model)
    result = bnexport.fold_modules(model, IMAGE)
    row = next(row for row in result.report.rows if row.module == path)
    assert not row.gone
    assert reason in row.reason
    assert same(state(model), before)
    assert difference(model, result.model, (torch.randn(3, 3, 8, 8),)) <= 1e-6
    assert type(result.model.get_submodule(path)) is type(model.get_submodule(path)), "what stays is as it was"


class InAList(ReadsMean):
    """Registered, but forward calls what its list holds."""

    def __init__(self) -> None:
        super().__init__()
        self.items = [self.other, self.conv, self.bn]

    def forward(self, x: Tensor) -> Tensor:
        for item in self.items:
            x = item(x)
        return x


def test_a_norm_that_is_reached_through_a_list_stays() -> None:
    torch.manual_seed(0)
    model = randomise(InAList()).eval()
    result = bnexport.fold_modules(model, IMAGE)
    assert [row.outcome for row in result.report.rows] == ["kept", "kept"]
    assert all("through a list" in row.reason for row in result.report.rows)
    assert difference(model, result.model, (torch.randn(3, 3, 8, 8),)) == 0


def test_a_norm_under_two_names_and_a_wrapper() -> None:
    torch.manual_seed(0)
    model = Graph(lambda m, x: m.second(m.conv(x)), conv=conv()(), first=bn()())
    model.second = model.first
    wrapped = nn.DataParallel(randomise(model)).eval()
    result = bnexport.fold_modules(wrapped, IMAGE)
    assert [row.outcome for row in result.report.rows] == ["backward"]
    assert isinstance(result.model.module.first, nn.Identity)
    assert isinstance(result.model.module.second, nn.Identity)
    assert difference(wrapped.module, result.model.module, (torch.randn(3, 3, 8, 8),)) <= 1e-6


def test_a_network_that_is_folded_again_still_loads() -> None:
    torch.manual_seed(0)
    model = randomise(
        nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))
    ).eval()
    once = bnexport.fold_modules(model, IMAGE).model
    head = nn.Conv2d(4, 2, 1, bias=False)
    once.append(head)
    twice = bnexport.fold_modules(once, IMAGE).model
    assert isinstance(twice[3], nn.Identity)
    restored = bnexport.load_folded(nn.Sequential(*copy.deepcopy(model), copy.deepcopy(head)), twice.state_dict())
    x = torch.randn(3, 3, 8, 8)
    assert torch.equal(restored.eval()(x), twice(x))
    assert close(twice(x), head(model(x)))


def test_the_rest_folds_where_forward_reads_one_norm() -> None:
    torch.manual_seed(0)
    model = randomise(ReadsMean()).eval()
    result = bnexport.fold_modules(model, IMAGE)
    assert [(row.module, row.outcome) for row in result.report.rows] == [("other", "forward"), ("bn", "kept")]
    assert "test_module_fold.py" in result.report.rows[1].reason


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
@pytest.mark.parametrize("path", ["0", "1", "2"])
def test_hooks_see_the_same_values(hook: str, path: str) -> None:
    torch.manual_seed(0)
    build = sequential(conv(), nn.Identity, bn(), nn.ReLU)
    seen: list[Tensor] = []
    model = randomise(build()).eval()

    def record(_module: nn.Module, *values: object) -> None:
        if not torch.compiler.is_exporting():
            seen.extend(map(torch.clone, tensors(values)))

    getattr(model[int(path)], hook)(record)
    result = bnexport.fold_modules(model, IMAGE)
    (row,) = result.report.rows
    assert not row.gone
    assert "a hook reads its value" in row.reason
    records = []
    for one in (model, result.model):
        seen.clear()
        one(X.clone().requires_grad_()).sum().backward()
        records.append(list(seen))
    assert len(records[0]) == len(records[1]) > 0
    assert all(torch.equal(a, b) for a, b in zip(*records, strict=True))


def test_hooks_on_other_modules_do_not_stop_a_fold() -> None:
    torch.manual_seed(0)
    model = randomise(sequential(sequential(conv(), bn()), nn.ReLU, sequential(conv(6, 6), bn()))()).eval()
    model[0].register_forward_hook(lambda *_: None)
    result = bnexport.fold_modules(model, IMAGE)
    assert [(row.module, row.gone) for row in result.report.rows] == [("0.1", False), ("2.1", True)]


def test_an_in_place_operation_behind_a_norm() -> None:
    torch.manual_seed(0)
    model = randomise(in_place_after()).eval()
    model.bn.running_mean.zero_()
    assert bnexport.fold(model, IMAGE).report.rows[0].gone, "in a graph it is a fold like any other"
    result = bnexport.fold_modules(model, IMAGE)
    assert "its result is changed in place" in result.report.rows[0].reason
    assert difference(model, result.model, (torch.randn(3, 3, 8, 8),)) == 0


def test_training_heads_are_listed() -> None:
    class WithHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
            self.head = nn.Sequential(nn.Conv2d(6, 2, 1), nn.BatchNorm2d(2))

        def forward(self, x: Tensor) -> object:
            y = self.bn(self.conv(x))
            return (y, self.head(y)) if self.training else y

    model = randomise(WithHead())
    assert model.training
    result = bnexport.fold_modules(model, IMAGE)
    assert model.training
    assert [(row.module, row.outcome) for row in result.report.rows] == [("bn", "backward"), ("head.1", "kept")]
    assert "eval mode" in result.report.rows[1].reason
    assert len(result.model.train()(X)) == 2


class ZeroForOneSample(nn.Module):
    """The mean of batch-normalised numbers, which is 0 for a single sample: its output is rounding there."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.last = nn.BatchNorm2d(8, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.bn(self.conv(x)))).mean((2, 3))


def test_an_output_that_is_only_rounding_is_not_another_branch() -> None:
    result = bnexport.fold_modules(randomise(ZeroForOneSample()).eval(), torch.randn(2, 3, 16, 16))
    assert [row.outcome for row in result.report.rows] == ["backward", "kept"]


def test_the_proof_catches_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    written = modules.write

    def wrong(model: nn.Module, changes: modules.Changes, added: tuple[str, ...]) -> None:
        written(model, changes, added)
        with torch.no_grad():
            model.conv1.bias.add_(1e-9)

    monkeypatch.setattr(modules, "write", wrong)
    with pytest.raises(ProofError, match="differs from the original"):
        bnexport.fold_modules(residual(), X)


@pytest.mark.parametrize("condition", [lambda x: x.shape[-1] <= 8, lambda x: x.shape[-1] > 6, lambda x: x.shape[0] > 1])
def test_another_way_for_another_size_is_found(condition: Callable[[Tensor], bool]) -> None:
    def forward(m: Graph, x: Tensor) -> Tensor:
        y = m.conv(x)
        return m.bn(y) if condition(x) else y

    torch.manual_seed(0)
    with pytest.raises(ProofError, match="another size"):
        bnexport.fold_modules(randomise(Graph(forward, conv=conv()(), bn=bn()())), IMAGE)


def test_lazy_layers_and_scripts_are_refused() -> None:
    with pytest.raises(ModelError, match="has no value yet"):
        bnexport.fold_modules(nn.Sequential(nn.LazyConv2d(6, 3), nn.BatchNorm2d(6)), IMAGE)
    script = torch.jit.trace(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)).eval(), IMAGE)
    with pytest.raises(UntracedError, match="TorchScript"):
        bnexport.fold_modules(script, IMAGE)
    with pytest.raises(UntracedError, match="part is a TorchScript module"):
        bnexport.fold_modules(Scripted(), IMAGE)


def test_layers_made_in_the_first_call_are_not_made_here() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = None
            self.bn = nn.BatchNorm2d(6)

        def forward(self, x: Tensor) -> Tensor:
            if self.conv is None:
                self.conv = nn.Conv2d(3, 6, 3)
            return self.bn(self.conv(x))

    model = randomise(Late())
    with pytest.raises(ModelError, match="makes the layer conv in its first call"):
        bnexport.fold_modules(model, IMAGE)
    assert model.conv is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = positive(randomise(residual())).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.clamp_(0.5, 4)
            module.running_mean.clamp_(-2, 2)
    result = bnexport.fold_modules(model.to(dtype), X.to(dtype))
    assert {value.dtype for value in result.model.parameters()} == {dtype}
    assert all(row.gone for row in result.report.rows)
    bound = {torch.float64: 1e-12, torch.float16: 1e-2, torch.bfloat16: 8e-2}[dtype]
    assert difference(model, result.model, (X,)) <= bound


def test_a_network_that_pins_float32_is_proved_fold_by_fold() -> None:
    torch.manual_seed(0)
    model = randomise(
        Graph(lambda m, x: m.fc(m.bn(m.conv(x)).float().mean((2, 3))), conv=conv()(), bn=bn()(), fc=linear(6, 4)())
    )
    result = bnexport.fold_modules(model, IMAGE)
    assert [row.outcome for row in result.report.rows] == ["backward"]
    assert "float64" in result.report.warnings[0]
    x = torch.randn(3, 3, 8, 8)
    assert close(result.model(x), model.eval()(x))


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
