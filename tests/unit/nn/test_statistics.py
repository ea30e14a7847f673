import json
import math

import pytest
import torch
from cases import randomise
from torch import nn

from bnexport.errors import ModelError
from bnexport.nn.batch_norm import BatchNorm
from bnexport.nn.lenet import bn_lenet, convert_weights
from bnexport.nn.statistics import DEFAULT_EPS, eps_of, layer_statistics


def state(gamma, var, *, beta=None, mean=None, prefix="bn."):
    names = ("weight", "bias", "running_mean", "running_var")
    columns = (gamma, beta or [0.5] * len(var), mean or [0.25] * len(var), var)
    return {prefix + name: torch.tensor(column) for name, column in zip(names, columns, strict=True) if column}


def marks(gamma, var, **options):
    (layer,) = layer_statistics(state(gamma, var, **options))
    return [channel.mark for channel in layer.channels]


def test_the_columns_and_the_scale():
    (layer,) = layer_statistics(state([2.0, -3.0], [4.0, 9.0], beta=[1.0, -1.0], mean=[7.0, -8.0]))
    assert (layer.name, layer.eps) == ("bn", DEFAULT_EPS)
    first, second = layer.channels
    assert (first.gamma, first.beta, first.moving_mean, first.moving_var) == (2.0, 1.0, 7.0, 4.0)
    assert first.scale == pytest.approx(2 / math.sqrt(4 + 1e-5), rel=1e-15)
    assert second.scale == pytest.approx(-3 / math.sqrt(9 + 1e-5), rel=1e-15)
    assert (first.mark, second.mark) == ("", "")


#: gamma, variance, marks
MARKS = {
    "all alive": ([1.0, -0.5, 2.0], [1.0, 2.0, 0.1], ["", "", ""]),
    "gamma of zero": ([1.0, 0.0, -1.0], [1.0, 1.0, 1.0], ["", "dead", ""]),
    "gamma of nearly zero": ([1.0, 1e-4, 0.01], [1.0, 1.0, 1.0], ["", "dead", ""]),
    "variance of zero": ([1.0, 1.0, 1.0], [1.0, 0.0, 1.0], ["", "dead", ""]),
    "variance far below eps": ([1.0, 1.0, 1.0], [1.0, 1e-13, 1.0], ["", "dead", ""]),
    "all gammas zero": ([0.0, 0.0, 0.0], [1.0, 2.0, 3.0], ["dead"] * 3),
    "all variances zero": ([1.0, 2.0], [0.0, 0.0], ["dead"] * 2),
    "one channel": ([3.0], [1e-4], [""]),
    "one dead channel": ([0.0], [1.0], ["dead"]),
    "exploding": ([1.0, -1.0, 1.0], [1.0, 1e-4, 1.0], ["", "exploding", ""]),
    "nearly exploding": ([1.0, -1.0, 1.0], [1.0, 0.0012, 1.0], ["", "", ""]),
    "by its gamma": ([1.0, 40.0, -1.0], [1.0, 1.0, 1.0], ["", "exploding", ""]),
    "dead and large": ([1.0, 1.0, 1.0], [100.0, 1e-12, 100.0], ["", "dead", ""]),
    "half of it dead": ([0.0, 1.0, 0.0, 2.0], [1.0] * 4, ["dead", "", "dead", ""]),
    "most of it dead": ([0.0, 0.0, 0.0, 2.0], [1.0] * 4, ["dead"] * 3 + [""]),
    "two halves": ([1.0, 1.0, 100.0, 100.0], [1.0] * 4, [""] * 4),
    "NaN": ([1.0, math.nan, 1.0], [1.0, 1.0, 1.0], ["", "not finite", ""]),
    "NaN variance": ([1.0, 1.0], [math.nan, 1.0], ["not finite", ""]),
    "infinite": ([1.0, math.inf], [1.0, 1.0], ["", "not finite"]),
    "negative variance": ([1.0, 1.0], [1.0, -1e-9], ["", "not finite"]),
    "all NaN": ([math.nan, math.nan], [1.0, 1.0], ["not finite"] * 2),
}


