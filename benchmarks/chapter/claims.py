"""The chapter's claims judged by the results. Every sentence is generated from the numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
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

    said: str
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
    others = [f"{len(runs)} {words}" for name, words in _OTHERS if (runs := setting.having(name))]
    return f"{len(setting.learned)} of {len(setting.runs)}" + (f" ({', '.join(others)})" if others else "")


_OTHERS = (("chance", "at chance"), ("diverged", "diverged"))


def _rates(results: Results) -> list[Claim]:
    by_norm = {
        norm: [setting for setting in results.settings("a") if setting.spec.norm == norm] for norm in ("torch", "none")
    }
    reach = {norm: _reach(settings) for norm, settings in by_norm.items()}
    parts = [
        f"{'with' if norm == 'torch' else 'without'} BatchNorm "
        + ", ".join(f"{counted(setting)} at {setting.spec.lr:g}" for setting in settings)
        for norm, settings in by_norm.items()
    ]
    pairs = [
        pair
        for with_norm, without in zip(by_norm["torch"], by_norm["none"], strict=True)
        for pair in zip(with_norm.runs, without.runs, strict=True)
    ]
    faster = [pair for pair in pairs if _lower_loss(*pair)]
    passing = [epoch for pair in pairs if (epoch := _passes(*pair)) is not None]
    epochs = results.plan.epochs
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
            len(faster) == len(pairs),
            f"Of {len(pairs)} pairs of one learning rate and seed, in {len(faster)} the training loss of epoch {epochs} is"
            f" lower with BatchNorm.{speed}",
        ),
    ]


def _reach(settings: Sequence[Setting]) -> float:
    """The largest learning rate at which every seed learned; 0 if there is none."""
    return max((setting.spec.lr for setting in settings if len(setting.learned) == len(setting.runs)), default=0.0)


def _lower_loss(one: RunResult, other: RunResult) -> bool:
    if "diverged" in (one.outcome, other.outcome):
        return one.outcome != "diverged"
    return one.history[-1].train_loss < other.history[-1].train_loss


def _passes(one: RunResult, other: RunResult) -> int | None:
    """The epoch, before the last, in which one passes the final training accuracy of the other."""
    if not other.history or one.outcome == "diverged":
        return None
    aim = other.history[-1].train_accuracy
    before = one.history[:-1]
    return next((number for number, epoch in enumerate(before, 1) if epoch.train_accuracy > aim), None)


def _conventions(results: Results) -> list[Claim]:
    by_place = {(setting.spec.batch_size, setting.spec.norm): setting for setting in results.settings("b")}
    same, equal, parts, factors = False, True, [], []
    for size in CONVENTION_BATCHES:
        torch, unbiased, biased = (by_place[size, norm] for norm in ("torch", "scratch-unbiased", "scratch"))
        apart, spread = _apart(torch, unbiased), torch.mean(lambda epoch: epoch.train_loss)
        deviation = (spread.deviation if spread is not None else None) or 0.0
        learned = all(len(setting.learned) == results.plan.seeds for setting in (torch, unbiased))
        if size == CHAPTER_BATCH:  # many small, noisy steps amplify rounding until the two differ as two seeds do
            same = learned and apart <= SAME * deviation
        parts.append(f"{apart:.1e} with batches of {size} (seeds deviate by {deviation:.1e})")
        expected, factor = size / (size - 1), _variance_factor(unbiased, biased)
        equal = equal and abs(factor - expected) < FACTOR_TOLERANCE * (expected - 1) and _apart(unbiased, biased) == 0.0
        change = Mean.of(changes_of(unbiased, biased))
        factors.append(
            f"with batches of {size} the moving variances behind the linear layers are"
            f" {'-' if math.isnan(factor) else f'{factor:.4f}'} times the biased ones"
            f" (n/(n-1) = {expected:.4f}), and test accuracy changes by {plus_minus(change, 4)}"
        )
    bits = [_apart(by_place[size, "scratch-unbiased"], by_place[size, "scratch"]) for size in CONVENTION_BATCHES]
    trained = (
        "Training is the same to the last bit" if not any(bits) else f"Training losses differ by up to {max(bits):.1e}"
    )
    return [
        Claim(
            f"With batches of {CHAPTER_BATCH} the layer from scratch trains as the framework's does, if both keep the same"
            " variance.",
            same,
            f"Largest difference between training losses of one seed and epoch: {'; '.join(parts)}.",
        ),
        Claim(
            "The chapter's layer, which keeps the biased variance, differs in its moving variance alone.",
            equal,
            f"{trained}; {'; '.join(factors)}.",
        ),
    ]


def _apart(one: Setting, other: Setting) -> float:
    """The largest difference between training losses of one seed and epoch."""
    return max(
        (
            abs(mine.train_loss - yours.train_loss)
            for run, twin in zip(one.runs, other.runs, strict=True)
            for mine, yours in zip(run.history, twin.history, strict=False)
        ),
        default=0.0,
    )


def changes_of(one: Setting, other: Setting) -> list[float]:
    """Return the differences of final test accuracy, seed by seed."""
    pairs = zip(one.runs, other.runs, strict=True)
    return [a.history[-1].test_accuracy - b.history[-1].test_accuracy for a, b in pairs if a.history and b.history]


def _variance_factor(one: Setting, other: Setting) -> float:
    """Geometric mean, over seeds and the layers behind linear ones, of one's moving variances over the other's."""
    ratios = [
        run.moving_var[layer] / twin.moving_var[layer]
        for run, twin in zip(one.runs, other.runs, strict=True)
        for layer in ("bn3", "bn4")
        if layer in run.moving_var and layer in twin.moving_var
    ]
    return statistics.geometric_mean(ratios) if ratios else math.nan


def _batches(results: Results) -> list[Claim]:
    inside, worst, parts, tiny = True, True, [], []
    for lr in BATCH_RATES:
        settings = [setting for setting in results.settings("c") if setting.spec.lr == lr]
        means = {setting: mean for setting in settings if (mean := _whole(setting)) is not None}
        if not means:
            inside = worst = False
            parts.append(f"at {lr:g} at no size every seed learned")
            continue
        best = max(means, key=lambda setting: means[setting].mean)
        inside = inside and best.spec.batch_size not in (BATCHES[0], BATCHES[-1])
        parts.append(f"at {lr:g} batches of {best.spec.batch_size} are best with {plus_minus(means[best])}")
        first = settings[0]
        worst = worst and _clearly_worse(means.get(first), means[best])
        accuracy = first.mean(lambda epoch: epoch.test_accuracy)
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


def _whole(setting: Setting) -> Mean | None:
    """Test accuracy of a setting whose seeds all learned."""
    return setting.mean(lambda epoch: epoch.test_accuracy) if len(setting.learned) == len(setting.runs) else None


def _clearly_worse(one: Mean | None, best: Mean) -> bool:
    """True if a mean lies below another by more than both deviations, or not every seed learned."""
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
    """The mean of a value over the epochs of each run that learned: epochs of one run are not independent."""
    found = [[value for epoch in run.history if (value := of(epoch)) is not None] for run in setting.learned]
    return [statistics.mean(values) for values in found if values]


def _affine(results: Results) -> list[Claim]:
    (setting,) = results.settings("e")
    runs = [run for run in setting.learned if run.affine]
    parts, moved, agree, layers = [], bool(runs), bool(runs), list(runs[0].affine) if runs else []
    for layer in layers:
        gamma, beta = ([value for run in runs for value in run.affine[layer][name]] for name in ("gamma", "beta"))
        distances = [
            statistics.median(abs(value - start) for value in values) for values, start in ((gamma, 1), (beta, 0))
        ]
        moved = moved and min(distances) > MOVED
        negative = sum(value < 0 for value in gamma)
        parts.append(
            f"{layer} gamma {min(gamma):.2f} to {max(gamma):.2f} ({negative} of {len(gamma)} negative), beta {min(beta):.2f} to"
            f" {max(beta):.2f}"
        )
        centres = [statistics.mean(run.affine[layer]["gamma"]) for run in runs]
        agree = agree and len(centres) > 1 and statistics.stdev(centres) < statistics.stdev(gamma)
    apart = [
        f"{layer} {statistics.stdev(statistics.mean(run.affine[layer]['gamma']) for run in runs):.3f} against"
        f" {statistics.stdev(value for run in runs for value in run.affine[layer]['gamma']):.3f}"
        for layer in layers
        if len(runs) > 1
    ]
    return [
        Claim("Gamma and beta are learned: they leave 1 and 0.", moved, f"{'; '.join(parts) or 'No run learned'}."),
        Claim(
            "Seeds give channels of their own, but layers alike.",
            agree,
            f"Deviation of a layer's mean gamma over seeds against that of gamma over channels: {'; '.join(apart) or '-'}.",
        ),
    ]


#: Experiment -> its claims.
CLAIMS: dict[str, Callable[[Results], list[Claim]]] = {
    "a": _rates,
    "b": _conventions,
    "c": _batches,
    "d": _statistics,
    "e": _affine,
}


def claims_of(results: Results, experiment: str) -> list[Claim]:
    """Return the judged claims of one complete experiment."""
    return CLAIMS[experiment](results)
