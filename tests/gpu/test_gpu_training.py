"""Training on a GPU: the recorded step is the step, nobody waits for the device inside an epoch, and what is lost is said."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.gpu.training import gpu_speeds
from bnexport.loading.checkpoint import load_checkpoint
from bnexport.nn.lenet import bn_lenet
from bnexport.reproducibility import strict_float32
from bnexport.training.config import TrainingConfig
from bnexport.training.loop import Epochs, epoch_order
from bnexport.training.optimisers import learning_rate, make_optimizer, set_learning_rate
from bnexport.training.run import train
from bnexport.training.samples import Resident
from bnexport.training.step import Step

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


def test_a_run_on_a_gpu_resumes(tmp_path) -> None:  # type: ignore[no-untyped-def]
    first = train(CONFIG, out=tmp_path / "a")
    grown = train(replace(CONFIG, epochs=3), out=tmp_path / "a", resume=True)
    assert [row["epoch"] for row in grown.history] == [1, 2, 3]
    assert first.recalibrated_accuracy is not None
    assert load_checkpoint(grown.model).metadata["training"]["made_by"]["device"] != "cpu"


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_mixed_precision_learns(tmp_path, amp: str) -> None:  # type: ignore[no-untyped-def]
    result = train(replace(CONFIG, amp=amp, epochs=3), out=tmp_path / "a")
    assert result.history[-1]["train_loss"] < result.history[0]["train_loss"]


def test_no_host_waits_inside_an_epoch() -> None:
    torch.cuda.set_sync_debug_mode("error")  # raises where the host waits for the device
    try:
        device = torch.device("cuda")
        model = bn_lenet().to(device)
        step = Step(model, make_optimizer(model, CONFIG, device))
        samples = Resident(torch.rand((256, 1, 28, 28)).to(device), torch.zeros(256, dtype=torch.int64).to(device))
        sums = Epochs(step, samples, batch_size=64)._fresh_sums(4)
        for X, y in samples.batches(torch.split(torch.arange(256), 64)):
            step(X, y, 64, sums)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_recorded_step_is_faster() -> None:
    rows = gpu_speeds(torch.device("cuda"), train=16_384, test=1_000, batch_sizes=(256,))
    fastest = {(row.norm, row.captured): row.images_per_s.high for row in rows}
    assert fastest["torch", True] > fastest["torch", False]
    assert fastest["scratch", True] > fastest["scratch", False]
