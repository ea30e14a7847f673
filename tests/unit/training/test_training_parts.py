"""Optimisers, schedules, samples, pooling, networks: the parts of a training of any classifier."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from bnexport.data.preprocessing import Preprocessing
from bnexport.errors import ModelError, UsageError
from bnexport.training import data_parts
from bnexport.training.config import OPTIMIZERS, TrainingConfig
from bnexport.training.data_parts import Resident, Streamed, make_part
from bnexport.training.optimisers import _MAKERS, learning_rate, make_optimizer, optimizer_tensors, restore_optimizer
from bnexport.training.preparation import build_network, leaves_parameters_unused
from bnexport.training.step import Step, Sums, keep_freed_memory, pooling_by_products

CPU = torch.device("cpu")
NETWORKS = """
from torch import nn

class Net(nn.Module):
    def __init__(self, classes=10, unused=False, pair=False):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 5, stride=3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(256, classes))
        self.pair = pair
        if unused:
            self.extra = nn.Linear(3, 3)

    def forward(self, X):
        scores = self.body(X)
        return (scores, scores) if self.pair == "always" or (self.pair and self.training) else scores

def frozen():
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    return net.requires_grad_(False)
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "net.py").write_text(NETWORKS)
    return f"{tmp_path / 'net.py'}:Net"


def built(source, **options):
    config = TrainingConfig(dataset="digits", model=source, model_options=options)
    return build_network(config, 10, Preprocessing())


# --- networks


def test_a_factory_is_built_from_the_seed(own):
    first, second = built(own), built(own)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert first.training
    assert int(first.body[1].num_batches_tracked) == 0, "the trial changes nothing"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": 7}, "returns 7 scores per image, but the data set has 10 classes"),
        ({"pair": "always"}, "does not return scores"),
        ({"nonsense": 1}, "nonsense"),
    ],
)
def test_a_network_that_does_not_fit(own, options, message):
    with pytest.raises(ModelError, match=message) as caught:
        built(own, **options)
    assert caught.value.remedy


def test_a_network_that_takes_other_images(own):
    config = TrainingConfig(dataset="digits", model=own)
    with pytest.raises(ModelError, match="fails on images of 3x28x28") as caught:
        build_network(config, 10, Preprocessing(3, 28, 28, mean=(0.0,) * 3, std=(1.0,) * 3))
    assert "--input" in caught.value.remedy


def test_a_zoo_network_gets_the_classes():
    config = TrainingConfig(dataset="digits", model="torchvision:squeezenet1_1")
    preprocessing = Preprocessing(3, 32, 32, mean=(0.0,) * 3, std=(1.0,) * 3)
    assert build_network(config, 4, preprocessing)(torch.zeros(2, 3, 32, 32)).shape == (2, 4)
    with pytest.raises(ModelError, match="fails on images of 1x28x28"):
        build_network(config, 4, Preprocessing())


def test_a_tuple_in_training_names_the_auxiliary_outputs(own):
    network = built(own, pair=True)
    step = Step(network, torch.optim.SGD(network.parameters(), lr=0.1))
    with pytest.raises(ModelError, match="in training mode the network returns a tuple"):
        step(torch.zeros(2, 1, 28, 28), torch.zeros(2, dtype=torch.int64), 2, Sums.zeros(1, CPU))
    assert not leaves_parameters_unused(network, Preprocessing())


def test_unused_parameters_are_found_and_can_be_resumed(own):
    assert not leaves_parameters_unused(built(own), Preprocessing())
    network = built(own, unused=True)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert leaves_parameters_unused(network, Preprocessing())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    config = TrainingConfig(model=own, momentum=0.9)
    optimizer = make_optimizer(network, config, CPU)
    network(torch.rand(4, 1, 28, 28)).sum().backward()
    optimizer.step()
    saved = optimizer_tensors(optimizer)
    again = make_optimizer(built(own, unused=True), config, CPU)
    restore_optimizer(again, saved)
    restored = optimizer_tensors(again)
    assert saved.keys() == restored.keys()
    assert all(torch.equal(saved[name], restored[name]) for name in saved)


# --- optimisers and schedules


def test_every_optimizer_has_a_maker():
    assert set(OPTIMIZERS) == set(_MAKERS)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_leaves_vectors_alone(name, own):
    network = built(own)
    optimizer = make_optimizer(network, TrainingConfig(model=own, optimizer=name, weight_decay=0.25), CPU)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    expected = {name: 0.25 if p.dim() > 1 else 0.0 for name, p in network.named_parameters()}
    assert {name: decay[id(p)] for name, p in network.named_parameters()} == expected


def test_nothing_to_train(own):
    network = built(own.replace(":Net", ":frozen"))
    with pytest.raises(ModelError, match="no trainable parameter"):
        make_optimizer(network, TrainingConfig(model=own), CPU)


@pytest.mark.parametrize("tensors", [{"99.x": torch.zeros(1)}, {"0.x": torch.zeros(7)}, {"x": torch.zeros(())}])
def test_the_state_of_another_optimizer(tensors):
    optimizer = torch.optim.SGD(nn.Linear(2, 3).parameters(), lr=0.1)
    with pytest.raises(ModelError, match="does not fit the network"):
        restore_optimizer(optimizer, tensors)


