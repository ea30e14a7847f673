from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from benchmarks.clock import Spread
from benchmarks.folding.affine_form import (
    BASE,
    BOUNDS,
    CONTEXTS,
    FORMS,
    Context,
    FormRow,
    Numbers,
    build,
    draw,
    expected,
    measure_forms,
    scores,
    usable_providers,
    winners,
    write_document,
)
from bnexport.environment import environment

CASES = [(context, form) for context in CONTEXTS for form in context.forms]


def run(model: bytes, x: np.ndarray) -> np.ndarray:
    onnx.checker.check_model(onnx.load_model_from_string(model), full_check=True)
    (value,) = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    return np.asarray(value)


def inputs(channels: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((2, channels, 4, 5), dtype=np.float32)


@pytest.mark.parametrize(("context", "form"), CASES, ids=lambda item: getattr(item, "name", item))
def test_every_form_computes_the_affine(context: Context, form: str) -> None:
    numbers, x = draw(context, 6), inputs(6)
    want = expected(context, form, numbers, x)
    assert float(np.abs(run(build(context, form, numbers), x) - want).max() / np.abs(want).max()) < 1e-5


def test_numbers_are_no_identity() -> None:
    numbers = draw(CONTEXTS[0], 64)
    assert (numbers.scale < 0).any()
    assert (numbers.scale == 0).sum() == 1
    assert np.abs(numbers.scale).max() > 3
    assert (draw(Context("x", positive=True), 64).scale > 0).all()


def test_two_bounds_hold_for_both_signs() -> None:
    context = next(item for item in CONTEXTS if item.after == ("Relu", "Conv"))
    positive, x = draw(context, 6), inputs(6)
    mixed = Numbers(positive.scale * np.float32([1, -1, 1, -1, 1, -1]), positive.shift, positive.weight)
    want = expected(context, BASE, mixed, x)
    assert float(np.abs(run(build(context, "two bounds", mixed), x) - want).max() / np.abs(want).max()) < 1e-5
    assert float(np.abs(run(build(context, "one bound", mixed), x) - want).max() / np.abs(want).max()) > 1e-2


def row(form: str, ratio: float, *, provider: str = "CPUExecutionProvider", context: str = "alone") -> FormRow:
    return FormRow(provider, 1, context, "small", 1, form, Spread.of([1e-5]), Spread.of([ratio]), 1e-7)


def test_the_winner_has_the_lowest_geometric_mean() -> None:
    rows = [row(BASE, 1.0), row("Mul and Add", 0.25), row(BASE, 1.0), row("Mul and Add", 2.0), row("one bound", 0.1)]
    rows += [
        row(form, value, provider="CUDAExecutionProvider") for form, value in ((BASE, 1.0), ("depthwise Conv", 1.2))
    ]
    assert scores(rows)["CPUExecutionProvider"] == pytest.approx({BASE: 1.0, "Mul and Add": 0.5**0.5})
    assert winners(rows) == {"CPUExecutionProvider": "Mul and Add", "CUDAExecutionProvider": BASE}


def test_measured_and_written(tmp_path: Path) -> None:
    told: list[str] = []
    rows = measure_forms(
        providers=["CPUExecutionProvider"], contexts=[CONTEXTS[2]], shapes=["small"], batches=[1], threads=[1], rounds=2,
        tell=told.append,
    )  # fmt: skip
    assert [item.form for item in rows] == [*FORMS, *BOUNDS]
    assert all(item.ratio.n == 2 and item.ratio.low > 0 and item.error < 1e-5 for item in rows)
    assert rows[0].ratio == Spread(1.0, 1.0, 1.0, 2)
    assert len(told) == 1
    write_document(rows, tmp_path / "page.md", record=environment(), rounds=2, seed=0)
    text = (tmp_path / "page.md").read_text()
    assert f"| CPUExecutionProvider | **{winners(rows)['CPUExecutionProvider']}** |" in text
    for part in ("n = 2 rounds", "seed 0", "No GPU was there", "### Before Relu (affine, Relu)", "one bound"):
        assert part in text


def test_the_cpu_is_always_there() -> None:
    assert usable_providers()[0] == "CPUExecutionProvider"
