"""BatchNorm over several processes: what one process computes with the whole batch, in float64."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from synced_child import CASES, Twice, batch, computed, network
from torch import nn

from bnexport.errors import FeedError, ModelError
from bnexport.nn.batch_norm import BatchNorm
from bnexport.nn.synced_batch_norm import SyncedBatchNorm, SyncedScratchBatchNorm, _normalised, synchronised

ROOT = Path(__file__).parents[3]


def start(size, folder):
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    script = Path(__file__).parent / "synced_child.py"
    children = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(size), str(folder)],
            env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(size)
    ]  # fmt: skip
    try:
        for child in children:
            _, error = child.communicate(timeout=120)
            assert child.returncode == 0, error
    finally:
        for child in children:
            child.kill()
            child.communicate()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(size)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return functools.cache(lambda size: start(size, tmp_path_factory.mktemp("meeting")))


SIZES = {case: len(parts) for case, (_, _, parts) in CASES.items()}


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.slow] * (SIZES[case] > 2)) for case in CASES])
def test_several_processes_compute_what_one_does(results, case):
    parts = [found[case] for found in results(SIZES[case])]
    whole = computed(network(case), *batch(case))
    together = {name: torch.cat([part[name] for part in parts]) for name in ("Y", "grad X")}
    for name in whole:
        if name in together:
            found = together[name]
        elif name.startswith("grad "):
            found = sum(part[name] for part in parts)
        else:
            found = parts[0][name]
            assert all(torch.equal(found, part[name]) for part in parts), f"the processes differ in {name}"
        scale = whole[name].abs().max()
        # 1e4 of mean over 1e-3 of deviation cost seven of float64's sixteen digits.
        assert (found - whole[name]).abs().max() <= 1e-8 * scale, name


def test_the_cases_distinguish_a_local_batch_norm():
    """Each part normalised by itself is far from the whole: the comparison above can fail."""
    for case in ("2-D", "4-D", "called twice", "scratch 4-D"):
        whole, parts = computed(network(case), *batch(case)), CASES[case][2]
        local = [
            computed(network(case), *pair)
            for pair in zip(*(value.split(parts) for value in batch(case)), strict=True)
            if len(pair[0]) > 1
        ]
        assert not any(torch.allclose(part["Y"], whole["Y"][: len(part["Y"])], rtol=1e-3) for part in local)


def test_replaced_and_kept_layers():
    layers = nn.ModuleDict(
        {"a": nn.BatchNorm2d(3), "none": nn.BatchNorm2d(3, track_running_stats=False), "s": BatchNorm(3, 4),
         "twice": Twice(nn.BatchNorm1d(3)), "i": nn.InstanceNorm2d(3)}
    )  # fmt: skip
    weight = layers["a"].weight
    assert synchronised(layers) is layers
    assert type(layers["a"]) is SyncedBatchNorm
    assert type(layers["s"]) is SyncedScratchBatchNorm
    assert layers["twice"].first is layers["twice"].second
    assert type(layers["twice"].second) is SyncedBatchNorm
    assert type(layers["none"]) is nn.BatchNorm2d
    assert type(layers["i"]) is nn.InstanceNorm2d
    assert layers["a"].weight is weight
    again = dict(layers.named_modules())
    synchronised(layers)
    assert all(module is again[name] for name, module in layers.named_modules())
    assert type(synchronised(nn.BatchNorm1d(2))) is SyncedBatchNorm
    with pytest.raises(ValueError, match="4D input"):
        layers["a"](torch.zeros(2, 3))


class WithRelu(nn.BatchNorm2d):
    def forward(self, X):
        return super().forward(X).relu()


class OwnScratch(BatchNorm):
    def forward(self, X):
        return super().forward(X).relu()


@pytest.mark.parametrize("layer", [WithRelu(3), OwnScratch(3, 4)])
def test_a_layer_whose_forward_does_more_is_refused(layer):
    with pytest.raises(ModelError, match=f"a {type(layer).__name__} does more than BatchNorm") as caught:
        synchronised(nn.Sequential(layer))
    assert "--sync-batch-norm" in caught.value.remedy


def test_one_value_over_all_processes_is_refused(monkeypatch):
    monkeypatch.setattr("bnexport.nn.synced_batch_norm._merged", lambda mean, var, count: (mean, var, count))
    with pytest.raises(FeedError, match=r"1 value\(s\) per channel over all processes"):
        _normalised(torch.ones(1, 3), None, None, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened(monkeypatch, dtype):
    monkeypatch.setattr("bnexport.nn.synced_batch_norm._merged", lambda mean, var, count: (mean, var, count))
    X = (torch.randn(64, 3, generator=torch.Generator().manual_seed(0)) * 0.1 + 8).to(dtype)
    Y, mean, _, _ = _normalised(X, None, None, 1e-5)
    assert Y.dtype == dtype
    assert torch.allclose(mean, X.double().mean(0))
    expected = nn.functional.batch_norm(X.double(), None, None, training=True)
    assert (Y.double() - expected).abs().max() < 0.02
