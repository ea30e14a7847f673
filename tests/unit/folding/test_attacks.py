"""Graphs found by attacking the engine: what moved a read, shared memory, hid a copy, or took too long."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.models import Graph, bn, conv, graph, linear, positive, randomise
from torch import Tensor, nn
from torch.nn import functional

import bnexport
from bnexport.errors import ProofError
from bnexport.folding import branches, layers
from bnexport.folding.torch_backend import torch_writer


def model_of(forward: Callable[..., Any], **layers: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return randomise(graph(forward, **layers)()).eval()


def images(channels: int = 3, size: int = 8, batch: int = 2) -> Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(batch))


def check(model: nn.Module, *inputs: Tensor, **options: Any) -> bnexport.FoldReport:
    """Fold, compare with the model on another batch, and check the fold report's invariants."""
    before = sum(tensor.numel() for tensor in model.state_dict().values())
    result = bnexport.fold(model, inputs, **options)
    others = [torch.cat([item, item.flip(0), item[:1]]) for item in inputs]
    with torch.no_grad():
        expected = torch.utils._pytree.tree_leaves(model(*(item.clone() for item in others)))
        have = torch.utils._pytree.tree_leaves(result.model(*(item.clone() for item in others)))
    for want, got in zip(expected, have, strict=True):
        assert got.shape == want.shape
        assert float((got - want).abs().max()) <= 2e-5 * float(want.abs().max()) + 1e-12
    report = result.report
    assert report.warnings == ()
    left = sum(node.target is torch.ops.aten.batch_norm.default for node in result.model.graph.nodes)
    assert report.remaining == left <= sum(not row.gone for row in report.rows)
    after = sum(tensor.numel() for tensor in result.model.state_dict().values())
    assert report.growth <= options.get("max_growth", 1.1)
    if all(row.gone for row in report.rows):
        assert after <= report.growth * before + 1
    return report


def add_later(m: Graph, x: Tensor) -> Tensor:
    y = m.conv(x)
    view = y.flatten(2)
    z = m.bn(y)
    y.add_(1.0)
    return m.out(z) + view.mean()


def input_changed_later(m: Graph, x: Tensor) -> Tensor:
    z = m.bn3(x)
    x.add_(1.0)
    return m.first(z)


def through_einsum(m: Graph, x: Tensor) -> Tensor:
    y = m.conv(x)
    torch.einsum("nchw->nhwc", y).mul_(2.0)
    return m.bn(y)


def through_broadcast(m: Graph, x: Tensor) -> Tensor:
    y = m.conv(x)
    torch.broadcast_tensors(y)[0].mul_(2.0)
    return m.bn(y)


@pytest.mark.parametrize("forward", [add_later, through_einsum, through_broadcast, input_changed_later])
def test_a_read_is_not_moved_past_a_change_of_its_memory(forward: Callable[..., Tensor]) -> None:
    report = check(model_of(forward, conv=conv(), bn=bn(), bn3=bn(3), out=conv(6, 6, 1), first=conv()), images())
    assert report.folded == 0
    assert report.rows[0].reason


def test_a_split_of_a_parameter_is_a_constant() -> None:
    def forward(m: Graph, x: Tensor) -> Tensor:
        first, second = m.bn6.weight.reshape(6, 1, 1).chunk(2, 0)
        return m.bn(m.conv(x) * second + first)

    report = check(model_of(forward, conv=conv(3, 3), bn=bn(3), bn6=bn(6)), images())
    assert report.rows[-1].outcome == "backward"


def _standardised(weight: Tensor, var: Tensor, mean: Tensor) -> Tensor:
    return (weight - mean) * (var + 1e-5).rsqrt()


