"""When a training step is recorded, and what is left of a recording that fails; the recorder itself needs a GPU."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cases import randomise
from torch import Tensor, nn

from bnexport.data import digits
from bnexport.data.dataset_table import Dataset
from bnexport.data.preprocessing import Preprocessing
from bnexport.nn.lenet import bn_lenet
from bnexport.training.config import TrainingConfig
from bnexport.training.data_parts import Resident, Streamed
from bnexport.training.listeners import TrainingListener
from bnexport.training.loop import Epochs, epoch_order
from bnexport.training.optimisers import make_optimizer, optimizer_tensors
from bnexport.training.processes import World
from bnexport.training.recording import Recording, obstacle, recorded_by_default
from bnexport.training.step import Step, Sums
from bnexport.training.training_run import train

CPU = torch.device("cpu")
BATCH, COUNT = 8, 50
CONFIG = TrainingConfig(momentum=0.9, lr=0.1)
ADAMW = TrainingConfig(optimizer="adamw", lr=0.01)


class Net(nn.Module):
    """A network whose forward may do one thing on the host."""

    def __init__(self, act: Callable[[Net], None] = lambda _: None) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 4))
        randomise(self.body)
        self.register_buffer("seen", torch.zeros(()))
        self.act, self.steps, self.log = act, 0, [0]
        self.cache: Tensor | None = None

    def forward(self, X: Tensor) -> Any:
        if self.training:
            self.act(self)
        return self.body(X)


class Recorder:
    """Stands for the CUDA graph: keeps the step and takes it when replayed."""

    def __init__(self, spoil: Callable[[Step, Sums], None] = lambda *_: None) -> None:
        self.spoil, self.recorded, self.replayed = spoil, 0, 0

    def __call__(self, step: Step, X: Tensor, y: Tensor, images: int, sums: Sums) -> Callable[[Tensor, Tensor], Tensor]:
        assert len(X) == len(y) == images == BATCH
        self.recorded += 1
        self.spoil(step, sums)

        def replay(X: Tensor, y: Tensor) -> Tensor:
            self.replayed += 1
            return step(X, y, images, sums)

        return replay


def trained(
    recorder: Recorder | None, act: Callable[[Net], None] = lambda _: None, config: TrainingConfig = CONFIG
) -> tuple[dict[str, Any], list[str]]:
    """Everything that three epochs of six whole batches and a part leave behind, and the notes."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    model, generator, notes = Net(act), torch.Generator().manual_seed(1), []
    samples = Resident(
        torch.rand((COUNT, 1, 4, 4), generator=generator), torch.randint(4, (COUNT,), generator=generator)
    )
    optimizer = make_optimizer(model, config, CPU)
    record = {} if recorder is None else {"capture": True, "record": recorder}
    epochs = Epochs(Step(model, optimizer), samples, batch_size=BATCH, on_note=notes.append, **record)  # type: ignore[arg-type]
    outcomes = [epochs.take(epoch_order(COUNT, seed=0, epoch=epoch)) for epoch in range(3)]
    left = {"outcomes": outcomes, "steps": model.steps, "log": len(model.log), "draws": draws()}
    return {**left, **model.state_dict(), **optimizer_tensors(optimizer)}, notes


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.random()), float(torch.rand(()))


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        equal = torch.equal(value, other[name]) if isinstance(value, Tensor) else value == other[name]
        assert equal, name


@pytest.mark.parametrize("config", [CONFIG, ADAMW], ids=["sgd", "adamw"])
def test_a_recorded_training_is_the_plain_one(config: TrainingConfig) -> None:
    recorder = Recorder()
    found, notes = trained(recorder, config=config)
    same(found, trained(None, config=config)[0])
    assert notes == []
    assert recorder.recorded == 1
    assert recorder.replayed == 3 * 6 - 3, "all but three plain steps; the parts of 2 images are plain too"


def count(net: Net) -> None:
    net.steps += 1


def rebind(net: Net) -> None:
    net.seen = net.seen + 1


def hold(net: Net) -> None:
    net.cache = torch.zeros(3)


ON_THE_HOST: dict[str, tuple[Callable[[Net], Any], str]] = {
    "random": (lambda _: random.random(), "the state of Python's random numbers changes"),
    "numpy": (lambda _: np.random.random(), "the state of numpy's random numbers changes"),
    "torch": (lambda _: torch.rand(1), "the state of torch's random numbers on the CPU changes"),
    "a counter": (count, "steps of Net changes"),
    "a buffer that is replaced": (rebind, "seen of Net changes"),
    "a tensor that is replaced": (hold, "cache of Net changes"),
    "a list that grows": (lambda net: net.log.append(1), "the length of log of Net changes"),
}


@pytest.mark.parametrize(("act", "message"), ON_THE_HOST.values(), ids=ON_THE_HOST.keys())
def test_python_code_of_a_step_is_not_frozen(act: Callable[[Net], None], message: str) -> None:
    recorder = Recorder()
    found, notes = trained(recorder, act)
    assert recorder.recorded == 0
    (note,) = notes
    assert note.startswith(f"the step is not recorded as a CUDA graph: {message}"), note
    same(found, trained(None, act)[0])


def test_a_cache_that_the_first_step_fills_does_not_prevent_recording() -> None:
    def fill(net: Net) -> None:
        if net.cache is None:
            net.cache = torch.zeros(3)

    recorder = Recorder()
    _, notes = trained(recorder, fill)
    assert (recorder.recorded, notes) == (1, [])


