"""Graphs made to mislead a fold: each must be folded exactly, or kept with a reason; every BatchNorm is in the fold report."""

from collections.abc import Callable

import pytest
import torch
from cases import randomise
from support.models import Graph
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import FrozenBatchNorm2d

import bnexport
from bnexport.errors import ProofError, UntracedError
from bnexport.folding import fold as fold_module
from bnexport.folding.torch_backend.torch_constants import TorchConstants


class Parts(nn.Module):
    """A convolution, a BatchNorm, and a norm's scale and shift as plain parameters."""

    def __init__(self, forward: Callable[["Parts", Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.gamma, self.beta = nn.Parameter(torch.randn(4, 1, 1)), nn.Parameter(torch.randn(4, 1, 1))
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


def parts(forward: Callable[[Parts, Tensor], Tensor]) -> nn.Module:
    torch.manual_seed(0)
    return randomise(Parts(forward)).eval()


def images(*shape: int) -> Tensor:
    return torch.rand(*(shape or (2, 3, 8, 8)), generator=torch.Generator().manual_seed(1)) + 0.1


def check(model: nn.Module, x: Tensor) -> bnexport.FoldResult:
    """Fold, and compare the folded graph with the model in float32."""
    with torch.no_grad():
        expected = model(x)
        result = bnexport.fold(model, x)
        error = float((result.model(x) - expected).abs().max() / expected.abs().max())
    assert error <= 1e-6
    return result


def test_a_cast_that_rounds_is_part_of_the_constant() -> None:
    to_int = parts(lambda m, x: m.conv(x) * (3 * m.gamma).to(torch.int32) + m.beta)
    assert [row.outcome for row in check(to_int, images()).report.rows] in ([], ["kept"])
    to_half = check(parts(lambda m, x: m.conv(x) * m.gamma.half().float() + m.beta), images())
    assert [row.outcome for row in to_half.report.rows] == ["backward"]
    assert to_half.report.error is not None


def test_a_computed_constant_changed_through_a_view_is_none() -> None:
    def forward(m: Parts, x: Tensor) -> Tensor:
        scale = m.gamma + 0
        scale.chunk(2)[0].mul_(2)
        return m.conv(x) * scale + m.beta

    assert check(parts(forward), images()).report.folded == 0


def test_a_vector_as_the_weight_of_a_linear_layer_has_no_channels() -> None:
    sizes = {"weight": (8,), "gamma": (), "beta": ()}
    plain = {name: nn.Parameter(torch.randn(size)) for name, size in sizes.items()}
    dot = Graph(lambda m, x: nn.functional.linear(x, m.weight) * m.gamma + m.beta, **plain)
    (row,) = check(dot, images(3, 8)).report.rows
    assert row.outcome == "affine"
    assert "vector" in row.reason


def test_a_network_of_positive_inputs_is_proved_on_its_example() -> None:
    result = check(parts(lambda m, x: m.bn(m.conv(torch.log(x)))), images())
    assert result.report.folded == 1
    assert result.report.error <= 1e-12


def test_a_network_that_casts_is_proved() -> None:
    result = check(parts(lambda m, x: m.bn(m.conv(x.float() / 255))), images())
    assert result.report.folded == 1
    assert result.report.error is not None


def _cond(m: Parts, x: Tensor) -> Tensor:
    answer: Tensor = torch.cond(x.sum() > 0, lambda y: m.bn(m.conv(y)), lambda y: m.conv(y), (x,))
    return answer


def _autocast(m: Parts, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return m.bn(m.conv(x))


def _grad(m: Parts, x: Tensor) -> Tensor:
    with torch.enable_grad():
        return m.bn(m.conv(x))


@pytest.mark.parametrize(
    ("forward", "where"),
    [
        (_cond, "a branch (torch.cond)"),
        (_autocast, "a region with another autocast mode"),
        (_grad, "a region with another gradient mode"),
    ],
)
def test_a_batch_norm_in_a_separate_region_has_a_row(forward: Callable[[Parts, Tensor], Tensor], where: str) -> None:
    report = check(parts(forward), images()).report
    assert [(row.outcome, row.channels) for row in report.rows] == [("kept", 4)]
    assert f"it is inside {where}," in report.rows[0].reason
    assert report.remaining == 1


def test_a_scale_that_is_infinite_is_kept_and_has_no_number() -> None:
    def forward(m: Parts, x: Tensor) -> Tensor:  # the module itself refuses an eps of 0 in torch 2.11
        bn = m.bn
        return torch.batch_norm(m.conv(x), bn.weight, bn.bias, bn.running_mean, bn.running_var, False, 0.1, 0.0, False)

    model = parts(forward)
    model.bn.running_var.zero_()
    result = bnexport.fold(model, images())
    (row,) = result.report.rows
    assert (row.outcome, row.gain) == ("kept", None)
    assert "not finite" in row.reason


def test_a_folded_graph_that_fails_proves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The original runs in float64, the folded graph does not: that is a fault."""
    original = fold_module._fold_copy

    def broken(*options: object) -> object:
        folded, outcome, exact, growth = original(*options)  # type: ignore[arg-type]
        exact["conv.bias"] = folded.get_parameter("conv.bias").new_zeros(5).double()
        return folded, outcome, exact, growth

    monkeypatch.setattr(fold_module, "_fold_copy", broken)
    with pytest.raises(ProofError, match="inf"):
        bnexport.fold(parts(lambda m, x: m.bn(m.conv(x))), images())


def deep(norm: Callable[[int], nn.Module], depth: int) -> nn.Module:
    """Residual blocks one after the other, and a cast at the end, before which torch.export puts an assertion."""

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), norm(4), nn.Tanh()) for _ in range(depth)
            )

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = x + block(x)
            return x.to(torch.float32)

    torch.manual_seed(0)
    return randomise(Deep()).eval()


def test_a_deep_residual_network_is_cleaned_in_one_pass() -> None:
    """Walking up from each node without readers would take every path: two to the power of the depth."""
    result = bnexport.fold(deep(nn.BatchNorm2d, 40), images(2, 4, 6, 6))
    assert result.report.folded == 40
    assert not [name for name in result.model.state_dict() if "running" in name]
    targets = [node.target for node in result.model.graph.nodes]
    assert torch.ops.aten._assert_tensor_metadata.default in targets


def test_constants_are_not_computed_again_after_each_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    computed = 0
    original = TorchConstants._compute

    def counting(self: TorchConstants, node: torch.fx.Node) -> Tensor | None:
        nonlocal computed
        computed += 1
        return original(self, node)

    monkeypatch.setattr(TorchConstants, "_compute", counting)
    result = bnexport.fold(deep(FrozenBatchNorm2d, 12), images(2, 4, 6, 6), prove=False)
    assert result.report.folded == 12
    traced = 12 * 30  # nodes of a block, rounded up
    assert computed <= traced


class Merges(nn.Module):
    """Eval mode adds an update to the weight and training mode removes it, as in LoRA. Neither returns the module."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.merged = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), False

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)
        if self.merged == mode:
            self.conv.weight.data += -0.5 if mode else 0.5
            self.merged = not mode

    def forward(self, x: Tensor) -> Tensor:
        update = 0.0 if self.merged else 0.5
        return self.bn(nn.functional.conv2d(x, self.conv.weight + update, self.conv.bias))


def test_a_train_that_changes_weights_changes_only_a_copy() -> None:
    model = randomise(Merges())
    weight = model.conv.weight.detach().clone()
    result = bnexport.fold(model, images())
    assert [row.outcome for row in result.report.rows] == ["backward"]
    assert torch.equal(model.conv.weight, weight)
    assert (model.merged, model.training, model.bn.training) == (False, True, True)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(result.model(images()), model(images()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("given", "needed", "also", "model"),
    [
        ("float32", "float16", True, nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).half()),
        ("float64", "float32", True, nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))),
        ("int64", "float32", False, nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))),
        ("float32", "int64", False, nn.Sequential(nn.Embedding(7, 3), nn.Flatten(), nn.Linear(576, 4))),
    ],
)
def test_an_input_of_the_wrong_type_is_named_as_the_cause(
    given: str, needed: str, also: bool, model: nn.Module
) -> None:
    with pytest.raises(UntracedError, match=f"of type {given}, and runs on one of type {needed}") as caught:
        bnexport.fold(model.eval(), torch.zeros(2, 3, 8, 8, dtype=getattr(torch, given)))
    assert f"--input SHAPE:{needed}" in caught.value.remedy
    assert (f".to(torch.{given})" in caught.value.remedy) == also


