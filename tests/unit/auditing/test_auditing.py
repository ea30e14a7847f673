import copy
import json
import math
from typing import Any

import pytest
import torch
from audit_networks import IMAGE, Tokens, Twice, deep, pair, trained
from support.models import Graph
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from bnexport.auditing.audit import Hidden, audit
from bnexport.auditing.tool_table import TOOLS, VERDICTS, AuditReport, AuditRow, ToolInput
from bnexport.errors import ModelError, RefusedModel, RuntimeUnavailable, UsageError
from bnexport.exporting.export_request import InputSpec

QUICK = tuple(tool.name for tool in TOOLS if tool.name not in ("torch.compile-freezing", "onnxsim", "onnxslim"))


def row_of(report: AuditReport, tool: str) -> AuditRow:
    return next(row for row in report.rows if row.tool == tool)


def breaks(path: str) -> Any:
    """A tool that drops the shift of one BatchNorm, if it is visible."""

    def make(job: ToolInput) -> nn.Module:
        layer = job.module.get_submodule(path)
        if not isinstance(layer, Hidden):
            layer.bias.data.zero_()
        return job.module

    return make


@pytest.fixture(scope="module")
def audited() -> tuple[nn.Module, dict[str, Any], AuditReport]:
    """A network in training mode with a hook, its state and torch's from before its audit, and the report."""
    network = trained(pair()).train()
    network[1].register_forward_hook(lambda *_: None)
    before = {"state": copy.deepcopy(network.state_dict()), "threads": torch.get_num_threads()}
    before["random"] = torch.get_rng_state()
    report = audit(network, IMAGE, tools=QUICK)
    before["kept"] = torch.equal(torch.get_rng_state(), before["random"])
    return network, before, report


def test_tools_are_right_on_a_plain_network_and_remaining_batch_norms_are_counted(audited: Any) -> None:
    _, _, report = audited
    assert {row.verdict for row in report.rows} == {"right"}
    assert not report.wrong
    left = {row.tool: row.batch_norms for row in report.rows}
    assert left["torch.eager"] == left["onnxruntime-disable"] == 2
    assert {left[name] for name in ("torch.jit.freeze", "torch.fx.fuse", "torch.onnx.export", "onnxruntime-basic")} == {
        1
    }
    assert left["bnexport"] is not None
    assert left["bnexport"] <= 1
    assert all(row.batches == (2, 2, 3, 5) for row in report.rows)
    assert report.bound == 1e-5
    assert all(row.error is not None and row.error < 3e-6 for row in report.rows)