def spoil(step: Step, sums: Sums) -> None:
    """All that a step may change, changed."""
    model: Any = step.model
    model.steps, model.seen, model.extra = 7, torch.full((), 9.0), 1
    model.log.append(3)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers(), sums.loss, sums.hits, sums.losses):
            tensor.fill_(3)
        for state in step.optimizer.state.values():
            for value in state.values():
                value.fill_(5)
    step.optimizer.state[next(iter(model.parameters()))]["new"] = torch.zeros(())
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    draws()


def fail(step: Step, sums: Sums) -> None:
    spoil(step, sums)
    step.model.log.pop()  # type: ignore[operator, union-attr]  # what a container holds is not put back
    raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nCUDA kernel errors might be ...")


@pytest.mark.parametrize("config", [CONFIG, ADAMW], ids=["sgd", "adamw"])
def test_a_failed_recording_leaves_nothing_behind(config: TrainingConfig) -> None:
    recorder = Recorder(fail)
    found, notes = trained(recorder, config=config)
    same(found, trained(None, config=config)[0])
    assert (recorder.recorded, recorder.replayed) == (1, 0)
    (note,) = notes
    assert "not recorded as a CUDA graph: CUDA error: operation not permitted when stream is capturing" in note
    assert "\n" not in note


def test_a_step_that_draws_while_it_is_recorded_is_not_replayed() -> None:
    recorder = Recorder(lambda *_: random.seed(5))
    found, notes = trained(recorder)
    same(found, trained(None)[0])
    assert (recorder.recorded, recorder.replayed) == (1, 0)
    assert "Python's random numbers" in notes[0]


def test_an_interrupt_is_not_a_failed_recording() -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(Recorder(interrupt))


def test_another_number_of_steps_is_recorded_anew() -> None:
    """A recording adds to the sums that it was made with."""
    recorder = Recorder()
    samples = Resident(torch.rand(48, 1, 4, 4), torch.zeros(48, dtype=torch.int64))
    model = Net()
    step = Step(model, make_optimizer(model, CONFIG, CPU))
    epochs = Epochs(step, samples, batch_size=BATCH, capture=True, record=recorder)
    epochs.take(torch.arange(48))
    found = epochs.take(torch.arange(32))
    assert recorder.recorded == 2
    assert found.accuracy <= 1
    assert epochs.recording is not None
    assert epochs.recording.made


# --- which networks are recorded


@pytest.mark.parametrize(
    ("model", "recorded"),
    [
        ("bn_lenet", True),
        ("torchvision:resnet18", True),
        ("timm:repvgg_a0", True),
        ("net.py:build", False),
        ("package.module:build", False),
    ],
)
def test_networks_of_users_are_not_recorded_by_default(model: str, recorded: bool) -> None:
    assert recorded_by_default(model) is recorded


def samples_on(kind: str) -> Resident:
    """Samples with a device; nothing is computed with them."""
    resident = Resident(torch.zeros(4, 1, 2, 2), torch.zeros(4, dtype=torch.int64))
    resident.device = torch.device(kind)
    return resident


def test_obstacles() -> None:
    config, cuda = TrainingConfig(), samples_on("cuda")
    streamed = Streamed(np.zeros((4, 2, 2), np.uint8), np.zeros(4, np.int64), Preprocessing(), torch.device("cuda"))
    assert obstacle(config, cuda, World()) is None
    for found, words in (
        (obstacle(config, samples_on("cpu"), World()), "the training runs on cpu"),
        (obstacle(config, cuda, World(0, 2)), "2 processes train together"),
        (obstacle(config, streamed, World()), "are not in the device's memory"),
        (obstacle(replace(config, amp="float16"), cuda, World()), "float16"),
    ):
        assert found is not None
        assert found.startswith("the step is not recorded as a CUDA graph: ")
        assert words in found


class Notes(TrainingListener):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def on_note(self, text: str) -> None:
        self.notes.append(text)


def small_dataset(*_: object, **__: object) -> Dataset:
    return Dataset("digits", *digits.draw(120, seed=1), *digits.draw(40, seed=2), tuple("0123456789"), "a test")


@pytest.mark.parametrize(("requested", "noted"), [(True, True), (None, False), (False, False)])
def test_a_run_states_why_it_can_t_record_the_requested_step(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, requested: bool | None, noted: bool
) -> None:
    monkeypatch.setattr("bnexport.training.preparation.load_dataset", small_dataset)
    config = TrainingConfig(dataset="digits", epochs=1, device="cpu", batch_size=64, lr=0.1, cuda_graph=requested)
    listener = Notes()
    train(config, out=tmp_path / "a", progress=listener)
    assert any("the training runs on cpu" in note for note in listener.notes) is noted


# --- streams


def test_all_plain_steps_share_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's allocator keeps a pool of memory per stream, and hands out 32 streams in turn."""
    made: list[SimpleNamespace] = []

    class Block:
        def __init__(self, stream: object) -> None:
            assert stream is made[0]

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

    def new_stream() -> SimpleNamespace:
        made.append(SimpleNamespace(wait_stream=lambda _: None))
        return made[-1]

    monkeypatch.setattr(torch.cuda, "Stream", new_stream)
    monkeypatch.setattr(torch.cuda, "stream", Block)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(wait_stream=lambda _: None))
    taken: list[int] = []
    step: Any = lambda X, y, images, sums: taken.append(images)  # noqa: E731
    step.model, X = bn_lenet(), SimpleNamespace(device=torch.device("cuda"))
    recording = Recording(step, batch_size=BATCH)
    for _ in range(5):
        recording.take(X, [0] * 3, 3, None)  # type: ignore[arg-type]
    assert taken == [3] * 5
    assert len(made) == 1