def test_the_learning_rate_of_each_step():
    plain = TrainingConfig(lr=0.5, epochs=4)
    assert {learning_rate(plain, step, 10) for step in range(40)} == {0.5}
    warm = TrainingConfig(lr=0.5, epochs=4, warmup_epochs=1)
    assert [learning_rate(warm, step, 10) for step in (0, 4, 9, 10, 39)] == pytest.approx([0.05, 0.25, 0.5, 0.5, 0.5])
    cosine = TrainingConfig(lr=0.5, epochs=4, schedule="cosine")
    assert learning_rate(cosine, 0, 10) == 0.5
    assert learning_rate(cosine, 20, 10) == pytest.approx(0.25)
    assert learning_rate(cosine, 39, 10) == pytest.approx(0.25 * (1 + math.cos(math.pi * 39 / 40)))
    both = TrainingConfig(lr=0.5, epochs=4, schedule="cosine", warmup_epochs=0.25)
    rates = [learning_rate(both, step, 10) for step in range(40)]
    assert rates[:3] == pytest.approx([0.5 / 3, 1.0 / 3, 0.5])
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert 0 < rates[-1] < 0.002


def test_label_smoothing_is_torchs():
    torch.manual_seed(0)
    network, X, y = nn.Linear(5, 4), torch.randn(6, 5), torch.randint(4, (6,))
    expected = nn.functional.cross_entropy(network(X), y, label_smoothing=0.2)
    step = Step(network, torch.optim.SGD(network.parameters(), lr=0.0), label_smoothing=0.2)
    found = step(X, y, 6, Sums.zeros(1, CPU))
    assert found.item() / 6 == pytest.approx(expected.item(), rel=1e-6)
    gradient = torch.autograd.grad(nn.functional.cross_entropy(network(X), y, label_smoothing=0.2), network.weight)[0]
    assert torch.allclose(network.weight.grad, gradient, atol=1e-7)


# --- samples


@pytest.mark.parametrize("shape", [(23, 6, 5), (23, 3, 6, 5)])
def test_streamed_samples_are_the_resident_ones(monkeypatch, shape):
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, shape, np.uint8)
    labels = generator.integers(0, 10, len(images))
    channels = 1 if len(shape) == 3 else 3
    preprocessing = Preprocessing(channels, 6, 5, mean=(0.4,) * channels, std=(0.3,) * channels)
    resident = make_part(images, labels, preprocessing, CPU)
    monkeypatch.setattr(data_parts, "RESIDENT_BYTES", 10)
    streamed = make_part(images, labels, preprocessing, CPU)
    assert isinstance(resident, Resident)
    assert isinstance(streamed, Streamed)
    groups = [torch.tensor([5, 0, 22, 7]), torch.tensor([3, 3]), torch.tensor([], dtype=torch.int64), torch.tensor([1])]
    pairs = zip(resident.batches(groups), streamed.batches(groups), groups, strict=True)
    for (X, y), (streamed_X, streamed_y), group in pairs:
        assert torch.equal(X, streamed_X)
        assert torch.equal(y, streamed_y)
        assert y.tolist() == labels[group.numpy()].tolist()
    next(iter(streamed.batches(groups)))  # left in the middle, as after a diverged batch


# --- pooling


@pytest.mark.parametrize(
    ("kernel", "shape", "options", "replaced"),
    [
        (2, (3, 4, 24, 24), {}, True),
        (3, (2, 4, 9, 12), {}, True),
        (2, (0, 4, 8, 8), {}, True),
        (2, (3, 4, 7, 8), {}, False),
        (2, (3, 4, 64, 64), {}, False),
        (2, (3, 4, 8, 8), {"stride": 1}, False),
        (2, (3, 4, 8, 8), {"padding": 1}, False),
        (2, (4, 8, 8), {}, False),
    ],
)
def test_pooling_is_torchs(kernel, shape, options, replaced, monkeypatch):
    pool, plain = nn.AvgPool2d(kernel, **options).double(), nn.AvgPool2d(kernel, **options)
    X = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mine, other = X.clone().requires_grad_(), X.clone().requires_grad_()
    expected = plain(other)
    calls = []
    forward = nn.AvgPool2d.forward
    monkeypatch.setattr(nn.AvgPool2d, "forward", lambda self, X: calls.append(1) or forward(self, X))
    with pooling_by_products(nn.Sequential(pool)):
        found = pool(mine)
    assert bool(calls) is not replaced
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found.backward(grad)
    expected.backward(grad)
    assert torch.allclose(found, expected, atol=1e-12)
    assert torch.allclose(mine.grad, other.grad, atol=1e-12)


def test_pooling_is_put_back_and_leaves_autocast_and_others_alone():
    pool, patched = nn.AvgPool2d(2), nn.AvgPool2d(2)
    patched.forward = lambda X: X
    network = nn.Sequential(pool, patched)
    X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(UsageError), pooling_by_products(network):
        assert "forward" in pool.__dict__
        assert patched(X) is X
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(pool(X), nn.functional.avg_pool2d(X, 2))
        raise UsageError("x", remedy="y")
    assert "forward" not in pool.__dict__
    assert patched(X) is X


def test_freed_memory_is_kept_where_the_c_library_can(monkeypatch):
    assert keep_freed_memory() in (True, False)
    monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))
    assert keep_freed_memory() is False
