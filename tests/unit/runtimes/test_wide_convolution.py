"""Convolutions as matrix products against torch's own, for every kind; what does not fit stays torch's."""

import pytest
import torch
from torch import nn

from bnexport.onnx_files import kernels
from bnexport.runtimes import torch_float64
from bnexport.runtimes.torch_float64 import wide_convolutions

KINDS = [
    nn.Conv2d(3, 5, 3),
    nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(2, 1), bias=False),
    nn.Conv2d(3, 5, 3, padding="same"),
    nn.Conv2d(3, 5, 3, padding=1, padding_mode="reflect"),
    nn.Conv2d(3, 5, 1),
    nn.Conv2d(3, 6, 3, groups=3),
    nn.Conv3d(3, 5, (2, 3, 2), stride=(1, 2, 1), padding=1),
    nn.Conv1d(3, 5, 3),
    nn.ConvTranspose2d(3, 5, 3, stride=2),
]


@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize("room", [1, 200, 1 << 21])
@pytest.mark.parametrize("layer", KINDS, ids=str)
def test_the_numbers_are_torch_s(layer: nn.Module, room: int, inference: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_ROOM", room)
    monkeypatch.setattr(kernels, "_MOST_ROOM", room)
    rank = {"1": 1, "2": 2, "3": 3}[type(layer).__name__[-2]]
    x = torch.randn(3, 3, *(9, 8, 7)[:rank], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    layer = layer.double()
    with torch.inference_mode(inference), torch.no_grad():
        want = layer(x)
        script = torch.jit.trace(layer, x, check_trace=False)  # type: ignore[no-untyped-call]
        with wide_convolutions():
            results = (layer(x), script(x))
    for result in results:
        assert result.shape == want.shape
        assert result.is_contiguous()
        torch.testing.assert_close(result, want, rtol=0, atol=1e-14 * float(want.abs().max()) * 10)


def test_only_float64_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []

    def convolve(x: torch.Tensor, *_rest: object) -> torch.Tensor:
        seen.append(x.dtype)
        return x

    monkeypatch.setattr(torch_float64, "_convolve", convolve)
    layer = nn.Conv2d(3, 5, 3)
    with torch.inference_mode(), wide_convolutions():
        layer(torch.zeros(1, 3, 5, 5))
        layer(torch.zeros(0, 3, 5, 5))
        layer.double()(torch.zeros(1, 3, 5, 5, dtype=torch.float64))
        layer(torch.zeros(3, 5, 5, dtype=torch.float64))  # one sample without a batch
    assert seen == [torch.float64]


def test_an_input_that_does_not_fit_is_refused() -> None:
    layer = nn.Conv2d(3, 5, 3).double()
    for shape in ((1, 3, 2, 2), (1, 4, 5, 5)):
        with torch.inference_mode(), wide_convolutions(), pytest.raises(RuntimeError):
            layer(torch.zeros(shape, dtype=torch.float64))
