from __future__ import annotations

import pytest
import torch

from bnexport.reproducibility import strict_float32

SETTINGS = {
    "all": torch.backends,
    "cuda.matmul": torch.backends.cuda.matmul,
    "cudnn": torch.backends.cudnn,
    "cudnn.conv": torch.backends.cudnn.conv,
    "cudnn.rnn": torch.backends.cudnn.rnn,
    "mkldnn": torch.backends.mkldnn,
    "mkldnn.matmul": torch.backends.mkldnn.matmul,
    "mkldnn.conv": torch.backends.mkldnn.conv,
    "mkldnn.rnn": torch.backends.mkldnn.rnn,
}


def state():
    precision = {name: holder.fp32_precision for name, holder in SETTINGS.items()}
    return {**precision, "flags": (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark)}


STRICT = {**dict.fromkeys(SETTINGS, "ieee"), "flags": (True, False)}


@pytest.fixture(autouse=True)
def as_it_was():
    before = state()
    yield
    for name, holder in SETTINGS.items():
        holder.fp32_precision = before[name]
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before["flags"]
    assert state() == before


@pytest.mark.parametrize("name", SETTINGS)
def test_each_setting_is_restored(name):
    SETTINGS[name].fp32_precision = "tf32"
    torch.backends.cudnn.benchmark = True
    before = state()
    assert before[name] == "tf32"
    with strict_float32():
        assert state() == STRICT
    assert state() == before


def test_a_mixed_state_is_restored():
    torch.backends.fp32_precision = "ieee"
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    before = state()
    assert len(set(before.values())) > 3
    with strict_float32():
        assert state() == STRICT
    assert state() == before


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_it_is_restored_after_an_exception(error):
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    before = state()
    with pytest.raises(error), strict_float32():
        raise error
    assert state() == before


def test_it_nests():
    torch.backends.cudnn.fp32_precision = "tf32"
    before = state()
    with strict_float32():
        with strict_float32():
            torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert state() == STRICT
    assert state() == before


def test_the_older_switches_still_answer_afterwards():
    """torch raises RuntimeError where old and new settings contradict each other."""
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        with strict_float32():
            pass
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cuda.matmul.allow_tf32 is True
    finally:
        torch.set_float32_matmul_precision(before)