#: Name -> a weight of 4 x 3 x 3 x 3 computed from a parameter: by an operator that gives several results, or with a tensor that
#: forward makes.
CONSTANT_WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "var_mean": lambda w: _standardised(w, *torch.var_mean(w, (1, 2, 3), keepdim=True)),
    "std_mean": lambda w: w / torch.std_mean(w, (1, 2, 3), keepdim=True)[0],
    "kthvalue": lambda w: w - w.flatten(1).kthvalue(5, 1)[0].view(-1, 1, 1, 1),
    "max": lambda w: w / w.flatten(1).max(1)[0].view(-1, 1, 1, 1),
    "positions": lambda w: w.flatten(1).gather(1, w.flatten(1).sort(1)[1]).view_as(w),
    "topk": lambda w: w * (w.abs() >= w.abs().flatten(1).topk(4)[0][:, -1].view(-1, 1, 1, 1)),
    "unbind": lambda w: torch.stack(w.unbind(0)[::-1]),
    "split": lambda w: torch.cat(w.split([1, 3])[::-1]),
    "chunk": lambda w: torch.cat([part * 2 for part in w.chunk(2)]),
    "aminmax": lambda w: w / (w.aminmax()[1] - w.aminmax()[0]),
    "svd": lambda w: (w.flatten(1) / torch.linalg.svd(w.flatten(1))[1][0]).view_as(w),
    "eye": lambda w: w * (torch.eye(3) + 0.5),
    "eye of a type": lambda w: w + torch.eye(3, dtype=torch.float64).to(w.dtype),
    "arange": lambda w: w * torch.arange(1, 4),
    "arange in steps": lambda w: w + torch.arange(0.1, 0.7, 0.2),
    "linspace": lambda w: w * torch.linspace(0.5, 2, 3),
    "logspace": lambda w: w * torch.logspace(0, 1, 3),
    "full": lambda w: w * torch.full((3, 1, 1), 0.3),
    "ones and zeros": lambda w: w * torch.ones(3) + torch.zeros(3, 1),
    "full_like": lambda w: w * torch.full_like(w, 0.3),
    "triangles": lambda w: w * torch.ones(3, 3).triu() + torch.tril_indices(3, 3).sum(),
    "a window": lambda w: w * torch.hann_window(3, periodic=False),
    "a stack": lambda w: w * torch.stack([torch.arange(3) / 3, torch.full((3,), 2.0), torch.ones(3)]),
}


@pytest.mark.parametrize("name", CONSTANT_WEIGHTS)
def test_a_weight_computed_from_parameters_alone_is_a_constant(name: str) -> None:
    def forward(m: Graph, x: Tensor) -> Tensor:
        return m.bn(functional.conv2d(x, CONSTANT_WEIGHTS[name](m.conv.weight), m.conv.bias))

    model = model_of(forward, conv=conv(3, 4, 3), bn=bn(4))
    assert [row.outcome for row in check(model, images()).rows] == ["backward"]


@pytest.mark.parametrize("factor", [lambda x: torch.arange(x.shape[0]).sum(), lambda x: torch.var_mean(x)[0]])
def test_a_weight_that_depends_on_the_input_is_not_a_constant(factor: Callable[[Tensor], Tensor]) -> None:
    def forward(m: Graph, x: Tensor) -> Tensor:
        return m.bn(functional.conv2d(x, m.conv.weight * factor(x), m.conv.bias))

    (row,) = check(model_of(forward, conv=conv(3, 4, 3), bn=bn(4)), images()).rows
    assert (row.outcome, "computed from the input" in row.reason) == ("affine", True), row


def test_a_tensor_made_and_changed_in_forward_is_not_a_wrong_constant() -> None:
    def forward(m: Graph, x: Tensor) -> Tensor:
        mask = torch.zeros(3)
        mask[1] = 2.0
        return m.bn(functional.conv2d(x, m.conv.weight * mask, m.conv.bias))

    check(model_of(forward, conv=conv(3, 4, 3), bn=bn(4)), images())


