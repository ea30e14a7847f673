import json
import math

import pytest
import torch
from cases import randomise
from torch import nn

from bnexport.errors import DataError
from bnexport.nn.batch_norm import BatchNorm
from bnexport.nn.lenet import bn_lenet
from bnexport.nn.moving_statistics import norm_layers, recalibrate
from bnexport.nn.stale_statistics import STALE_ABOVE, LayerStaleness, StalenessReport, compare, staleness
from bnexport.nn.statistics import NormView


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def row(layer: nn.Module, mean: list[float], var: list[float]) -> LayerStaleness:
    """The layer's own statistics against exact ones."""
    moving = (layer.running_mean, layer.running_var)
    view = NormView.of(layer)
    assert view is not None
    return compare("bn", view, moving=moving, exact=(torch.tensor(mean), torch.tensor(var)))


def norm(mean: list[float], var: list[float], *, gamma: list[float], eps: float = 1e-5) -> nn.Module:
    layer = nn.BatchNorm1d(len(mean), eps=eps)
    with torch.no_grad():
        layer.running_mean.copy_(torch.tensor(mean))
        layer.running_var.copy_(torch.tensor(var))
        layer.weight.copy_(torch.tensor(gamma))
    return layer


def test_exact_statistics_are_at_no_distance() -> None:
    found = row(norm([3.0, -2.0], [4.0, 1e-4], gamma=[-1.0, 2.0]), [3.0, -2.0], [4.0, 1e-4])
    assert found.error == found.worst_error == found.shift == found.worst_shift == 0.0
    assert found.scale == found.worst_scale == 1.0


def test_shift_and_scale_are_in_units_of_the_deviation() -> None:
    found = row(norm([3.0, 0.0], [4.0, 16.0], gamma=[1.0, 1.0], eps=1e-12), [1.0, 0.0], [4.0, 4.0])
    assert found.worst_shift == pytest.approx(1.0)  # 2 off, the deviation is 2
    assert found.shift == pytest.approx(math.sqrt(0.5))
    assert found.worst_scale == pytest.approx(2.0)  # either way: see the next test
    assert found.scale == pytest.approx(2 ** math.sqrt(0.5))
    assert found.worst_error == pytest.approx(1.0)
    assert found.error == pytest.approx(math.sqrt((1.0**2 + 0.5**2) / 2))


def test_a_scale_too_small_counts_as_one_too_large() -> None:
    assert row(norm([0.0], [1.0], gamma=[1.0], eps=1e-12), [0.0], [4.0]).scale == pytest.approx(2.0)
    assert row(norm([0.0], [4.0], gamma=[1.0], eps=1e-12), [0.0], [1.0]).scale == pytest.approx(2.0)


@pytest.mark.parametrize("seed", range(3))
def test_the_error_is_what_the_output_is_really_off(seed: int) -> None:
    """Against the layer itself in eval mode, with its moving and with exact statistics, in float64."""
    layer = randomise(nn.BatchNorm2d(7), seed).double().eval()
    X = 3 * values(50, 7, 4, 4, seed=seed).double() + values(1, 7, 1, 1, seed=seed + 9).double()
    found = staleness(layer, [X]).layers[0]
    moving = layer(X)
    recalibrate(layer, [X])
    off = (moving - layer(X)).detach().movedim(1, -1).reshape(-1, 7)
    gamma = layer.weight.detach()
    assert found.error == pytest.approx(float((off**2).mean(0).sum().sqrt() / (gamma**2).sum().sqrt()), rel=1e-9)
    live = gamma != 0
    assert not bool(live.all()), "randomise gives one channel a gamma of 0"
    assert found.worst_error == pytest.approx(float(((off**2).mean(0).sqrt() / gamma.abs())[live].max()), rel=1e-9)


def test_a_dead_channel_is_not_seen() -> None:
    found = row(norm([100.0, 0.0], [1.0, 1.0], gamma=[0.0, -3.0]), [0.0, 0.0], [1.0, 1.0])
    assert (found.error, found.worst_error) == (0.0, 0.0)
    assert found.worst_shift > 99
    dead = row(norm([100.0], [1.0], gamma=[0.0]), [0.0], [1.0])
    assert dead.error == 0.0


