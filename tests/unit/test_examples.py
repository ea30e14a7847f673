"""The Python examples in docstrings of the public API run as they are printed."""

import doctest
import os
from pathlib import Path

import onnx
import pytest
import torch

import bnexport

ROOT = Path(__file__).parents[2]
WITH_EXAMPLE = [name for name in bnexport.__all__ if ">>>" in (getattr(bnexport, name).__doc__ or "")]
#: A convolution and its BatchNormalization.
NETWORK = """
<ir_version: 8, opset_import: ["": 18]>
network (float[N, 3, 8, 8] image) => (float[N, 4, 6, 6] y)
<float[4, 3, 3, 3] weight, float[4] scale, float[4] shift, float[4] mean, float[4] var> {
    x = Conv (image, weight)
    y = BatchNormalization (x, scale, shift, mean, var)
}
"""


def write_network(path: Path) -> None:
    model = onnx.parser.parse_model(NETWORK)
    generator = torch.Generator().manual_seed(0)
    del model.graph.initializer[:]
    for name, shape in {"weight": (4, 3, 3, 3), **dict.fromkeys(("scale", "shift", "mean", "var"), (4,))}.items():
        value = torch.rand(shape, generator=generator) + 0.5
        model.graph.initializer.append(onnx.numpy_helper.from_array(value.numpy(), name))
    onnx.save(model, path)


@pytest.mark.parametrize("name", WITH_EXAMPLE)
def test_an_example_in_a_docstring_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder with the committed bundle under models/ and an unfolded network.onnx."""
    os.symlink(ROOT / "models", tmp_path / "models")
    write_network(tmp_path / "network.onnx")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    failures: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    tests = doctest.DocTestFinder(recurse=False).find(getattr(bnexport, name), name, globs={"bnexport": bnexport})
    assert any(test.examples for test in tests)
    for test in tests:
        runner.run(test, out=failures.append)
    assert not failures, "".join(failures)


@pytest.mark.parametrize("name", ["fold", "fold_modules", "fold_onnx", "is_folded", "load_folded"])
def test_folding_has_examples(name: str) -> None:
    assert name in WITH_EXAMPLE
