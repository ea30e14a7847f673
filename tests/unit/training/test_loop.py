import pytest
import torch
from torch import nn

from bnexport.errors import Diverged
from bnexport.training.data_parts import Resident
from bnexport.training.loop import Epochs, batches_of, epoch_order, evaluate
from bnexport.training.step import Step


def linear(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 3))


def data(count):
    generator = torch.Generator().manual_seed(1)
    return torch.randn((count, 1, 2, 2), generator=generator), torch.randint(3, (count,), generator=generator)


def test_the_order_depends_on_seed_and_epoch_alone():
    order = epoch_order(100, seed=0, epoch=1)
    torch.manual_seed(123)
    assert torch.equal(order, epoch_order(100, seed=0, epoch=1))
    assert sorted(order.tolist()) == list(range(100))
    others = [epoch_order(100, seed=seed, epoch=epoch) for seed, epoch in ((0, 2), (1, 0), (1, 1), (2**62, 1))]
    assert not any(torch.equal(order, other) for other in others)


def test_an_epoch_is_plain_sgd_over_every_image():
    images, labels = data(10)
    order = epoch_order(10, seed=0, epoch=1)
    model, twin = linear(), linear()
    reported = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    epochs = Epochs(Step(model, optimizer), Resident(images, labels), batch_size=4)
    outcome = epochs.take(order, on_batch=lambda *now: reported.append(now))
    losses, hits = 0.0, 0
    for start in (0, 4, 8):
        batch = order[start : start + 4]
        logits = twin(images[batch])
        value = nn.functional.cross_entropy(logits, labels[batch])
        twin.zero_grad()
        value.backward()
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter -= 0.5 * parameter.grad
        losses += value.item() * len(batch)
        hits += (logits.argmax(1) == labels[batch]).sum().item()
    assert reported == [(1, 3), (2, 3), (3, 3)]
    assert outcome.loss == pytest.approx(losses / 10, rel=1e-6)
    assert outcome.accuracy == hits / 10
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_evaluation_uses_eval_mode_and_puts_the_mode_back(monkeypatch):
    monkeypatch.setattr("bnexport.training.loop._EVALUATION_BATCH", 3)
    images, labels = data(10)
    model = nn.Sequential(linear(), nn.BatchNorm1d(3)).train()
    model[1].running_mean.copy_(torch.tensor([5.0, -3.0, 1.0]))
    before = model[1].running_mean.clone()
    accuracy = evaluate(model, Resident(images, labels)).accuracy
    assert model.training
    assert torch.equal(model[1].running_mean, before)
    expected = (model.eval()(images).argmax(1) == labels).float().mean().item()
    assert accuracy == pytest.approx(expected)


@pytest.mark.parametrize("broken", ["image", "weight"])
def test_a_diverged_epoch_is_an_error(broken):
    images, labels = data(10)
    model = linear()
    if broken == "image":
        images[7] = float("inf")
    else:  # an infinite weight whose loss is still finite until the last step
        model.register_buffer("statistic", torch.tensor(float("nan")))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    where = "in batch 2 of 3" if broken == "image" else "after batch 3 of 3"
    with pytest.raises(Diverged, match=where) as caught:
        Epochs(Step(model, optimizer), Resident(images, labels), batch_size=4).take(torch.arange(10))
    assert "--lr" in caught.value.remedy


def test_batches_follow_the_order():
    images = torch.arange(5.0).reshape(5, 1)
    batches = [
        batch.flatten().tolist()
        for batch in batches_of(Resident(images, torch.zeros(5)), torch.tensor([4, 2, 0, 1, 3]), 2)
    ]
    assert batches == [[4.0, 2.0], [0.0, 1.0], [3.0]]