def test_a_channel_that_is_always_the_same_is_judged_by_eps() -> None:
    """Its variance is 0: what the output is off is the shift in units of sqrt(eps)."""
    found = row(norm([0.1], [0.0], gamma=[1.0], eps=0.01), [0.0], [0.0])
    assert found.error == pytest.approx(1.0)


def test_both_kinds_of_norm_and_layers_without_gamma() -> None:
    torch.manual_seed(0)
    X = values(30, 3)
    plain = nn.BatchNorm1d(3, affine=False)
    scratch = BatchNorm(3, 2)
    first, second = staleness(plain, [X]).layers[0], staleness(scratch, [X]).layers[0]
    assert first.error == pytest.approx(second.error)
    assert first.error > 0


def test_a_network_is_not_changed_and_its_layers_are_in_order() -> None:
    torch.manual_seed(0)
    network = randomise(bn_lenet()).eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    report = staleness(network, iter([torch.rand(5, 1, 28, 28), torch.rand(3, 1, 28, 28)]))
    assert [layer.name for layer in report.layers] == ["bn1", "bn2", "bn3", "bn4"]
    assert report.images == 8
    assert report.stale
    assert not network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    recalibrate(network, [torch.rand(64, 1, 28, 28, generator=torch.Generator().manual_seed(1))])
    fresh = staleness(network, [torch.rand(64, 1, 28, 28, generator=torch.Generator().manual_seed(1))])
    assert max(layer.error for layer in fresh.layers) < 1e-5


def test_statistics_of_earlier_weights_are_stale() -> None:
    """The very thing: weights that moved after the average was taken."""
    torch.manual_seed(0)
    network, X = bn_lenet().train(), torch.rand(64, 1, 28, 28)
    recalibrate(network, [X])
    with torch.no_grad():
        network.conv1.bias.add_(3 * norm_layers(network)["bn1"].var.sqrt())
    report = staleness(network, [X])
    assert report.worst is not None
    assert report.worst.name == "bn1"
    assert report.worst.worst_shift == pytest.approx(3.0, rel=1e-2)
    assert [report.is_stale(layer) for layer in report.layers] == [True, False, False, False], (
        "later layers see the same inputs"
    )


def test_the_sentence() -> None:
    def report(*errors: float) -> StalenessReport:
        rows = tuple(LayerStaleness(f"bn{k}", 0.1, 0.2, 1.1, 1.2, error, error) for k, error in enumerate(errors))
        return StalenessReport(rows, 1024)

    assert report(STALE_ABOVE).sentence() == (
        f"the moving statistics are up to date on 1024 training images: at most, bn0's output is off by {STALE_ABOVE:g}"
        " of its standard deviation"
    )
    stale = report(0.1, 0.75, 0.3)
    assert stale.sentence().startswith(
        "the moving statistics are stale on 1024 training images: bn1's output is off by 0.75"
    )
    assert "bnexport recalibrate" in stale.sentence()
    assert report().sentence() == "the network has no moving statistics"
    assert not report().stale
    broken = report(0.1, math.nan)
    assert broken.stale
    assert broken.worst is not None
    assert broken.worst.name == "bn1"
    value = json.loads(json.dumps(broken.to_json(), allow_nan=False))
    assert value["layers"][1]["error"] is None
    assert value["layers"][1]["stale"] is value["stale"] is True


def test_few_images_need_a_larger_error() -> None:
    row = LayerStaleness("bn", 0.2, 0.2, 1.0, 1.0, 0.2, 0.2)
    assert StalenessReport((row,), 1024).stale
    assert StalenessReport((row,), 1024).threshold == STALE_ABOVE
    assert not StalenessReport((row,), 100).stale


@pytest.mark.parametrize("n", [128, 1024])
def test_sampling_alone_is_not_stale(n: int) -> None:
    """Exact statistics of many inputs, looked at through few."""
    torch.manual_seed(0)
    layer = randomise(nn.BatchNorm1d(200))
    recalibrate(layer, [values(20_000, 200, seed=1)])
    report = staleness(layer, [values(n, 200, seed=2)])
    assert 0.5 / math.sqrt(n) < report.layers[0].error < 2 / math.sqrt(n)
    assert not report.stale


def test_without_batches() -> None:
    with pytest.raises(DataError):
        staleness(bn_lenet(), [])
