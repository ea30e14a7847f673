"""Which trainings show what "Dive into Deep Learning", section 8.5, says of batch normalization.

An experiment is a list of trainings; the same training serves every experiment that asks for it and is done once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from bnexport.errors import UsageError

#: Learning rates of experiment a; the chapter trains with 1.0.
RATES = (0.1, 0.5, 1.0, 2.0)
#: Batch sizes of experiment c.
BATCHES = (2, 8, 32, 128, 256, 1024)
#: Batch sizes of experiment b: the chapter's, and one at which n / (n - 1) is far from 1.
CONVENTION_BATCHES = (256, 8)
CHAPTER_RATE, CHAPTER_BATCH = 1.0, 256
#: Learning rates of experiment c, each the same for every batch size.
BATCH_RATES = (0.1, 1.0)
#: Normalization layer of a training -> how the page calls it.
VARIANTS: dict[str, str] = {
    "torch": "torch.nn.BatchNorm",
    "scratch-unbiased": "BatchNorm from scratch, unbiased=True",
    "scratch": "BatchNorm from scratch, as in the chapter",
    "none": "none",
}


@dataclass(frozen=True)
class RunSpec:
    """One training.

    Attributes:
        norm: A key of VARIANTS.
        lr: Learning rate of plain SGD.
        batch_size: Images per step.
        epochs: Passes over ``images``.
        images: Of the training set, the first so many.
        test_images: Of the test set, the first so many.
        dataset: A row of ``data.catalogue.DATASETS``.
        seed: Of the initial weights and the order of the images.
    """

    norm: str
    lr: float
    batch_size: int
    epochs: int
    images: int
    test_images: int
    dataset: str
    seed: int = 0

    @property
    def key(self) -> str:
        """A file name that no other training has."""
        sizes = f"b{self.batch_size}-e{self.epochs}-n{self.images}-t{self.test_images}"
        return f"{self.dataset}-{self.norm}-lr{self.lr:g}-{sizes}-s{self.seed}"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Plan:
    """How large the experiments are.

    Attributes:
        dataset: A row of ``data.catalogue.DATASETS``.
        seeds: 0 to ``seeds - 1``.
        images: Of the training set, in experiments a, d and e.
        test_images: Of the test set.
        epochs: Of experiments a, d and e.
        convention_images: Of the training set, in experiment b.
        convention_epochs: Of experiment b.
        batch_images: Of the training set, in experiment c, which has one epoch.
        quick: Whether this plan is too small to be evidence.
    """

    dataset: str = "fashion-mnist"
    seeds: int = 5
    images: int = 60_000
    test_images: int = 10_000
    epochs: int = 5
    convention_images: int = 20_480
    convention_epochs: int = 6
    batch_images: int = 30_000
    quick: bool = False

    def __post_init__(self) -> None:
        if self.seeds < 2:
            raise UsageError(f"{self.seeds} seed(s) have no spread", remedy="Give at least 2")

    def spec(self, norm: str, *, lr: float = CHAPTER_RATE, batch_size: int = CHAPTER_BATCH) -> RunSpec:
        """A training of experiment a, of seed 0."""
        return RunSpec(norm, lr, batch_size, self.epochs, self.images, self.test_images, self.dataset)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


FULL = Plan()
#: A minute's work, for tests and for a first look.
QUICK = Plan(
    seeds=2,
    images=1024,
    test_images=500,
    epochs=2,
    convention_images=512,
    convention_epochs=2,
    batch_images=1024,
    quick=True,
)


def _rates(plan: Plan) -> Iterable[RunSpec]:
    return (plan.spec(norm, lr=lr) for lr in RATES for norm in ("torch", "none"))


def _conventions(plan: Plan) -> Iterable[RunSpec]:
    for batch_size in CONVENTION_BATCHES:
        for norm in ("torch", "scratch-unbiased", "scratch"):
            # As many steps with small batches as with large ones would be few images.
            epochs = plan.convention_epochs if batch_size == CHAPTER_BATCH else 1
            yield replace(plan.spec(norm, batch_size=batch_size), images=plan.convention_images, epochs=epochs)


def _batches(plan: Plan) -> Iterable[RunSpec]:
    for lr in BATCH_RATES:
        for size in BATCHES:
            yield replace(plan.spec("torch", lr=lr, batch_size=size), images=plan.batch_images, epochs=1)


def _statistics(plan: Plan) -> Iterable[RunSpec]:
    return (plan.spec("torch", lr=lr) for lr in RATES)


def _affine(plan: Plan) -> Iterable[RunSpec]:
    return (plan.spec("torch"),)


#: Letter -> the trainings of an experiment, each of which is made with every seed.
EXPERIMENTS: dict[str, Callable[[Plan], Iterable[RunSpec]]] = {
    "a": _rates,
    "b": _conventions,
    "c": _batches,
    "d": _statistics,
    "e": _affine,
}


def settings_of(experiment: str, plan: Plan) -> list[RunSpec]:
    """The trainings of one experiment, each with seed 0.

    Raises:
        UsageError: There is no such experiment.
    """
    if experiment not in EXPERIMENTS:
        raise UsageError(f"there is no experiment {experiment!r}", remedy=f"Choose of {', '.join(EXPERIMENTS)}")
    return list(EXPERIMENTS[experiment](plan))


def specs_of(experiments: Iterable[str], plan: Plan) -> list[RunSpec]:
    """Every training of some experiments, each once, those that take longest first.

    Raises:
        UsageError: There is no such experiment.
    """
    settings = dict.fromkeys(spec for name in experiments for spec in settings_of(name, plan))
    specs = [replace(spec, seed=seed) for spec in settings for seed in range(plan.seeds)]
    return sorted(specs, key=lambda spec: spec.epochs * spec.images * (1 + 40 / spec.batch_size), reverse=True)
