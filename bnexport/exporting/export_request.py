"""The options of an export: the network's inputs, the properties of the files, and the bundle's folder.

``--help`` reads this module, so it imports neither torch nor onnx before they are needed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnexport.bundle import INPUT_TYPES, INT8_TARGETS, STORED_PRECISIONS
from bnexport.data.classes import check_dataset
from bnexport.data.dataset_table import folder_of
from bnexport.data.datasets import dataset_labels
from bnexport.data.preprocessing import Preprocessing
from bnexport.errors import DataError, ExportError, UsageError
from bnexport.optional import one_line
from bnexport.request_fields import option
from bnexport.tensors import DTYPES, TensorSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

#: ONNX Runtime 1.14 and newer read opset 18 with IR version 8, and so do the serving images in use.
DEFAULT_OPSET = 18
DEFAULT_IR_VERSION = 8
#: Older operator sets lack operators that the exporter writes, and onnx's converter has no adapters for many of them.
OLDEST_OPSET = 17
_FORMATS = ("onnx", "torchscript", "exported-program")

#: The first operator set whose Conv and pooling support bfloat16.
BFLOAT16_OPSET = 22
_INPUT = re.compile(r"(?:(?P<name>[A-Za-z_]\w*)=)?(?P<shape>\d+(?:x\d+)*|scalar)(?::(?P<dtype>\w+))?")


@dataclass(frozen=True)
class OnnxTarget:
    """The version of an ONNX file.

    Attributes:
        opset: Version of the default operator set.
        ir_version: Version of the file format; None: the lowest that the opset allows, at least 8.
    """

    opset: int = option("Version of the ONNX operator set.", DEFAULT_OPSET)
    ir_version: int | None = option("Version of the ONNX file format.  [default: lowest possible, at least 8]", None)

    def resolved_ir_version(self) -> int:
        """Return the IR version to write, or refuse the requested one if the opset needs a newer one."""
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
                f"IR version {self.ir_version} is not valid with opset {self.opset} (possible: {lowest} to {onnx.IR_VERSION})",
                remedy="Leave --ir-version out, or choose an older --opset",
            )
        return self.ir_version


@dataclass(frozen=True)
class ExportRequest:
    """The options of an export. A field with a ``help`` is an option of the command line too (``cli/options.py``).

    Attributes:
        weights_key: The set of weights to take from a weights file with several, or the prefix of the names to take.
        model_options: Named arguments of the network's constructor or factory: ``{"num_classes": 10}``.
        inputs: One text per input: ``[NAME=]SHAPE[:TYPE]``, the shape of one sample: "1x28x28", "tokens=16:int64". Empty:
            the checkpoint's.
        dynamic_size: Let height and width of image inputs vary, as the batch does.
        max_growth: Upper bound on parameter growth by a fold, as for ``folding.fold``.
        clamps: Fold across ReLU, at the price of a bound per channel, as for ``folding.fold``.
        precision: A row of ``bundle.STORED_PRECISIONS``. "int8" writes model.onnx and its float32 original alone.
        input_type: One of ``bundle.INPUT_TYPES``. "uint8": the files take pixels from 0 to 255, channels first, and contain the
            preprocessing, except decoding and resizing.
        pack_pools: Write model.onnx alone, rewritten by ``onnx_files.packed_pools``; UsageError if it has no such pooling.
        calibrate: Source of the int8 ranges: "none" for BatchNorm's gamma and beta, a data set, a folder of images, or an .npy
            or .npz file; None: BatchNorm, or the data set where that is not enough.
        target: One of ``bundle.INT8_TARGETS``.
        allow_flips: Largest share of labels that int8 may change, as 0.01 or "1%"; None: judged by what the margins predict.
        float_layers: Layers that stay in float in an int8 file.
        labels: Class names in the order of the logits; None: the checkpoint's.
        rename_classes: The labels are new names for the data set's classes, in the order of the data set.
        preprocessing: How an image becomes an input, or its JSON, in which form it is kept; None: that of the checkpoint or
            of the network's package.
        mean: Per channel, of pixels from 0 to 1, with ``std``, in place of ``preprocessing``.
        std: Per channel, of pixels from 0 to 1.
        dataset: Data set whose test images the verification uses; None: the checkpoint's.
        data_dir: Folder of the data set; None: the usual places.
        thorough: Verify on at least 16 samples of each kind, however large the network is.
        onnx: Operator set and file format.
        formats: Names from ``exporting.formats.FORMATS``.
        allow_untrained: Accept BatchNorm layers that were never trained, and an accuracy at chance.
        allow_low_accuracy: Accept a network whose accuracy on labelled images is at or below chance (``data.classes``).
        allow_nonfinite: Names of parameters that may hold infinities, and of buffers that may hold NaN. Buffers that are not
            moving statistics may always hold infinities.
        force: Replace an existing bundle.
    """

    weights_key: str | None = option("Name of the set of weights, if the file has several.", None, metavar="NAME")
    model_options: Mapping[str, Any] = option(
        "Argument of the network's constructor. Repeatable.", dict, flag="--model-option", metavar="KEY=VALUE"
    )
    inputs: tuple[str, ...] = option(
        "Shape of one sample, as 1x28x28. Repeatable.", (), flag="--input", metavar="[NAME=]SHAPE[:TYPE]"
    )
    dynamic_size: bool = option("Let height and width of image inputs vary, as the batch does.", False)
    max_growth: float = option("Upper bound on parameter growth by copies, as a factor.", 1.1)
    clamps: bool = option("Fold across ReLU too, which leaves a bound per channel instead of a BatchNorm.", False)
    precision: str = option(
        "Precision of weights and arithmetic in the files. Inputs and outputs keep their types.",
        "float32",
        choices=tuple(STORED_PRECISIONS),
    )
    input_type: str = option(
        "Type of the input. uint8: the files take pixels from 0 to 255, and apply mean and std themselves.",
        "float32",
        choices=INPUT_TYPES,
    )
    pack_pools: bool = option(
        "Write model.onnx alone, with convolutions for average pools of few channels: faster on CPUs.", False
    )
    calibrate: str | None = option(
        "With --precision int8: source of the ranges: none (BatchNorm), a data set, a folder, or an .npy or .npz file.",
        None,
        metavar="DATASET|PATH|none",
    )
    target: str = option("With --precision int8: engine that the file is for.", "cpu", choices=INT8_TARGETS)
    allow_flips: float | str | None = option(
        "With --precision int8: share of labels that may change, such as 1%.", None, metavar="SHARE"
    )
    float_layers: tuple[str, ...] = option(
        "With --precision int8: layer that stays in float. Repeatable.", (), metavar="NAME"
    )
    labels: tuple[str, ...] | None = option("Text file with one class name per line.", None)
    rename_classes: bool = option("Take --labels as new names of the data set's classes, in the same order.", False)
    preprocessing: Preprocessing | Mapping[str, Any] | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    dataset: str | None = option("Data set whose test images the verification uses.  [default: the checkpoint's]", None)
    data_dir: Path | None = option("Folder of the data set's files.", None)
    thorough: bool = option("Compare at least 16 samples of each kind, also of a large network.", False)
    onnx: OnnxTarget = field(default_factory=OnnxTarget)
    formats: tuple[str, ...] = option(
        "Format to write. Repeatable.  [default: all]", _FORMATS, flag="--format", choices=_FORMATS
    )
    allow_untrained: bool = option("Accept BatchNorm layers that were never trained.", False)
    allow_low_accuracy: bool = option("Accept a network whose accuracy is at or below chance.", False)
    allow_nonfinite: tuple[str, ...] = option(
        "Tensor that may hold infinities, as a mask does. Repeatable.", (), metavar="NAME"
    )
    force: bool = option("Replace an existing bundle.", False)

    def images_at(self, dataset: str | None, *, usable: bool = True) -> Path | None:
        """Return the folder of the images for the verification of an export: ``data_dir``, or a data set that is a folder.

        An untrusted bundle may name any folder, so ``verify`` reads a folder only on request; here the user names it. A
        checkpoint's folder is left out if it is missing, or if its images are not ``usable`` as inputs.
        """
        folder = None if dataset is None else folder_of(dataset)
        there = folder is not None and (dataset == self.dataset or (usable and folder.is_dir()))
        return self.data_dir or (folder if there else None)

    def check_dataset(
        self,
        dataset: str | None,
        *,
        preprocessing: Mapping[str, Any] | None,
        labels: tuple[str, ...] | None,
        scores: int | None = None,
    ) -> None:
        """Refuse a given data set or folder that can't be used. ``dataset`` is the given data set, or the checkpoint's."""
        if self.dataset is None and self.data_dir is None:
            return
        if dataset is None:
            raise UsageError("--data-dir is given without a data set", remedy="Pass --dataset, too")
        names = None if self.rename_classes else labels
        place = self.images_at(dataset)
        remedy = "Pass --mean and --std, which go with one image input, or leave --dataset out"
        check_dataset(dataset, preprocessing=preprocessing, data_dir=place, labels=names, scores=scores, remedy=remedy)

    def expected_accuracy(self, dataset: str | None) -> dict[str, Any]:
        """Return the facts that a manifest states before its verification: renamed classes, an accepted accuracy."""
        facts: dict[str, Any] = {}
        if self.rename_classes and dataset is not None:
            facts["classes"] = list(dataset_labels(dataset, data_dir=self.images_at(dataset)))
        if self.allow_low_accuracy or self.allow_untrained:
            facts["accepted"] = True
        return {"accuracy": facts} if facts else {}

    def image(
        self, specs: Sequence[InputSpec] = (), *, stated: Mapping[str, Any] | None = None
    ) -> Mapping[str, Any] | None:
        """Return the JSON of the preprocessing: the given one, or the ``stated`` one of the source if it fits the inputs."""
        if (given := image_preprocessing(specs, self.mean, self.std)) is not None:
            return given
        own = self.preprocessing
        return (own.to_json() if isinstance(own, Preprocessing) else own) or fitted_preprocessing(stated, specs)

    def check_pixels(self, inputs: Sequence[InputSpec | TensorSpec], image: Mapping[str, Any] | None) -> None:
        """Refuse uint8 input (``input_type``) for a network that does not take one float32 image with a known preprocessing."""
        if self.input_type != "uint8":
            return
        if len(inputs) != 1:
            raise _no_pixels(f"the network has {len(inputs)} inputs")
        shape = inputs[0].shape if isinstance(inputs[0], InputSpec) else inputs[0].sample_shape
        if inputs[0].dtype != "float32":
            raise _no_pixels(f"{inputs[0].name!r} takes {inputs[0].dtype}, not float32")
        if len(shape) != 3 or (image is not None and shape[0] != image["channels"]):
            found, count = "x".join(map(str, shape)), "" if image is None else f"{image['channels']} "
            raise _no_pixels(f"{inputs[0].name!r} has the shape {found}, expected {count}channels, height and width")
        if image is None:
            raise UsageError(
                "--input-type uint8 puts the preprocessing into the files, and the preprocessing is unknown",
                remedy="Pass --mean and --std; pixels from 0 to 1 as they are have --mean 0,0,0 --std 1,1,1",
            )

    def with_options(self, **options: Any) -> ExportRequest:
        """Return the request with the options that are not None; ``input`` and ``data_dir`` as users write them."""
        options["inputs"] = input_texts(options.pop("input"))
        options["data_dir"] = None if options["data_dir"] is None else Path(options["data_dir"])
        return replace(self, **{name: value for name, value in options.items() if value is not None})

    def __post_init__(self) -> None:
        for name, value in (
            ("preprocessing", _preprocessing_json(self.preprocessing)),
            ("labels", label_names(self.labels)),
            ("inputs", input_texts(self.inputs)),
        ):
            object.__setattr__(self, name, value)
        if self.rename_classes and self.labels is None:
            raise UsageError("--rename-classes is given without --labels", remedy="Pass --labels, or leave it out")
        if self.preprocessing is not None and (self.mean is not None or self.std is not None):
            raise UsageError("both preprocessing and mean with std are given", remedy="Give one of them")
        for what, stated, known in (
            ("precision", self.precision, STORED_PRECISIONS),
            ("input type", self.input_type, INPUT_TYPES),
        ):
            if stated not in known:
                raise UsageError(f"the {what} {stated!r} is not known", remedy=f"Known: {', '.join(known)}")
        object.__setattr__(self, "allow_flips", read_share(self.allow_flips, "--allow-flips"))
        for flag, given in (
            ("--calibrate", self.calibrate is not None),
            ("--target", self.target != "cpu"),
            ("--allow-flips", self.allow_flips is not None),
            ("--float-layers", bool(self.float_layers)),
        ):
            if given and self.precision != "int8":
                raise UsageError(f"{flag} is given without --precision int8", remedy="Pass both, or leave it out")
        if self.pack_pools and self.precision == "int8":
            raise UsageError(
                "--pack-pools is for float files, and --precision int8 is given", remedy="Leave one of the two out"
            )
        if self.precision == "bfloat16" and self.onnx.opset < BFLOAT16_OPSET:
            raise UsageError(
                f"operator set {self.onnx.opset} has no convolution in bfloat16",
                remedy=f"Pass --opset {BFLOAT16_OPSET}",
            )


def _no_pixels(found: str) -> UsageError:
    return UsageError(f"--input-type uint8 is for one float32 image: {found}", remedy="Leave --input-type out")


def read_share(given: float | str | None, flag: str) -> float | None:
    """Return a share from 0 to 1, given as a number or as "1%"."""
    if given is None:
        return None
    try:
        text = str(given).strip()
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise UsageError(f"{flag} {given!r} is neither a percentage nor a fraction", remedy="Write it as 1% or 0.01")
    return share


def read_labels(path: Path) -> tuple[str, ...]:
    """Return class names from a text file, one per line; refuse a file without labels or with control characters."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # Windows editors write a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path} can't be read: {one_line(error)}", remedy="Give a text file, one label per line"
        ) from error
    labels = tuple(line.strip() for line in lines if line.strip())
    if not labels:
        raise UsageError(f"{path} contains no label", remedy="Give a text file, one label per line")
    if odd := [label for label in labels if not label.isprintable()]:
        raise UsageError(f"{path} contains the label {odd[0]!r} with control characters", remedy="Give plain text")
    return labels