@pytest.mark.parametrize(("build", "shape", "culprit"), [(Twice, (3, 8, 8), "bn"), (Tokens, (8, 8), "norm")])
def test_a_silently_wrong_fold_is_found_and_named(build: Any, shape: tuple[int, ...], culprit: str) -> None:
    network = trained(build())
    report = audit(network, (InputSpec("input", shape),), tools=("torch.fx.fuse", "bnexport"))
    x = torch.randn(4, *shape, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        off = float((fuse(copy.deepcopy(network))(x) - network(x)).abs().max())
    row = row_of(report, "torch.fx.fuse")
    assert row.verdict == ("wrong" if off > 1e-3 else "right")  # a later torch may be right
    if row.verdict == "wrong":
        assert row.batch_norm == culprit
        assert row.output == "output"
        assert row.channel is not None
        assert report.wrong == (row,)
    assert row_of(report, "bnexport").verdict == "right"


@pytest.mark.parametrize("place", range(6))
def test_the_first_wrong_batch_norm_is_found_by_halves(with_tools: Any, place: int) -> None:
    opened = []

    def tool(job: ToolInput) -> nn.Module:
        opened.append(job)
        for path in {f"{place}.1", "5.1"}:  # the last one is wrong as well; the first has to be found
            breaks(path)(job)
        return job.module

    with_tools(tool=tool)
    report = audit(trained(deep()), IMAGE)
    assert [row.verdict for row in report.rows] == ["right", "wrong"]
    assert report.rows[1].batch_norm == f"{place}.1"
    assert len(opened) <= 1 + 1 + 3


def test_the_order_is_that_of_the_calls(with_tools: Any) -> None:
    layers = {"second": nn.BatchNorm2d(3), "first": nn.BatchNorm2d(3)}
    backwards = Graph(lambda m, x: m.second(m.first(x).tanh()), **layers)
    with_tools(tool=lambda job: breaks("second")(ToolInput(breaks("first")(job), job.example, job.folder)))
    assert audit(trained(backwards), IMAGE).rows[1].batch_norm == "first"


def test_a_block_with_batch_norm_in_its_name_is_not_one(with_tools: Any) -> None:
    class ConvBatchNorm(nn.Sequential):
        pass

    with_tools(tool=breaks("0.1"))
    network = nn.Sequential(ConvBatchNorm(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), nn.Tanh())
    assert audit(trained(network), IMAGE).rows[1].batch_norm == "0.1"


def test_no_batch_norm_is_blamed_for_another_fault(with_tools: Any) -> None:
    with_tools(shifted=lambda job: lambda x: job.module(x) + 1, cautious=_refuses_what_is_hidden)
    report = audit(trained(pair()), IMAGE)
    assert [(row.verdict, row.batch_norm) for row in report.rows[1:]] == [("wrong", ""), ("wrong", "")]


def _refuses_what_is_hidden(job: ToolInput) -> Any:
    if any(isinstance(module, Hidden) for module in job.module.modules()):
        raise ValueError("unknown layer")
    return breaks("1")(job)


def test_no_answer_is_not_wrong(with_tools: Any) -> None:
    def fails(job: ToolInput) -> Any:
        raise ValueError("first line\n\n  second\x1b[31m line")

    def is_missing(job: ToolInput) -> Any:
        raise RuntimeUnavailable("no such engine", remedy="Install it")

    with_tools(fails=fails, missing=is_missing)
    report = audit(trained(pair()), IMAGE)
    assert [row.verdict for row in report.rows] == ["right", "failed", "not run"]
    assert report.rows[1].reason.startswith("ValueError: first line second")
    assert report.rows[2].reason == "no such engine"
    assert report.summary() == "no tool could be compared"
    assert not report.wrong


def test_answers_that_can_not_be_compared_are_wrong(with_tools: Any) -> None:
    with_tools(
        nan=lambda job: lambda x: job.module(x).log(),
        shape=lambda job: lambda x: job.module(x)[:, :1],
        several=lambda job: lambda x: (job.module(x), x),
    )
    report = audit(trained(pair()), IMAGE)
    assert [row.verdict for row in report.rows] == ["right", "wrong", "wrong", "wrong"]
    for row, expected in zip(report.rows[1:], ("not finite", "shape", "2 outputs"), strict=True):
        assert row.error == math.inf
        assert expected in row.reason
    written = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert [row["error"] for row in written["tools"][1:]] == [None, None, None]


def test_a_tool_for_one_batch_size_is_judged_on_that_one(with_tools: Any) -> None:
    def fixed(job: ToolInput) -> Any:
        return lambda x: job.module(x.view(2, 3, 8, 8))

    with_tools(fixed=fixed)
    row = audit(trained(pair()), IMAGE).rows[1]
    assert (row.verdict, row.batches) == ("right", (2, 2))
    assert row.reason.startswith("not with a batch of 3 or 5: ")


def test_a_network_for_one_batch_size_is_probed_with_that_one() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(2, 192) * 3

    report = audit(Fixed(), IMAGE, tools=("torch.jit.freeze",))
    assert report.batches == (2, 2)
    assert row_of(report, "torch.jit.freeze").verdict == "right"


def test_the_bound_follows_the_noise_of_the_network_itself() -> None:
    class Cancels(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x + 3e3) - 3e3

    report = audit(Cancels(), IMAGE, tools=("torch.jit.freeze",))
    noise = report.rows[0].error
    assert noise is not None
    assert noise > 1e-5
    assert report.bound == pytest.approx(10 * noise)
    assert not report.wrong


def test_all_outputs_are_compared(with_tools: Any) -> None:
    class Several(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> dict[str, Any]:
            return {"a": x + 1, "b": (x.mean(), [y * 2])}

    def off(job: ToolInput) -> Any:
        def run(x: Tensor, y: Tensor) -> list[Tensor]:
            z = y * 2
            z[:, 4] += 1
            return [x + 1, x.mean(), z]

        return run

    with_tools(off=off)
    report = audit(Several(), (InputSpec("x", (3,)), InputSpec("y", (5,))))
    found = [(row.verdict, row.output, row.channel) for row in report.rows]
    assert found == [("right", "", None), ("wrong", "output 2", 4)]


def test_the_network_and_torch_are_as_before(audited: Any) -> None:
    network, before, _ = audited
    assert before["kept"], "the random state"
    assert all(torch.equal(before["state"][name], tensor) for name, tensor in network.state_dict().items())
    assert all(module.training for module in network.modules())
    assert len(network[1]._forward_hooks) == 1
    assert all(tensor.requires_grad for tensor in network.parameters())
    assert torch.is_grad_enabled()
    assert torch.get_num_threads() == before["threads"]


def test_an_untrained_batch_norm_does_not_hide_a_wrong_fold(with_tools: Any) -> None:
    network = deep(3).eval()
    before = copy.deepcopy(network.state_dict())
    with_tools(tool=breaks("1.1"))
    report = audit(network, IMAGE)
    assert report.rows[1].verdict == "wrong"
    assert "3 BatchNorm layers were never trained" in report.notes[0]
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert audit(trained(deep(3)), IMAGE).notes == ()


class Dice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


class Infinite(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 0


class Overflows(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 1e30 * 1e30


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (Dice(), "change from call to call"),
        (Infinite(), "not finite"),
        (Overflows(), "does not match float64"),
        (nn.Linear(3, 2), "can't run on a batch of 2"),
    ],
)
def test_networks_that_can_not_be_judged(network: nn.Module, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        audit(network.eval(), IMAGE, tools=("torch.jit.freeze",))


def test_unknown_tools_and_nan_are_refused_at_once() -> None:
    network = trained(pair())
    with pytest.raises(UsageError, match="the tool 'torch' is unknown"):
        audit(network, IMAGE, tools=("torch",))
    network[0].weight.data[0] = math.nan
    with pytest.raises(RefusedModel, match="NaN"):
        audit(network, IMAGE)


def test_the_report_as_json() -> None:
    reported: list[str] = []
    report = audit(trained(pair()), IMAGE, tools=("torch.fx.fuse",), seed=3, progress=reported.append)
    assert reported == ["torch.eager", "torch.fx.fuse"]
    value = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert set(value) == {"passed", "summary", "bound", "rule", "seed", "batches", "notes", "tools", "environment"}
    assert (value["passed"], value["summary"], value["seed"]) == (True, "right: 1 tool", 3)
    assert [row["tool"] for row in value["tools"]] == reported
    fields = [
        "tool",
        "verdict",
        "control",
        "batch_norms",
        "error",
        "output",
        "channel",
        "batch_norm",
        "reason",
        "batches",
    ]
    assert all(set(row) == set(fields) and row["verdict"] in VERDICTS for row in value["tools"])
    assert value["environment"]["packages"]["torch"]


def test_the_seed_draws_the_probes() -> None:
    errors = {audit(trained(pair()), IMAGE, tools=("torch.eager",), seed=seed).rows[0].error for seed in (0, 0, 9)}
    assert len(errors) == 2


def test_the_control_is_the_first_row_and_alone() -> None:
    assert [tool.control for tool in TOOLS] == [True] + [False] * (len(TOOLS) - 1)
    assert len({tool.name for tool in TOOLS}) == len(TOOLS)
