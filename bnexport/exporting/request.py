"""The options of an export: the bundle's folder, the network's inputs, the properties of the files.

``--help`` reads this module, so it imports neither torch nor onnx before they are needed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnexport.bundle import STORED_PRECISIONS
from bnexport.data.catalogue import folder_of
from bnexport.errors import ExportError, UsageError
from bnexport.optional import one_line
from bnexport.request_fields import option
from bnexport.tensors import DTYPES

if TYPE_CHECKING:
    import torch
    from torch import Tensor

#: Opset 18 with IR version 8 is read by ONNX Runtime 1.14 and newer, and so by the serving images in use.
DEFAULT_OPSET = 18
DEFAULT_IR_VERSION = 8
#: Older operator sets lack what the exporter writes, and onnx's converter has no adapters for much of it.
OLDEST_OPSET = 17
_FORMATS = ("onnx", "torchscript", "exported-program")

#: The first operator set whose Conv, pooling and so on take bfloat16.
BFLOAT16_OPSET = 22
_INPUT = re.compile(r"(?:(?P<name>[A-Za-z_]\w*)=)?(?P<shape>\d+(?:x\d+)*|scalar)(?::(?P<dtype>\w+))?")


@dataclass(frozen=True)
class OnnxTarget:
    """The version of an ONNX file.

    Attributes:
        opset: Version of the default operator set.
        ir_version: Version of the file format; None: the lowest that the opset allows, at least 8.
    """

    opset: int = option("ONNX operator set.", DEFAULT_OPSET)
    ir_version: int | None = option("ONNX file format.  [default: lowest possible, at least 8]", None)

    def resolved_ir_version(self) -> int:
        """Return the IR version to write.

        Raises:
            ExportError: The opset is unknown, or needs a newer IR version than the requested one.
        """
        import onnx

        newest = onnx.defs.onnx_opset_version()
        if not OLDEST_OPSET <= self.opset <= newest:
            raise ExportError(
                f"opset {self.opset} is not one of {OLDEST_OPSET} to {newest}", remedy=f"Use --opset {DEFAULT_OPSET}"
            )
        lowest = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", self.opset)])
        if self.ir_version is None:
            return max(lowest, DEFAULT_IR_VERSION)
        if not lowest <= self.ir_version <= onnx.IR_VERSION:
            raise ExportError(
                f"IR version {self.ir_version} does not go with opset {self.opset} (possible: {lowest} to {onnx.IR_VERSION})",
                remedy="Leave --ir-version out, or choose an older --opset",
            )
        return self.ir_version


@dataclass(frozen=True)
class ExportRequest:
    """The options of an export. A field with a ``help`` is an option of the command line too (``cli/options.py``).

    Attributes:
        model_options: Named arguments of the network's constructor or factory: ``{"num_classes": 10}``.
        inputs: One text per input: ``[NAME=]SHAPE[:TYPE]``, the shape of one sample: "1x28x28", "tokens=16:int64". Empty:
            the checkpoint's.
        dynamic_size: Let height and width of image inputs vary, as the batch does.
        max_growth: Upper bound on parameter growth by a fold, as for ``folding.fold``.
        clamps: Fold across ReLU, at the price of a bound per channel, as for ``folding.fold``.
        precision: A row of ``bundle.STORED_PRECISIONS``.
        labels: Class names in the order of the logits; None: the checkpoint's.
        preprocessing: JSON of the preprocessing; None: that of the checkpoint or of the network's package.
        dataset: Data set whose test images the verification uses; None: the checkpoint's.
        data_dir: Folder of the data set; None: the usual places.
        thorough: Verify on at least 16 samples of each kind, however large the network is.
        onnx: Operator set and file format.
        formats: Names from ``exporting.formats.FORMATS``.
        allow_untrained: Accept BatchNorm layers that were never trained.
        force: Replace an existing bundle.
    """

    model_options: Mapping[str, Any] = option(
        "For its constructor; repeatable.", dict, flag="--model-option", metavar="KEY=VALUE"
    )
    inputs: tuple[str, ...] = option(
        "One sample, as 1x28x28; repeatable.", (), flag="--input", metavar="[NAME=]SHAPE[:TYPE]"
    )
    dynamic_size: bool = option("Let height and width of image inputs vary, as the batch does.", False)
    max_growth: float = option("How much larger the weights may become by copies.", 1.1)
    clamps: bool = option("Fold across ReLU too: a bound per channel instead of a BatchNorm.", False)
    precision: str = option(
        "Of weights and arithmetic in the files; inputs and outputs keep their types.",
        "float32",
        choices=tuple(STORED_PRECISIONS),
    )
    labels: tuple[str, ...] | None = option("Text file with one class name per line.", None)
    preprocessing: Mapping[str, Any] | None = None
    dataset: str | None = option("Verify on its test images (a checkpoint names its own).", None)
    data_dir: Path | None = option("Folder of data sets.", None)
    thorough: bool = option("Verify at least 16 samples of each kind, however large the network is.", False)
    onnx: OnnxTarget = field(default_factory=OnnxTarget)
    formats: tuple[str, ...] = option(
        "Write only this; repeatable.  [default: all]", _FORMATS, flag="--format", choices=_FORMATS
    )
    allow_untrained: bool = option("Accept BatchNorm layers that were never trained.", False)
    force: bool = option("Replace an existing bundle.", False)

    def images_at(self, dataset: str | None) -> Path | None:
        """Folder of the images for the verification of an export: ``data_dir``, or the folder that the data set itself is.

        An untrusted bundle may name any folder, so ``verify`` reads one only on request; here the user names it.
        """
        folder = None if dataset is None else folder_of(dataset)
        return self.data_dir or (folder if folder is not None and folder.is_dir() else None)

    def __post_init__(self) -> None:
        if self.precision not in STORED_PRECISIONS:
            raise UsageError(
                f"the precision {self.precision!r} is not known", remedy=f"Known: {', '.join(STORED_PRECISIONS)}"
            )
        if self.precision == "bfloat16" and self.onnx.opset < BFLOAT16_OPSET:
            raise UsageError(
                f"operator set {self.onnx.opset} has no convolution in bfloat16",
                remedy=f"Pass --opset {BFLOAT16_OPSET}",
            )


@dataclass(frozen=True)
class InputSpec:
    """One input of the network, without its batch dimension."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"

    def example(self, batch: int, generator: torch.Generator) -> Tensor:
        """A batch of noise; of zeros for integers and flags, which are valid indices of every table."""
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype)
        if dtype.is_floating_point:
            return torch.randn(batch, *self.shape, generator=generator).to(dtype)
        return torch.zeros(batch, *self.shape, dtype=dtype)


