"""A forward that loses the batch, or depends on its size, is found before the export, with the line and a remedy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cases import randomise
from torch import Tensor, nn
from torch.nn import functional

from bnexport.errors import UntracedError
from bnexport.folding.torch_backend.trace import trace
from bnexport.nn.batch_axis import check_batch

LINES = Path(__file__).read_text(encoding="utf-8").split("\n")


class Net(nn.Module):
    def __init__(self, tail: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5)
        self.flat, self.tail, self.table = nn.Linear(144, 5), tail, None

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self, self.bn(self.conv(x)))


def squeezed(m: Net, y: Tensor) -> Tensor:
    pooled = functional.adaptive_avg_pool2d(y, 1)
    return m.head(pooled.squeeze())  # here


def squeezed_first(m: Net, y: Tensor) -> Tensor:
    return m.head(y.mean((2, 3)).squeeze(0))  # here


def squeezed_and_failing(m: Net, y: Tensor) -> Tensor:
    pooled = y.mean((2, 3)).squeeze()  # here
    return m.head(torch.cat([pooled, pooled], 1)[:, :4])


def written(m: Net, y: Tensor) -> Tensor:
    return m.flat(y.reshape(4, -1))  # here


def written_as_two(m: Net, y: Tensor) -> Tensor:
    return m.head(y.mean((2, 3)).reshape(2, -1)[:, :4])  # here


def written_whole(m: Net, y: Tensor) -> Tensor:
    return m.head(y.mean((2, 3))).reshape(2, 5)  # here


def mixed(m: Net, y: Tensor) -> Tensor:
    return m.head(y.view(-1, 4))  # here


def reduced(m: Net, y: Tensor) -> Tensor:
    return m.head(y.mean((0, 2)).T)  # here


def asks_for_one(m: Net, y: Tensor) -> Tensor:
    if y.shape[0] == 1:
        y = y * 2  # here
    return m.head(y.mean((2, 3)))


def asks_for_many(m: Net, y: Tensor) -> Tensor:
    if len(y) > 3:
        y = y * 2  # here
    return m.head(y.mean((2, 3)))


def keeps(m: Net, y: Tensor) -> Tensor:
    return m.head(functional.adaptive_avg_pool2d(y, 1).squeeze((2, 3)))


def caches(m: Net, y: Tensor) -> Tensor:
    if m.table is None:
        m.table = torch.arange(4.0) * 1.5
    return m.head(y.mean((2, 3)) * m.table)


def sequence_first(m: Net, y: Tensor) -> Tensor:
    return m.head(y.flatten(2).permute(2, 0, 1) * 2).mean(0)


def windows(m: Net, y: Tensor) -> Tensor:
    return m.head(y.permute(0, 2, 3, 1).reshape(-1, 4)).view(len(y), -1, 5).mean(1)


def the_same_either_way(m: Net, y: Tensor) -> Tensor:
    return m.head(y.mean((2, 3)) if len(y) > 1 else torch.stack([y[0].mean((1, 2))]))


def line_of(tail: Callable[[Net, Tensor], Tensor]) -> int:
    start = tail.__code__.co_firstlineno
    return next(number for number in range(start, start + 9) if LINES[number - 1].endswith("# here"))


def refusal(tail: Callable[[Net, Tensor], Tensor]) -> UntracedError:
    torch.manual_seed(0)
    network, x = randomise(Net(tail)), torch.randn(2, 3, 8, 8)
    with pytest.raises(UntracedError) as caught:
        check_batch(network, (x,))
        trace(network, (x,))
    return caught.value


@pytest.mark.parametrize(
    ("tail", "expected", "remedy"),
    [
        (
            squeezed,
            "drops a batch of 1 at FILE:LINE: squeeze gives 4 there, and 2x4 for a batch of 2",
            "squeeze((2, 3))",
        ),
        (squeezed_first, "drops a batch of 1 at FILE:LINE: squeeze gives 4 there", "flatten(1)"),
        (squeezed_and_failing, "drops a batch of 1 at FILE:LINE: squeeze gives 4 there", "squeeze((2, 3))"),
        (written, "loses the batch at FILE:LINE: reshape gives 4x72 for 2x4x6x6", "x.shape[0]"),
        (
            written_as_two,
            "loses the batch at FILE:LINE: reshape gives 2x2 for 1x4, so its first axis is no longer the batch of 1",
            "x.shape[0]",
        ),
        (written_whole, "fails on a batch of 1 at FILE:LINE: shape '[2, 5]' is invalid", "x.shape[0]"),
        (mixed, "loses the batch at FILE:LINE: view gives 72x4 for 2x4x6x6", "x.flatten(1)"),
        (reduced, "loses the batch at FILE:LINE: mean gives 4x6 for 2x4x6x6", "the first axis"),
        (asks_for_one, "takes another path for a batch of 1 than for a batch of 2, from FILE:LINE on", "without if"),
        (asks_for_many, "takes another path for a batch of 4 than for a batch of 2, from FILE:LINE on", "without if"),
    ],
)
def test_the_line_and_what_helps_are_named(tail: Callable[[Net, Tensor], Tensor], expected: str, remedy: str) -> None:
    error = refusal(tail)
    assert expected.replace("FILE", "test_batch_axis.py").replace("LINE", str(line_of(tail))) in error.message
    assert "Net" in error.message
    assert remedy in error.remedy


@pytest.mark.parametrize("tail", [keeps, caches, sequence_first, windows, the_same_either_way])
def test_a_network_that_takes_every_batch_is_accepted(tail: Callable[[Net, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    network, x = randomise(Net(tail)), torch.randn(2, 3, 8, 8)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    check_batch(network, (x,))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert network.table is None
    assert network.training


def test_a_network_that_fails_by_itself_is_not_blamed_for_its_batch() -> None:
    def wrong_size(m: Net, y: Tensor) -> Tensor:
        return m.head(y.flatten(2).permute(2, 0, 1))[:, :, 9].view(3, 3)

    error = refusal(wrong_size)
    assert "fails on an example input of shape 2x3x8x8, before any tracing, at test_batch_axis.py" in error.message


def test_a_module_that_can_not_be_copied_is_left_to_others() -> None:
    class Uncopied(nn.Linear):
        def __deepcopy__(self, memo: object) -> None:
            raise RuntimeError("no copies")

    check_batch(Uncopied(4, 2), (torch.ones(2, 4),))
