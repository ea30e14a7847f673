"""Options of evaluate, recalibrate and inspect; this module needs no torch, so ``--help`` is fast."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

from bnexport.data.preprocessing import Preprocessing
from bnexport.errors import UsageError
from bnexport.exporting.export_request import image_preprocessing, input_texts, label_names, parse_inputs
from bnexport.request_fields import option
from bnexport.runtimes.catalogue import RUNNERS
from bnexport.training.config import DEVICES

#: Definition of exact statistics -> its meaning; ``nn.moving_statistics`` has the formulas.
DEFINITIONS: dict[str, str] = {
    "batch": "one pass; layers normalise with the statistics of each batch, as in training (precise BatchNorm)",
    "population": "one pass per layer, after the earlier layers are exact, so the batch size does not matter",
}


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """Facts about a user's network that plain weights do not contain; a checkpoint of bnexport contains them.

    ``input`` may be "3x224x224" or ``(3, 224, 224)``. ``labels`` may be names or a text file with one name per line.
    """

    source: str | None = option(
        "Code of your own network, for a file that contains only its weights.", None, metavar="FILE.py:FACTORY"
    )
    weights_key: str | None = option(
        "With --source: name of the set of weights, if the file has several.", None, metavar="NAME"
    )
    model_options: Mapping[str, Any] = option(
        "Argument of the factory of --source. Repeatable.", dict, flag="--model-option", metavar="KEY=VALUE"
    )
    input: str | None = option("Shape of one image, as 3x224x224, for plain weights.", None, metavar="CxHxW")
    mean: tuple[float, ...] | None = option(
        "Mean per channel of pixels from 0 to 1, as 0.485,0.456,0.406, for plain weights.", None
    )
    std: tuple[float, ...] | None = option(
        "Standard deviation per channel, as 0.229,0.224,0.225, for plain weights.", None
    )
    labels: tuple[str, ...] | None = option("Text file with one class name per line, for plain weights.", None)

    def __post_init__(self) -> None:
        texts = input_texts(self.input)
        object.__setattr__(self, "input", texts[0] if texts else None)
        object.__setattr__(self, "labels", label_names(self.labels))

    def with_options(self, **options: Any) -> Self:
        """Return the request with the options that are not None."""
        if options.get("data_dir") is not None:
            options["data_dir"] = Path(options["data_dir"])
        return replace(self, **{name: value for name, value in options.items() if value is not None})

    @property
    def given(self) -> tuple[str, ...]:
        """Flags of the given options."""
        given = [item for item in fields(NetworkOptions) if getattr(self, item.name) not in (None, {})]
        return tuple(item.metadata.get("flag", f"--{item.name.replace('_', '-')}") for item in given)

    def assumes_pixels(self, stated: Mapping[str, Any] | None) -> bool:
        """Return True if neither the options nor ``stated`` give mean and std for the images that are used."""
        if self.mean is not None or self.std is not None:
            return False
        image = self.image(stated)
        return stated is None or (image is not None and image.get("channels") != stated.get("channels"))

    def image(self, stated: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
        """Return the preprocessing as JSON: ``stated`` by the checkpoint or package, changed by the given options.

        Raises:
            UsageError: The values contradict each other, or --mean and --std are given without a shape.
        """
        if self.input is None and self.mean is None and self.std is None:
            return stated
        shape = self.input
        if shape is None and stated is not None:
            known = Preprocessing.from_json(stated)
            shape = f"{known.channels}x{known.height}x{known.width}"
        specs = parse_inputs((shape,)) if shape is not None else ()
        if (found := image_preprocessing(specs, self.mean, self.std)) is not None:
            return found
        if len(specs[0].shape) != 3:
            raise UsageError(f"--input {shape} is not the shape of an image", remedy="Write it as 3x224x224")
        channels, height, width = specs[0].shape
        if stated is not None and stated.get("channels") == channels:
            return {**stated, "height": height, "width": width}
        return Preprocessing(channels, height, width, mean=(0.0,) * channels, std=(1.0,) * channels).to_json()


def needed_dataset(name: str | None, file: Path) -> str:
    """Return the name of a data set; UsageError without one."""
    if name is None:
        raise UsageError(f"{file} does not state the data set that it was trained on", remedy="Pass --dataset NAME")
    return name


@dataclass(frozen=True)
class InspectionRequest(NetworkOptions):
    """The options of a comparison of moving statistics with exact ones."""

    dataset: str | None = option("Data set whose training images are used.  [default: PATH's own]", None)
    data_dir: Path | None = option("Folder of the data set's files.", None, metavar="DIR")


@dataclass(frozen=True)
class EvaluationRequest(NetworkOptions):
    """The options of ``evaluate``.

    Example:
        >>> bnexport.EvaluationRequest(dataset="mnist", batch_size=100).batch_size
        100
    """

    dataset: str | None = option("Data set to evaluate on.  [default: PATH's own]", None)
    data_dir: Path | None = option("Folder of the data set's files.", None, metavar="DIR")
    runtime: str | None = option(
        f"Runtime of a bundle: {', '.join(spec.name for spec in RUNNERS)}.  [default: onnxruntime-cpu]",
        None,
        choices=tuple(spec.name for spec in RUNNERS),
        metavar="NAME",
    )
    device: str | None = option("Device for a checkpoint.  [default: auto]", None, choices=DEVICES)
    batch_size: int = option("Number of images per batch.", 1000)


@dataclass(frozen=True)
class RecalibrationRequest(NetworkOptions):
    """The options of ``recalibrate``; batches are made equal in size, at most ``batch_size``.

    Example:
        >>> bnexport.RecalibrationRequest(definition="population").samples is None  # all training images
        True
    """

    definition: str = option(
        "Definition of exact statistics. "
        + "; ".join(f"{name}: {meaning}" for name, meaning in DEFINITIONS.items())
        + ".",
        "batch",
        choices=tuple(DEFINITIONS),
    )
    dataset: str | None = option("Data set whose images are used.  [default: CHECKPOINT's own]", None)
    data_dir: Path | None = option("Folder of the data set's files.", None, metavar="DIR")
    samples: int | None = option("Number of training images, chosen at random.  [default: all]", None, metavar="N")
    batch_size: int = option("Largest number of images per batch.", 256)
    seed: int = option("Random seed of the choice and order of images.", 0)
    device: str = option("Device of torch. auto uses a GPU if torch finds one.", "auto", choices=DEVICES)
    force: bool = option("Replace an existing output.", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.definition not in DEFINITIONS:
            raise UsageError(
                f"the definition {self.definition!r} is unknown", remedy=f"Choose one of {', '.join(DEFINITIONS)}"
            )
        if self.seed < 0:
            raise UsageError(f"the seed is {self.seed}", remedy="Give 0 or more")
        for name, value in (("batch size", self.batch_size), ("number of samples", self.samples)):
            if value is not None and value < 1:
                raise UsageError(f"the {name} is {value}", remedy="Give at least 1")
