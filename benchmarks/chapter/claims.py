"""The chapter's claims, judged by the results. Every sentence is generated from the numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks.chapter.plan import BATCH_RATES, BATCHES, CHAPTER_BATCH, CONVENTION_BATCHES, RATES
from benchmarks.chapter.results import Mean, Results, Setting
from benchmarks.chapter.run import EpochResult, RunResult

#: Training losses are equal to rounding if they differ by less than this share of the deviation over seeds.
SAME = 0.1
#: Relative tolerance on the distance from 1 of a factor n/(n-1) between moving variances.
FACTOR_TOLERANCE = 0.1
#: Gamma and beta count as learned if the median channel is farther than this from 1 and 0.
MOVED = 0.02


@dataclass(frozen=True)
class Claim:
    """One claim, and the numbers on it, as sentences."""

    claim: str
    holds: bool  # the numbers show it
    found: str


def plus_minus(mean: Mean | None, digits: int = 3) -> str:
    """Return a mean with its deviation; "-" without a value."""
    if mean is None:
        return "-"
    spread = f" +/- {mean.deviation:.{digits}f}" if mean.deviation is not None else ""
    return f"{mean.mean:.{digits}f}{spread}"


def counted(setting: Setting) -> str:
    """Return the number of runs that learned, and the outcomes of the others."""
    words = {"chance": "at chance", "diverged": "diverged"}
    others = [f"{len(runs)} {text}" for name, text in words.items() if (runs := setting.having(name))]
    return f"{len(setting.learned)} of {len(setting.runs)}" + (f" ({', '.join(others)})" if others else "")


def _complete(setting: Setting) -> bool:
    """Return True if every seed learned."""
    return len(setting.learned) == len(setting.runs)


def _pairs(one: Setting, other: Setting) -> Iterator[tuple[RunResult, RunResult]]:
    """Yield the trainings of two settings, seed by seed."""
    return zip(one.runs, other.runs, strict=True)


def _rates(results: Results) -> list[Claim]:
    settings = results.settings("a")
    columns = {norm: [each for each in settings if each.spec.norm == norm] for norm in ("torch", "none")}
    reach = {
        norm: max((each.spec.lr for each in column if _complete(each)), default=0.0) for norm, column in columns.items()
    }
    parts = [
        f"{'with' if norm == 'torch' else 'without'} BatchNorm "
        + ", ".join(f"{counted(setting)} at {setting.spec.lr:g}" for setting in column)
        for norm, column in columns.items()
    ]
    pairs = [pair for sides in zip(*columns.values(), strict=True) for pair in _pairs(*sides)]
    faster = sum(_lower_loss(*pair) for pair in pairs)
    passing = [epoch for pair in pairs if (epoch := _passes(*pair)) is not None]
    speed = (
        f" In {len(passing)} of them it has passed the training accuracy that the other ends with before the end; in epoch"
        f" {statistics.median(passing):g} in the median pair, in epoch {max(passing)} in the slowest."
        if passing
        else ""
    )
    return [
        Claim(
            "With BatchNorm a network can be trained at higher learning rates.",
            reach["torch"] > reach["none"],
            f"Seeds that learned: {'; '.join(parts)}.",
        ),
        Claim(
            "With BatchNorm training converges faster.",
            faster == len(pairs),
            f"Of {len(pairs)} pairs of one learning rate and seed, in {faster} the training loss of epoch"
            f" {results.plan.epochs} is lower with BatchNorm.{speed}",
        ),
    ]


def _lower_loss(one: RunResult, other: RunResult) -> bool:
    if "diverged" in (one.outcome, other.outcome):
        return one.outcome != "diverged"
    return one.history[-1].train_loss < other.history[-1].train_loss


def _passes(one: RunResult, other: RunResult) -> int | None:
    """Return the epoch, before the last, in which one passes the final training accuracy of the other."""
    if not other.history or one.outcome == "diverged":
        return None
    aim = other.history[-1].train_accuracy
    return next((n for n, epoch in enumerate(one.history[:-1], 1) if epoch.train_accuracy > aim), None)


def _conventions(results: Results) -> list[Claim]:
    by_place = {(setting.spec.batch_size, setting.spec.norm): setting for setting in results.settings("b")}
    same, equal, parts, factors, apart = False, True, [], [], 0.0
    for size in CONVENTION_BATCHES:
        torch, unbiased, biased = (by_place[size, norm] for norm in ("torch", "scratch-unbiased", "scratch"))
        losses, spread = _apart(torch, unbiased), torch.mean("train_loss")
        deviation = (spread.deviation if spread is not None else None) or 0.0
        if size == CHAPTER_BATCH:  # many small, noisy steps amplify rounding until the two differ as two seeds do
            same = _complete(torch) and _complete(unbiased) and losses <= SAME * deviation
        parts.append(f"{losses:.1e} with batches of {size} (seeds deviate by {deviation:.1e})")
        expected, factor = size / (size - 1), _variance_factor(unbiased, biased)
        equal = equal and abs(factor - expected) < FACTOR_TOLERANCE * (expected - 1)
        apart = max(apart, _apart(unbiased, biased))
        factors.append(
            f"with batches of {size} the moving variances behind the linear layers are"
            f" {'-' if math.isnan(factor) else f'{factor:.4f}'} times the biased ones"
            f" (n/(n-1) = {expected:.4f}), and test accuracy changes by {plus_minus(Mean.of(changes_of(unbiased, biased)), 4)}"
        )
    trained = f"Training losses differ by up to {apart:.1e}" if apart else "Training is the same to the last bit"
    return [
        Claim(
            f"With batches of {CHAPTER_BATCH} the layer from scratch trains as the framework's does, if both keep the same"
            " variance.",
            same,
            f"Largest difference between training losses of one seed and epoch: {'; '.join(parts)}.",
        ),
        Claim(
            "The chapter's layer, which keeps the biased variance, differs in its moving variance alone.",
            equal and not apart,
            f"{trained}; {'; '.join(factors)}.",
        ),
    ]


def _apart(one: Setting, other: Setting) -> float:
    """Return the largest difference between training losses of one seed and epoch."""
    epochs = (zip(run.history, twin.history, strict=False) for run, twin in _pairs(one, other))
    return max((abs(a.train_loss - b.train_loss) for pairs in epochs for a, b in pairs), default=0.0)


def changes_of(one: Setting, other: Setting) -> list[float]:
    """Return the differences of final test accuracy, seed by seed."""
    histories = [(run.history, twin.history) for run, twin in _pairs(one, other)]
    return [mine[-1].test_accuracy - yours[-1].test_accuracy for mine, yours in histories if mine and yours]


def _variance_factor(one: Setting, other: Setting) -> float:
    """Return the geometric mean, over seeds and the layers behind linear ones, of the ratios of moving variances."""
    variances = [(run.moving_var, twin.moving_var) for run, twin in _pairs(one, other)]
    ratios = [a[layer] / b[layer] for a, b in variances for layer in ("bn3", "bn4") if layer in a and layer in b]
    return statistics.geometric_mean(ratios) if ratios else math.nan


def _batches(results: Results) -> list[Claim]:
    inside, worst, parts, tiny = True, True, [], []
    for lr in BATCH_RATES:
        settings = [setting for setting in results.settings("c") if setting.spec.lr == lr]
        means = {each: mean for each in settings if _complete(each) and (mean := each.mean("test_accuracy"))}
        if not means:
            inside = worst = False
            parts.append(f"at {lr:g} at no size every seed learned")
            continue
        best, first = max(means, key=lambda setting: means[setting].mean), settings[0]
        inside = inside and best.spec.batch_size not in (BATCHES[0], BATCHES[-1])
        parts.append(f"at {lr:g} batches of {best.spec.batch_size} are best with {plus_minus(means[best])}")
        worst = worst and _clearly_worse(means.get(first), means[best])
        accuracy = first.mean("test_accuracy")
        tiny.append(f"at {lr:g} {counted(first)}" + (f", test accuracy {plus_minus(accuracy)}" if accuracy else ""))
    return [
        Claim(
            "Batches of medium size do best.",
            inside,
            f"Test accuracy after {results.plan.batch_images:,} images: {'; '.join(parts)}.",
        ),
        Claim(
            f"Batches of {BATCHES[0]} do clearly worse.",
            worst,
            f"Seeds that learned with them: {'; '.join(tiny) or 'nothing to compare with'}.",
        ),
    ]


def _clearly_worse(one: Mean | None, best: Mean) -> bool:
    """Return True if a mean is below another by more than both deviations, or not every seed learned."""
    return one is None or one.mean + (one.deviation or 0.0) < best.mean - (best.deviation or 0.0)


def _statistics(results: Results) -> list[Claim]:
    settings = results.settings("d")
    gaps = [Mean.of(_per_run(setting, _gap)) for setting in settings]
    shifts = [Mean.of(_per_run(setting, lambda epoch: epoch.shift)) for setting in settings]
    means = [mean.mean for mean in shifts if mean is not None]
    last = gaps[-1]
    return [
        Claim(
            f"At learning rate {RATES[-1]:g} predictions are better with re-estimated statistics than with moving ones.",
            last is not None and last.mean > 2 * (last.deviation or 0.0) / last.n**0.5,
            f"Test accuracy with re-estimated ones less that with moving ones, {_at_rates(gaps)}.",
        ),
        Claim(
            "The higher the learning rate, the farther the moving means are from those of the weights.",
            len(means) == len(RATES) and means == sorted(means),
            f"Their distance in standard deviations, root mean square over channels, {_at_rates(shifts)}.",
        ),
    ]


def _at_rates(means: Sequence[Mean | None]) -> str:
    parts = ", ".join(f"{plus_minus(mean)} at {lr:g}" for lr, mean in zip(RATES, means, strict=True))
    return f"mean of all epochs: {parts}"


def _gap(epoch: EpochResult) -> float | None:
    return None if epoch.exact_accuracy is None else epoch.exact_accuracy - epoch.test_accuracy


def _per_run(setting: Setting, of: Callable[[EpochResult], float | None]) -> list[float]:
    """Return the mean of a value over the epochs of each run that learned: epochs of one run are not independent."""
    found = [[value for epoch in run.history if (value := of(epoch)) is not None] for run in setting.learned]
    return [statistics.mean(values) for values in found if values]


def _affine(results: Results) -> list[Claim]:
    (setting,) = results.settings("e")
    runs = [run for run in setting.learned if run.affine]
    parts, apart, moved, agree = [], [], bool(runs), bool(runs)
    for layer in runs[0].affine if runs else []:
        gamma, beta = ([value for run in runs for value in run.affine[layer][name]] for name in ("gamma", "beta"))
        farthest = [
            statistics.median(abs(value - start) for value in values) for values, start in ((gamma, 1), (beta, 0))
        ]
        moved = moved and min(farthest) > MOVED
        negative = sum(value < 0 for value in gamma)
        parts.append(
            f"{layer} gamma {min(gamma):.2f} to {max(gamma):.2f} ({negative} of {len(gamma)} negative), beta {min(beta):.2f} to"
            f" {max(beta):.2f}"
        )
        if len(runs) > 1:
            seeds = statistics.stdev(statistics.mean(run.affine[layer]["gamma"]) for run in runs)
            agree = agree and seeds < statistics.stdev(gamma)
            apart.append(f"{layer} {seeds:.3f} against {statistics.stdev(gamma):.3f}")
    return [
        Claim("Gamma and beta are learned: they leave 1 and 0.", moved, f"{'; '.join(parts) or 'No run learned'}."),
        Claim(
            "Seeds give different channels, but similar layers.",
            agree and len(runs) > 1,
            f"Deviation of a layer's mean gamma over seeds against that of gamma over channels: {'; '.join(apart) or '-'}.",
        ),
    ]


#: Experiment -> its judged claims; the experiment must be complete.
CLAIMS: dict[str, Callable[[Results], list[Claim]]] = {
    "a": _rates,
    "b": _conventions,
    "c": _batches,
    "d": _statistics,
    "e": _affine,
}
