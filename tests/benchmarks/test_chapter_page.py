"""docs/results/chapter.md and its figures, from made-up results."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from support.chapter import at_chance, crafted, diverged

from benchmarks.chapter.__main__ import SECTIONS, write_chapter
from benchmarks.chapter.figures import FIGURES
from benchmarks.chapter.plan import EXPERIMENTS, RATES
from benchmarks.chapter.results import load_results
from benchmarks.chapter.run import RunResult


def written(folder: Path, results: object = None) -> str:
    write_chapter(results or crafted(), folder / "chapter.md")  # type: ignore[arg-type]
    return (folder / "chapter.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the page of complete results."""
    written(folder := tmp_path_factory.mktemp("whole"))
    return folder


@pytest.fixture
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.chapter.__main__.write_figures", lambda *_: None)


def one_diverges_and_one_stays(run: RunResult) -> RunResult:
    if run.spec.norm == "torch" and run.spec.lr == 2.0 and run.spec.seed == 0:
        return diverged(run, 2)
    return at_chance(run) if run.spec.seed == 1 else run


def test_the_page_holds_tables_figures_and_conditions(whole: Path) -> None:
    text = (whole / "chapter.md").read_text(encoding="utf-8")
    assert "| A | With BatchNorm a network can be trained at higher learning rates. | yes |" in text
    assert "| 2 | none | 0 of 3 (3 at chance) | - | - | - |" in text
    assert "| 1 | torch.nn.BatchNorm | 3 of 3 | 0.167 +/- 0.010 | 0.800 +/- 0.000 | 0.800 +/- 0.010 |" in text
    assert "| 0.1 | 32 | 1 | 3 of 3 |" in text
    assert "| 2 | 3 | 0.800 +/- 0.010 | 0.860 +/- 0.010 | 0.200 +/- 0.010 | 0.100 +/- 0.000 |" in text
    assert "| bn4 | 1.688 | 1.698 | 1.708 |" in text
    assert "n = 3 seeds (0 to 2)" in text
    assert "a processor (2 cores), Python 3.11, torch 2.14; 1 thread(s) for each training" in text
    assert "This is the result of" not in text
    for name in EXPERIMENTS:
        assert f"](chapter/{name}.svg)" in text
        assert (whole / "chapter" / f"{name}.svg").is_file()
    assert all(len(line) <= 120 for line in text.splitlines() if not line.startswith(("|", "!", "#")))
    assert not re.search(r"\bnan\b", text)


@pytest.mark.usefixtures("without_figures")
def test_a_quick_result_is_marked(tmp_path: Path) -> None:
    results = crafted()
    assert "This is the result of `--quick`" in written(
        tmp_path, replace(results, plan=replace(results.plan, quick=True))
    )


def test_missing_measurements_are_named(tmp_path: Path) -> None:
    text = written(tmp_path, crafted(experiments=("b", "e")))
    assert text.count("Not measured yet.") == 3
    assert re.findall(r"^\| ([A-E]) \|", text, re.MULTILINE) == ["B", "B", "E", "E"]
    assert sorted(path.name for path in (tmp_path / "chapter").iterdir()) == ["b.svg", "e.svg", "results.json"]


@pytest.mark.sampled(2, 1)
@pytest.mark.parametrize("change", [diverged, one_diverges_and_one_stays])
def test_a_page_of_failures_is_a_page(tmp_path: Path, change: object) -> None:
    text = written(tmp_path, crafted(change))  # type: ignore[arg-type]
    assert "diverged)" in text
    assert not re.search(r"\bnan\b", text)


def test_the_saved_results_give_the_same_page_and_figures(whole: Path, tmp_path: Path) -> None:
    again = load_results(whole / "chapter" / "results.json")
    assert written(tmp_path, again) == (whole / "chapter.md").read_text(encoding="utf-8")
    for name in EXPERIMENTS:
        figures = [(folder / "chapter" / f"{name}.svg").read_bytes() for folder in (whole, tmp_path)]
        assert figures[0] == figures[1]
        assert b"<dc:date>" not in figures[0]


def test_figures_have_titles_with_units_and_do_not_depend_on_colour(whole: Path) -> None:
    for name, units in {
        "a": ("train loss (nats)", "test accuracy (fraction)", "epoch"),
        "b": ("train loss (nats)", "change of test accuracy (fraction)", "batch size (images)"),
        "c": ("test accuracy (fraction)", "batch size (images)"),
        "d": ("test accuracy (fraction)", "(standard deviations)"),
        "e": ("gamma (no unit)", "beta (no unit)"),
    }.items():
        text = (whole / "chapter" / f"{name}.svg").read_text(encoding="utf-8")
        assert all(f"<!-- {unit}" in text for unit in units), name
    for name in ("a", "c", "d"):
        labelled = [line for line in FIGURES[name][0](crafted()).axes[0].get_lines() if line.get_label()[0] != "_"]
        assert len({line.get_linestyle() for line in labelled}) == len(labelled) == 2


def test_figures_show_runs_that_did_not_learn() -> None:
    figure = FIGURES["a"][0](crafted(one_diverges_and_one_stays))
    panels = figure.axes[: len(RATES)]
    crosses = [[line.get_xdata()[0] for line in panel.get_lines() if line.get_marker() == "X"] for panel in panels]
    assert crosses == [[], [], [], [2]]
    hollow = [line for line in FIGURES["c"][0](crafted()).axes[0].get_lines() if line.get_markerfacecolor() == "none"]
    assert {round(line.get_xdata()[0]) for line in hollow} == {2}
    assert len(hollow) == 6, "three seeds with both statistics"


def test_a_mean_line_leaves_out_runs_that_did_not_learn() -> None:
    figure = FIGURES["a"][0](crafted(one_diverges_and_one_stays))
    (mean,) = (line for line in figure.axes[3].get_lines() if line.get_label() == "with BatchNorm")
    assert list(mean.get_ydata()) == pytest.approx([0.51, 0.26, 0.5 / 3 + 0.01]), "seed 2 alone"


def test_every_experiment_has_a_section_and_a_figure() -> None:
    assert list(SECTIONS) == list(FIGURES) == list(EXPERIMENTS)
