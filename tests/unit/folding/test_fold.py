"""Every case of the table: the outcome of each BatchNorm, the equality of the outputs, and the fold report."""

import copy
import dataclasses
import functools
import json
from collections.abc import Callable

import pytest
import torch
from cases import CASES, Case, randomise
from module_fold_models import tensors
from support.models import AddCMul, Graph, bn, graph, sequential
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import FrozenBatchNorm2d

import bnexport
from bnexport.errors import ProofError, UntracedError, UsageError
from bnexport.folding import layers, plan
from bnexport.folding.torch_backend import torch_writer
from bnexport.nn.batch_norm import BatchNorm

ids = [case.name for case in CASES]
#: Cases that no hook on a module sees: arithmetic in the root's forward, a call of the operator itself.
UNSEEN = ("chapter", "functional")


@functools.cache
def folded(case: Case) -> tuple[nn.Module, bnexport.FoldResult]:
    """The model and its fold; the model is compared with a fresh one afterwards."""
    model = case.model()
    shapes = {"inputs": (None,) * len(case.shapes)} if case.name.startswith("unbatched") else None
    options = {"dynamic_shapes": shapes, "max_growth": case.max_growth, "clamps": case.clamps}
    return model, bnexport.fold(model, case.inputs(), **options)


def test_there_are_enough_cases_and_no_name_twice() -> None:
    assert len(set(ids)) == len(ids) >= 80


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_outcome_and_reason_of_every_batch_norm(case: Case) -> None:
    report = folded(case)[1].report
    assert tuple((row.module, row.outcome) for row in report.rows) == case.outcomes
    assert all(bool(row.reason) != row.gone for row in report.rows)
    assert all(bool(row.rule and row.equation and row.into) for row in report.rows if row.gone)
    assert all(row.error is not None and row.error <= 1e-12 for row in report.rows if row.gone)
    assert report.warnings == ()
    left = [row for row in report.rows if not row.gone]
    if left:
        assert case.because, "a case with a BatchNorm that stays must state the reason"
        assert case.because in left[0].reason


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_folded_model_computes_what_the_original_does(case: Case) -> None:
    result = folded(case)[1]
    batch = None if case.name.startswith(("unbatched", "training-mode", "no-statistics")) else 5
    inputs, original = case.inputs(seed=9, batch=batch), case.model().double()
    with torch.no_grad():
        torch.manual_seed(0)
        expected = tensors(original(*(item.double() for item in inputs)))
        torch.manual_seed(0)
        have = tensors(result.model.double()(*(item.double() for item in inputs)))
        result.model.float()
    assert len(have) == len(expected)
    for a, b in zip(have, expected, strict=True):
        # The weights were cast to float32 once; all else is float64.
        assert float((a - b).abs().max()) <= 2e-6 * float(b.abs().max())


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_proof_holds_and_every_operator_is_counted(case: Case) -> None:
    result = folded(case)[1]
    assert result.report.error <= 1e-12
    left = sum(node.target is torch.ops.aten.batch_norm.default for node in result.model.graph.nodes)
    assert result.report.remaining == left


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_the_users_model_is_not_changed(case: Case) -> None:
    model, result = folded(case)
    fresh = case.model()
    assert [module.training for module in model.modules()] == [module.training for module in fresh.modules()]
    before, after = fresh.state_dict(), model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    owned = {tensor.untyped_storage().data_ptr() for tensor in result.model.state_dict().values() if tensor.numel()}
    assert owned.isdisjoint(tensor.untyped_storage().data_ptr() for tensor in after.values() if tensor.numel())


def test_every_call_of_a_batch_norm_is_in_the_report_once() -> None:
    calls: list[str] = []
    kinds = (nn.modules.batchnorm._BatchNorm, BatchNorm, FrozenBatchNorm2d, AddCMul)
    for case in CASES:
        if case.name in UNSEEN:
            continue
        model = case.model()
        calls.clear()
        for name, module in model.named_modules():
            if isinstance(module, kinds):
                module.register_forward_pre_hook(lambda _module, _inputs, name=name: calls.append(name))
        with torch.no_grad():
            model(*case.inputs())
        assert [row.module for row in folded(case)[1].report.rows] == calls, case.name


