"""The page docs/chapter.md, written from the results of the chapter's experiments."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.chapter.claims import claims_of, counted, plus_minus
from benchmarks.chapter.figures import FIGURES, write_figures
from benchmarks.chapter.plan import CHAPTER_BATCH, CHAPTER_RATE, VARIANTS, Plan
from benchmarks.chapter.results import Results, Setting, save_results
from benchmarks.chapter.run import CHANCE_FACTOR, RECALIBRATION, EpochResult
from benchmarks.pages import write_page
from bnexport.environment import describe

RESULTS = "results.json"
_HEAD = """# What the chapter claims, shown

"Dive into Deep Learning", [section 8.5](https://d2l.ai/chapter_convolutional-modern/batch-norm.html), says what batch
normalization does to a small LeNet and leaves some of it to the reader as exercises. Here it is measured. Written by
`python scripts/chapter.py`, sentences about the numbers too: they are made of the numbers.
"""
_QUICK = """**This is the result of `--quick`: it shows that the script works. The networks see too few images for any of the
answers below to mean something.**
"""


def write_chapter(results: Results, page: Path) -> None:
    """Write the page, and its results and figures into the folder beside it that has its name.

    Args:
        results: Complete experiments are shown, the others named as missing.
        page: The file, as docs/chapter.md.

    Raises:
        OutputError: A file can't be written.
    """
    folder = page.with_suffix("")
    save_results(results, folder / RESULTS)
    write_figures(results, folder)
    write_page(_parts(results, folder.name), page)


def _parts(results: Results, folder: str) -> Iterator[str]:
    yield _HEAD
    if results.plan.quick:
        yield _QUICK
    yield from _answers(results)
    yield from _conditions(results, folder)
    for name, (title, text, tables) in SECTIONS.items():
        yield f"## {name.upper()}. {title}\n"
        if name not in results.experiments:
            yield "Not measured yet.\n"
            continue
        yield text(results.plan) + "\n"
        yield f"![{FIGURES[name][1]}]({folder}/{name}.svg)\n"
        yield from tables(results)
        yield ""
        for claim in claims_of(results, name):
            yield f"- {claim.said} **{_answer(claim.holds)}.** {claim.found}"
        yield ""


def _answers(results: Results) -> Iterator[str]:
    yield "## Answers\n"
    yield "| | claim | shown |"
    yield "|---|---|---|"
    for name in results.experiments:
        for claim in claims_of(results, name):
            yield f"| {name.upper()} | {claim.said} | {_answer(claim.holds)} |"
    yield '\n"Yes" is a rule on the numbers, in `bnexport/benchmarking/chapter_claims.py`; "no": they do not show it.\n'


def _answer(holds: bool) -> str:
    return "yes" if holds else "no"


def _conditions(results: Results, folder: str) -> Iterator[str]:
    plan = results.plan
    yield "## Conditions\n"
    yield (
        f"- {plan.dataset}: the first {plan.images:,} training and {plan.test_images:,} test images; BN-LeNet, plain SGD with a"
        f" constant learning rate, Xavier weights, no augmentation. The chapter: learning rate {CHAPTER_RATE:g}, batches of"
        f" {CHAPTER_BATCH}"
    )
    yield (
        f"- n = {plan.seeds} seeds (0 to {plan.seeds - 1}); a seed gives the same initial weights and order of images whatever"
        " the normalization. Shown is mean +/- sample standard deviation over the seeds that learned"
    )
    yield (
        "- a run *diverged* when its loss or weights were no longer finite, and stayed *at chance* when none of its accuracies"
        f" in the last epoch was above {CHANCE_FACTOR:g} times that of guessing; such runs are counted, not averaged"
    )
    yield (
        f"- re-estimated statistics are those of {min(RECALIBRATION, plan.images):,} training images, taken after each epoch in"
        " the batch size of the training; training goes on with the moving ones"
    )
    for record in results.conditions():
        yield f"- {describe(dict(record))}; {record['threads']} thread(s) for each training"
    seconds = sum(run.seconds for run in results.runs)
    yield f"- {len(results.runs)} trainings, {seconds / 60:.0f} minutes one after the other; every epoch of each is in"
    yield f"  [{RESULTS}]({folder}/{RESULTS})\n"


def _table(heads: list[str], rows: list[list[str]]) -> Iterator[str]:
    yield f"| {' | '.join(heads)} |"
    yield "|" + "---|" * len(heads)
    yield from (f"| {' | '.join(row)} |" for row in rows)


def _means(setting: Setting) -> list[str]:
    """Seeds that learned, and the usual three numbers of the last epoch."""
    return [
        counted(setting),
        plus_minus(setting.mean(lambda epoch: epoch.train_loss)),
        plus_minus(setting.mean(lambda epoch: epoch.train_accuracy)),
        plus_minus(setting.mean(lambda epoch: epoch.test_accuracy)),
    ]


_MEANS = ["seeds that learned", "train loss, nats", "train accuracy", "test accuracy"]


def _rates_text(plan: Plan) -> str:
    return (
        f"The same network with and without BatchNorm, {plan.epochs} epochs of {plan.images:,} images in batches of"
        f" {CHAPTER_BATCH}. Thin lines are seeds, thick ones the mean of those that learned; a cross at the upper edge"
        " marks the epoch in which one diverged."
    )


def _rates_table(results: Results) -> Iterator[str]:
    rows = [[f"{s.spec.lr:g}", VARIANTS[s.spec.norm], *_means(s)] for s in results.settings("a")]
    yield from _table(["learning rate", "norm", *_MEANS], rows)


def _conventions_text(plan: Plan) -> str:
    return (
        "Both layers normalise with the biased variance of a batch (divided by n), but torch keeps the unbiased one (divided by"
        " n-1) for its moving variance, and the chapter the biased. `BatchNorm(unbiased=True)` does as torch."
        f" {plan.convention_images:,} images, learning rate {CHAPTER_RATE:g}; {plan.convention_epochs} epochs in batches of"
        f" {CHAPTER_BATCH}, and one in batches of 8, where n-1 and n differ more."
    )


def _conventions_table(results: Results) -> Iterator[str]:
    rows = [[str(s.spec.batch_size), VARIANTS[s.spec.norm], *_means(s)] for s in results.settings("b")]
    yield from _table(["batch size", "norm", *_MEANS], rows)


def _batches_text(plan: Plan) -> str:
    return (
        f"One epoch of {plan.batch_images:,} images for every batch size, so small batches make more steps; at two learning"
        " rates, each kept for all sizes. The epoch is shorter than in A: the whole training set in batches of 2 would take"
        " half of the time of this page. In a batch of 2 a channel behind a linear layer has two values; normalised they are"
        " -1 and 1, whatever they were (but for eps), so only their order is left. Hollow marks are"
        " seeds that did not learn."
    )


def _batches_table(results: Results) -> Iterator[str]:
    rows = [
        [
            f"{s.spec.lr:g}",
            str(s.spec.batch_size),
            f"{-(-s.spec.images // s.spec.batch_size):,}",
            *_means(s),
            plus_minus(s.mean(lambda epoch: epoch.exact_accuracy)),
        ]
        for s in results.settings("c")
    ]
    yield from _table(["learning rate", "batch size", "steps", *_MEANS, "with re-estimated statistics"], rows)


def _statistics_text(plan: Plan) -> str:
    return (
        f"The trainings of A with BatchNorm, {plan.epochs} epochs, tested after each with the moving statistics and with"
        " re-estimated ones. Shift is the distance of the moving means in standard deviations, root mean square over all"
        " channels; the last column is the root mean square of ln(moving / re-estimated standard deviation)."
    )


def _statistics_table(results: Results) -> Iterator[str]:
    values: list[Callable[[EpochResult], float | None]] = [
        lambda e: e.test_accuracy,
        lambda e: e.exact_accuracy,
        lambda e: e.shift,
        lambda e: e.scale,
    ]
    rows = [
        [f"{s.spec.lr:g}", str(epoch), *(plus_minus(s.mean(of, epoch=epoch)) for of in values)]
        for s in results.settings("d")
        for epoch in range(1, results.plan.epochs + 1)
    ]
    heads = ["learning rate", "epoch", "test accuracy, moving", "re-estimated", "shift of means", "ln of deviations"]
    yield from _table(heads, rows)


def _affine_text(plan: Plan) -> str:
    return (
        f"Gamma and beta of every channel after {plan.epochs} epochs at learning rate {CHAPTER_RATE:g}. A box is one seed: the"
        " middle half of the channels, its line the median, its whiskers the smallest and largest."
    )


def _affine_table(results: Results) -> Iterator[str]:
    (setting,) = results.settings("e")
    for name in ("gamma", "beta"):
        yield f"\nMean of {name} over the channels, seed by seed:\n"
        layers = list(next((run.affine for run in setting.learned if run.affine), {}))
        rows = [
            [layer, *(f"{sum(run.affine[layer][name]) / len(run.affine[layer][name]):.3f}" for run in setting.learned)]
            for layer in layers
        ]
        yield from _table(["layer", *(f"seed {run.spec.seed}" for run in setting.learned)], rows)


#: Experiment -> (heading, what was done, its tables), in the order of the page.
SECTIONS: dict[str, tuple[str, Callable[[Plan], str], Callable[[Results], Iterator[str]]]] = {
    "a": ("Learning rates with BatchNorm and without", _rates_text, _rates_table),
    "b": ("From scratch and the framework's", _conventions_text, _conventions_table),
    "c": ("Batch sizes", _batches_text, _batches_table),
    "d": ("Moving statistics and re-estimated ones", _statistics_text, _statistics_table),
    "e": ("Gamma and beta", _affine_text, _affine_table),
}
