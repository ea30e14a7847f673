import statistics

import numpy as np
import pytest
import torch
from cases import randomise
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import Graph
from torch import nn

from bnexport.errors import DataError, FeedError, ModelError
from bnexport.nn.batch_norm import BatchNorm
from bnexport.nn.lenet import bn_lenet
from bnexport.nn.moving_statistics import RunningMoments, norm_layers, recalibrate, recalibrate_by_layer


def noise(*shape, seed=0, scale=1.0, shift=0.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale + shift


def all_values(X):
    """(n, channels)"""
    return X.double().movedim(1, -1).reshape(-1, X.shape[1])


LAYERS = [
    (nn.BatchNorm1d(4), (4,)),
    (nn.BatchNorm1d(4), (4, 9)),
    (nn.BatchNorm2d(4), (4, 3, 5)),
    (nn.BatchNorm3d(4), (4, 2, 3, 2)),
    (BatchNorm(4, 2), (4,)),
    (BatchNorm(4, 4, unbiased=True), (4, 3, 5)),
]


def statistics_in(layer):
    return (
        (layer.moving_mean, layer.moving_var)
        if isinstance(layer, BatchNorm)
        else (layer.running_mean, layer.running_var)
    )


@pytest.mark.parametrize(("layer", "shape"), LAYERS)
def test_statistics_are_those_of_all_values(layer, shape):
    # Far from zero: a sum of squares minus a squared mean in float32 would lose every digit here.
    batches = [noise(n, *shape, seed=n, scale=1e-2 * n, shift=1000.0) for n in (2, 7, 3)]
    assert recalibrate(layer, batches) == 1
    values = torch.cat([all_values(batch) for batch in batches])
    mean, var = statistics_in(layer)
    assert torch.equal(mean, values.mean(0).float())
    assert torch.allclose(var.double(), values.var(0, correction=0), rtol=1e-6, atol=0)


def test_every_layer_sees_batches_normalised_with_their_own_statistics():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Sigmoid(), nn.Linear(5, 3), nn.BatchNorm1d(3))
    with torch.no_grad():
        network[1].weight.copy_(torch.tensor([0.0, -2.0, 1.0, 0.3, 5.0]))
    batches = [noise(n, 6, seed=n) for n in (4, 9, 2)]
    recalibrate(network, batches)
    first, second = [], []
    with torch.no_grad():
        for batch in batches:
            x = network[0](batch).double()
            first.append(x)
            x = (x - x.mean(0)) / torch.sqrt(x.var(0, correction=0) + 1e-5)
            x = torch.sigmoid(network[1].weight * x + network[1].bias)
            second.append(network[3](x.float()).double())
    for layer, seen in ((network[1], torch.cat(first)), (network[4], torch.cat(second))):
        assert torch.allclose(layer.running_mean.double(), seen.mean(0), rtol=1e-5, atol=1e-6)
        assert torch.allclose(layer.running_var.double(), seen.var(0, correction=0), rtol=1e-4, atol=1e-9)


def test_the_old_statistics_and_the_order_of_batches_do_not_matter():
    torch.manual_seed(0)
    network = bn_lenet()
    batches = [torch.rand((n, 1, 28, 28), generator=torch.Generator().manual_seed(n)) for n in (2, 5, 3)]
    recalibrate(network, batches)
    expected = {name: value.clone() for name, value in network.state_dict().items()}
    for name, value in network.state_dict().items():
        if "running" in name:
            value.fill_(17.0)
    recalibrate(network, reversed(batches))
    for name, value in network.state_dict().items():
        assert torch.allclose(value, expected[name], rtol=1e-6, atol=1e-7), name


def test_a_layer_called_twice_gets_the_values_of_both_calls():
    layers = {"norm": nn.BatchNorm1d(3), "unused": nn.BatchNorm1d(3)}
    model = Graph(lambda m, X: m.norm(X) + m.norm(input=10 * X + 4), **layers)
    model.unused.running_var.fill_(3.0)
    X = noise(6, 3)
    assert recalibrate(model, [X]) == 1
    values = torch.cat([X, 10 * X + 4]).double()
    assert torch.allclose(model.norm.running_var.double(), values.var(0, correction=0), rtol=1e-6)
    assert model.norm.num_batches_tracked == 2
    assert torch.equal(model.unused.running_var, torch.full((3,), 3.0))


