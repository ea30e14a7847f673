"""Every case of the table: the outcome of each BatchNorm, the equality of the outputs, and the account."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import CASES, Case, randomise
from torch import Tensor, nn

import bnexport
from bnexport.errors import ProofError, UntracedError
from bnexport.folding import fold as fold_module

ids = [case.name for case in CASES]


def flat(outputs: object) -> list[Tensor]:
    return [item for item in torch.utils._pytree.tree_leaves(outputs) if isinstance(item, Tensor)]


def fold_case(case: Case, model: nn.Module) -> bnexport.FoldResult:
    shapes = {"inputs": (None,) * len(case.shapes)} if case.name.startswith("unbatched") else None
    return bnexport.fold(model, case.inputs(), dynamic_shapes=shapes)


def model_of(case: Case) -> nn.Module:
    """In eval mode; the case that is about training mode sets its own flags."""
    model = case.model()
    if case.name == "training-mode":
        model[1].train()
    return model


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_outcome_and_reason_of_every_batch_norm(case: Case) -> None:
    report = fold_case(case, model_of(case)).report
    assert tuple((row.module, row.outcome) for row in report.rows) == case.outcomes
    assert all(bool(row.reason) != (row.outcome == "folded") for row in report.rows)
    assert all(bool(row.rule) == (row.outcome == "folded") for row in report.rows)
    left = [row for row in report.rows if row.outcome != "folded"]
    if left:
        assert case.because, "a case with a kept BatchNorm must say why"
        assert case.because in left[0].reason


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_folded_model_computes_what_the_original_does(case: Case) -> None:
    model = model_of(case)
    result = fold_case(case, model)
    batch = None if case.name.startswith(("unbatched", "training-mode", "no-statistics")) else 5
    inputs = case.inputs(seed=9, batch=batch)
    with torch.no_grad():
        expected = flat(copy.deepcopy(model).double()(*(item.double() for item in inputs)))
        folded = flat(result.model(*inputs))
    assert len(folded) == len(expected)
    for have, want in zip(folded, expected, strict=True):
        assert float((have - want).abs().max()) <= 3e-6 * float(want.abs().max())


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_proof_holds_and_every_operator_is_counted(case: Case) -> None:
    result = fold_case(case, model_of(case))
    if case.name not in ("weight-changed-in-forward",):
        assert result.report.error is not None
        assert result.report.error <= 1e-12
    left = sum(node.target is torch.ops.aten.batch_norm.default for node in result.model.graph.nodes)
    assert result.report.remaining == left


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_the_users_model_is_not_changed(case: Case) -> None:
    model = model_of(case)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    result = fold_case(case, model)
    assert [module.training for module in model.modules()] == flags
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    owned = {tensor.untyped_storage().data_ptr() for tensor in result.model.state_dict().values() if tensor.numel()}
    assert owned.isdisjoint(tensor.untyped_storage().data_ptr() for tensor in after.values() if tensor.numel())


def test_every_call_of_a_batch_norm_is_in_the_report_once() -> None:
    calls: list[str] = []
    for case in CASES:
        model = model_of(case)
        if case.name in ("chapter", "functional"):
            continue
        calls.clear()
        kinds = (nn.modules.batchnorm._BatchNorm, bnexport.nn.batch_norm.BatchNorm)
        for name, module in model.named_modules():
            frozen = type(module).__name__ == "FrozenBatchNorm2d"
            if isinstance(module, kinds) or frozen:
                module.register_forward_pre_hook(lambda _module, _inputs, name=name: calls.append(name))
        with torch.no_grad():
            model(*case.inputs())
        seen = list(calls)
        report = fold_case(case, model_of(case)).report
        assert [row.module for row in report.rows] == seen, case.name


def test_model_in_training_mode_is_folded_as_in_eval_mode() -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Dropout(0.5)))
    model.train()
    inputs = torch.randn(4, 3, 8, 8)
    result = bnexport.fold(model, inputs)
    assert [row.outcome for row in result.report.rows] == ["folded"]
    assert model.training
    assert model[1].training
    with torch.no_grad():
        torch.testing.assert_close(result.model(inputs), copy.deepcopy(model).eval()(inputs), rtol=1e-4, atol=1e-4)


def test_folded_statistics_do_not_travel_on() -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6))).eval()
    result = bnexport.fold(model, torch.randn(2, 3, 8, 8))
    assert sorted(result.model.state_dict()) == ["0.bias", "0.weight"]


def test_weights_are_folded_in_float64_and_cast_once() -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))).eval()
    conv, norm = model
    scale = norm.weight.detach().double() / (norm.running_var.double() + norm.eps).sqrt()
    weight = (conv.weight.double() * scale.view(-1, 1, 1, 1)).float()
    bias = (scale * (conv.bias.double() - norm.running_mean.double()) + norm.bias.double()).float()
    folded = bnexport.fold(model, torch.randn(2, 3, 8, 8)).model.state_dict()
    # One unit in the last place: rsqrt and 1 / sqrt round differently in float64, which can show after the cast.
    torch.testing.assert_close(folded["0.weight"], weight, rtol=1.2e-7, atol=0)
    torch.testing.assert_close(folded["0.bias"], bias, rtol=1.2e-7, atol=1e-12)


def test_row_facts() -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))).eval()
    (row,) = bnexport.fold(model, torch.randn(2, 3, 8, 8)).report.rows
    norm = model[1]
    scale = norm.weight.detach().double() / (norm.running_var.double() + norm.eps).sqrt()
    assert (row.kind, row.into, row.channels) == ("BatchNorm2d", "0", 6)
    assert row.max_scale == pytest.approx(float(scale.abs().max()), rel=1e-12)


def test_half_precision_overflow_is_refused_before_the_cast() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)).half().eval()
    with torch.no_grad():
        model[1].running_var.fill_(1e-7)
        model[1].weight.fill_(60000.0)
    result = bnexport.fold(model, torch.randn(2, 3, 8, 8).half())
    assert [row.outcome for row in result.report.rows] == ["kept"]
    assert "does not fit into torch.float16" in result.report.rows[0].reason


def test_mixed_precision_is_refused() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 6, 3).half(), randomise(nn.BatchNorm2d(6))

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x).float())

    result = bnexport.fold(Mixed().eval(), torch.randn(2, 3, 8, 8).half())
    assert [row.outcome for row in result.report.rows] == ["kept"]


def test_subnormal_results_are_flushed() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)).eval()
    with torch.no_grad():
        model[1].weight.fill_(1e-38)
        model[1].running_var.fill_(4.0)
    folded = bnexport.fold(model, torch.randn(2, 3, 8, 8)).model.state_dict()["0.weight"]
    tiny = torch.finfo(torch.float32).tiny
    assert bool(((folded == 0) | (folded.abs() >= tiny)).all())
    assert bool((folded == 0).any())


def test_a_wrong_rewrite_is_caught_by_the_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    from bnexport.folding import affine

    right = affine.ChannelAffine.from_statistics.__func__

    def eps_dropped(cls, mean, var, eps, gamma=None, beta=None):
        return right(cls, mean, var, 0.0, gamma, beta)

    monkeypatch.setattr(affine.ChannelAffine, "from_statistics", classmethod(eps_dropped))
    model = randomise(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))).eval()
    with pytest.raises(ProofError, match="differs from the original"):
        bnexport.fold(model, torch.randn(2, 3, 8, 8))
    assert fold_module.MAX_FLOAT64_ERROR < 1e-6


def test_untraceable_model_names_the_line() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(UntracedError, match=r"can't trace Branches at test_fold.py:\d+"):
        bnexport.fold(Branches(), torch.randn(2, 3))


def test_report_survives_json() -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.BatchNorm2d(6))).eval()
    report = bnexport.fold(model, torch.randn(2, 3, 8, 8)).report
    assert bnexport.FoldReport.from_json(report.to_json()) == report
    assert (report.count("folded"), report.count("kept"), report.remaining) == (1, 1, 1)
