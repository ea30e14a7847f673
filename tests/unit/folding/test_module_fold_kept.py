"""``fold_modules``: what has no place in the user's modules stays with its reason, and what is refused."""

import copy
from collections.abc import Callable

import pytest
import torch
from module_fold_models import IMAGE, X, close, difference, residual, same, state, tensors
from support.models import Graph, bn, conv, linear, positive, randomise, sequential
from torch import Tensor, nn
from torch.nn import functional

import bnexport
from bnexport.errors import ModelError, ProofError, UntracedError, UsageError
from bnexport.folding.torch_backend import modules
from bnexport.nn.folded import ScaleShift


def test_a_scale_that_moves_leaves_a_shift() -> None:
    """``f(s x + t) = s f(x + t / s)``: the module keeps one addition, also in training mode."""
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
    model = randomise(InAList()).eval()
    result = bnexport.fold_modules(model, IMAGE)
    assert [row.outcome for row in result.report.rows] == ["kept", "kept"]
    assert all("through a list" in row.reason for row in result.report.rows)
    assert difference(model, result.model, (torch.randn(3, 3, 8, 8),)) == 0


def test_a_norm_under_two_names_and_a_wrapper() -> None:
    model = Graph(lambda m, x: m.second(m.conv(x)), conv=conv()(), first=bn()())
    model.second = model.first
    wrapped = nn.DataParallel(randomise(model)).eval()
    result = bnexport.fold_modules(wrapped, IMAGE)
    assert [row.outcome for row in result.report.rows] == ["backward"]
    assert isinstance(result.model.module.first, nn.Identity)
    assert isinstance(result.model.module.second, nn.Identity)
    assert difference(wrapped.module, result.model.module, (torch.randn(3, 3, 8, 8),)) <= 1e-6


def test_a_network_that_is_folded_again_still_loads() -> None:
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
    model = randomise(ReadsMean()).eval()
    result = bnexport.fold_modules(model, IMAGE)
    assert [(row.module, row.outcome) for row in result.report.rows] == [("other", "forward"), ("bn", "kept")]
    assert "test_module_fold_kept.py" in result.report.rows[1].reason


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
@pytest.mark.parametrize("path", ["0", "1", "2"])
def test_hooks_see_the_same_values(hook: str, path: str) -> None:
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
    model = randomise(sequential(sequential(conv(), bn()), nn.ReLU, sequential(conv(6, 6), bn()))()).eval()
    model[0].register_forward_hook(lambda *_: None)
    result = bnexport.fold_modules(model, IMAGE)
    assert [(row.module, row.gone) for row in result.report.rows] == [("0.1", False), ("2.1", True)]


def test_an_in_place_operation_after_a_norm() -> None:
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

    def wrong(model: nn.Module, changes: modules.ModuleChanges, added: tuple[str, ...]) -> None:
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

    with pytest.raises(ProofError, match="another size"):
        bnexport.fold_modules(randomise(Graph(forward, conv=conv()(), bn=bn()())), IMAGE)


def test_lazy_layers_scripts_and_arrays_are_refused() -> None:
    with pytest.raises(ModelError, match="has no value yet"):
        bnexport.fold_modules(nn.Sequential(nn.LazyConv2d(6, 3), nn.BatchNorm2d(6)), IMAGE)
    script = torch.jit.trace(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)).eval(), IMAGE)
    with pytest.raises(UntracedError, match="TorchScript"):
        bnexport.fold_modules(script, IMAGE)
    with pytest.raises(UntracedError, match="part is a TorchScript module"):
        bnexport.fold_modules(Scripted(), IMAGE)
    with pytest.raises(UsageError, match=r"example inputs as tensors, not as a numpy\.ndarray"):
        bnexport.fold_modules(residual(), IMAGE.numpy())


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
    model = randomise(
        Graph(lambda m, x: m.fc(m.bn(m.conv(x)).float().mean((2, 3))), conv=conv()(), bn=bn()(), fc=linear(6, 4)())
    )
    result = bnexport.fold_modules(model, IMAGE)
    assert [row.outcome for row in result.report.rows] == ["backward"]
    assert "float64" in result.report.warnings[0]
    x = torch.randn(3, 3, 8, 8)
    assert close(result.model(x), model.eval()(x))
