"""docs/results/chapter.md agrees with its results, and ``python -m benchmarks.chapter`` writes it."""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from benchmarks.chapter.__main__ import main, write_chapter
from benchmarks.chapter.plan import EXPERIMENTS
from benchmarks.chapter.results import load_results
from benchmarks.command import finish

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "results" / "chapter.md"
FOLDER = ROOT / "docs" / "results" / "chapter"


def script(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.chapter", *map(str, arguments)]
    environ = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=240, check=False)


@pytest.fixture(scope="module")
def again(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a page written from the committed results."""
    folder = tmp_path_factory.mktemp("again")
    write_chapter(load_results(FOLDER / "results.json"), folder / "chapter.md")
    return folder


def test_the_page_is_what_the_results_give(again: Path) -> None:
    results = load_results(FOLDER / "results.json")
    assert results.experiments == tuple(EXPERIMENTS), "every experiment is measured"
    assert results.plan.dataset == "fashion-mnist"
    assert (again / "chapter.md").read_text() == PAGE.read_text(), "write it again: python -m benchmarks.chapter"
    assert (again / "chapter" / "results.json").read_bytes() == (FOLDER / "results.json").read_bytes()
    assert sorted(p.name for p in FOLDER.iterdir()) == sorted(p.name for p in (again / "chapter").iterdir())


def test_the_figures_are_what_the_results_give(again: Path) -> None:
    results = load_results(FOLDER / "results.json")
    if {record["packages"].get("matplotlib") for record in results.conditions()} != {metadata.version("matplotlib")}:
        pytest.skip("another matplotlib draws other bytes")
    for name in EXPERIMENTS:
        assert (again / "chapter" / f"{name}.svg").read_bytes() == (FOLDER / f"{name}.svg").read_bytes(), name


@pytest.mark.slow
def test_the_script_makes_the_whole_page(tmp_path: Path) -> None:
    page = tmp_path / "out" / "chapter.md"
    given = ("--quick", "--dataset", "digits", "--work", tmp_path / "work", "--page", page)
    first = script(*given, "--only", "e")
    assert first.returncode == 0, first.stderr
    assert first.stderr.startswith("2 trainings to make, 2 at a time\n1/2 digits-torch-lr1-b256-e2-n1024-t500-s")
    assert page.read_text().count("Not measured yet.") == 4
    everything = script(*given)
    assert everything.returncode == 0, everything.stderr
    text = page.read_text()
    assert "Not measured yet." not in text
    assert "This is the result of `--quick`" in text
    saved = json.loads((page.with_suffix("") / "results.json").read_text())
    assert len(saved["runs"]) == len(list((tmp_path / "work").iterdir()))
    assert everything.stderr.startswith(f"{len(saved['runs']) - 2} trainings to make"), "two were there already"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--only", "a,z"), "chapter: there is no experiment 'z'. Choose of a, b, c, d, e"),
        (("--jobs", 0), "chapter: 0 trainings at a time can't be made. Give at least 1"),
        (("--dataset", "cats"), "chapter: the data set 'cats' is unknown"),
    ],
)
def test_wrong_requests_get_one_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[object, ...],
    sentence: str,
) -> None:
    words = ["chapter", "--quick", "--work", tmp_path / "work", "--page", tmp_path / "page.md", *arguments]
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    with pytest.raises(SystemExit) as left:
        finish("chapter", main)
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith(sentence)
    assert "Traceback" not in error
    assert not (tmp_path / "page.md").exists()
