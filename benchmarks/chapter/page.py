"""The page docs/results/chapter.md, from the results of the chapter's experiments."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks.chapter.claims import claims_of, counted, plus_minus
from benchmarks.chapter.figures import FIGURES, write_figures
from benchmarks.chapter.plan import CHAPTER_BATCH, CHAPTER_RATE, VARIANTS
from benchmarks.chapter.results import Results, Setting, save_results
from benchmarks.chapter.run import CHANCE_FACTOR, RECALIBRATION
from benchmarks.pages import render, write_page
from bnexport.environment import describe

RESULTS = "results.json"
_MEANS = ["seeds that learned", "train loss, nats", "train accuracy", "test accuracy"]
#: (words above the table, heads, rows)
Table = tuple[str, list[str], list[list[str]]]


def write_chapter(results: Results, page: Path) -> None:
    """Write a page as docs/results/chapter.md, with results and figures in the folder next to it that has its name."""
    folder = page.with_suffix("")
    save_results(results, folder / RESULTS)
    write_figures(results, folder)
    text = render(
        "chapter/page.md.jinja", plan=results.plan, complete=results.experiments, folder=folder.name, results=RESULTS,
        rate=CHAPTER_RATE, batch=CHAPTER_BATCH, chance=CHANCE_FACTOR, recalibration=min(RECALIBRATION, results.plan.images),
        machines=[(describe(dict(record)), record["threads"]) for record in results.conditions()],
        runs=len(results.runs), minutes=sum(run.seconds for run in results.runs) / 60, titles=SECTIONS,
        figures={name: words for name, (_, words) in FIGURES.items()},
        tables={name: SECTIONS[name][1](results) for name in results.experiments},
        answers=[[name.upper(), claim.said, "yes" if claim.holds else "no"]
                 for name in results.experiments for claim in claims_of(results, name)],
        claims={name: claims_of(results, name) for name in results.experiments},
    )  # fmt: skip
    write_page([text], page)


def _means(setting: Setting) -> list[str]:
    """Seeds that learned, and three means of the last epoch."""
    values = (setting.mean(lambda epoch, name=name: getattr(epoch, name)) for name in _NAMES)  # type: ignore[misc]
    return [counted(setting), *map(plus_minus, values)]


_NAMES = ("train_loss", "train_accuracy", "test_accuracy")


def _rates(results: Results) -> list[Table]:
    rows = [[f"{s.spec.lr:g}", VARIANTS[s.spec.norm], *_means(s)] for s in results.settings("a")]
    return [("", ["learning rate", "norm", *_MEANS], rows)]


def _conventions(results: Results) -> list[Table]:
    rows = [[str(s.spec.batch_size), VARIANTS[s.spec.norm], *_means(s)] for s in results.settings("b")]
    return [("", ["batch size", "norm", *_MEANS], rows)]


def _batches(results: Results) -> list[Table]:
    rows = []
    for s in results.settings("c"):
        steps = f"{-(-s.spec.images // s.spec.batch_size):,}"
        exact = plus_minus(s.mean(lambda epoch: epoch.exact_accuracy))
        rows.append([f"{s.spec.lr:g}", str(s.spec.batch_size), steps, *_means(s), exact])
    return [("", ["learning rate", "batch size", "steps", *_MEANS, "with re-estimated statistics"], rows)]


def _statistics(results: Results) -> list[Table]:
    names = ("test_accuracy", "exact_accuracy", "shift", "scale")
    rows = []
    for s in results.settings("d"):
        for number in range(1, results.plan.epochs + 1):
            means = (s.mean(lambda epoch, name=name: getattr(epoch, name), epoch=number) for name in names)  # type: ignore[misc]
            rows.append([f"{s.spec.lr:g}", str(number), *map(plus_minus, means)])
    heads = ["learning rate", "epoch", "test accuracy, moving", "re-estimated", "shift of means", "ln of deviations"]
    return [("", heads, rows)]


def _affine(results: Results) -> list[Table]:
    (setting,) = results.settings("e")
    heads = ["layer", *(f"seed {run.spec.seed}" for run in setting.learned)]
    layers = list(next((run.affine for run in setting.learned if run.affine), {}))
    found = []
    for name in ("gamma", "beta"):
        values = {layer: [run.affine[layer][name] for run in setting.learned] for layer in layers}
        rows = [[layer, *(f"{sum(each) / len(each):.3f}" for each in runs)] for layer, runs in values.items()]
        found.append((f"Mean of {name} over the channels, seed by seed:", heads, rows))
    return found


#: Experiment -> (heading, its tables), in the order of the page. The template has its text.
SECTIONS: dict[str, tuple[str, Callable[[Results], list[Table]]]] = {
    "a": ("Learning rates with BatchNorm and without", _rates),
    "b": ("From scratch and the framework's", _conventions),
    "c": ("Batch sizes", _batches),
    "d": ("Moving statistics and re-estimated ones", _statistics),
    "e": ("Gamma and beta", _affine),
}
