"""Training on a GPU: the recorded step is the step, no host waits inside an epoch, and a failed recording leaves no trace."""

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.gpu.training import gpu_speeds
from bnexport.loading.checkpoint import load_checkpoint
from bnexport.nn.lenet import bn_lenet
from bnexport.reproducibility import strict_float32
from bnexport.training.config import TrainingConfig
from bnexport.training.data_parts import Resident
from bnexport.training.listeners import TrainingListener
from bnexport.training.loop import Epochs, epoch_order, evaluated
from bnexport.training.optimisers import learning_rate, make_optimizer, set_learning_rate
from bnexport.training.processes import World
from bnexport.training.step import Step
from bnexport.training.training_run import train

pytestmark = pytest.mark.needs("cuda")
CONFIG = TrainingConfig(dataset="digits", epochs=2, batch_size=64, lr=0.5, device="cuda", seed=3)


def epochs_of(config: TrainingConfig, *, capture: bool) -> tuple[torch.nn.Module, list[float]]:
    """A network after three epochs on random images, and the mean losses; 330 images leave a last batch of 10."""
    device = torch.device("cuda")
    generator = torch.Generator().manual_seed(1)
    images = torch.rand((330, 1, 28, 28), generator=generator).to(device)
    labels = torch.randint(10, (330,), generator=generator).to(device)
    torch.manual_seed(config.seed)
    model = bn_lenet(config.norm).to(device)
    optimizer = make_optimizer(model, config, device)
    epochs = Epochs(Step(model, optimizer), Resident(images, labels), batch_size=64, capture=capture)
    losses = []
    for epoch in range(3):

        def before(step: int, epoch: int = epoch) -> None:
            set_learning_rate(optimizer, learning_rate(config, epoch * epochs.steps() + step, epochs.steps()))

        losses.append(epochs.take(epoch_order(330, seed=0, epoch=epoch), before_step=before).loss)
    assert epochs.recording is None or epochs.recording.made
    return model, losses


@pytest.mark.parametrize("norm", ["torch", "scratch"])
@pytest.mark.parametrize("optimizer", [{"momentum": 0.9}, {"optimizer": "adamw", "lr": 0.01}])
def test_the_recorded_step_is_the_step(norm: str, optimizer: dict[str, object]) -> None:
    config = replace(CONFIG, epochs=3, schedule="cosine", warmup_epochs=0.5, norm=norm, **optimizer)  # type: ignore[arg-type]
    with strict_float32():
        plain, losses = epochs_of(config, capture=False)
        recorded, again = epochs_of(config, capture=True)
    assert again == pytest.approx(losses, rel=1e-4)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(recorded.state_dict()[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_a_run_on_a_gpu_resumes(tmp_path: Path) -> None:
    first = train(CONFIG, out=tmp_path / "a")
    grown = train(replace(CONFIG, epochs=3), out=tmp_path / "a", resume=True)
    assert [row["epoch"] for row in grown.history] == [1, 2, 3]
    assert first.recalibrated_accuracy is not None
    assert load_checkpoint(grown.model).metadata["training"]["made_by"]["device"] != "cpu"


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "lr": 0.1}, {"optimizer": "adamw", "lr": 0.01}])
def test_mixed_precision_learns(tmp_path: Path, amp: str, options: dict[str, object]) -> None:
    """The first steps in float16 are skipped: the loss is scaled by 65536."""
    result = train(replace(CONFIG, amp=amp, epochs=3, **options), out=tmp_path / "a")  # type: ignore[arg-type]
    assert result.history[-1]["train_loss"] < result.history[0]["train_loss"]