def label_names(given: str | Path | Sequence[str] | None) -> tuple[str, ...] | None:
    """Return labels as a tuple; a path is a text file with one per line."""
    if given is None:
        return None
    return read_labels(Path(given)) if isinstance(given, str | Path) else tuple(map(str, given))


def _preprocessing_json(given: Any) -> Mapping[str, Any] | None:
    """Return a preprocessing as JSON; refuse a mapping with other keys or unusable values."""
    if given is None:
        return None
    example = "Give bnexport.Preprocessing(3, 224, 224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))"
    if isinstance(given, Preprocessing):
        return given.to_json()
    if not isinstance(given, Mapping):
        raise UsageError(f"preprocessing is a {type(given).__name__}, not a Preprocessing", remedy=example)
    known = [item.name for item in fields(Preprocessing)]
    if missing := [key for key in known if key not in given]:
        raise UsageError(f"preprocessing has no {', '.join(map(repr, missing))}", remedy=example)
    if odd := [key for key in given if key not in known]:
        raise UsageError(f"preprocessing has the unknown key {odd[0]!r}", remedy=example)
    try:
        Preprocessing.from_json(given)
    except DataError as error:
        raise UsageError(error.message, remedy=example) from error
    return dict(given)


@dataclass(frozen=True)
class InputSpec:
    """One input of the network, without its batch dimension."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"

    def example(self, batch: int, generator: torch.Generator) -> Tensor:
        """Return a batch of noise, or of zeros for integers and flags, which are valid indices of every table."""
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype)
        if dtype.is_floating_point:
            return torch.randn(batch, *self.shape, generator=generator).to(dtype)
        return torch.zeros(batch, *self.shape, dtype=dtype)


def input_texts(given: str | Sequence[int] | Sequence[str] | None) -> tuple[str, ...] | None:
    """Return inputs as the texts that ``parse_inputs`` reads: a shape, one text, or one text per input."""
    if given is None:
        return None
    if isinstance(given, str):
        return (given,)
    if all(isinstance(item, str) for item in given):
        return tuple(map(str, given))
    return ("x".join(str(item) for item in given),)


def parse_inputs(texts: tuple[str, ...], *, default_shape: tuple[int, ...] | None = None) -> tuple[InputSpec, ...]:
    """Read ``[NAME=]SHAPE[:TYPE]`` texts. Names default to "input", or "input_0", "input_1", ... for several inputs."""
    if not texts:
        if default_shape is None:
            raise UsageError(
                "the shape of the network's input is not known",
                remedy="Pass --input with one sample's shape, such as 1x28x28",
            )
        return (InputSpec("input", default_shape),)
    specs = tuple(_parse(text, "input" if len(texts) == 1 else f"input_{index}") for index, text in enumerate(texts))
    if len({spec.name for spec in specs}) != len(specs):
        raise UsageError(
            "two inputs have the same name", remedy="Give them different names: --input a=1x28x28 --input b=10"
        )
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
    """Return one example batch of 2 samples, because exporters treat a batch of 1 as a constant."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    try:
        return tuple(spec.example(batch, generator) for spec in specs)
    except RuntimeError as error:  # torch's allocator raises no other class
        raise UsageError(
            f"an example input can't be made: {one_line(error)}", remedy="Check the sizes given with --input"
        ) from error


