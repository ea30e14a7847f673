"""Values of the command line converted to the library's values."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import click

from bnexport.data.catalogue import DATASETS, FOLDER, is_dataset
from bnexport.data.preprocessing import Preprocessing
from bnexport.errors import UsageError
from bnexport.exporting.formats import FORMATS
from bnexport.exporting.onnx_graph import OnnxTarget
from bnexport.exporting.request import ExportRequest, parse_inputs
from bnexport.optional import one_line


def export_request(
    *,
    inputs: tuple[str, ...],
    labels: Path | None,
    mean: str | None,
    std: str | None,
    dataset: str | None,
    data_dir: Path | None,
    model_options: tuple[str, ...],
    dynamic_size: bool,
    max_growth: float,
    clamps: bool,
    precision: str,
    opset: int,
    ir_version: int | None,
    formats: tuple[str, ...],
    allow_untrained: bool,
    force: bool,
) -> ExportRequest:
    """The request that the options of fold-and-export stand for.

    Raises:
        UsageError: Values that do not go together, or that can't be read.
    """
    if formats and "onnx" not in formats:
        raise UsageError("a bundle without model.onnx can't be verified", remedy="Add --format onnx")
    return ExportRequest(
        inputs=inputs,
        labels=None if labels is None else read_labels(labels),
        dataset=dataset,
        preprocessing=preprocessing(inputs, mean, std),
        model_options=read_model_options(model_options),
        dynamic_size=dynamic_size,
        max_growth=max_growth,
        clamps=clamps,
        precision=precision,
        onnx=OnnxTarget(opset, ir_version),
        formats=formats or tuple(row.name for row in FORMATS),
        allow_untrained=allow_untrained,
        force=force,
        data_dir=data_dir,
    )


def read_model_options(texts: tuple[str, ...]) -> dict[str, bool | int | float | str]:
    """``KEY=VALUE`` texts as a constructor's named arguments: whole numbers, numbers, true and false, else text.

    Raises:
        UsageError: A text of another form, or one key twice.
    """
    options: dict[str, bool | int | float | str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise UsageError(
                f"--model-option {text!r} is not of the form KEY=VALUE", remedy="Write it as num_classes=10"
            )
        if key in options:
            raise UsageError(f"--model-option {key} is given twice", remedy="Give each option once")
        options[key] = _value(value)
    return options


def _value(text: str) -> bool | int | float | str:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            if math.isfinite(value := kind(text)):  # JSON, in which the options are kept, has no infinity
                return value
    return text


def read_labels(path: Path) -> tuple[str, ...]:
    """Class names from a text file, one per line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # Windows editors write a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path} can't be read: {one_line(error)}", remedy="Give a text file, one label per line"
        ) from error
    labels = tuple(line.strip() for line in lines if line.strip())
    if not labels:
        raise UsageError(f"{path} holds no label", remedy="Give a text file, one label per line")
    if odd := [label for label in labels if not label.isprintable()]:
        raise UsageError(f"{path} holds the label {odd[0]!r} with control characters", remedy="Give plain text")
    return labels


def preprocessing(inputs: tuple[str, ...], mean: str | None, std: str | None) -> dict[str, Any] | None:
    """Preprocessing of a network that takes one image, when --mean or --std says that it is one."""
    if mean is None and std is None:
        return None
    if len(inputs) != 1 or len(shape := parse_inputs(inputs)[0].shape) != 3:
        raise UsageError("--mean and --std are for one image input", remedy="Pass --input with its shape, as 3x224x224")
    channels, height, width = shape
    means = numbers(mean, "--mean") if mean is not None else (0.0,) * channels
    stds = numbers(std, "--std") if std is not None else (1.0,) * channels
    return Preprocessing(channels, height, width, mean=means, std=stds).to_json()


def numbers(text: str, option: str) -> tuple[float, ...]:
    """A text like "0.485,0.456,0.406" as numbers.

    Raises:
        UsageError: It is not a list of numbers.
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(
            f"{option} {text!r} is not a list of numbers", remedy="Write it as 0.485,0.456,0.406"
        ) from error


class DatasetName(click.Choice[str]):
    """A row of DATASETS, or ``folder:PATH``."""

    def __init__(self) -> None:
        super().__init__(tuple(DATASETS))

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str | None:  # noqa: ARG002
        """The choices for the help."""
        return f"[{'|'.join(DATASETS)}|{FOLDER}PATH]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The name; what is no name is refused with the list of names."""
        if isinstance(value, str) and value not in DATASETS and is_dataset(value):
            return value
        return super().convert(value, param, ctx)

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:  # noqa: ARG002
        """The list of names."""
        return f"{value!r} is not one of {', '.join(DATASETS)}, {FOLDER}PATH."