def test_model_in_training_mode_is_folded_as_in_eval_mode() -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Dropout(0.5)))
    model.train()
    inputs = torch.randn(4, 3, 8, 8)
    result = bnexport.fold(model, inputs)
    assert [row.outcome for row in result.report.rows] == ["backward"]
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
    assert row.gain == pytest.approx((float(scale.abs().min()), float(scale.abs().max())), rel=1e-12)
    assert row.dead == int((scale == 0).sum()) == 1


def test_half_precision_overflow_is_refused_before_the_cast() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)).half().eval()
    with torch.no_grad():
        model[1].running_var.fill_(1e-7)
        model[1].weight.fill_(60000.0)
    result = bnexport.fold(model, torch.randn(2, 3, 8, 8).half())
    assert [row.outcome for row in result.report.rows] == ["affine"]
    assert "does not fit into torch.float16" in result.report.rows[0].reason
    assert "float32" in result.report.rows[0].hint


def test_mixed_precision_is_refused() -> None:
    layers = {"conv": nn.Conv2d(3, 6, 3).half(), "bn": randomise(nn.BatchNorm2d(6))}
    mixed = Graph(lambda m, x: m.bn(m.conv(x).float()), **layers)
    result = bnexport.fold(mixed.eval(), torch.randn(2, 3, 8, 8).half())
    assert [row.outcome for row in result.report.rows] == ["affine"]
    assert "it follows to" in result.report.rows[0].reason


def test_subnormal_results_are_flushed() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)).eval()
    with torch.no_grad():
        model[1].weight.fill_(1e-38)
        model[1].running_var.fill_(4.0)
    folded = bnexport.fold(model, torch.randn(2, 3, 8, 8)).model.state_dict()["0.weight"]
    tiny = torch.finfo(torch.float32).tiny
    assert bool(((folded == 0) | (folded.abs() >= tiny)).all())
    assert bool((folded == 0).any())


