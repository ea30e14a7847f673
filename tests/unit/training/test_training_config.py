import json
from dataclasses import replace

import pytest

from bnexport.errors import UsageError
from bnexport.training.config import TrainingConfig


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
        ({"mean": (0.5, 0.5, 0.5)}, "3 means and 1 deviations for 1 channel"),
        ({"input": "3x8x8", "mean": (0.5,)}, "1 means and 3 deviations for 3 channel"),
        ({"input": "8x8"}, "no shape of an image"),
        ({"dataset": "folder:x", "model": "net.py:net"}, "no one size"),
    ],
)
def test_values_out_of_range(options, message):
    with pytest.raises(UsageError, match=message):
        TrainingConfig(**options)


def test_json_round_trip():
    config = TrainingConfig(dataset="digits", lr=0.3, recalibrate=False)
    assert TrainingConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize("value", [[], {}, {**TrainingConfig().to_json(), "inertia": 1}])
def test_bad_json(value):
    with pytest.raises(UsageError, match="missing or unknown options"):
        TrainingConfig.from_json(value)


def test_values_of_a_wrong_kind():
    with pytest.raises(UsageError, match="wrong kind"):
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
