"""The comparison of ways to train: the measurement, its ratios, and its page."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.training import __main__ as training_speed
from benchmarks.training.__main__ import OPERATIONS_PER_IMAGE, TrainingSpeeds, main, measure, speed_page
from benchmarks.training.ways import WAYS, epochs_of, gemm_rate
from bnexport.errors import RuntimeUnavailable
from bnexport.nn.lenet import bn_lenet


def children(monkeypatch, rates):
    """Stand-ins for the measuring processes: name -> one list of rates per round, or an error."""
    measured = []

    def child(name, seconds):
        measured.append(name)
        found = rates[name].pop(0)
        if isinstance(found, Exception):
            raise found
        return found, 2

    monkeypatch.setattr(training_speed, "_in_child", child)
    return measured


def test_ratios_are_of_one_round(monkeypatch):
    measured = children(
        monkeypatch,
        {"gemm": [[1e11], [2e11]], "chapter-4": [[100.0, 90.0], [50.0]], "bnexport": [[400.0], [300.0, 350.0]]},
    )
    speeds = measure(["bnexport"], rounds=2, seconds=1.0)
    assert measured == ["gemm", "chapter-4", "bnexport"] * 2
    assert speeds.ratios == {"chapter-4": [1.0, 1.0], "bnexport": [4.0, 7.0]}
    assert speeds.rates["bnexport"] == [400.0, 300.0, 350.0]
    assert list(speeds.gemm) == [1e11, 2e11]


def test_a_way_that_fails_is_named_and_the_others_continue(monkeypatch):
    broken = RuntimeUnavailable("no compiler", remedy="Install one")
    children(
        monkeypatch, {"gemm": [[1e11]] * 2, "chapter-4": [[1.0]] * 2, "one-thread": [broken], "plain": [[3.0]] * 2}
    )
    speeds = measure(["one-thread", "plain"], rounds=2)
    assert speeds.failed == {"one-thread": "no compiler"}
    assert speeds.ratios["plain"] == [3.0, 3.0]
    assert "not measured, no compiler" in speed_page(speeds, "a machine")


def test_without_the_baseline_there_is_nothing_to_compare(monkeypatch):
    children(monkeypatch, {"gemm": [[1e11]], "chapter-4": [RuntimeUnavailable("no data", remedy="Get it")]})
    with pytest.raises(RuntimeUnavailable, match="no data"):
        measure(["plain"])


def test_the_page_states_the_distance_from_the_limit():
    speeds = TrainingSpeeds(
        {"chapter-4": [10.0], "bnexport": [25000.0]}, {"chapter-4": [1.0], "bnexport": [5.0]}, dict.fromkeys(WAYS, 2),
        [OPERATIONS_PER_IMAGE * 100000],
    )  # fmt: skip
    page = speed_page(speeds, "a machine")
    assert "100,000 images/s" in page
    assert "25% of it" in page
    assert "| 25,000 | 25,000 | 1 | 5.00 (5.00 to 5.00) | yes |" in page
    assert "a machine." in page


def test_the_operations_are_those_of_the_network():
    counted = 0

    def count(module, args, output):
        nonlocal counted
        inputs = module.weight[0].numel()
        counted += 2 * inputs * output.numel()

    network = bn_lenet().eval()
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    network(torch.zeros(1, 1, 28, 28))
    assert pytest.approx(3 * counted, rel=0.001) == OPERATIONS_PER_IMAGE


def test_an_epoch_that_warms_up_is_not_counted():
    taken = []
    rates, threads = epochs_of(lambda: lambda: taken.append(1) or 100)(0.0)
    assert len(taken) == 3
    assert len(rates) == 2
    assert min(rates) > 0
    assert threads == torch.get_num_threads()
    assert gemm_rate(side=8, repeats=3) > 0


def test_a_child_without_data_reports_it(monkeypatch, tmp_path):
    monkeypatch.setenv("BNEXPORT_DATA", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(RuntimeUnavailable, match="is missing"):
        training_speed._in_child("plain", 0.0)


@pytest.mark.slow
@pytest.mark.needs("data")
def test_a_real_child_measures():
    rates, _ = training_speed._in_child("bnexport", 0.0)
    assert len(rates) == 2
    assert all(rate > 0 for rate in rates)


def test_the_committed_page_holds_every_way():
    page = (Path(__file__).parents[2] / "docs" / "results" / "training_speed.md").read_text(encoding="utf-8")
    assert all(f"| {way.words} |" in page for way in WAYS.values())


def test_the_script_refuses_an_unknown_way(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["training", "tpu"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    assert "unknown way tpu" in capsys.readouterr().err
