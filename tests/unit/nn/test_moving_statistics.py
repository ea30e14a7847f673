import pytest
import torch
from torch import nn

from bnexport.errors import DataError, FeedError, ModelError
from bnexport.nn.batch_norm import BatchNorm
from bnexport.nn.lenet import bn_lenet
from bnexport.nn.moving_statistics import recalibrate


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


def statistics(layer):
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
    mean, var = statistics(layer)
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
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)
            self.unused = nn.BatchNorm1d(3)

        def forward(self, X):
            return self.norm(X) + self.norm(input=10 * X + 4)

    model = Twice()
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
