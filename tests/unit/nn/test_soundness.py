from __future__ import annotations

import math

import pytest
import torch
from cases import randomise
from torch import nn

from bnexport.errors import RefusedModel
from bnexport.nn.batch_norm import BatchNorm
from bnexport.nn.soundness import check_sound, is_untrained


def model(norm: nn.Module | None = None) -> nn.Sequential:
    """Randomised statistics in every channel."""
    return randomise(nn.Sequential(nn.Conv2d(2, 4, 3), norm or nn.BatchNorm2d(4), nn.ReLU()))


def refusal(network: nn.Module, **options: bool) -> str:
    with pytest.raises(RefusedModel) as caught:
        check_sound(network, **options)
    assert caught.value.remedy
    return caught.value.message


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), BatchNorm(4, 4), nn.SyncBatchNorm(4), nn.InstanceNorm2d(4)])
def test_a_trained_model_is_sound(norm):
    network = model(norm)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    check_sound(network)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize(
    ("name", "index", "where"),
    [("0.weight", (3, 1, 0, 2), "[3, 1, 0, 2]"), ("0.bias", (2,), "[2]"), ("1.running_mean", (1,), "[1]"),
     ("1.weight", (0,), "[0]")],
)  # fmt: skip
@pytest.mark.parametrize(("value", "what"), [(math.nan, "NaN"), (math.inf, "infinity"), (-math.inf, "infinity")])
def test_what_is_not_finite_is_named(name, index, where, value, what):
    network = model()
    network.state_dict()[name][index] = value
    assert refusal(network) == f"{name} holds {what} (at {where})"
    assert refusal(network, allow_untrained=True) == f"{name} holds {what} (at {where})"


def test_the_first_place_is_named():
    network = model()
    network[1].bias.data[2:] = math.nan
    assert refusal(network) == "1.bias holds NaN (at [2])"


def test_a_buffer_outside_the_state_dict_counts():
    network = model()
    network.register_buffer("scale", torch.tensor(math.inf), persistent=False)
    assert refusal(network) == "scale holds infinity (as its value)"


def test_half_and_double_are_read_and_integers_passed():
    network = model()
    network.register_buffer("index", torch.tensor([-1]))
    check_sound(network)
    network.half()[0].bias.data[1] = math.inf
    assert refusal(network) == "0.bias holds infinity (at [1])"


@pytest.mark.parametrize(("norm", "name"), [(nn.BatchNorm2d(4), "1.running_var"), (BatchNorm(4, 4), "1.moving_var")])
def test_a_negative_variance_is_named(norm, name):
    network = model(norm)
    network.state_dict()[name][3] = -1e-30
    assert refusal(network) == f"{name} holds a negative variance (at [3])"
    network.state_dict()[name][3] = 0.0
    check_sound(network)


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d(4), BatchNorm(4, 4), nn.SyncBatchNorm(4), nn.BatchNorm2d(4, affine=False)]
)
def test_a_norm_that_was_never_trained(norm):
    network = nn.Sequential(nn.Conv2d(2, 4, 3), norm)
    assert refusal(network).startswith(f"1 is a {type(norm).__name__} that was never trained")
    assert refusal(norm).startswith(f"the model is a {type(norm).__name__}")
    check_sound(network, allow_untrained=True)
    names = ("moving_mean", "moving_var") if isinstance(norm, BatchNorm) else ("running_mean", "running_var")
    for name, value in zip(names, (0.5, 2.0), strict=True):
        tensor = getattr(norm, name)
        before = tensor[2].item()
        tensor[2] = value  # one channel is enough
        assert not is_untrained(norm)
        tensor[2] = before
    assert is_untrained(norm)


def test_one_untrained_norm_among_trained_ones():
    network = nn.Sequential(model(), nn.Sequential(nn.BatchNorm2d(4)))
    assert refusal(network).startswith("1.0 is a BatchNorm2d")


def test_what_counts_as_trained():
    counted = nn.BatchNorm2d(4)
    counted.num_batches_tracked.fill_(1)
    assert not is_untrained(counted)
    for layer in (
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.GroupNorm(2, 4),
        nn.Linear(2, 3),
        nn.InstanceNorm2d(4),
    ):
        assert not is_untrained(layer)


def test_a_lazy_layer_that_has_seen_no_input_is_named():
    assert refusal(nn.Sequential(nn.LazyLinear(3))) == "0.weight has no value yet"
    assert refusal(nn.Sequential(nn.LazyBatchNorm1d())).endswith("has no value yet")
