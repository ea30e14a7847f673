"""Optimisers whose first step is skipped, as the scaling of float16 losses does, and their state in a checkpoint."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from bnexport.training.config import TrainingConfig
from bnexport.training.optimisers import make_optimizer, optimizer_tensors, restore_optimizer
from bnexport.training.step import Step, Sums

CPU = torch.device("cpu")
OPTIMISERS = {"sgd with momentum": {"momentum": 0.9, "lr": 0.25}, "adamw": {"optimizer": "adamw", "lr": 0.25}}


@pytest.fixture
def uninitialised_is_nan() -> Iterator[None]:
    """torch fills uninitialised memory with NaN in its deterministic mode, so that a read of it is seen."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((8, 1, 2, 3), generator=generator), torch.randint(3, (8,), generator=generator)


def scaled_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    step = Step(model, optimizer, amp="float16")
    assert step.scaler.is_enabled()
    step.scaler.load_state_dict({**step.scaler.state_dict(), "scale": 1024.0})
    return step


def take(step: Step, seed: int, *, broken: bool = False) -> None:
    X, y = batch(seed)
    step(X * torch.inf if broken else X, y, len(y), Sums.zeros(1, CPU))


@pytest.mark.usefixtures("uninitialised_is_nan")
@pytest.mark.parametrize("options", OPTIMISERS.values(), ids=OPTIMISERS.keys())
def test_a_skipped_first_step_leaves_no_trace(options: dict[str, object]) -> None:
    config = TrainingConfig(**options)  # type: ignore[arg-type]
    states = []
    for skipped in (0, 2):
        model = network()
        step = scaled_step(model, make_optimizer(model, config, CPU))
        before = {name: value.clone() for name, value in model.state_dict().items()}
        for number in range(skipped):
            take(step, number, broken=True)
            step.scaler.load_state_dict({**step.scaler.state_dict(), "scale": 1024.0})
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        for number in range(3):
            take(step, number)
        states.append({**model.state_dict(), **optimizer_tensors(step.optimizer)})
    first, second = states
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(second[name], value), name


@pytest.mark.usefixtures("uninitialised_is_nan")
@pytest.mark.parametrize("options", OPTIMISERS.values(), ids=OPTIMISERS.keys())
def test_a_checkpoint_after_a_skipped_first_step_is_sound(options: dict[str, object]) -> None:
    config = TrainingConfig(**options)  # type: ignore[arg-type]
    model = network()
    step = scaled_step(model, make_optimizer(model, config, CPU))
    take(step, 0, broken=True)
    saved = {name: value.clone() for name, value in optimizer_tensors(step.optimizer).items()}
    assert saved
    assert all(value.isfinite().all() for value in saved.values())
    again = network()
    resumed = scaled_step(again, make_optimizer(again, config, CPU))
    restore_optimizer(resumed.optimizer, saved)
    for one in (step, resumed):
        one.scaler.load_state_dict({**one.scaler.state_dict(), "scale": 1024.0})
        take(one, 1)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


@pytest.mark.parametrize("options", OPTIMISERS.values(), ids=OPTIMISERS.keys())
def test_without_scaling_every_bit_is_that_of_torch_s_own_optimiser(options: dict[str, object]) -> None:
    """Also the sign of a zero: a weight and its gradient may both be -0."""
    config = TrainingConfig(**options)  # type: ignore[arg-type]
    kind = torch.optim.SGD if config.optimizer == "sgd" else torch.optim.AdamW
    extra = {"momentum": config.momentum} if config.optimizer == "sgd" else {"weight_decay": 0.0}
    ours, theirs = nn.Linear(4, 3), nn.Linear(4, 3)
    with torch.no_grad():
        ours.weight.copy_(torch.tensor([[0.5, -1.0, 2.0, -0.0]]).expand(3, 4))
        theirs.load_state_dict(ours.state_dict())
    optimisers = (make_optimizer(ours, config, CPU), kind(theirs.parameters(), lr=config.lr, fused=True, **extra))  # type: ignore[arg-type]
    for number in range(4):
        for module, optimizer in zip((ours, theirs), optimisers, strict=True):
            gradient = torch.randn((3, 4), generator=torch.Generator().manual_seed(number))
            gradient[:, 3] = -0.0
            module.weight.grad, module.bias.grad = gradient, gradient[:, 0].clone()
            optimizer.step()
        for name, value in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name].view(torch.int32), value.view(torch.int32)), (name, number)


def test_a_run_of_an_older_version_resumes_without_the_buffers_that_it_lacks() -> None:
    """It kept none of a parameter that had no gradient yet."""
    config, model = TrainingConfig(momentum=0.9), network()
    optimizer = make_optimizer(model, config, CPU)
    saved = {name: value for name, value in optimizer_tensors(optimizer).items() if not name.startswith("0.")}
    restore_optimizer(optimizer, saved)
    assert all((value == 0).all() for value in optimizer_tensors(optimizer).values())
    assert len(optimizer_tensors(optimizer)) == len(saved) + 1
