"""The trainings behind the claims of "Dive into Deep Learning", section 8.5, on batch normalization.

An experiment is a list of trainings; a training that several experiments use is done once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from bnexport.errors import UsageError

CHAPTER_RATE, CHAPTER_BATCH = 1.0, 256
#: Learning rates of experiment a.
RATES = (0.1, 0.5, CHAPTER_RATE, 2.0)
#: Batch sizes of experiment b: the chapter's, and one at which n / (n - 1) is far from 1.
CONVENTION_BATCHES = (CHAPTER_BATCH, 8)
#: Batch sizes of experiment c, and its learning rates, each the same for every batch size.
BATCHES, BATCH_RATES = (2, 8, 32, 128, 256, 1024), (0.1, 1.0)
#: Normalization layer of a training -> its name on the page.
VARIANTS: dict[str, str] = {
    "torch": "torch.nn.BatchNorm",
    "scratch-unbiased": "BatchNorm from scratch, unbiased=True",
    "scratch": "BatchNorm from scratch, as in the chapter",
    "none": "none",
}


@dataclass(frozen=True)
class RunSpec:
    """One training."""

    norm: str  # a key of VARIANTS
    lr: float  # of plain SGD
    batch_size: int
    epochs: int
    images: int  # the first ones of the training set
    test_images: int  # the first ones of the test set
    dataset: str  # a row of ``data.dataset_table.DATASETS``
    seed: int = 0  # of the initial weights and the order of the images

    @property
    def key(self) -> str:
        """A unique file name."""
        sizes = f"b{self.batch_size}-e{self.epochs}-n{self.images}-t{self.test_images}"
        return f"{self.dataset}-{self.norm}-lr{self.lr:g}-{sizes}-s{self.seed}"


@dataclass(frozen=True)
class ChapterPlan:
    """The size of the experiments."""

    dataset: str = "fashion-mnist"  # a row of ``data.dataset_table.DATASETS``
    seeds: int = 5  # 0 to ``seeds - 1``, at least 2
    images: int = 60_000  # of the training set, in experiments a, d and e
    test_images: int = 10_000
    epochs: int = 5  # of experiments a, d and e
    convention_images: int = 20_480  # of the training set, in experiment b
    convention_epochs: int = 6  # of experiment b
    batch_images: int = 30_000  # of the training set, in experiment c, which has one epoch
    quick: bool = False  # this plan is too small to be evidence

    def spec(self, norm: str, *, lr: float = CHAPTER_RATE, batch_size: int = CHAPTER_BATCH) -> RunSpec:
        """Return a training of experiment a with seed 0."""
        return RunSpec(norm, lr, batch_size, self.epochs, self.images, self.test_images, self.dataset)


FULL = ChapterPlan()
#: A plan of a minute, for tests and for a first look.
QUICK = ChapterPlan(
    seeds=2, images=1024, test_images=500, epochs=2, convention_images=512, convention_epochs=2, batch_images=1024, quick=True
)  # fmt: skip


def _conventions(plan: ChapterPlan) -> Iterable[RunSpec]:
    for batch_size in CONVENTION_BATCHES:
        for norm in ("torch", "scratch-unbiased", "scratch"):
            # An equal number of steps would leave few images for small batches.
            epochs = plan.convention_epochs if batch_size == CHAPTER_BATCH else 1
            yield replace(plan.spec(norm, batch_size=batch_size), images=plan.convention_images, epochs=epochs)


def _batches(plan: ChapterPlan) -> Iterable[RunSpec]:
    for lr in BATCH_RATES:
        for size in BATCHES:
            yield replace(plan.spec("torch", lr=lr, batch_size=size), images=plan.batch_images, epochs=1)


#: Letter -> the trainings of an experiment; each is made with every seed.
EXPERIMENTS: dict[str, Callable[[ChapterPlan], Iterable[RunSpec]]] = {
    "a": lambda plan: (plan.spec(norm, lr=lr) for lr in RATES for norm in ("torch", "none")),
    "b": _conventions,
    "c": _batches,
    "d": lambda plan: (plan.spec("torch", lr=lr) for lr in RATES),
    "e": lambda plan: [plan.spec("torch")],
}


def settings_of(experiment: str, plan: ChapterPlan) -> list[RunSpec]:
    """Return the trainings of one experiment with seed 0; UsageError if it is unknown."""
    if experiment not in EXPERIMENTS:
        raise UsageError(f"there is no experiment {experiment!r}", remedy=f"Choose of {', '.join(EXPERIMENTS)}")
    return list(EXPERIMENTS[experiment](plan))


def specs_of(experiments: Iterable[str], plan: ChapterPlan) -> list[RunSpec]:
    """Return every training of some experiments once, the longest first; UsageError if one is unknown."""
    settings = dict.fromkeys(spec for name in experiments for spec in settings_of(name, plan))
    specs = [replace(spec, seed=seed) for spec in settings for seed in range(plan.seeds)]
    return sorted(specs, key=lambda spec: spec.epochs * spec.images * (1 + 40 / spec.batch_size), reverse=True)
