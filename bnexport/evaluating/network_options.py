"""The options of evaluate, recalibrate and inspect; they load no torch, so that the command line can offer them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from bnexport.data.preprocessing import Preprocessing
from bnexport.errors import UsageError
from bnexport.exporting.request import image_preprocessing, input_texts, label_names, parse_inputs
from bnexport.request_fields import option
from bnexport.runtimes.catalogue import RUNNERS
from bnexport.training.config import DEVICES

#: Definition of exact statistics -> what it means. ``nn.moving_statistics`` has both in full.
DEFINITIONS: dict[str, str] = {
    "batch": "one pass; layers normalise with each batch's own statistics, as in training (precise BatchNorm)",
    "population": "one pass per layer; the layers before it are exact already, so batches do not matter",
}


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """Facts about a user's own network that plain weights do not contain; a checkpoint of bnexport states its own.

    Attributes:
        source: Code of the network: ``file.py:factory``.
        weights_key: The set of weights to take from a file with several.
        model_options: Named arguments of the factory.
        input: Shape of one image, "3x224x224" or ``(3, 224, 224)``.
        mean: Per channel, of pixels from 0 to 1, with ``std``.
        std: Per channel, of pixels from 0 to 1.
        labels: Class names in the order of the scores, or a text file with one per line.
    """

    source: str | None = option(
        "Code of your own network, whose weights the file holds.", None, metavar="FILE.py:FACTORY"
    )
    weights_key: str | None = option(
        "With --source: weights to take, of a file with several sets.", None, metavar="NAME"
    )
    model_options: Mapping[str, Any] = option(
        "For the factory of --source; repeatable.", dict, flag="--model-option", metavar="KEY=VALUE"
    )
    input: str | None = option("Shape of one image, as 3x224x224, for plain weights.", None, metavar="CxHxW")
    mean: tuple[float, ...] | None = option("Per channel, as 0.485,0.456,0.406, for plain weights.", None)
    std: tuple[float, ...] | None = option("Per channel, as 0.229,0.224,0.225.", None)
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
        """Return the options that were given."""
        values = (
            ("--source", self.source), ("--weights-key", self.weights_key),
            ("--model-option", self.model_options or None), ("--input", self.input),
            ("--mean", self.mean), ("--std", self.std), ("--labels", self.labels),
        )  # fmt: skip
        return tuple(name for name, value in values if value is not None)

    def image(self, stated: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
        """Return the JSON of the preprocessing: the given values in place of the stated ones.

        Args:
            stated: JSON of the preprocessing that the checkpoint or the network's package states.

        Raises:
            UsageError: Values that do not go together, or --mean and --std without a shape.
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
            raise UsageError(f"--input {shape} is not the shape of an image", remedy="Give it as 3x224x224")
        channels, height, width = specs[0].shape
        if stated is not None and stated.get("channels") == channels:
            return {**stated, "height": height, "width": width}
        return Preprocessing(channels, height, width, mean=(0.0,) * channels, std=(1.0,) * channels).to_json()


@dataclass(frozen=True)
class InspectionRequest(NetworkOptions):
    """The options of a comparison of moving statistics with exact ones.

    Attributes:
        dataset: A data set; default: the one that the file names.
        data_dir: Folder of data sets.
    """

    dataset: str | None = option("Data set whose training images are used.  [default: PATH's own]", None)
    data_dir: Path | None = option("Folder of data sets.", None, metavar="DIR")


@dataclass(frozen=True)
class EvaluationRequest(NetworkOptions):
    """The options of an evaluation.

    Attributes:
        dataset: A data set; default: the one that the checkpoint or bundle names.
        data_dir: Folder of data sets.
        runtime: For a bundle: a row of RUNNERS; default: onnxruntime-cpu.
        device: For a checkpoint: one of ``training.config.DEVICES``; default: "auto".
        batch_size: Images at once; it does not change the result beyond rounding.
    """

    dataset: str | None = option("Data set to evaluate on.  [default: PATH's own]", None)
    data_dir: Path | None = option("Folder of data sets.", None, metavar="DIR")
    runtime: str | None = option(
        f"For a bundle: {', '.join(spec.name for spec in RUNNERS)}.  [default: onnxruntime-cpu]",
        None,
        choices=tuple(spec.name for spec in RUNNERS),
        metavar="NAME",
    )
    device: str | None = option("For a checkpoint.  [default: auto]", None, choices=DEVICES)
    batch_size: int = option("Images at once.", 1000)


@dataclass(frozen=True)
class RecalibrationRequest(NetworkOptions):
    """The options of a recalibration.

    Attributes:
        definition: A key of DEFINITIONS.
        dataset: A data set; default: the one that the checkpoint names.
        data_dir: Folder of data sets.
        samples: Training images, chosen at random; default: all.
        batch_size: Images at once; batches are made equal in size, at most this.
        seed: Random seed of the choice and order of the images.
        device: One of ``training.config.DEVICES``.
        force: Replace the output.
    """

    definition: str = option(
        "; ".join(f"{name}: {meaning}" for name, meaning in DEFINITIONS.items()) + ".",
        "batch",
        choices=tuple(DEFINITIONS),
    )
    dataset: str | None = option("Data set whose images are used.  [default: CHECKPOINT's own]", None)
    data_dir: Path | None = option("Folder of data sets.", None, metavar="DIR")
    samples: int | None = option("Training images, chosen at random.  [default: all]", None, metavar="N")
    batch_size: int = option("Images at once, at most.", 256)
    seed: int = option("Random seed of the choice and order of images.", 0)
    device: str = option("auto takes a GPU if there is one.", "auto", choices=DEVICES)
    force: bool = option("Replace the output.", False)

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