class Partial(nn.Module):
    """A norm with moving statistics that has only a scale, or only a shift."""

    def __init__(self, forward: Callable[[Partial, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(6) + 0.5), nn.Parameter(torch.randn(6))
        self.register_buffer("running_mean", torch.randn(6))
        self.register_buffer("running_var", torch.rand(6) * 2 + 0.1)
        self.register_buffer("sigma2", torch.rand(6) * 2 + 0.1)
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


def _on(x: Tensor) -> Tensor:
    return x.view(1, -1, 1, 1)


PARTIAL: dict[str, Callable[[Partial, Tensor], Tensor]] = {
    "deviation and gamma": lambda m, x: x / (_on(m.running_var) + 1e-4) ** 0.5 * _on(m.weight),
    "deviation alone": lambda m, x: x * torch.rsqrt(_on(m.running_var) + 1e-4),
    "one product": lambda m, x: x * _on(m.weight / torch.sqrt(m.running_var + 1e-4)),
    "a variance by another name": lambda m, x: x / torch.sqrt(_on(m.sigma2) + 1e-4),
    "mean and beta": lambda m, x: x - _on(m.running_mean) + _on(m.bias),
    "mean alone": lambda m, x: x - _on(m.running_mean),
}


@pytest.mark.parametrize("name", PARTIAL)
def test_a_norm_without_scale_or_without_shift_is_folded_and_listed(name: str) -> None:
    norms = [Partial(PARTIAL[name]) for _ in range(2)]
    model = nn.Sequential(nn.Conv2d(3, 6, 3), norms[0], nn.ReLU(), nn.Conv2d(6, 6, 3), norms[1]).eval()
    rows = [(row.module, row.kind, row.outcome, row.channels) for row in check(model, images()).rows]
    assert rows == [("1", "Partial", "backward", 6), ("4", "Partial", "backward", 6)]
    graph = bnexport.fold(model, images()).model.graph
    left = {str(node.target) for node in graph.nodes if node.op == "call_function"}
    assert left == {"aten.conv2d.default", "aten.relu.default"}


def test_a_lone_scale_or_shift_is_not_a_norm() -> None:
    for forward in (lambda m, x: x * _on(m.weight), lambda m, x: x + _on(m.bias), lambda m, x: x / 6**0.5):
        model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh(), Partial(forward)).eval()
        assert check(model, images()).rows == ()


def test_calls_that_fold_alike_first_and_apart_later_stay_in_the_budget() -> None:
    def forward(m: Graph, x: Tensor, y: Tensor) -> Tensor:
        return m.p(m.bn(m.conv(x))) + m.q(m.bn(m.conv(y))).tanh()

    layers = {"conv": conv(3, 32), "bn": bn(32), "p": bn(32), "q": bn(32)}
    tight = check(model_of(forward, **layers), images(), images(size=8))
    loose = check(model_of(forward, **layers), images(), images(size=8), max_growth=2.0)
    assert tight.growth <= 1.1
    assert loose.folded == 4
    assert 1.1 < loose.growth <= 2.0


def test_a_new_bias_counts_where_nothing_is_freed_for_it() -> None:
    """The BatchNorm stays in one of its two calls, so its tensors stay; the other call would give ``out`` a bias."""

    def forward(m: Graph, x: Tensor) -> Tensor:
        return m.out(m.bn(m.bn(x) - x))

    model = model_of(forward, bn=bn(3), out=conv(3, 4, bias=False))
    tight = check(model, images(), max_growth=1.0)
    assert [row.outcome for row in tight.rows] == ["affine", "affine"]
    assert tight.growth == 1.0
    assert "the bias that conv2d (out) would get would exceed the size budget of 1" in tight.rows[1].reason
    growth = float(tight.rows[1].hint.split("--max-growth ")[1].split(";")[0])
    loose = check(model, images(), max_growth=growth)
    assert [row.outcome for row in loose.rows] == ["affine", "forward"]
    assert 1.0 < loose.growth <= growth


def test_a_fold_succeeds_with_the_hinted_growth() -> None:
    def forward(m: Graph, x: Tensor) -> Tensor:
        return m.p(m.conv(x)) + m.q(m.conv(x.tanh())).tanh() + m.r(m.conv(x.sin())).tanh()

    for channels in (6, 11):
        layers = {"conv": conv(3, channels), "p": bn(channels), "q": bn(channels), "r": bn(channels)}
        model = model_of(forward, **layers)
        refused = check(model, images())
        advice = next(row.hint for row in refused.rows if "--max-growth" in row.hint)
        growth = float(advice.split("--max-growth ")[1].split(";")[0])
        assert check(model, images(), max_growth=growth).folded == 3


@pytest.mark.parametrize("change", [lambda x: x + 1.0, lambda x: -x, lambda x: x * 2.0, lambda x: 1.0 - x / 3.0])
def test_arithmetic_before_a_norm_that_stays_does_not_hide_it(change: Callable[[Tensor], Tensor]) -> None:
    report = check(model_of(lambda m, x: functional.gelu(m.bn(change(x))), bn=bn(3)), images())
    assert [row.outcome for row in report.rows] == ["affine"]


@pytest.mark.parametrize("place", [lambda m, x: m.bn(m.p(x)), lambda m, x: torch.tanh(m.p(m.bn(x.sigmoid())))])
def test_a_map_of_positions_is_not_multiplied_by_channels(place: Callable[..., Tensor]) -> None:
    window = graph(lambda m, x: x + m.map, map=lambda: nn.Parameter(torch.randn(8, 8)))
    model = model_of(place, p=window, bn=bn(16))
    result = bnexport.fold(model, images(16))
    assert max(tensor.numel() for tensor in result.model.state_dict().values()) <= 64
    check(model, images(16))


def test_an_example_of_one_sample_is_enough() -> None:
    model = model_of(lambda m, x: m.bn(m.conv(x)), conv=conv(), bn=bn())
    result = bnexport.fold(model, images(batch=1))
    assert result.report.folded == 1
    assert result.model(images(batch=5)).shape[0] == 5


@pytest.mark.parametrize(
    "change",
    [lambda y, x: y.view_as(x), lambda y, x: y.reshape_as(x), lambda y, _x: torch.rsub(y, 2.0, alpha=3)],
    ids=["view_as", "reshape_as", "rsub with a factor"],
)
def test_an_operation_between_a_layer_and_its_norm(change: Callable[..., Tensor]) -> None:
    model = model_of(lambda m, x: m.bn(change(m.conv(x), x)), conv=conv(6, 6, 1), bn=bn(6))
    assert check(model, images(6)).folded == 1


def test_weights_computed_by_operators_for_float32_alone() -> None:
    def faked(m: Graph, x: Tensor) -> Tensor:
        scales, zeros = torch.full((6,), 0.1), torch.zeros(6, dtype=torch.int32)
        weight = torch.fake_quantize_per_channel_affine(m.conv.weight, scales, zeros, 0, -128, 127)
        return m.bn(functional.conv2d(x, weight))

    def truncated(m: Graph, x: Tensor) -> Tensor:
        bits = m.conv.weight.view(torch.int32) & -65536
        return m.bn(functional.conv2d(x, bits.view(torch.float32)))

    for forward in (faked, truncated):
        model = model_of(forward, conv=conv(), bn=bn())
        result = bnexport.fold(model, images())
        with torch.no_grad():
            error = (result.model(images(batch=5)) - model(images(batch=5))).abs().max()
        assert float(error) <= 1e-4


def test_a_sum_that_broadcasts_its_convolution_is_not_merged() -> None:
    def forward(m: Graph, x: Tensor) -> Tensor:
        return m.b0(x) + (m.c(x) + m.z(x.tanh()))

    report = check(model_of(forward, b0=bn(6), c=conv(6, 6, 8), z=conv(6, 6, 1)), images(6))
    assert report.folded == 0


def test_a_branch_that_is_read_elsewhere_is_not_merged_into() -> None:
    def forward(m: Graph, x: Tensor) -> tuple[Tensor, Tensor]:
        a = m.b3(m.c3(x))
        return a, a + m.b0(x)

    report = check(model_of(forward, b3=bn(6), c3=conv(6, 6, padding=1), b0=bn(6)), images(6))
    assert [row.outcome for row in report.rows] == ["backward", "affine"]


def test_a_weight_computed_from_shared_factors_counts_as_a_copy() -> None:
    a, b = nn.Parameter(torch.randn(24, 2)), nn.Parameter(torch.randn(2, 24))
    net = Graph(
        lambda m, x: m.bn(functional.linear(x, m.a @ m.b)) + functional.linear(x, m.b) @ m.a.t(),
        a=a, b=b, bn=nn.BatchNorm1d(24),
    )  # fmt: skip
    model = randomise(net).eval()
    assert check(model, torch.randn(2, 24)).folded == 0
    assert check(model, torch.randn(2, 24), max_growth=6.0).folded == 1


class Branches(nn.Module):
    """``y = c_i(x) + y`` again and again, over a value that no scale can enter."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(number))
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = x.tanh()
        for layer in self.layers:
            y = layer(x) + y
        return self.bn(y)


def test_a_sum_of_many_branches_takes_no_exponential_time(monkeypatch: pytest.MonkeyPatch) -> None:
    visits = itertools.count()
    visit = bnexport.folding.plan.FoldPlan.visit

    def counting(self: Any, op: Any) -> None:
        next(visits)
        visit(self, op)

    monkeypatch.setattr(bnexport.folding.plan.FoldPlan, "visit", counting)
    result = bnexport.fold(randomise(Branches(40)).eval(), images(size=4))
    assert result.report.folded == 0
    assert next(visits) < 20_000


@pytest.mark.sampled(3)
@pytest.mark.parametrize("layer", [lambda: nn.AvgPool2d(1), nn.Dropout, lambda: nn.BatchNorm2d(4)])
def test_long_chains_need_no_deep_stack(layer: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), *(layer() for _ in range(300)), nn.BatchNorm2d(4))
    report = bnexport.fold(positive(randomise(model)).eval(), images()).report
    assert len(report.rows) == sum(isinstance(item, nn.BatchNorm2d) for item in model)
    assert all(row.gone or "too many operations" in row.reason for row in report.rows)


@pytest.mark.parametrize("size", [1e-2, 1e-3])
def test_small_weights_in_float16_keep_their_digits(size: float) -> None:
    model = randomise(nn.Sequential(nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3, padding=1), nn.BatchNorm2d(4))).eval()
    with torch.no_grad():
        model[0].weight.fill_(size)
        model[0].bias.fill_(1.0)
    half = model.half()
    result = bnexport.fold(half, images(8).half())
    x = images(8, batch=5).half()
    with torch.no_grad():
        exact = model.double()(x.double())
        folded = result.model.half()(x).double()
        plain = half.half()(x).double()
    noise = float((plain - exact).abs().max() / exact.abs().max())
    assert float((folded - exact).abs().max() / exact.abs().max()) <= 8 * noise + 1e-3


def test_a_scale_that_would_vanish_is_not_divided_by() -> None:
    model = randomise(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1))).eval()
    with torch.no_grad():
        model[0].weight.fill_(1e-37)
    check(model, images())


def test_a_network_that_can_not_be_compared_gets_a_warning() -> None:
    def forward(m: Graph, x: Tensor) -> Tensor:
        return m.bn(m.conv(x)) + functional.linear(x.float().mean((2, 3)), torch.ones(3, 3)).mean()

    result = bnexport.fold(model_of(forward, conv=conv(), bn=bn(), fc=linear()), images())
    assert result.report.error is not None or any("can't be compared" in text for text in result.report.warnings)


@pytest.mark.slow
def test_two_thousand_norms_in_a_row_have_rows() -> None:
    model = positive(randomise(nn.Sequential(*(nn.BatchNorm2d(2) for _ in range(1500)), nn.GELU()))).eval()
    for layer in model[:-1]:
        layer.running_var.fill_(1.0)
        layer.weight.data.clamp_(0.99, 1.01)
    report = bnexport.fold(model, images(2, 2)).report
    assert [row.outcome for row in report.rows].count("merged") == 1499
    assert {row.into for row in report.rows[:-1]} == {"1499"}


def test_the_stored_tensor_is_the_proved_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_writer, "flushed", lambda value, dtype: value.to(dtype) * 1.01)
    with pytest.raises(ProofError, match="rounded once"):
        bnexport.fold(model_of(lambda m, x: m.bn(m.conv(x)), conv=conv(), bn=bn()), images())


@pytest.mark.parametrize("late", ["merge", "second"])
def test_a_late_failure_keeps_the_earlier_folds(monkeypatch: pytest.MonkeyPatch, late: str) -> None:
    """A merge of branches, or of a norm that took in another one, fails its proof after folds were made."""
    if late == "merge":
        monkeypatch.setattr(branches, "_factor", lambda *_: 1.0)
        model = model_of(lambda m, x: m.p(m.a(x)) - m.q(m.b(x)), a=conv(), b=conv(), p=bn(), q=bn())
    else:
        right = layers.ABSORBERS["rows"]
        wrong = dataclasses.replace(right, push_shift=lambda *given: right.push_shift(*given) * 1.01)
        monkeypatch.setitem(layers.ABSORBERS, "rows", wrong)
        model = model_of(lambda m, x: m.out(m.q(m.p(x))), p=bn(3), q=bn(3), out=conv())
    result = bnexport.fold(model, images())
    assert result.report.warnings
    with torch.no_grad():
        torch.testing.assert_close(result.model(images(batch=3)), model(images(batch=3)), rtol=1e-3, atol=1e-3)


def test_a_chaotic_network_is_not_a_fault_of_the_fold() -> None:
    class Chaotic(nn.Module):
        """Its outputs are all rounding: only each fold alone can be proved."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.bn(self.conv(x)).sigmoid()
            for _ in range(60):
                x = 3.99 * x * (1 - x)
            return x

    report = bnexport.fold(randomise(Chaotic()).eval(), images()).report
    assert report.folded == 1
    assert any("last digit" in text for text in report.warnings)


def test_a_batch_norm_of_a_constant_has_a_row() -> None:
    def forward(m: Graph, x: Tensor) -> Tensor:
        return m.conv(x) + m.bn(m.fc.weight[None, :, :, None]).mean()

    report = check(model_of(forward, conv=conv(), bn=bn(7, dims=2), fc=linear(5, 7)), images())
    assert [(row.module, row.outcome) for row in report.rows] == [("bn", "kept")]
    assert "constant" in report.rows[0].reason


def test_an_identity_norm_has_its_own_rule() -> None:
    model = nn.Sequential(nn.Tanh(), nn.BatchNorm2d(3, eps=2.0**-20), nn.GELU()).eval()
    model[1].running_var.fill_(1 - 2.0**-20)
    (row,) = bnexport.fold(model, images()).report.rows
    assert (row.rule, row.into) == ("nothing to move", "")
    assert row.gone


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_large_mean_is_not_moved_past_a_sum(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1, groups=2)).eval()
    with torch.no_grad():
        model[0].running_mean.fill_(3000.0)
    x = images(2) + 3000
    (row,) = bnexport.fold(model.to(dtype), x.to(dtype)).report.rows
    assert not row.gone
    assert "cancel" in row.reason
    assert bnexport.fold(model.double(), x.double()).report.folded == 1


def test_the_advice_names_the_size_of_a_map() -> None:
    model = model_of(lambda m, x: m.out(m.bn(x)), bn=bn(3), out=conv(3, 2, padding=1, stride=2))
    (row,) = check(model, images()).rows
    growth = float(row.hint.split("--max-growth ")[1].split(";")[0])
    assert check(model, images(), max_growth=growth - 0.02).folded == 0
    assert check(model, images(), max_growth=growth).folded == 1


def test_heads_that_are_never_run_do_not_widen_the_budget() -> None:
    def forward(m: Graph, x: Tensor) -> Tensor:
        return m.p(m.conv(x)) + m.q(m.conv(x.tanh())).tanh()

    model = model_of(forward, conv=conv(), p=bn(), q=bn(), unused=linear(100, 100))
    assert check(model, images()).folded == 0
