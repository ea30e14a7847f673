import copy
import math

import pytest
import torch
from cases import randomise
from torch import nn

from bnexport.errors import RefusedModel, UsageError
from bnexport.nn.batch_norm import BatchNorm
from bnexport.nn.soundness import check_finite_output, check_sound, has_diverged, is_untrained


def model(norm: nn.Module | None = None) -> nn.Sequential:
    """Randomised statistics in every channel."""
    return randomise(nn.Sequential(nn.Conv2d(2, 4, 3), norm or nn.BatchNorm2d(4), nn.ReLU()))


def refusal(network: nn.Module, **options: object) -> str:
    with pytest.raises(RefusedModel) as caught:
        check_sound(network, **options)  # type: ignore[arg-type]
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
def test_nonfinite_tensors_are_named(name, index, where, value, what):
    network = model()
    network.state_dict()[name][index] = value
    assert refusal(network) == f"{name} holds {what} (at {where})"
    assert refusal(network, allow_untrained=True) == f"{name} holds {what} (at {where})"


def test_the_first_place_is_named():
    network = model()
    network[1].bias.data[2:] = math.nan
    assert refusal(network) == "1.bias holds NaN (at [2])"


@pytest.mark.parametrize("persistent", [True, False])
def test_a_mask_may_hold_infinities_and_no_nan(persistent):
    network = model()
    network.register_buffer("mask", torch.full((3, 3), -math.inf).triu(1), persistent=persistent)
    network.register_buffer("least", torch.tensor(math.inf), persistent=persistent)
    check_sound(network)
    network.mask[2, 1] = math.nan
    assert refusal(network) == "mask holds NaN (at [2, 1])"
    check_sound(network, allow_nonfinite=["mask"])


def test_nonfinite_tensors_allowed_by_name():
    network = model()
    network[0].bias.data[1] = -math.inf
    with pytest.raises(RefusedModel, match=r"0\.bias holds infinity") as caught:
        check_sound(network)
    assert "--allow-nonfinite 0.bias" in caught.value.remedy
    check_sound(network, allow_nonfinite=["0.bias"])
    network[0].bias.data[0] = math.nan  # NaN in a parameter is damage, whatever is allowed
    assert refusal(network, allow_nonfinite=["0.bias"]) == "0.bias holds NaN (at [0])"
    network[0].bias.data[:2] = 0
    for name in ("1.running_mean", "1.running_var"):
        network.state_dict()[name][2] = math.inf
        assert refusal(network, allow_nonfinite=[name]) == f"{name} holds infinity (at [2])"
        network.state_dict()[name][2] = 1.0
    with pytest.raises(UsageError, match=r"no parameter or buffer of that name") as unknown:
        check_sound(network, allow_nonfinite=["0.bais"])
    assert unknown.value.remedy == "Did you mean 0.bias?"


def test_infinities_that_reach_the_output_are_refused():
    network, x = model(), torch.ones(2, 2, 5, 5)
    check_finite_output(network, (x,))
    network.register_buffer("mask", torch.tensor(-math.inf))
    check_finite_output(network, (x,))  # nothing reads it
    network[1].bias.data[1] = -math.inf
    check_finite_output(network, (x,))  # the ReLU makes it 0
    network[2] = nn.Identity()
    with pytest.raises(RefusedModel, match=r"1\.bias holds infinity or NaN, and the network's output"):
        check_finite_output(network, (x,))


def test_a_training_with_a_mask_has_not_diverged():
    network = model()
    network.register_buffer("mask", torch.full((3,), -math.inf))
    assert not has_diverged(network)
    for name, value in (("0.weight", math.inf), ("1.running_var", math.inf), ("mask", math.nan)):
        broken = copy.deepcopy(network)
        broken.state_dict()[name].view(-1)[0] = value
        assert has_diverged(broken), name


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


def test_conditions_of_a_trained_layer():
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
