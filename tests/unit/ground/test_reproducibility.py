import subprocess
import sys

import pytest
import torch

from bnexport.errors import UsageError
from bnexport.reproducibility import effective_precision, float32_precision, override_problem, strict_float32

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
        if name == "mkldnn":
            holder.set_flags(_fp32_precision=before[name])
        else:
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


def test_a_setting_that_followed_its_parent_follows_it_afterwards():
    """Each in turn is given its parent's value by inheritance alone; a restored copy of that value would stay behind."""
    names = [name for name in SETTINGS if name != "all"]
    for name in names:
        SETTINGS[name].fp32_precision = "none"
    torch.backends.fp32_precision = "tf32"
    followers = {name: SETTINGS[name].fp32_precision for name in names}
    assert set(followers.values()) == {"tf32"}
    for block in (strict_float32, lambda: float32_precision("tf32")):
        with block():
            pass
        torch.backends.fp32_precision = "ieee"
        assert {SETTINGS[name].fp32_precision for name in names} == {"ieee"}
        torch.backends.fp32_precision = "tf32"


def test_one_dnn_apart_from_all_is_restored():
    torch.backends.fp32_precision = "tf32"
    torch.backends.mkldnn.set_flags(_fp32_precision="ieee")
    before = state()
    assert (before["all"], before["mkldnn"]) == ("tf32", "ieee")
    with strict_float32():
        pass
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


GPU = {name: "tf32" for name in SETTINGS if not name.startswith("mkldnn")}
TF32 = {**dict.fromkeys(SETTINGS, "ieee"), **GPU, "flags": (True, False)}


def test_tf32_is_for_gpus_alone_and_restored():
    torch.backends.mkldnn.conv.fp32_precision = "bf16"
    before = state()
    with float32_precision("tf32"):
        assert state() == TF32
        assert effective_precision("cuda") == "TF32"
        assert effective_precision("cpu") == "strict float32"
    assert state() == before


def test_the_two_precisions_nest():
    before = state()
    with float32_precision("tf32"):
        with strict_float32():
            assert state() == STRICT
            with float32_precision("tf32", exhaustive=True):
                assert state() == {**TF32, "flags": (False, True)}
            assert state() == STRICT
        assert state() == TF32
    assert state() == before


def test_an_unknown_precision_is_refused_before_anything_changes():
    before = state()
    with pytest.raises(UsageError, match="'fp8' is unknown"), float32_precision("fp8"):
        pass
    assert state() == before


def test_settings_in_effect_are_read_back_and_not_remembered():
    with strict_float32():
        assert effective_precision("cuda") == "strict float32"
        torch.backends.cudnn.conv.fp32_precision = "tf32"  # as a user's forward may do
        assert effective_precision("cuda") == "cuda.matmul strict float32, cudnn.conv TF32, cudnn.rnn strict float32"


@pytest.mark.parametrize(
    ("value", "precision", "message"),
    [
        (None, "float32", None),
        (None, "tf32", None),
        ("0", "float32", None),
        ("0", "tf32", "NVIDIA_TF32_OVERRIDE=0"),
        ("1", "float32", "NVIDIA_TF32_OVERRIDE=1"),
        ("1", "tf32", None),
    ],
)
def test_the_driver_s_variable_goes_before_settings(monkeypatch, value, precision, message):
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    if value is not None:
        monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", value)
    found = override_problem(precision)
    assert found is None if message is None else message in found


#: Changes of the older flags before; each in a separate process, since torch keeps them.
OLDER = (
    "pass",
    "b.cuda.matmul.allow_tf32 = True",
    "b.cuda.matmul.allow_tf32 = False",
    "b.cudnn.allow_tf32 = True",
    "b.cudnn.allow_tf32 = False",
    "b.cuda.matmul.allow_tf32 = True; b.cudnn.allow_tf32 = False",
    "torch.set_float32_matmul_precision('high')",
    "torch.set_float32_matmul_precision('medium')",
)
SCRIPT = """
import torch
from bnexport.reproducibility import float32_precision
b = torch.backends
def state():
    holders = b, b.cuda.matmul, b.cudnn, b.cudnn.conv, b.cudnn.rnn, b.mkldnn, b.mkldnn.matmul, b.mkldnn.conv, b.mkldnn.rnn
    older = [value_of(lambda: b.cuda.matmul.allow_tf32), value_of(lambda: b.cudnn.allow_tf32)]
    return [holder.fp32_precision for holder in holders], older, value_of(torch.get_float32_matmul_precision)
def value_of(read):
    try:
        return read()
    except RuntimeError:  # a user can contradict himself, too
        return RuntimeError
for lines in {older!r}:
    exec(lines)
    before = state()
    for precision in "float32", "tf32":
        try:
            with float32_precision(precision):
                assert b.cuda.matmul.fp32_precision == {{"float32": "ieee", "tf32": "tf32"}}[precision]
                raise KeyError
        except KeyError:
            pass
        assert state() == before, (lines, precision, state(), before)
"""


@pytest.mark.parametrize("first", OLDER)
def test_users_of_the_older_flags_keep_their_state(first):
    """torch raises RuntimeError where an older flag is read that contradicts the new settings."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(older=(first, *OLDER))], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
