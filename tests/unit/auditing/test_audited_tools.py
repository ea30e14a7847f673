import os
import shutil
import tempfile
from pathlib import Path

import onnx
import pytest
import torch
import torch._inductor.config as config
from audit_networks import IMAGE, pair, trained
from onnx import helper
from support.models import Graph
from torch import Tensor, nn

from bnexport.auditing import tools
from bnexport.auditing.audit import Hidden, audit, hide, is_batch_norm
from bnexport.auditing.tools import batch_norms, counted_calls, need_compiler, sites_left
from bnexport.errors import RuntimeUnavailable
from bnexport.nn.batch_norm import BatchNorm


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler")
def test_inductor_is_judged_counted_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before, settings = dict(os.environ), {name: getattr(config, name) for name in tools.SETTINGS}
    (_, row) = audit(trained(pair()), IMAGE, tools=("torch.compile-freezing",)).rows
    assert (row.verdict, row.reason, row.batch_norms, row.batches) == ("right", "", 1, (2, 2, 3, 5))
    assert dict(os.environ) == before
    assert {name: getattr(config, name) for name in tools.SETTINGS} == settings
    assert config.post_grad_custom_post_pass is None
    assert list(tmp_path.iterdir()) == []


def test_without_a_compiler_inductor_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    report = audit(trained(pair()), IMAGE, tools=("torch.compile-freezing",))
    (_, row) = report.rows
    assert row.verdict == "not run"
    assert row.reason.startswith("no C++ compiler (")
    assert not report.wrong


def test_the_compiler_may_be_any_of_several_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    tool = tmp_path / "cache"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    need_compiler((None, "cache g++"))
    need_compiler("cache")
    for nothing in ((None,), (None, ""), "g++"):
        with pytest.raises(RuntimeUnavailable, match=r"C\+\+ compiler"):
            need_compiler(nothing)


def test_nodes_without_an_origin_are_not_counted_as_one() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    for _ in range(2):
        graph.call_function(torch.ops.aten.mul.Tensor, (x, 2)).meta["original_aten"] = "aten.batch_norm.default"
    assert tools._total([sites_left(graph)]) is None
    assert tools._total([]) is None
    assert tools._total([set(), {"a", "b"}, {"a"}]) == 3


def test_batch_normalization_is_counted_in_branches_and_functions() -> None:
    node = helper.make_node("BatchNormalization", ["x", "s", "b", "m", "v"], ["y"])
    branch = helper.make_graph([node], "branch", [], [helper.make_empty_tensor_value_info("y")])
    choice = helper.make_node("If", ["c"], ["z"], then_branch=branch, else_branch=branch)
    call = helper.make_node("Norm", ["x", "s", "b", "m", "v"], ["w"], domain="own")
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    function = helper.make_function("own", "Norm", ["x", "s", "b", "m", "v"], ["y"], [node], opsets[:1])
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in "xsbmv"]
    flag = helper.make_tensor_value_info("c", onnx.TensorProto.BOOL, [])
    outputs = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in "zw"]
    graph = helper.make_graph([choice, call], "graph", [*values, flag], outputs)
    assert batch_norms(helper.make_model(graph, opset_imports=opsets, functions=[function])) == 3


def test_calls_of_batch_norm_are_counted_once_each() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.norm = nn.BatchNorm2d(3), nn.InstanceNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.bn(self.bn(self.norm(x)))
            return nn.functional.batch_norm(x, self.bn.running_mean, self.bn.running_var)

    with counted_calls() as calls, torch.no_grad():
        Functional().eval()(torch.rand(2, 3, 4, 4))
    assert calls.count == 3


def test_hiding_changes_no_bit_and_hides_a_shared_batch_norm_everywhere() -> None:
    conv, bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
    layers = {"a": conv, "bn": bn, "list": nn.ModuleList([bn, nn.Conv2d(3, 3, 1)])}
    model = Graph(lambda m, x: m.list[0](m.list[1](m.bn(m.a(x)).tanh())), **layers)
    network, x = trained(model), torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    hidden = hide(network, ["bn"])
    with torch.no_grad():
        assert torch.equal(hidden(x), network(x))
    assert isinstance(hidden.bn, Hidden)
    assert hidden.list[0] is hidden.bn
    assert not any(isinstance(module, Hidden) for module in network.modules())


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(3), nn.SyncBatchNorm(3), BatchNorm(3, 4)])
def test_layers_that_are_a_batch_norm(layer: nn.Module) -> None:
    assert is_batch_norm(layer)
    assert not is_batch_norm(nn.GroupNorm(1, 3))
