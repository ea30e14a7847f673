"""Random graphs: a folded network computes the same, and every BatchNorm has a row in the fold report."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, note, seed, settings
from hypothesis import strategies as st
from support.random_graphs import Program, programs
from torch import nn

import bnexport
from bnexport.folding.fold_report import GONE, OUTCOMES


def calls_of(program: Program, inputs: torch.Tensor) -> list[str]:
    """Return the module paths of the BatchNorm calls of one run, counted without any of bnexport's code."""
    found: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda _module, _inputs, name=name: found.append(name))
        for name, module in program.named_modules()
        if isinstance(module, nn.BatchNorm2d)
    ]
    with torch.no_grad():
        program(inputs)
    for handle in handles:
        handle.remove()
    return found


#: 500 graphs in 25 parts with a seed each, so that a red run is red again; scripts/check runs the first part.
PARTS = range(25)


@pytest.mark.sampled(len(PARTS))
@pytest.mark.parametrize("part", PARTS)
def test_random_graphs_are_folded_exactly(part: int) -> None:
    seed(part)(check)()


@settings(
    max_examples=20,
    deadline=None,
    database=None,
    phases=[Phase.generate],  # a failure shows its program; shrinking it would take minutes
    suppress_health_check=list(HealthCheck),
)
@given(programs(), st.booleans(), st.sampled_from([1.0, 1.1, 3.0]))
def check(program: Program, clamps: bool, max_growth: float) -> None:
    note(f"steps {[name for name, _ in program.steps]}, outputs {program.outputs}, input {program.input_shape}")
    channels = program.input_shape
    inputs = torch.randn(2, *channels, generator=torch.Generator().manual_seed(1))
    result = bnexport.fold(program, inputs, clamps=clamps, max_growth=max_growth)
    report = result.report
    assert report.warnings == ()
    assert report.error <= 1e-12
    calls = calls_of(program, inputs)
    assert [row.module for row in report.rows] == calls
    for row in report.rows:
        assert row.outcome in OUTCOMES
        assert bool(row.reason) == (row.outcome not in GONE)
        assert row.error is None or row.error <= 1e-12
    assert report.growth <= max_growth + 1e-9
    # Once more without bnexport's own proof: another batch, other numbers, the weights as they were written.
    probe = torch.randn(3, *channels, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with torch.no_grad():
        expected, have = program.double()(probe.clone()), result.model.double()(probe.clone())
    for want, got in zip(expected, have, strict=True):
        assert float((got - want).abs().max()) <= 1e-5 * max(float(want.abs().max()), 1e-6)