@contextlib.contextmanager
def no_waits() -> Iterator[None]:
    """Raise where the host waits for the device; torch warns that this mode is a prototype."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("amp", ["off", "bfloat16", "float16"])
@pytest.mark.parametrize("capture", [False, True])
def test_no_host_waits_inside_an_epoch(amp: str, capture: bool) -> None:
    """A first epoch makes what is made once (library handles, momentum, the recording), which may wait."""
    device, config = torch.device("cuda"), replace(CONFIG, momentum=0.9)
    model = bn_lenet().to(device)
    optimizer = make_optimizer(model, config, device)
    samples = Resident(torch.rand((266, 1, 28, 28)).to(device), torch.zeros(266, dtype=torch.int64).to(device))
    capture = capture and amp != "float16"  # the scaling of the loss is not recorded
    epochs = Epochs(Step(model, optimizer, amp=amp), samples, batch_size=64, capture=capture)
    epochs.take_steps(torch.arange(266))
    evaluated(model, samples, World())
    torch.cuda.synchronize()
    with no_waits():
        epochs.take_steps(torch.arange(266), before_step=lambda _: set_learning_rate(optimizer, 0.25))
        sums = evaluated(model, samples, World())
    assert epochs.recording is None or epochs.recording.made
    assert sums.hits.item() >= 0


def test_a_wait_is_found() -> None:
    value = torch.ones(3, device="cuda")
    with pytest.raises(RuntimeError, match="synchronizing"), no_waits():
        value.sum().item()


OWN = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, kind="plain"):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.BatchNorm1d(32), nn.Dropout(0.2), nn.Linear(32, 10))
        self.kind, self.steps = kind, 0

    def forward(self, X):
        if self.kind == "counts" and self.training:
            self.steps += 1
        if self.kind == "reads" and self.training:
            X = X * (1.0 if X.sum().item() > -1 else 0.5)
        if self.kind == "reads late" and torch.cuda.is_current_stream_capturing():
            X = X * (1.0 if X.sum().item() > -1 else 0.5)
        return self.body(X)
"""


class Notes(TrainingListener):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def on_note(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.parametrize(
    ("kind", "requested", "message"),
    [
        ("plain", True, None),
        ("counts", None, None),
        ("counts", True, "steps of Net changes"),
        ("reads", True, "the host waits for the device"),
        ("reads late", True, "CUDA error"),
    ],
)
def test_a_network_of_a_user_is_recorded_or_trained_plainly(
    tmp_path: Path, kind: str, requested: bool | None, message: str | None
) -> None:
    """The last kind fails in the midst of the recording; dropout, memory and streams work afterwards."""
    (tmp_path / "net.py").write_text(OWN)
    config = replace(
        CONFIG,
        model=f"{tmp_path / 'net.py'}:Net",
        model_options={"kind": kind},
        lr=0.1,
        momentum=0.9,
        cuda_graph=requested,
    )
    notes, stream = Notes(), torch.cuda.current_stream()
    result = train(config, out=tmp_path / "a", progress=notes)
    assert torch.cuda.current_stream() == stream
    found = [note for note in notes.notes if "not recorded as a CUDA graph" in note]
    assert len(found) == (message is not None), found
    if message is not None:
        assert message in found[0]
    assert result.history[-1]["train_loss"] < result.history[0]["train_loss"]
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.nn.functional.dropout(torch.ones(1000, device="cuda")).count_nonzero() < 1000


def test_a_failed_recording_leaves_the_weights_of_a_plain_training() -> None:
    """Dropout draws the same, because the generator is where it was."""

    class Refusing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.drop = bn_lenet(), nn.Dropout(0.3)

        def forward(self, X: Tensor) -> Tensor:
            if torch.cuda.is_current_stream_capturing():
                X = X + X.sum().item()
            Y: Tensor = self.drop(self.body(X))
            return Y

    device, states = torch.device("cuda"), []
    images = torch.rand((320, 1, 28, 28), generator=torch.Generator().manual_seed(1)).to(device)
    samples = Resident(images, torch.arange(320, device=device) % 10)
    for capture in (False, True):
        torch.manual_seed(0)
        model = Refusing().to(device)
        epochs = Epochs(Step(model, make_optimizer(model, CONFIG, device)), samples, batch_size=64, capture=capture)
        with strict_float32():
            for _ in range(2):
                epochs.take(torch.arange(320))
        assert epochs.recording is None or not epochs.recording.made
        states.append({**model.state_dict(), "draw": torch.rand(5, device=device)})
    plain, failed = states
    for name, value in plain.items():
        torch.testing.assert_close(failed[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_the_recorded_step_is_faster() -> None:
    rows = gpu_speeds(torch.device("cuda"), train=16_384, test=1_000, batch_sizes=(256,))
    fastest = {(row.norm, row.captured): row.images_per_s.high for row in rows}
    assert fastest["torch", True] > fastest["torch", False]
    assert fastest["scratch", True] > fastest["scratch", False]