def test_a_wrong_fold_is_rolled_back_alone_and_loudly(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault in one absorber: its sites stay as they were, the others are folded, and the report states it."""
    right = layers.ABSORBERS["transposed"]

    def swapped(weight: Tensor, scale: Tensor, groups: int) -> Tensor:
        return right.scale_outputs(weight, scale.roll(1), groups)

    monkeypatch.setitem(layers.ABSORBERS, "transposed", dataclasses.replace(right, scale_outputs=swapped))
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ConvTranspose2d(6, 6, 3), nn.BatchNorm2d(6), nn.GELU()
    )
    model = randomise(model).eval()
    result = bnexport.fold(model, torch.randn(2, 3, 8, 8))
    assert [row.outcome for row in result.report.rows] == ["backward", "kept"]
    assert "failed its proof" in result.report.rows[1].reason
    assert len(result.report.warnings) == 1
    assert result.report.warnings[0].startswith("3: ")
    assert result.report.remaining == 1
    assert result.report.error <= 1e-12


def test_a_wrong_fold_that_no_site_shows_gives_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """The written tensors differ from the plan: only the proof of the whole network detects it."""
    flushed = torch_writer.TorchWriter._set

    def damaged(self: torch_writer.TorchWriter, target: str, value: Tensor, dtype: torch.dtype) -> None:
        flushed(self, target, value * 1.001, dtype)

    monkeypatch.setattr(torch_writer.TorchWriter, "_set", damaged)
    model = randomise(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))).eval()
    with pytest.raises(ProofError, match="differs from the original"):
        bnexport.fold(model, torch.randn(2, 3, 8, 8))


def test_a_reading_that_misses_a_consumer_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof compares every value that leaves the changed part, also those that the plan assumes to be unread."""
    monkeypatch.setattr(plan.FoldPlan, "_only_reader", lambda *_: None)
    model = next(case for case in CASES if case.name == "second-consumer").model()
    report = bnexport.fold(model, torch.randn(2, 3, 8, 8)).report
    assert [row.outcome for row in report.rows] == ["kept"]
    assert report.warnings


@pytest.mark.parametrize(
    "build",
    [
        graph(lambda m, x: functional.gelu(m.bn(x) * 2.0 + 1.0), bn=bn(3)),
        graph(lambda m, x: functional.gelu(0.5 - m.drop(m.bn(x)) / 4.0 + 0.0), bn=bn(3), drop=nn.Dropout),
        sequential(lambda: BatchNorm(3, 4), nn.GELU),
        sequential(lambda: FrozenBatchNorm2d(3), bn(3), nn.GELU),
    ],
    ids=["then-arithmetic", "between-arithmetic", "written-out", "two-kinds"],
)
def test_an_affine_that_stays_is_one_operation(build: Callable[[], nn.Module]) -> None:
    model = randomise(build()).eval()
    x = torch.randn(2, 3, 8, 8)
    result = bnexport.fold(model, x)
    assert not any(row.gone for row in result.report.rows if row.outcome != "merged")
    work = {node.target for node in result.model.graph.nodes if node.op == "call_function"}
    assert work - {torch.ops.aten.dropout.default} == {torch.ops.aten.batch_norm.default, torch.ops.aten.gelu.default}
    assert result.report.remaining == 1
    with torch.no_grad():
        torch.testing.assert_close(result.model(x), model(x), rtol=1e-4, atol=1e-4)


def test_a_scale_and_a_table_of_positions_are_not_a_batch_norm() -> None:
    table = nn.Parameter(torch.randn(1, 2, 4, 4))
    attention = Graph(lambda m, q, k: (q @ k.transpose(-2, -1) * 0.35 + m.table).softmax(-1), table=table)
    assert bnexport.fold(attention, (torch.randn(2, 2, 4, 3), torch.randn(2, 2, 4, 3))).report.rows == ()


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("conv2d", "into what comes before"),
        ("at-the-input", "into what comes after"),
        ("scale-before-shift-after", "scale before, shift after"),
        ("before-zero-padding-map", "map of constants behind zero padding"),
        ("before-zero-padding-positive", "scale after, one addition stays"),
        ("before-transposed-positive", "scale after, one addition stays"),
        ("before-prelu-sign-rule", "scale after, one addition stays"),
        ("before-relu-sign-rule", "scale after, one addition stays"),
        ("before-zero-padding", ""),  # a scale of 0 can't be divided by
    ],
)
def test_the_rule_is_the_one_that_is_meant(name: str, rule: str) -> None:
    case = next(case for case in CASES if case.name == name)
    (row,) = folded(case)[1].report.rows
    assert row.rule == rule
    if rule.endswith("stays"):
        targets = [node.target for node in folded(case)[1].model.graph.nodes]
        assert torch.ops.aten.add.Tensor in targets
        assert torch.ops.aten.batch_norm.default not in targets


def test_shared_weights_stay_shared() -> None:
    case = next(case for case in CASES if case.name == "conv-and-norm-called-twice")
    result = folded(case)[1]
    assert sorted(result.model.state_dict()) == ["conv.bias", "conv.weight"]
    assert result.report.growth < 1.0  # the statistics are gone


def test_the_size_budget_is_kept() -> None:
    case = next(case for case in CASES if case.name == "conv-with-two-norms-unshared")
    grown = folded(case)[1]
    before = sum(tensor.numel() for tensor in case.model().state_dict().values())
    assert 1.0 < grown.report.growth <= 2.0
    assert sum(tensor.numel() for tensor in grown.model.state_dict().values()) <= 2.0 * before
    with pytest.raises(UsageError, match="max_growth"):
        bnexport.fold(case.model(), case.inputs(), max_growth=0.5)


def test_untraceable_model_names_the_line() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(UntracedError, match=r"can't trace Branches at test_fold.py:\d+"):
        bnexport.fold(Branches(), torch.randn(2, 3))


def test_report_survives_json() -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.GELU(), nn.BatchNorm2d(6))).eval()
    report = bnexport.fold(model, torch.randn(2, 3, 8, 8)).report
    assert bnexport.FoldReport.from_json(json.loads(json.dumps(report.to_json()))) == report
    assert (report.folded, report.count("backward"), report.count("affine"), report.remaining) == (1, 1, 1, 1)
