"""Results of the chapter's experiments made up so that every claim holds; tests change one thing at a time."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from benchmarks.chapter.plan import EXPERIMENTS, ChapterPlan, RunSpec, specs_of
from benchmarks.chapter.results import Results
from benchmarks.chapter.run import EpochResult, RunResult

PLAN = ChapterPlan(
    seeds=3,
    images=64,
    test_images=50,
    epochs=3,
    convention_images=64,
    convention_epochs=2,
    batch_images=32,
    dataset="digits",
)
CONDITIONS = {
    "cpu": "a processor",
    "cores": 2,
    "gpu": None,
    "python": "3.11",
    "packages": {"torch": "2.14"},
    "threads": 1,
}
#: Test accuracy over the batch size: best in the middle, at chance with 2.
ACCURACIES = {2: 0.12, 8: 0.7, 32: 0.85, 128: 0.8, 256: 0.75, 1024: 0.4}
LAYERS = {"bn1": 6, "bn2": 16, "bn3": 120, "bn4": 84}

Change = Callable[[RunResult], RunResult]


def unchanged(run: RunResult) -> RunResult:
    return run


def crafted(change: Change = unchanged, experiments: tuple[str, ...] = tuple(EXPERIMENTS)) -> Results:
    """Return every training, each changed by ``change``."""
    runs = tuple(change(crafted_run(spec)) for spec in specs_of(experiments, PLAN))
    return Results(PLAN, experiments, runs)


def crafted_run(spec: RunSpec) -> RunResult:
    jitter = 0.01 * (spec.seed - 1)
    norm = spec.norm != "none"
    accuracy = 0.8 if norm else 0.6
    if spec.images == PLAN.batch_images:
        accuracy = ACCURACIES[spec.batch_size]
    elif not norm and spec.lr == 2.0:
        accuracy = 0.1
    history = []
    for epoch in range(1, spec.epochs + 1):
        tested = accuracy + jitter - (0.01 if spec.norm == "scratch" else 0.0)
        distances = {"exact_accuracy": tested + 0.03 * spec.lr, "shift": 0.1 * spec.lr + jitter, "scale": 0.1}
        loss = (0.5 if norm else 1.0) / epoch + jitter
        history.append(EpochResult(loss, accuracy, 0.6, tested, **distances if norm else {}))
    unbiased = spec.norm in ("torch", "scratch-unbiased")
    factor = spec.batch_size / (spec.batch_size - 1) if unbiased else 1.0
    affine = {
        layer: {
            "gamma": [1.5 + 0.1 * (number % 5) + jitter for number in range(channels)],
            "beta": [-0.5 + 0.1 * (number % 3) for number in range(channels)],
        }
        for layer, channels in LAYERS.items()
    }
    moving_var = dict.fromkeys(LAYERS, 2.0 * factor)
    return RunResult(
        spec, tuple(history), None, 10, affine if norm else {}, moving_var if norm else {}, CONDITIONS, 1.5
    )


def with_epochs(run: RunResult, **values: Any) -> RunResult:
    """The same run with other values in every epoch; a function gets the old value."""

    def changed(epoch: EpochResult) -> EpochResult:
        new = {name: value(getattr(epoch, name)) if callable(value) else value for name, value in values.items()}
        return replace(epoch, **new)

    return replace(run, history=tuple(map(changed, run.history)))


def at_chance(run: RunResult) -> RunResult:
    """The same run, which has learned nothing."""
    return with_epochs(
        run, train_accuracy=0.1, test_accuracy=0.1, exact_accuracy=lambda old: None if old is None else 0.1
    )


def diverged(run: RunResult, epoch: int = 1) -> RunResult:
    """The same run, diverged in an epoch."""
    return replace(run, history=run.history[: epoch - 1], diverged=epoch, affine={}, moving_var={})