@pytest.mark.parametrize(
    ("x", "found"),
    [
        (torch.zeros(2, 3, 8), "fails on an example input of shape 2x3x8"),
        (torch.zeros(2, 3, 2, 8, 8), "fails on an example input of shape 2x3x2x8x8"),
        (torch.zeros(2, 5, 8, 8), "fails on an example input of shape 2x5x8x8"),
        ((torch.zeros(2, 3, 8, 8),) * 2, "does not take 2 inputs"),
    ],
)
def test_an_input_of_the_wrong_shape_is_named_as_the_cause(x: Tensor | tuple[Tensor, ...], found: str) -> None:
    with pytest.raises(UntracedError, match=found):
        bnexport.fold(parts(lambda m, x: m.bn(m.conv(x))), x)


@pytest.mark.parametrize("factor", [2.0, -0.5])
def test_a_norm_next_to_a_scaled_convolution_goes_into_it(factor: float) -> None:
    def forward(m: Parts, x: Tensor) -> Tensor:
        y = m.conv(x).tanh()
        return torch.add(m.bn(y) + y.sin(), functional.conv2d(y, m.kernel, padding=1), alpha=factor)

    model = parts(forward)
    model.kernel = nn.Parameter(torch.randn(4, 4, 3, 3))
    assert [row.outcome for row in check(model, images()).report.rows] == ["merged"]


class Amplifies(nn.Module):
    """The mean over an image, in which changes of single pixels average out, and a function that multiplies its last digit."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.conv, self.bn, self.factor = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), factor

    def forward(self, x: Tensor) -> Tensor:
        return (self.bn(self.conv(x)).mean((2, 3)) * self.factor).sin()


@pytest.mark.parametrize(
    ("seed", "factor", "warnings"), [(5, 1e4, ()), (6, 1e4, ()), (5, 1e7, (fold_module.AMPLIFIES,))]
)
def test_rounding_that_the_network_amplifies_excuses_no_wrong_fold(
    seed: int, factor: float, warnings: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(seed)
    model, x = randomise(Amplifies(factor)).eval(), torch.randn(2, 3, 32, 32)
    report = bnexport.fold(model, x).report
    assert [row.outcome for row in report.rows] == ["backward"]
    assert report.warnings == warnings
    assert report.error < 1e-14 * factor
    original = fold_module._fold_copy

    def wrong(*options: object) -> object:
        folded, outcome, exact, growth = original(*options)  # type: ignore[arg-type]
        exact["conv.bias"] = exact["conv.bias"] * (1 + 1e-9)
        return folded, outcome, exact, growth

    monkeypatch.setattr(fold_module, "_fold_copy", wrong)
    with pytest.raises(ProofError):
        bnexport.fold(model, x)
