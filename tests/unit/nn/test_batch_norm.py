import pytest
import torch
from torch import nn

from bnexport.errors import FeedError, UsageError
from bnexport.nn.batch_norm import BatchNorm, batch_norm

SHAPES = [(7, 5), (4, 5, 3, 6)]
EPS = 3e-4


def randomise(parameters, seed=0):
    """Gamma with negative and zero values, variances from tiny to large."""
    gamma, beta, mean, var = parameters
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        gamma.copy_(torch.randn(gamma.shape, generator=generator))
        gamma[0], gamma[1] = 0.0, -1.5
        beta.copy_(torch.randn(beta.shape, generator=generator))
        mean.copy_(3 * torch.randn(mean.shape, generator=generator))
        var.copy_(torch.rand(var.shape, generator=generator))
        var[2], var[3] = 1e-6, 400.0


def pair(shape, unbiased=True):
    scratch = BatchNorm(5, len(shape), eps=EPS, momentum=0.9, unbiased=unbiased)
    torchs = (nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(5, eps=EPS, momentum=0.1)
    randomise((scratch.gamma, scratch.beta, scratch.moving_mean, scratch.moving_var))
    randomise((torchs.weight, torchs.bias, torchs.running_mean, torchs.running_var))
    return scratch, torchs


@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_torch_in_training_and_eval(shape):
    scratch, torchs = pair(shape)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        X = 2 * torch.randn(shape, generator=generator) + 1
        assert torch.allclose(scratch(X), torchs(X), atol=1e-6, rtol=1e-6)
    assert torch.allclose(scratch.moving_mean, torchs.running_mean, atol=1e-6, rtol=1e-6)
    assert torch.allclose(scratch.moving_var, torchs.running_var, atol=1e-6, rtol=1e-6)
    scratch.eval()
    torchs.eval()
    X = torch.randn(shape, generator=generator)
    assert torch.allclose(scratch(X), torchs(X), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_default_keeps_the_biased_variance(shape):
    scratch, _ = pair(shape, unbiased=False)
    before = scratch.moving_var.clone()
    X = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    scratch(X)
    dims = [d for d in range(X.dim()) if d != 1]
    expected = 0.9 * before + 0.1 * X.var(dims, correction=0)
    assert torch.allclose(scratch.moving_var, expected, atol=1e-7, rtol=1e-6)
    assert not torch.allclose(scratch.moving_var, 0.9 * before + 0.1 * X.var(dims, correction=1), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("training", [True, False])
def test_gradients(shape, training):
    generator = torch.Generator().manual_seed(3)
    X = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    gamma, beta, mean = (torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(3))
    var = torch.rand(5, generator=generator, dtype=torch.float64) + 0.1
    gamma.requires_grad_()
    beta.requires_grad_()

    def y(X, gamma, beta):
        return batch_norm(X, gamma, beta, mean, var, 1e-5, 0.9, training=training)[0]

    assert torch.autograd.gradcheck(y, (X, gamma, beta))


@pytest.mark.parametrize("statistics_shape", [(5,), (1, 5), (1, 5, 1, 1)])
@pytest.mark.parametrize("training", [True, False])
def test_statistics_of_any_shape(statistics_shape, training):
    X = torch.randn((4, 5, 3, 6), generator=torch.Generator().manual_seed(4))
    values = [torch.empty(5) for _ in range(4)]
    randomise(values)
    flat = batch_norm(X, *values, 1e-5, 0.9, training=training)
    shaped = batch_norm(X, *(v.reshape(statistics_shape) for v in values), 1e-5, 0.9, training=training)
    assert torch.equal(flat[0], shaped[0])
    assert shaped[1].shape == shaped[2].shape == statistics_shape
    assert torch.equal(flat[2], shaped[2].reshape(5))


def test_the_mode_is_the_modules_not_autograds():
    layer, _ = pair((7, 5))
    X = torch.randn((7, 5), generator=torch.Generator().manual_seed(5))
    before = layer.moving_mean.clone()
    with torch.no_grad():
        layer.train()(X)
    assert not torch.equal(layer.moving_mean, before)
    before = layer.moving_mean.clone()
    layer.eval()(X)
    assert torch.equal(layer.moving_mean, before)


def test_moving_statistics_are_saved_and_moved():
    layer, _ = pair((7, 5))
    assert set(layer.state_dict()) == {"gamma", "beta", "moving_mean", "moving_var"}
    assert layer.double().moving_var.dtype == torch.float64


def test_a_state_dict_in_the_chapters_shapes_loads():
    layer, _ = pair((4, 5, 3, 6))
    state = {name: value.reshape(1, 5, 1, 1) for name, value in layer.state_dict().items()}
    fresh = BatchNorm(5, 4)
    fresh.load_state_dict(state)
    assert torch.equal(fresh.moving_var, layer.moving_var)
    with pytest.raises(RuntimeError, match="size mismatch"):
        BatchNorm(6, 4).load_state_dict(state)


@pytest.mark.parametrize(
    ("num_dims", "shape", "message"),
    [
        (2, (1, 5), "1 value"),
        (4, (1, 5, 1, 1), "1 value"),
        (4, (0, 5, 2, 2), "0 value"),
        (4, (7, 5), "num_dims=4"),
        (2, (2, 5, 3, 3), "num_dims=2"),
        (4, (2, 1, 3, 3), "5 channels got an input of 1"),
    ],
)
def test_a_wrong_input_is_named(num_dims, shape, message):
    with pytest.raises(FeedError, match=message):
        BatchNorm(5, num_dims)(torch.zeros(shape))


def test_a_single_image_is_fine_in_eval_mode():
    layer, torchs = pair((7, 5))
    X = torch.randn((1, 5), generator=torch.Generator().manual_seed(6))
    assert torch.allclose(layer.eval()(X), torchs.eval()(X), atol=1e-6, rtol=1e-5)


def test_three_dimensions_are_refused():
    one = torch.ones(5)
    with pytest.raises(FeedError, match="3 dimensions"):
        batch_norm(torch.zeros(2, 5, 3), one, one, one, one, 1e-5, 0.9)


@pytest.mark.parametrize(
    "options",
    [
        {"num_features": 0, "num_dims": 2},
        {"num_features": 3, "num_dims": 3},
        {"num_features": 3, "num_dims": 2, "eps": 0.0},
        {"num_features": 3, "num_dims": 2, "momentum": 1.5},
    ],
)
def test_bad_options(options):
    with pytest.raises(UsageError):
        BatchNorm(**options)


@pytest.mark.parametrize("shape", SHAPES)
def test_eval_mode_is_traced_with_any_batch_size(shape):
    layer, _ = pair(shape)
    layer.eval()
    program = torch.export.export(layer, (torch.zeros(shape),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert operators <= {f"aten.{op}" for op in ("sub.Tensor", "div.Tensor", "sqrt.default", "view.default")} | {
        "aten.add.Tensor",
        "aten.mul.Tensor",
    }
    X = torch.randn((11, *shape[1:]), generator=torch.Generator().manual_seed(7))
    assert torch.equal(program.module()(X), layer(X))
