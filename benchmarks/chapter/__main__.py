"""Show by trainings the claims of "Dive into Deep Learning", section 8.5, on BatchNorm; write docs/results/chapter.md.

Every finished training is kept in the folder --work, so an interrupted run resumes. Fashion-MNIST comes from the folder that
BNEXPORT_DATA names, the cache or the network. The whole takes about 20 minutes on two idle cores.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from benchmarks.chapter.claims import CLAIMS, counted, plus_minus
from benchmarks.chapter.figures import FIGURES, write_figures
from benchmarks.chapter.plan import CHAPTER_BATCH, CHAPTER_RATE, EXPERIMENTS, FULL, QUICK, VARIANTS
from benchmarks.chapter.results import Results, Setting, run_chapter, save_results
from benchmarks.chapter.run import CHANCE_FACTOR, RECALIBRATION
from benchmarks.command import finish, options, progress
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
    claims = {name: CLAIMS[name](results) for name in results.experiments}
    text = render(
        "chapter/page.md.jinja", plan=results.plan, complete=results.experiments, folder=folder.name, results=RESULTS,
        rate=CHAPTER_RATE, batch=CHAPTER_BATCH, chance=CHANCE_FACTOR, recalibration=min(RECALIBRATION, results.plan.images),
        machines=[(describe(dict(record)), record["threads"]) for record in results.conditions()],
        runs=len(results.runs), minutes=sum(run.seconds for run in results.runs) / 60, titles=SECTIONS,
        figures={name: words for name, (_, words) in FIGURES.items()}, claims=claims,
        tables={name: SECTIONS[name][1](results) for name in results.experiments},
        answers=[[name.upper(), each.claim, "yes" if each.holds else "no"] for name in claims for each in claims[name]],
    )  # fmt: skip
    write_page([text], page)


def _means(setting: Setting) -> list[str]:
    """Return the number of seeds that learned, and three means of the last epoch."""
    return [counted(setting), *_cells(setting, "train_loss", "train_accuracy", "test_accuracy")]


def _cells(setting: Setting, *names: str, epoch: int = 0) -> list[str]:
    return [plus_minus(setting.mean(name, epoch=epoch)) for name in names]


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
        rows.append([f"{s.spec.lr:g}", str(s.spec.batch_size), steps, *_means(s), *_cells(s, "exact_accuracy")])
    return [("", ["learning rate", "batch size", "steps", *_MEANS, "with re-estimated statistics"], rows)]


def _statistics(results: Results) -> list[Table]:
    names = ("test_accuracy", "exact_accuracy", "shift", "scale")
    settings, epochs = results.settings("d"), range(1, results.plan.epochs + 1)
    rows = [[f"{s.spec.lr:g}", str(n), *_cells(s, *names, epoch=n)] for s in settings for n in epochs]
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


def main() -> None:
    """Make the missing trainings, and write the page of all of them."""
    parser = options("chapter", __doc__)
    parser.add_argument("--quick", action="store_true", help="2 seeds, few images: shows only that the command works")
    parser.add_argument("--only", default=",".join(EXPERIMENTS), help="make these experiments' trainings: a,b")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time, which share the cores")
    parser.add_argument("--dataset", default=FULL.dataset, help="a row of the catalogue; digits needs --quick")
    parser.add_argument("--work", type=Path, default=Path("runs/chapter"), help="folder of finished trainings")
    parser.add_argument(
        "--page", type=Path, default=Path("docs/results/chapter.md"), help="the page, with its figures next to it"
    )
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # each training sets its threads in its process
    plan = replace(QUICK if given.quick else FULL, dataset=given.dataset)
    results = run_chapter(given.work, plan, given.only.split(","), jobs=given.jobs, on_line=progress)
    write_chapter(results, given.page)


if __name__ == "__main__":
    finish("chapter", main)