#: Largest plausible mean and standard deviation of pixels that were scaled to 0 to 1.
_LARGEST_MEAN, _LARGEST_STD = 1.0, 10.0


def image_preprocessing(
    specs: Sequence[InputSpec], mean: Sequence[float] | None, std: Sequence[float] | None
) -> dict[str, Any] | None:
    """Return the JSON of the preprocessing of a network with one image input; None without mean and std.

    ``mean`` and ``std`` are per channel, of pixels from 0 to 1; values of pixels from 0 to 255 are refused.
    """
    if mean is None and std is None:
        return None
    if len(specs) != 1 or len(specs[0].shape) != 3:
        raise UsageError(
            "--mean and --std are for one image input", remedy="Pass --input with its shape, such as 3x224x224"
        )
    if mean is None or std is None:
        given, missing = ("--std", "--mean") if mean is None else ("--mean", "--std")
        raise UsageError(
            f"{given} is given without {missing}",
            remedy="Pass both; pixels from 0 to 1 as they are have --mean 0,0,0 --std 1,1,1",
        )
    channels, height, width = specs[0].shape
    image = Preprocessing(channels, height, width, mean=tuple(mean), std=tuple(std))
    for name, values, most in (("mean", mean, _LARGEST_MEAN), ("std", std, _LARGEST_STD)):
        if odd := [value for value in values if abs(value) > most]:
            raise UsageError(
                f"--{name} {odd[0]:g} is not a {name} of pixels from 0 to 1",
                remedy=f"Pixels are divided by 255 first, so divide it, too: --{name} {odd[0] / 255:.4g}",
            )
    return image.to_json()


def fitted_preprocessing(
    preprocessing: Mapping[str, Any] | None, specs: Sequence[InputSpec]
) -> Mapping[str, Any] | None:
    """Return a source's preprocessing with the size of the requested input; None if the channels differ."""
    if preprocessing is None or len(specs) != 1 or len(specs[0].shape) != 3:
        return None
    channels, height, width = specs[0].shape
    if channels != preprocessing.get("channels"):
        return None
    return {**preprocessing, "height": height, "width": width}


def model_and_version(out: Path) -> tuple[str, int]:
    """Return name and version from ``models/<name>/<version>``; refuse a folder of another form."""
    absolute = Path(out).absolute()
    version, name = absolute.name, absolute.parent.name
    if not re.fullmatch(r"[1-9]\d{0,17}", version) or not re.fullmatch(r"[A-Za-z0-9][\w.\-]*", name):
        raise UsageError(
            f"{out} is not of the form FOLDER/<name>/<version>, with a name of letters, digits and . _ - and a version"
            " from 1 upwards",
            remedy="A model repository needs that layout: pass --out models/my_model/1",
        )
    return name, int(version)