def test_modes_hooks_and_dropout():
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    model.train()
    model[2].eval()
    X = noise(50, 3)
    recalibrate(model, [X])
    assert [module.training for module in model] == [True, True, False]
    assert torch.allclose(model[1].running_mean, X.mean(0), atol=1e-6)
    assert not model[1]._forward_pre_hooks


def test_pairs_of_a_data_loader():
    layer = nn.BatchNorm1d(3)
    X = noise(8, 3)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, torch.zeros(8)), batch_size=4)
    recalibrate(layer, loader)
    assert torch.allclose(layer.running_mean, X.mean(0), atol=1e-6)


def test_a_network_without_batch_norm():
    assert recalibrate(bn_lenet("none"), [torch.zeros(2, 1, 28, 28)]) == 0


def interrupted():
    yield noise(4, 3)
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("batches", "error"),
    [
        ([], DataError),
        ([noise(4, 3), noise(1, 3)], FeedError),
        ([noise(4, 3), torch.full((4, 3), float("nan"))], ModelError),
        ([noise(4, 3), noise(4, 9)], Exception),
        (interrupted(), KeyboardInterrupt),
    ],
)
def test_all_or_nothing(batches, error):
    model = nn.Sequential(nn.BatchNorm1d(3, momentum=0.5), BatchNorm(3, 2))
    model[0](noise(5, 3, seed=9))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error):
        recalibrate(model, batches)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not model[0]._forward_pre_hooks


# The definition "population"


def mixed_lenet():
    """A network whose BatchNorms have negative and zero gammas and different eps."""
    torch.manual_seed(0)
    return randomise(bn_lenet()).eval()


def images(n, *, sorted_by_brightness=False):
    X = torch.rand((n, 1, 28, 28), generator=torch.Generator().manual_seed(7)) ** 2
    X = X * torch.linspace(0.1, 1.0, n).reshape(-1, 1, 1, 1)
    return X if sorted_by_brightness else X[torch.randperm(n, generator=torch.Generator().manual_seed(3))]


def by_layer(X, *sizes):
    network = mixed_lenet()
    recalibrate_by_layer(network, lambda: torch.split(X, list(sizes)))
    return {name: value.double() for name, value in network.state_dict().items() if "running" in name}


def furthest(first, second):
    """Largest difference as a share of the largest value, over all statistics."""
    return max(float((first[name] - second[name]).abs().max() / second[name].abs().max()) for name in second)


def test_population_statistics_do_not_depend_on_the_batches():
    X = images(24)
    expected = by_layer(X, 24)
    for other in (
        by_layer(X, 1, 1, 2, 20),
        by_layer(X, *[3] * 8),
        by_layer(images(24, sorted_by_brightness=True), *[4] * 6),
    ):
        assert furthest(other, expected) < 1e-5


def test_batch_statistics_depend_on_the_batches_but_not_on_their_order():
    def by_batch(batches):
        network = mixed_lenet()
        recalibrate(network, batches)
        return {name: value.double() for name, value in network.state_dict().items() if "running" in name}

    X = images(24, sorted_by_brightness=True)
    small, large = by_batch(torch.split(X, 4)), by_batch([X])
    first, deep = ("bn1.running_mean", "bn1.running_var"), ("bn2.running_mean", "bn2.running_var")
    for name in first:  # nothing before it depends on a batch
        assert torch.allclose(small[name], large[name], rtol=1e-5)
    assert any(not torch.allclose(small[name], large[name], rtol=1e-3) for name in deep)
    assert furthest(by_batch(torch.split(X, 4)[::-1]), small) < 1e-6
    assert furthest(by_batch([X]), by_layer(X, 24)) < 1e-5, "with one batch both definitions are the same"


