"""The configuration of a training run."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from bnexport.data.dataset_table import DATASETS, FOLDER, is_dataset
from bnexport.data.preprocessing import Preprocessing
from bnexport.errors import UsageError
from bnexport.nn.lenet import NORMS
from bnexport.request_fields import option

DEVICES = ("auto", "cpu", "cuda")
OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("constant", "cosine")
#: Automatic mixed precision; float16 scales the loss and is for CUDA alone.
AMP = ("off", "bfloat16", "float16")
LENET = "bn_lenet"
#: Channels, height and width of the images of DATASETS, the default of ``input``.
_SHAPE = (1, 28, 28)
START_ANEW = "Start the training anew with --force"
#: Options that a resumed run may change, because they change the weights by rounding only.
_FREE = ("device", "cuda_graph")


@dataclass(frozen=True)
class TrainingConfig:
    """The configuration of a training; the defaults are those of "Dive into Deep Learning", section 8.5.

    Each field is an option of ``bnexport train``, and the option's help describes the field. An empty ``input`` is 1x28x28, the
    shape of DATASETS. The last, partial batch is kept. Weight decay is an L2 penalty of SGD, and decoupled in AdamW
    (Loshchilov and Hutter, 2019). The cosine schedule falls to 0 at the end (Loshchilov and Hutter, 2017). Label smoothing
    follows Szegedy et al., 2016.

    Example:
        >>> from bnexport.training.config import TrainingConfig
        >>> TrainingConfig(dataset="mnist", epochs=2, lr=0.5).batch_size
        256

    Raises:
        UsageError: An option is unknown or out of range, or options contradict each other.
    """

    dataset: str = option(
        "Data set to train on, or folder:PATH with train/CLASS/*.png and val/CLASS/*.png.", "fashion-mnist"
    )
    model: str = option(
        "Network: bn_lenet, torchvision:NAME, timm:NAME, or your own file.py:factory.", LENET, metavar="SOURCE"
    )
    model_options: Mapping[str, bool | int | float | str] = option(
        "Argument of the model's constructor. Repeatable.", dict, flag="--model-option", metavar="KEY=VALUE"
    )
    input: str = option("Shape of an image for the model.", "", metavar="CxHxW", show_default="the images' own")
    mean: tuple[float, ...] = option(
        "Mean per channel, subtracted from pixels of 0 to 1.", (), metavar="M,M,M", show_default="0"
    )
    std: tuple[float, ...] = option(
        "Standard deviation per channel, by which pixels are divided.", (), metavar="S,S,S", show_default="1"
    )
    norm: str = option("Kind of BatchNorm in bn_lenet.", "torch", choices=NORMS)
    epochs: int = option("Passes over the training set.", 10)
    lr: float = option("Learning rate; with a schedule, the largest one.", 1.0)
    batch_size: int = option("Images per step, summed over all processes.", 256)
    optimizer: str = option("Optimiser of the weights.", "sgd", choices=OPTIMIZERS)
    momentum: float = option("SGD momentum.", 0.0)
    weight_decay: float = option("Weight decay; biases, gamma and beta are left out.", 0.0)
    schedule: str = option("Learning rate schedule.", "constant", choices=SCHEDULES)
    warmup_epochs: float = option("Epochs in which the learning rate grows linearly from 0.", 0.0)
    label_smoothing: float = option("Share of the target that is spread over all classes.", 0.0)
    amp: str = option("Automatic mixed precision.", "off", choices=AMP)
    cuda_graph: bool | None = option(
        "Record the training step as a CUDA graph on a GPU, or run every step without a recording. "
        "A network whose Python code changes state in a step is not recorded; the output states this.",
        None,
        show_default="records bn_lenet and the networks of torchvision and timm",
    )
    sync_batch_norm: bool = option("Compute BatchNorm statistics over all processes (torchrun).", False)
    device: str = option("Device of torch; auto: a GPU if torch finds one.", "auto", choices=DEVICES)
    seed: int = option("Random seed for weights, image order and dropout.", 0)
    recalibrate: bool = option("Re-estimate the moving statistics over the training set at the end.", True)

    def __post_init__(self) -> None:
        self._convert_numbers()
        self._check_choices()
        self._check_numbers()
        if self.model == LENET and self.model_options:
            raise UsageError("bn_lenet has no --model-option", remedy="Leave it out; --norm chooses its BatchNorm")
        if self.model != LENET and self.norm != "torch":
            raise UsageError(f"--norm {self.norm} is for bn_lenet, not {self.model}", remedy="Leave --norm out")
        if self.momentum and self.optimizer != "sgd":
            raise UsageError(f"--momentum is for sgd, not {self.optimizer}", remedy="Leave --momentum out")
        if self.dataset.startswith(FOLDER) and self.model != LENET and not self.input:
            raise UsageError(
                f"the images of {self.dataset} can differ in size",
                remedy="Pass the model's with --input, such as 3x64x64",
            )
        self.preprocessing()

    def _convert_numbers(self) -> None:
        """Convert each number to the type of its field: a learning rate of 1 would make an integer tensor on a GPU."""
        for item in fields(self):
            value = getattr(self, item.name)
            if item.type in ("int", "float"):
                object.__setattr__(self, item.name, _number(item.name, value, item.type))
            elif item.type == "tuple[float, ...]":
                object.__setattr__(self, item.name, tuple(_number(item.name, one, "float") for one in value))

    def _check_choices(self) -> None:
        choices = {item.name: item.metadata["choices"] for item in fields(self) if "choices" in item.metadata}
        if not is_dataset(self.dataset):
            choices["dataset"] = (*DATASETS, f"{FOLDER}PATH")
        for name, known in choices.items():
            if (value := getattr(self, name)) not in known:
                raise UsageError(f"the {name} {value!r} is unknown", remedy=f"Choose one of {', '.join(known)}")

    def _check_numbers(self) -> None:
        for name, number in (("epochs", self.epochs), ("batch_size", self.batch_size)):
            if number < 1:
                raise UsageError(f"{name} is {number}", remedy="Give at least 1")
        if not math.isfinite(self.lr) or self.lr <= 0:
            raise UsageError(f"the learning rate is {self.lr}", remedy="Give a positive number")
        for name, share in (("momentum", self.momentum), ("label_smoothing", self.label_smoothing)):
            if not 0 <= share < 1:
                raise UsageError(f"{name} is {share}", remedy="Give a number from 0 to below 1")
        for name, value in (("weight_decay", self.weight_decay), ("warmup_epochs", self.warmup_epochs)):
            if not math.isfinite(value) or value < 0:
                raise UsageError(f"{name} is {value}", remedy="Give 0 or a positive number")
        if self.warmup_epochs > self.epochs:
            raise UsageError(
                f"the warm-up of {self.warmup_epochs:g} epochs is longer than the training of {self.epochs}",
                remedy="Lower --warmup-epochs or raise --epochs",
            )
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"the seed is {self.seed}", remedy="Give a number from 0 to 2**63 - 1")

    def preprocessing(self) -> Preprocessing:
        """Return the preprocessing; UsageError if ``input``, ``mean`` and ``std`` do not fit, DataError for a bad ``std``."""
        channels, height, width = self._shape()
        mean, std = self.mean or (0.0,) * channels, self.std or (1.0,) * channels
        if not len(mean) == len(std) == channels:
            raise UsageError(
                f"there are {len(mean)} means and {len(std)} standard deviations for {channels} channel(s)",
                remedy="Give one value per channel, as --input 3x64x64 --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225",
            )
        return Preprocessing(channels, height, width, mean=mean, std=std)

    def _shape(self) -> tuple[int, int, int]:
        if not self.input:
            return _SHAPE
        parts = self.input.lower().split("x")
        if len(parts) != 3 or not all(part.isdecimal() and 0 < int(part) <= 65536 for part in parts):
            raise UsageError(f"--input {self.input!r} is not the shape of an image", remedy="Write it as 3x64x64")
        return int(parts[0]), int(parts[1]), int(parts[2])

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "model_options": dict(self.model_options), "mean": [*self.mean], "std": [*self.std]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> TrainingConfig:
        """Read the result of ``to_json``; a missing option gets its default. UsageError for bad values."""
        known = {item.name: item.default for item in fields(cls)}
        if not isinstance(value, Mapping) or "dataset" not in value or not set(value) <= set(known):
            raise UsageError("the saved configuration has missing or unknown options", remedy=START_ANEW)
        wrong = UsageError("the saved configuration has values of the wrong type", remedy=START_ANEW)
        if not all(_same_kind(given, known[name]) for name, given in value.items() if name != "model_options"):
            raise wrong
        try:
            lists = {name: tuple(value[name]) for name in ("mean", "std") if name in value}
            return cls(**{**value, **lists, "model_options": dict(value.get("model_options", {}))})
        except (TypeError, ValueError) as error:
            raise wrong from error

    def check_continues(self, before: TrainingConfig) -> None:
        """Raise UsageError unless only ``device``, ``cuda_graph`` and a larger number of epochs differ from the first run."""
        for item in fields(self):
            old, new = getattr(before, item.name), getattr(self, item.name)
            if old == new or item.name in _FREE:
                continue
            option = item.name.replace("_", "-")
            if item.name != "epochs":
                raise UsageError(
                    f"the run was started with {option} {old}, so it can't be resumed with {option} {new}",
                    remedy=f"Resume with {option} {old}, or choose another --out",
                )
            if new < old or self.schedule != "constant":
                why = "" if new < old else f": its {self.schedule} schedule ends there"
                raise UsageError(
                    f"the run was started with epochs {old}, so it can't be resumed with epochs {new}{why}",
                    remedy=f"Resume with epochs {old}, or choose another --out",
                )


def _number(name: str, value: Any, kind: str) -> int | float:
    """Return a number as its field's type; a bool is not a number."""
    whole = kind == "int"
    fits = isinstance(value, numbers.Integral if whole else numbers.Real) and not isinstance(value, bool)
    if not fits:
        raise UsageError(
            f"{name} is {value!r}", remedy="Give a whole number" if whole else "Give a number, such as 0.5"
        )
    return int(value) if whole else float(value)


def _same_kind(value: Any, default: Any) -> bool:
    if default is None:
        return value is None or isinstance(value, bool)
    if isinstance(default, tuple):
        return isinstance(value, list | tuple)
    if isinstance(default, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is type(default)