@pytest.mark.parametrize("name", MARKS)
def test_marks(name):
    gamma, var, expected = MARKS[name]
    assert marks(gamma, var) == expected


@pytest.mark.parametrize("column", ["beta", "mean"])
def test_a_shift_that_is_not_finite_is_marked(column):
    assert marks([1.0, 1.0], [1.0, 1.0], **{column: [0.0, math.nan]}) == ["", "not finite"]


def test_marked_gives_indices():
    (layer,) = layer_statistics(state([0.0, 1.0, 50.0, math.nan, 0.0, 1.0, 1.0], [1.0] * 7))
    assert [layer.marked(mark) for mark in ("dead", "exploding", "not finite")] == [[0, 4], [2], [3]]


def test_without_gamma_and_beta():
    (layer,) = layer_statistics({"a.b.running_mean": torch.zeros(2), "a.b.running_var": torch.tensor([1.0, 3.0])})
    assert layer.name == "a.b"
    assert [(channel.gamma, channel.beta) for channel in layer.channels] == [(1.0, 0.0)] * 2


def test_both_kinds_of_norm_read_alike():
    torch_state = randomise(bn_lenet()).state_dict()
    scratch_state = convert_weights(torch_state, to="scratch")
    layers = layer_statistics(torch_state)
    assert [layer.name for layer in layers] == ["bn1", "bn2", "bn3", "bn4"]
    assert [len(layer.channels) for layer in layers] == [6, 16, 120, 84]
    assert layer_statistics(scratch_state) == layers
    assert layers[0].channels[1].mark == "dead"  # randomise gives it a gamma of 0


def test_the_chapter_s_shape_is_read_too():
    scratch = {name: value.reshape(1, 2, 1, 1) for name, value in randomise(BatchNorm(2, 4)).state_dict().items()}
    (layer,) = layer_statistics(scratch)
    assert layer.name == ""
    assert [channel.moving_var for channel in layer.channels] == scratch["moving_var"].double().flatten().tolist()


def test_eps_comes_from_the_module():
    network = nn.Sequential(nn.BatchNorm1d(2, eps=0.5), nn.Sequential(nn.BatchNorm1d(2, eps=0.25)), nn.BatchNorm1d(2))
    with torch.no_grad():
        for norm in (network[0], network[1][0], network[2]):
            norm.running_var.copy_(torch.tensor([1.0, 2.0]))
    layers = layer_statistics(network.state_dict(), eps=eps_of(network))
    assert [(layer.name, layer.eps) for layer in layers] == [("0", 0.5), ("1.0", 0.25), ("2", 1e-5)]
    assert layers[0].channels[0].scale == pytest.approx(1 / math.sqrt(1.5))
    (alone,) = layer_statistics(network[0].state_dict(), eps=eps_of(network[0]))
    assert (alone.name, alone.eps) == ("", 0.5)
    assert {layer.eps for layer in layer_statistics(network.state_dict())} == {DEFAULT_EPS}


def test_a_shared_layer_has_its_eps_under_each_name():
    norm = nn.BatchNorm1d(2, eps=0.5)
    network = nn.ModuleDict({"a": norm, "b": norm})
    assert eps_of(network) == {"a": 0.5, "b": 0.5}


def test_tensors_that_differ_in_size_are_refused():
    with pytest.raises(ModelError, match="the tensors of bn differ in size"):
        layer_statistics(state([1.0, 1.0, 1.0], [1.0, 1.0], mean=[0.0, 0.0], beta=[0.0, 0.0]))


def test_json_has_no_number_that_json_lacks():
    (layer,) = layer_statistics(state([1.0, math.nan, math.inf], [1.0, 1.0, -1.0]))
    value = json.loads(json.dumps(layer.to_json(), allow_nan=False))
    assert list(value) == ["name", "eps", "channels"]
    assert [row["gamma"] for row in value["channels"]] == [1.0, None, None]
    assert [row["mark"] for row in value["channels"]] == ["", "not finite", "not finite"]
    assert value["channels"][0]["scale"] == pytest.approx(1.0, rel=1e-4)


def test_other_modules_than_norms_are_skipped():
    assert layer_statistics(nn.Sequential(nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2)).state_dict()) == []
