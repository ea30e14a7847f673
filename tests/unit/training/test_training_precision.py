"""One rule: training steps round as the user's torch does, evaluation and exact statistics run in strict float32."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from bnexport.data import digits
from bnexport.data.dataset_table import Dataset
from bnexport.evaluating.evaluate import EvaluationRequest, evaluate_path
from bnexport.evaluating.network_options import DEFINITIONS, RecalibrationRequest
from bnexport.evaluating.recalibration import recalibrate_checkpoint
from bnexport.nn.lenet import bn_lenet
from bnexport.nn.moving_statistics import exact_moments, recalibrate, recalibrate_by_layer
from bnexport.nn.stale_statistics import staleness
from bnexport.reproducibility import effective_precision, float32_precision
from bnexport.training.config import TrainingConfig
from bnexport.training.training_run import train

TRAIN, TEST = digits.draw(120, seed=1), digits.draw(40, seed=2)
CONFIG = TrainingConfig(dataset="digits", epochs=2, device="cpu", batch_size=64, lr=0.1)
STRICT, USERS = "strict float32", "TF32"
#: (a BatchNorm or the network is in training mode, gradients are on) -> the precision of a GPU's kernels there.
Seen = set[tuple[bool, bool, str]]


@pytest.fixture(autouse=True)
def _users_precision(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A user's torch that rounds to TF32 on a GPU, and small data."""
    monkeypatch.setattr("bnexport.data.digits.training_set", lambda: TRAIN)
    monkeypatch.setattr("bnexport.data.digits.test_set", lambda: TEST)
    dataset = Dataset("digits", *TRAIN, *TEST, tuple("0123456789"), "a test")
    monkeypatch.setattr("bnexport.training.preparation.load_dataset", lambda *_, **__: dataset)
    with float32_precision(USERS.lower()):
        yield


@pytest.fixture
def seen() -> Iterator[Seen]:
    """Every call of a convolution or BatchNorm: its mode, whether gradients are on, and the precision in effect."""
    found: Seen = set()

    def note(module: nn.Module, _: object) -> None:
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
            found.add((module.training, torch.is_grad_enabled(), effective_precision("cuda")))

    handle = nn.modules.module.register_module_forward_pre_hook(note)
    yield found
    handle.remove()
    assert effective_precision("cuda") == USERS, "the user's precision is as before"


def precisions(seen: Seen, *, steps: bool) -> set[str]:
    return {precision for _, gradients, precision in seen if gradients is steps}


def test_a_run_steps_in_the_users_precision_and_judges_in_strict_float32(tmp_path: Path, seen: Seen) -> None:
    result = train(CONFIG, out=tmp_path / "a")
    assert result.recalibrated_accuracy is not None
    assert precisions(seen, steps=True) == {USERS}
    # The trial on two grey images, which build_network takes on the CPU, is not a judgement.
    judged = {(training, precision) for training, gradients, precision in seen if not gradients}
    assert (True, STRICT) in judged, "exact statistics"
    assert (False, STRICT) in judged, "evaluation"
    assert (True, USERS) not in judged


def test_evaluation_in_training_is_strict(seen: Seen) -> None:
    from bnexport.training.data_parts import Resident
    from bnexport.training.loop import evaluate

    evaluate(bn_lenet(), Resident(torch.rand(6, 1, 28, 28), torch.zeros(6, dtype=torch.int64)))
    assert seen == {(False, False, STRICT)}


def test_statistics_are_strict_for_every_caller(seen: Seen) -> None:
    model, X = bn_lenet(), torch.rand(6, 1, 28, 28)
    for act in (
        lambda: recalibrate(model, [X]),
        lambda: recalibrate_by_layer(model, lambda: [X]),
        lambda: exact_moments(model, [X]),
        lambda: staleness(model, [X]),
    ):
        seen.clear()
        act()
        assert precisions(seen, steps=False) == {STRICT}


def test_the_commands_are_strict(tmp_path: Path, seen: Seen) -> None:
    file = train(CONFIG, out=tmp_path / "a").checkpoint
    for definition in DEFINITIONS:
        seen.clear()
        recalibrate_checkpoint(file, tmp_path / f"{definition}.safetensors", RecalibrationRequest(definition))
        assert {precision for *_, precision in seen} == {STRICT}
    seen.clear()
    evaluate_path(file, EvaluationRequest(device="cpu"))
    assert {precision for *_, precision in seen} == {STRICT}
