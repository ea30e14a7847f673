"""docs/chapter.md says what its results give, and ``python -m benchmarks.chapter`` makes it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from benchmarks.chapter.page import write_chapter
from benchmarks.chapter.plan import EXPERIMENTS
from benchmarks.chapter.results import load_results

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "chapter.md"
FOLDER = ROOT / "docs" / "chapter"


def script(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.chapter", *map(str, arguments)]
    environ = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=240, check=False)


def test_the_page_is_what_the_results_give(tmp_path: Path) -> None:
    results = load_results(FOLDER / "results.json")
    assert results.experiments == tuple(EXPERIMENTS), "every experiment is measured"
    assert results.plan.dataset == "fashion-mnist"
    write_chapter(results, tmp_path / "chapter.md")
    assert (tmp_path / "chapter.md").read_text() == PAGE.read_text(), "write it again: python -m benchmarks.chapter"
    assert (tmp_path / "chapter" / "results.json").read_bytes() == (FOLDER / "results.json").read_bytes()
    assert sorted(p.name for p in FOLDER.iterdir()) == sorted(p.name for p in (tmp_path / "chapter").iterdir())


def test_the_figures_are_what_the_results_give(tmp_path: Path) -> None:
    results = load_results(FOLDER / "results.json")
    if {record["packages"].get("matplotlib") for record in results.conditions()} != {metadata.version("matplotlib")}:
        pytest.skip("another matplotlib draws other bytes")
    write_chapter(results, tmp_path / "chapter.md")
    for name in EXPERIMENTS:
        assert (tmp_path / "chapter" / f"{name}.svg").read_bytes() == (FOLDER / f"{name}.svg").read_bytes(), name


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
def test_wrong_requests_get_one_sentence(tmp_path: Path, arguments: tuple[object, ...], sentence: str) -> None:
    done = script("--quick", "--work", tmp_path / "work", "--page", tmp_path / "page.md", *arguments)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(sentence)
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "page.md").exists()