def parse_inputs(texts: tuple[str, ...], *, default_shape: tuple[int, ...] | None = None) -> tuple[InputSpec, ...]:
    """Read ``[NAME=]SHAPE[:TYPE]`` texts. Names default to "input", or "input_0", "input_1", ... for several.

    Raises:
        UsageError: No text and no default, a text of another form, an unknown type, or one name twice.
    """
    if not texts:
        if default_shape is None:
            raise UsageError(
                "the shape of the network's input is not known",
                remedy="Pass --input with one sample's shape, as 1x28x28",
            )
        return (InputSpec("input", default_shape),)
    specs = tuple(_parse(text, "input" if len(texts) == 1 else f"input_{index}") for index, text in enumerate(texts))
    if len({spec.name for spec in specs}) != len(specs):
        raise UsageError("two inputs have the same name", remedy="Name them apart: --input a=1x28x28 --input b=10")
    return specs


def _parse(text: str, default_name: str) -> InputSpec:
    match = _INPUT.fullmatch(text)
    if match is None:
        raise UsageError(
            f"--input {text!r} is not of the form [NAME=]SHAPE[:TYPE]", remedy="Write it as 1x28x28 or tokens=16:int64"
        )
    shape = () if match["shape"] == "scalar" else tuple(map(int, match["shape"].split("x")))
    dtype = match["dtype"] or "float32"
    if dtype not in DTYPES:
        raise UsageError(f"--input {text!r} has the unknown type {dtype!r}", remedy=f"Known: {', '.join(DTYPES)}")
    if 0 in shape:
        raise UsageError(f"--input {text!r} has a dimension of size 0", remedy="Give the shape of one sample")
    return InputSpec(match["name"] or default_name, shape, dtype)


def example_inputs(specs: tuple[InputSpec, ...], *, batch: int = 2, seed: int = 0) -> tuple[Tensor, ...]:
    """One example batch; of 2 samples, because exporters take a batch of 1 for a constant."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    try:
        return tuple(spec.example(batch, generator) for spec in specs)
    except RuntimeError as error:  # torch's allocator raises no class of its own
        raise UsageError(
            f"an example input can't be made: {one_line(error)}", remedy="Check the sizes given with --input"
        ) from error


def fitted_preprocessing(
    preprocessing: Mapping[str, Any] | None, specs: tuple[InputSpec, ...]
) -> Mapping[str, Any] | None:
    """Return a source's preprocessing for the requested inputs: another size is used; other channels give None."""
    if preprocessing is None or len(specs) != 1 or len(specs[0].shape) != 3:
        return None
    channels, height, width = specs[0].shape
    if channels != preprocessing.get("channels"):
        return None
    return {**preprocessing, "height": height, "width": width}


def model_and_version(out: Path) -> tuple[str, int]:
    """Return name and version from ``models/<name>/<version>``.

    Raises:
        UsageError: The last part is not a positive integer, or the name before it is missing.
    """
    absolute = Path(out).absolute()
    version, name = absolute.name, absolute.parent.name
    if not re.fullmatch(r"[1-9]\d{0,17}", version) or not re.fullmatch(r"[A-Za-z0-9][\w.\-]*", name):
        raise UsageError(
            f"{out} is not of the form FOLDER/<name>/<version>, with a name of letters, digits and . _ - and a version"
            " from 1 upwards",
            remedy="A model repository needs that layout: pass --out models/my_model/1",
        )
    return name, int(version)