def test_population_statistics_are_those_of_the_network_s_own_inputs_in_eval_mode():
    network, X = mixed_lenet(), images(20)
    assert recalibrate_by_layer(network, lambda: torch.split(X, [7, 13])) == 4
    seen = {}
    for name in ("bn1", "bn2", "bn3", "bn4"):
        network.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.__setitem__(name, all_values(args[0]))
        )
    with torch.no_grad():
        network(X)
    for name, values in seen.items():
        layer = network.get_submodule(name)
        deviation = values.std(0, correction=0)
        assert ((layer.running_mean.double() - values.mean(0)).abs() <= 1e-5 * (deviation + values.mean(0).abs())).all()
        assert torch.allclose(layer.running_var.double(), deviation**2, rtol=1e-4)


def test_population_reads_old_statistics_nowhere():
    X = images(12)
    network = mixed_lenet()
    for layer in norm_layers(network).values():
        layer.mean.fill_(5.0), layer.var.fill_(1e-3)
    recalibrate_by_layer(network, lambda: [X])
    found = {name: value.double() for name, value in network.state_dict().items() if "running" in name}
    assert furthest(found, by_layer(X, 12)) == 0.0


def test_population_with_a_layer_that_feeds_itself():
    layers = {"norm": nn.BatchNorm1d(3), "unused": nn.BatchNorm1d(3)}
    model, X = Graph(lambda m, X: m.norm(3 * m.norm(X) + 1), **layers), noise(8, 3, scale=4.0)
    model.norm.running_var.fill_(100.0)
    assert recalibrate_by_layer(model, lambda: [X]) == 1
    once = (X - X.mean(0)) / torch.sqrt(X.var(0, correction=0) + 1e-5)
    values = torch.cat([X, 3 * once + 1]).double()
    assert torch.allclose(model.norm.running_mean.double(), values.mean(0), rtol=1e-5)
    assert torch.allclose(model.norm.running_var.double(), values.var(0, correction=0), rtol=1e-5)
    with pytest.raises(FeedError, match="norm, but it needs at least 2"):
        recalibrate_by_layer(model, lambda: [X[:1]])


@pytest.mark.parametrize("second", [KeyboardInterrupt, ModelError])
def test_population_is_all_or_nothing(second):
    network = mixed_lenet().train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    passes = []

    def batches():
        passes.append(1)
        yield images(4)
        if len(passes) == 3:  # the scout and bn1 are through
            if second is KeyboardInterrupt:
                raise KeyboardInterrupt
            yield torch.full((4, 1, 28, 28), torch.nan)

    with pytest.raises(second):
        recalibrate_by_layer(network, batches)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(module.training for module in network.modules())


def test_population_without_batches():
    with pytest.raises(DataError):
        recalibrate_by_layer(mixed_lenet(), list)


@settings(max_examples=60, deadline=None)
@given(
    center=st.floats(-1e6, 1e6),
    log_scale=st.floats(-6, 3),
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**31),
)
def test_moments_are_those_of_numpy_in_float64(center, log_scale, sizes, dtype, seed):
    """Large means with tiny variances, in batches of any size: no more is lost than one pass of numpy loses."""
    generator = np.random.default_rng(seed)
    X = torch.from_numpy(center + 10.0**log_scale * generator.standard_normal((sum(sizes), 3))).to(dtype)
    moments = RunningMoments()
    for batch in torch.split(X, sizes):
        moments.add(batch)
    values = X.double().numpy()
    mean, var = values.mean(0), values.var(0)
    exact = [statistics.fmean(values[:, k]) for k in range(3)]
    # The resolution of float64 at values of this size.
    resolution = 1e-15 * (abs(center) + 10.0**log_scale)
    assert moments.count == len(values)
    np.testing.assert_allclose(moments.mean.numpy(), exact, rtol=1e-14, atol=4 * resolution + 1e-300)
    np.testing.assert_allclose(moments.mean.numpy(), mean, rtol=1e-14, atol=8 * resolution + 1e-300)
    np.testing.assert_allclose(
        moments.var.numpy(), var, rtol=1e-12, atol=8 * (resolution * np.sqrt(var) + resolution**2).max()
    )


def test_a_sum_of_squares_would_fail_that_test():
    X = noise(50, 1).double() * 1e-3 + 1e6
    naive = (X**2).mean(0) - X.mean(0) ** 2
    moments = RunningMoments()
    moments.add(X)
    assert abs(float(moments.var / X.numpy().var()) - 1) < 1e-9
    assert abs(float(naive / X.numpy().var()) - 1) > 0.1
