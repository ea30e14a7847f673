"""The measurement of one network: its statistics, the places of its BatchNorms, the fold, and the other tools."""

from collections.abc import Callable

import pytest
import torch
from cases import bn, conv, graph, randomise, sequential
from torch import nn

from benchmarks.clock import Spread
from benchmarks.zoo import fold as zoo_fold
from benchmarks.zoo import network as zoo_subject
from benchmarks.zoo import tools as zoo_tools
from benchmarks.zoo.network import ZooNetwork, make_zoo_network, outputs_of
from benchmarks.zoo.run import networks
from bnexport.errors import ModelError
from bnexport.folding.fold import fold
from bnexport.folding.fold_report import FoldReport, FoldRow
from bnexport.folding.torch_backend.trace import trace


class Scaled(nn.Module):
    """A branch that a fresh layer scale switches off."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.gamma = (
            nn.Conv2d(4, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.Parameter(torch.full((4, 1, 1), 1e-6)),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.gamma * self.bn(self.conv(x))


def deep() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, padding=1)]
    for _ in range(30):
        layers += [Scaled(), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)).eval()


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Callable[[], nn.Module]:
    """The zoo holds one network: conv, bn, relu, bn, pooled."""

    def build(_source: object = "", _options: object = None) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8), nn.Sigmoid(), nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )  # fmt: skip

    monkeypatch.setattr(zoo_subject, "build_from_zoo", build)
    monkeypatch.setattr(zoo_subject, "zoo_facts", lambda *_args: ((3, 16, 16), None))
    monkeypatch.setattr(zoo_subject, "SIZES", (8,))
    return build


def test_statistics_are_not_the_identity_and_stay_of_a_size() -> None:
    module = deep()
    zoo_subject.randomise(module, torch.randn(8, 3, 8, 8))
    norms = [item for item in module.modules() if isinstance(item, nn.BatchNorm2d)]
    gammas = torch.cat([item.weight for item in norms])
    assert 0 < int((gammas == 0).sum()) < len(gammas) / 10
    assert float((gammas < 0).double().mean()) > 0.2
    assert len({item.eps for item in norms}) == 3
    assert float(module[1].gamma.detach().min()) > 0.4, "a layer scale of 1e-6 hides what is wrong behind it"
    x = torch.randn(4, 3, 8, 8)
    (single,), (double,) = outputs_of(module, x), outputs_of(module.double(), x.double())
    assert bool(torch.isfinite(double).all())
    assert float((single - double).abs().max() / double.abs().max()) < 1e-4
    assert float(double.std(0).max() / double.abs().max()) > 1e-3, "the outputs must depend on the input"


def test_a_subject_is_the_same_again_and_as_small_as_it_runs(tiny: Callable[[], nn.Module]) -> None:
    first, second = make_zoo_network("x", seed=3), make_zoo_network("x", seed=3)
    assert first.shape == (3, 8, 8)
    assert first.norms == 2
    for name, tensor in first.module.state_dict().items():
        assert torch.equal(tensor, second.module.state_dict()[name]), name


def test_a_network_that_takes_no_image_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo_subject, "build_from_zoo", lambda *_args: nn.Linear(7, 7))
    monkeypatch.setattr(zoo_subject, "zoo_facts", lambda *_args: ((3, 16, 16), None))
    with pytest.raises(ModelError, match="can't run on an image"):
        make_zoo_network("x")


@pytest.mark.parametrize(
    ("build", "shape", "places"),
    [
        (sequential(lambda: nn.Conv2d(3, 4, 1), lambda: nn.BatchNorm2d(4)), (2, 3, 5, 5), ["adjacent"]),
        (sequential(lambda: nn.ConvTranspose2d(3, 4, 2), lambda: nn.BatchNorm2d(4)), (2, 3, 5, 5), ["adjacent"]),
        (sequential(lambda: nn.Linear(3, 4), nn.Identity, nn.Dropout, lambda: nn.BatchNorm1d(4)), (2, 3), ["adjacent"]),
        (sequential(lambda: nn.Conv2d(3, 4, 1), nn.ReLU, lambda: nn.BatchNorm2d(4)), (2, 3, 5, 5), ["apart"]),
        (sequential(lambda: nn.Linear(3, 4), lambda: nn.BatchNorm1d(5)), (2, 5, 3), ["apart"]),
        (
            graph(lambda m, x: (lambda y: m.bn(y) + y)(m.conv(x)), conv=conv(3, 4), bn=bn(4)),
            (2, 3, 5, 5),
            ["apart"],
        ),
    ],
    ids=["conv", "transposed", "nothing between", "relu between", "positions", "second reader"],
)  # fmt: skip
def test_places(build: Callable[[], nn.Module], shape: tuple[int, ...], places: list[str]) -> None:
    traced = trace(randomise(build()).eval(), (torch.randn(shape),))
    assert [place for found in zoo_fold.places_of(traced).values() for place in found] == places


def test_the_fold_report_is_counted_by_place() -> None:
    rows = (
        FoldRow("a", "BatchNorm2d", "backward", "before"),
        FoldRow(
            "b.norm", "BatchNorm2d", "affine", reason="before: it follows relu_3 (b.norm); 2 of its scales are negative"
        ),
        FoldRow("b.norm", "BatchNorm2d", "through", "before"),
        FoldRow("scale", "Attention", "affine", reason="not counted"),
    )
    found = zoo_fold.account(FoldReport(rows, 1), {"a": ["adjacent"], "b.norm": ["apart", "apart"]})
    assert found["outcomes"] == {
        "adjacent": {"backward": 1},
        "apart": {"affine": 1, "through": 1},
        "arithmetic": {"affine": 1},
    }
    assert found["reasons"] == {"before: it follows relu; some of its scales are negative": 1}


def test_a_fold_is_measured(tiny: Callable[[], nn.Module]) -> None:
    found = zoo_fold.measure_fold("x")
    assert found["norms"] == found["calls"] == 2
    assert found["outcomes"]["adjacent"] == {"backward": 1}
    assert not found["wrong"]
    assert found["check_error"] < 1e-5
    assert found["varies"] > 1e-3
    assert found["cost"]["ratio"]["n"] == 1


def test_a_wrong_fold_is_reported(tiny: Callable[[], nn.Module]) -> None:
    subject = make_zoo_network("x")
    folded = fold(subject.module, subject.batch(2, 1)).model
    assert not zoo_fold.independent_check(subject, folded, seed=5)["wrong"]
    name, weight = next(iter(folded.named_parameters()))
    weight.data[0] *= 1.001
    assert zoo_fold.independent_check(subject, folded, seed=5)["wrong"], name
    weight.data[0] = float("nan")
    assert zoo_fold.independent_check(subject, folded, seed=5) | {"check_noise": 0, "varies": 0} == {
        "check_error": None, "check_noise": 0, "wrong": True, "varies": 0,
    }  # fmt: skip


def test_nothing_to_fold_is_not_measured(monkeypatch: pytest.MonkeyPatch, tiny: Callable[[], nn.Module]) -> None:
    monkeypatch.setattr(zoo_subject, "build_from_zoo", lambda *_args: nn.Conv2d(3, 4, 1))
    assert zoo_fold.measure_fold("x") == {"shape": [3, 8, 8], "norms": 0}
    assert zoo_tools.measure_tools("x")["left"] == {}


def test_tools_leave_what_is_not_adjacent(tiny: Callable[[], nn.Module]) -> None:
    found = zoo_tools.measure_tools("x")
    left = {name: count for name, count in found["left"].items() if name != "onnxslim"}
    assert left == {"before": 2, "torch.jit.freeze": 1, "onnxruntime": 1, "torch.onnx.export": 1}, found["failed"]
    assert set(found["left"]) | set(found["failed"]) == {*left, "onnxslim"}


def test_a_tool_that_fails_is_named(tiny: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: object, **_options: object) -> None:
        raise ValueError("no\nsuch operator")

    monkeypatch.setattr("torch.onnx.export", fail)
    found = zoo_tools.measure_tools("x")
    assert found["failed"]["before"] == "ValueError: no such operator"
    assert set(found["failed"]) == {"before", "onnxruntime", "onnxslim", "torch.onnx.export"}
    assert found["left"] == {"torch.jit.freeze": 1}


def test_a_spread() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(1.0, 2.0, 3.0, 3)
    assert Spread.ratio([3.0, 1.0, 8.0], [1.0, 2.0, 2.0]) == Spread(0.5, 3.0, 4.0, 3)
    with pytest.raises(ValueError, match="zip"):
        Spread.ratio([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="needs a value"):
        Spread.of([])


def test_the_names_are_fixed_and_known() -> None:
    listed = networks()
    assert len(listed) == len(set(listed))
    assert sum(name.startswith("timm:") for name in listed) >= 100
    assert {"torchvision:resnet18", "torchvision:vit_b_16", "timm:repvgg_a0"} <= set(listed)
    assert not [name for name in listed if "deeplab" in name or "rcnn" in name]
    timm = pytest.importorskip("timm")
    known = set(timm.list_models())
    assert [name for name in listed if name.startswith("timm:") and name.removeprefix("timm:") not in known] == []


def test_a_subject_draws_by_seed() -> None:
    subject = ZooNetwork(nn.Identity(), (3, 4), 0)
    assert torch.equal(subject.batch(2, 5), subject.batch(2, 5))
    assert not torch.equal(subject.batch(2, 5), subject.batch(2, 6))
