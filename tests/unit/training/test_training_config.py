import json
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torch import nn

from bnexport.errors import UsageError
from bnexport.training.config import TrainingConfig
from bnexport.training.optimisers import make_optimizer


def test_the_defaults_are_the_chapters():
    config = TrainingConfig()
    assert (config.lr, config.epochs, config.batch_size, config.norm) == (1.0, 10, 256, "torch")
    assert (config.dataset, config.device, config.seed, config.recalibrate) == ("fashion-mnist", "auto", 0, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "cifar"}, "'cifar'"),
        ({"norm": "layer"}, "'layer'"),
        ({"device": "tpu"}, "'tpu'"),
        ({"epochs": 0}, "epochs is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"lr": 0.0}, "learning rate is 0.0"),
        ({"lr": float("nan")}, "learning rate is nan"),
        ({"lr": float("inf")}, "learning rate is inf"),
        ({"seed": -1}, "seed is -1"),
        ({"lr": True}, "lr is True"),
        ({"lr": "1"}, "lr is '1'"),
        ({"epochs": 2.5}, "epochs is 2.5"),
        ({"epochs": True}, "epochs is True"),
        ({"mean": (False,)}, "mean is False"),
        ({"mean": (0.5, 0.5, 0.5)}, "3 means and 1 standard deviations for 1 channel"),
        ({"input": "3x8x8", "mean": (0.5,)}, "1 means and 3 standard deviations for 3 channel"),
        ({"input": "8x8"}, "not the shape of an image"),
        ({"dataset": "folder:x", "model": "net.py:net"}, "can differ in size"),
    ],
)
def test_values_out_of_range(options, message):
    with pytest.raises(UsageError, match=message):
        TrainingConfig(**options)


FLOATS = [item.name for item in fields(TrainingConfig) if item.type == "float"]


def test_numbers_have_the_type_of_their_field():
    assert set(FLOATS) >= {"lr", "momentum", "weight_decay", "warmup_epochs", "label_smoothing"}
    whole = {name: 1 if name in ("lr", "warmup_epochs") else 0 for name in FLOATS}
    for config in (
        TrainingConfig(**whole, mean=(0,), std=(1,)),
        TrainingConfig(lr=np.float32(0.5), epochs=np.int64(3)),
        TrainingConfig.from_json({**TrainingConfig().to_json(), **whole, "mean": [0], "std": [1]}),
    ):
        for item in fields(config):
            value = getattr(config, item.name)
            if item.type in ("float", "int"):
                assert type(value).__name__ == item.type, item.name
        assert {type(value) for value in (*config.mean, *config.std)} <= {float}
    optimizer = make_optimizer(nn.Linear(2, 2), TrainingConfig(lr=1), torch.device("cpu"))
    assert type(optimizer.param_groups[0]["lr"]) is float


@pytest.mark.parametrize("value", [None, True, False])
def test_the_recipe_states_whether_the_step_is_recorded(value):
    config = TrainingConfig(cuda_graph=value)
    assert TrainingConfig.from_json(json.loads(json.dumps(config.to_json()))).cuda_graph is value
    older = {name: item for name, item in config.to_json().items() if name != "cuda_graph"}
    assert TrainingConfig.from_json(older).cuda_graph is None
    TrainingConfig().check_continues(config)
    with pytest.raises(UsageError, match="wrong type"):
        TrainingConfig.from_json({**config.to_json(), "cuda_graph": "on"})


def test_json_round_trip():
    config = TrainingConfig(dataset="digits", lr=0.3, recalibrate=False)
    assert TrainingConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize("value", [[], {}, {**TrainingConfig().to_json(), "inertia": 1}])
def test_bad_json(value):
    with pytest.raises(UsageError, match="missing or unknown options"):
        TrainingConfig.from_json(value)


def test_values_of_a_wrong_kind():
    with pytest.raises(UsageError, match="wrong type"):
        TrainingConfig.from_json({**TrainingConfig().to_json(), "epochs": "many"})


def test_only_the_epochs_may_grow():
    before = TrainingConfig(epochs=5)
    before.check_continues(before)
    replace(before, epochs=6).check_continues(before)
    for change in (
        {"epochs": 4},
        {"lr": 0.5},
        {"batch_size": 128},
        {"seed": 1},
        {"norm": "none"},
        {"recalibrate": False},
    ):
        (name,) = change
        with pytest.raises(UsageError, match=f"{name.replace('_', '-')} "):
            replace(before, **change).check_continues(before)
