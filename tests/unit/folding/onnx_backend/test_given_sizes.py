"""Sizes that a file leaves open: numbers for them, shapes computed from shapes, and proofs that have something to compare."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto
from support.onnx_builder import Builder

import bnexport
from bnexport.cli.main import run
from bnexport.errors import UsageError
from bnexport.folding.onnx_backend.onnx_constants import Shapes
from bnexport.folding.onnx_backend.onnx_proof import _other_sizes, evaluator
from bnexport.folding.onnx_backend.onnx_proof import run as evaluate


def flattened_by_shape() -> ModelProto:
    """A Reshape whose target is computed by operators that onnx's inference does not follow, then a Conv and its norm."""
    g = Builder(opset=12)
    y = g.node("Sigmoid", g.input("n", 3, "height", "width"))
    sizes = g.node("Cast", g.node("Cast", g.node("Shape", y), to=1), to=7)
    n = g.node("Slice", sizes, g.init("zero", value=[0]), g.init("one", value=[1]))
    y = g.node("Reshape", y, g.node("Concat", n, g.init("rest", value=[3, -1]), axis=0))
    g.output(g.node("Tanh", g.bn(g.conv(y, 3, 6, 1, dims=1), 6)), rank=3)
    return g.model()


def only_48_high() -> ModelProto:
    """A file that declares its height open, and works for 48 alone: a Reshape needs it."""
    g = Builder(opset=13)
    y = g.node("Sigmoid", g.input("n", 3, "height", "width"))
    y = g.node("Reshape", g.node("Transpose", y, perm=[0, 3, 1, 2]), g.init("s", value=[-1, 40, 3, 48]))
    y = g.node("Transpose", y, perm=[0, 2, 3, 1])
    g.output(g.node("Tanh", g.bn(g.conv(y, 3, 6), 6)), rank=4)
    return g.model()


def test_values_computed_from_shapes_are_evaluated():
    model = flattened_by_shape()
    result = bnexport.fold_onnx(model)
    assert [row.outcome for row in result.report.rows] == ["backward"]
    assert result.report.error <= 1e-12


def test_given_sizes_are_used_for_shapes_and_proof_and_stay_open_in_the_file():
    model = only_48_high()
    result = bnexport.fold_onnx(model, inputs={"x": (3, 48, 40)})
    assert [row.outcome for row in result.report.rows] == ["backward"]
    assert not result.report.warnings
    assert result.report.error <= 1e-12
    dims = result.model.graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in dims] == ["n", 3, "height", "width"]
    feeds = {"x": np.random.default_rng(0).standard_normal((3, 3, 48, 40))}
    (before,), (after,) = evaluate(evaluator(model), feeds), evaluate(evaluator(result.model), feeds)
    assert np.abs(before - after).max() <= 1e-5 * np.abs(before).max()


def test_without_them_the_whole_can_not_be_compared_and_the_fold_does_not_fail():
    report = bnexport.fold_onnx(only_48_high()).report
    assert report.error is None or report.error <= 1e-12
    assert not any("failed its proof" in text for text in (*report.warnings, *(row.reason for row in report.rows)))


def test_the_batch_is_never_taken_for_fixed():
    shapes = Shapes(only_48_high(), {"x": (3, 48, 40)})
    for name in ("reshape2_out", "transpose3_out", "conv_out"):
        shape = shapes.of(name)
        assert shape is not None
        assert not isinstance(shape[0], int), name


def test_given_sizes_make_no_map_of_constants():
    """A shift behind zero padding could become one number per position, for one size alone."""
    g = Builder(opset=13)
    y = g.bn(g.node("Sigmoid", g.input("n", 3, "h", "w")), 3)
    g.output(g.conv(y, 3, 2, name="conv", pads=[1] * 4, strides=[4, 4]), rank=4)
    result = bnexport.fold_onnx(g.model(), inputs={"x": (3, 8, 8)}, max_growth=10.0)
    assert [row.outcome for row in result.report.rows] == ["affine"]
    feeds = {"x": np.random.default_rng(0).standard_normal((1, 3, 24, 16))}
    (before,), (after,) = evaluate(evaluator(g.model()), feeds), evaluate(evaluator(result.model), feeds)
    assert np.abs(before - after).max() <= 1e-5 * np.abs(before).max()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"x": (4, 48, 40)}, "does not fit 'x'"),
        ({"x": (3, 48)}, "does not fit"),
        ({"a": (3,), "b": (3,)}, "the inputs x"),
    ],
)
def test_sizes_that_do_not_fit(inputs: dict[str, tuple[int, ...]], message: str):
    with pytest.raises(UsageError, match=message):
        bnexport.fold_onnx(only_48_high(), inputs=inputs)


def test_input_is_heeded_for_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    onnx.save(only_48_high(), tmp_path / "in.onnx")
    out = tmp_path / "out.onnx"
    arguments = ["fold-and-export", str(tmp_path / "in.onnx"), "--out", str(out)]
    assert run([*arguments, "--input", "x=3x48x40", "--json"]) == 0, capsys.readouterr()
    fold = json.loads(capsys.readouterr().out)["fold"]
    assert [row["outcome"] for row in fold["rows"]] == ["backward"]
    assert fold["error"] is not None
    assert run([*arguments, "--force", "--input", "x=4x48x40"]) == 2
    assert "does not fit 'x'" in capsys.readouterr().err


def test_the_other_sizes_of_a_proof_are_larger_than_the_given_ones() -> None:
    """Smaller ones would leave out what reads beyond the given size."""
    g = Builder()
    g.output(g.node("Relu", g.input("n", 3, "height", "width")), rank=4)
    found = _other_sizes(evaluator(g.model()), g.model(), {"x": (3, 40, 48)})
    assert found[0]["x"].shape == (2, 3, 72, 80)
