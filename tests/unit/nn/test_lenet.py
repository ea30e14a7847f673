import subprocess
import sys

import pytest
import torch
from torch import nn

from bnexport.errors import UsageError
from bnexport.nn.batch_norm import BatchNorm
from bnexport.nn.lenet import NORMS, bn_lenet, convert_weights


def randomised(norm, seed=0):
    """A network whose BatchNorm layers have statistics of every kind."""
    torch.manual_seed(seed)
    network = bn_lenet(norm)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if name.startswith("bn") and value.is_floating_point():
                value.copy_(torch.randn(value.shape, generator=generator))
                if name.endswith("var"):
                    value.abs_().add_(1e-4)
    return network.eval()


@pytest.mark.parametrize("norm", NORMS)
def test_shapes_and_names(norm):
    network = bn_lenet(norm, in_channels=3, num_classes=7)
    assert network(torch.zeros(2, 3, 28, 28)).shape == (2, 7)
    names = [name for name, _ in network.named_children()]
    norms = [name for name in names if name.startswith("bn")]
    assert norms == ([] if norm == "none" else ["bn1", "bn2", "bn3", "bn4"])
    others = "conv1 sigmoid1 pool1 conv2 sigmoid2 pool2 flatten fc1 sigmoid3 fc2 sigmoid4 fc3"
    assert " ".join(name for name in names if name not in norms) == others
    kinds = {"torch": (nn.BatchNorm2d, nn.BatchNorm1d), "scratch": (BatchNorm, BatchNorm)}
    if norm in kinds:
        assert isinstance(network.bn1, kinds[norm][0])
        assert isinstance(network.bn4, kinds[norm][1])


def test_one_seed_gives_the_same_weights_for_every_norm():
    networks = []
    for norm in NORMS:
        torch.manual_seed(5)
        networks.append(bn_lenet(norm))
    for name in ("conv1", "conv2", "fc1", "fc2", "fc3"):
        first, *others = (getattr(network, name) for network in networks)
        assert all(torch.equal(first.weight, other.weight) and torch.equal(first.bias, other.bias) for other in others)


def test_weights_are_xavier_uniform():
    torch.manual_seed(0)
    bound = (6 / (256 + 120)) ** 0.5
    largest = bn_lenet().fc1.weight.abs().max().item()
    assert 0.99 * bound < largest <= bound


@pytest.mark.parametrize("options", [{"norm": "layer"}, {"in_channels": 0}, {"num_classes": 0}])
def test_bad_options(options):
    with pytest.raises(UsageError):
        bn_lenet(**options)


@pytest.mark.parametrize(("source", "target"), [("torch", "scratch"), ("scratch", "torch")])
def test_weights_move_between_the_variants(source, target):
    network, other = randomised(source), bn_lenet(target)
    other.load_state_dict(convert_weights(network.state_dict(), to=target))
    X = torch.rand((16, 1, 28, 28), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, got = network(X), other.eval()(X)
    assert (expected - got).abs().max() <= 1e-6 * expected.abs().max()
    if target == "torch":
        assert other.bn1.num_batches_tracked == 1


def test_converting_twice_changes_nothing():
    state = randomised("torch").state_dict()
    there = convert_weights(state, to="scratch")
    assert list(convert_weights(there, to="scratch")) == list(there)
    back = convert_weights(there, to="torch")
    assert set(back) == set(state)
    assert all(torch.equal(back[name], state[name]) for name in state if "num_batches" not in name)


def test_untrained_statistics_stay_untrained():
    converted = convert_weights(bn_lenet("scratch").state_dict(), to="torch")
    assert converted["bn2.num_batches_tracked"] == 0


def test_the_chapters_shapes_become_vectors():
    state = {name: value.reshape(1, -1, 1, 1) for name, value in BatchNorm(6, 4).state_dict().items()}
    converted = convert_weights({f"net.1.{name}": value for name, value in state.items()}, to="torch")
    assert converted["net.1.running_var"].shape == (6,)


def test_no_other_target():
    with pytest.raises(UsageError, match="none"):
        convert_weights({}, to="none")


def test_the_names_of_the_norms_cost_no_torch_import():
    code = "import sys, bnexport.nn.lenet, bnexport.training.config, bnexport.cli.train; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
