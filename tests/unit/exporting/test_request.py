"""Inputs as written on the command line, and the layout of a model repository."""

from pathlib import Path

import pytest
import torch

from bnexport.errors import ExportError, OutputError, UsageError
from bnexport.exporting.export_request import InputSpec, example_inputs, model_and_version, parse_inputs
from bnexport.exporting.signature import signature_of
from bnexport.exporting.triton_config import triton_config, write_triton_config
from bnexport.tensors import Signature, TensorSpec


def test_inputs_are_read() -> None:
    assert parse_inputs(("1x28x28",)) == (InputSpec("input", (1, 28, 28)),)
    assert parse_inputs(("image=3x8x8:float16", "5:int64")) == (
        InputSpec("image", (3, 8, 8), "float16"),
        InputSpec("input_1", (5,), "int64"),
    )
    assert parse_inputs((), default_shape=(1, 28, 28)) == (InputSpec("input", (1, 28, 28)),)
    assert parse_inputs(("scalar",)) == (InputSpec("input", ()),)


@pytest.mark.parametrize(
    "texts", [(), ("",), ("3xx8",), ("3,8,8",), ("0x3",), ("3:complex64",), ("-1x3",), ("a=3", "a=4"), ("3 8",)]
)
def test_other_texts_are_refused(texts: tuple[str, ...]) -> None:
    with pytest.raises(UsageError):
        parse_inputs(texts)


def test_example_is_a_batch_of_two() -> None:
    floats, integers = example_inputs((InputSpec("a", (3, 4)), InputSpec("b", (5,), "int64")))
    assert floats.shape == (2, 3, 4)
    assert float(floats.std()) > 0.1
    assert integers.shape == (2, 5)
    assert integers.dtype == torch.int64


def test_layout_of_a_model_repository() -> None:
    assert model_and_version(Path("models/bn_lenet/12")) == ("bn_lenet", 12)
    for bad in ("models/bn_lenet/v1", "models/bn_lenet/0", "models/bn_lenet/01", "models/bn lenet/1", "/1"):
        with pytest.raises(UsageError):
            model_and_version(Path(bad))


SIGNATURE = Signature(
    (TensorSpec("input", "float32", ("batch", 1, 28, 28)), TensorSpec("flag", "bool", ("batch",))),
    (TensorSpec("logits", "float16", ("batch", "time", 10)),),
)


def test_triton_configuration() -> None:
    text = triton_config("bn_lenet", SIGNATURE, max_batch_size=32)
    assert text.count("{") == text.count("}")
    assert text.count("[") == text.count("]")
    for expected in (
        'name: "bn_lenet"', "max_batch_size: 32", "dims: [ 1, 28, 28 ]", "dims: [ 1 ]\n    reshape: { shape: [ ] }",
        "dims: [ -1, 10 ]", "data_type: TYPE_FP16", "data_type: TYPE_BOOL", 'key: "intra_op_thread_count"',
    ):  # fmt: skip
        assert expected in text


def test_configuration_of_another_version_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "m" / "1").mkdir(parents=True)
    (tmp_path / "m" / "2").mkdir()
    write_triton_config(tmp_path / "m" / "1", "m", SIGNATURE)
    written = (tmp_path / "m" / "config.pbtxt").read_text()
    other = Signature(SIGNATURE.inputs[:1], SIGNATURE.outputs)
    with pytest.raises(OutputError, match="version 1 relies on it"):
        write_triton_config(tmp_path / "m" / "2", "m", other)
    assert (tmp_path / "m" / "config.pbtxt").read_text() == written
    write_triton_config(tmp_path / "m" / "2", "m", other, force=True)
    assert (tmp_path / "m" / "config.pbtxt").read_text() == triton_config("m", other)


@pytest.mark.parametrize("bad", [lambda x: x.sum(), lambda x: x.to(torch.complex64), lambda x: x[:1]])
def test_outputs_without_batch_or_of_odd_types_are_refused(bad: object) -> None:
    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return bad(x)  # type: ignore[operator]

    graph = torch.fx.symbolic_trace(Model())
    with pytest.raises(ExportError):
        signature_of(graph, (torch.randn(2, 3),), input_names=("input",))
