"""The small benchmarks that print a table, the frame of the command lines, and the pages' table and wrapping."""

import os
import re
import runpy
import signal
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.int8 import PIXELS, folded, images, residual
from torch import nn

from benchmarks import int8
from benchmarks.clock import Spread
from benchmarks.command import finish, known, options
from benchmarks.folding import cost
from benchmarks.pages import ranged, table_page, write_page
from benchmarks.training.accuracy import cell, row
from benchmarks.training.stale_statistics import rows
from benchmarks.zoo.network import ZooNetwork
from bnexport.environment import describe, environment
from bnexport.errors import BundleError, MissingDependency, ProofError
from bnexport.quantization.moments import seen_in_module

ROOT = Path(__file__).parents[2]


def test_a_fold_is_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    monkeypatch.setattr(cost, "make_zoo_network", lambda _source: ZooNetwork(module, (3, 8, 8), 1))
    cells = cost.cost_row("timm:x", seconds=60, repeats=2)
    assert (cells[0], cells[1], cells[-1], len(cells)) == ("timm:x", "1", "2", 8)
    table = table_page(cost.HEADS, [cells], "n is small").splitlines()
    assert table[0].count("|") == table[1].count("|") == table[2].count("|") == 9
    assert table[-1].startswith("n is small; load of the machine at the end ")
    assert table[-1].endswith(f"; {describe(environment())}.")


def test_stale_statistics_of_one_run() -> None:
    ((lr, momentum, seed, epoch, error, accuracy, exact),) = rows("digits", [(0.1, 0.001, 3, (1,))])
    assert (lr, momentum, seed, epoch) == ("0.1", "0.001", "3", "1")
    assert float(error.split()[0]) > 0.15, "after 24 steps a momentum of 0.001 is stale"
    assert float(exact) > float(accuracy)


def test_accuracies_are_means_over_seeds() -> None:
    def result(accuracy: float, recalibrated: float | None) -> SimpleNamespace:
        last = {"train_loss": 0.5, "train_accuracy": 0.75, "test_accuracy": accuracy}
        return SimpleNamespace(history=[{}, last], recalibrated_accuracy=recalibrated)

    found = row("torch", [result(0.5, 0.25), result(0.75, None)])  # type: ignore[list-item]
    assert found == ["torch", "0.5000 +/- 0.0000", "0.7500 +/- 0.0000", "0.6250 +/- 0.1768", "0.2500"]
    assert cell([]) == "-"


def test_int8_files_side_by_side_and_continued(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(int8.NNCF, raising=False)
    monkeypatch.setattr(int8, "PEERS", {"quantize_static, per channel": {"per_channel": True}})
    subject = int8.Subject(
        "small", folded(residual(), tmp_path), partial(seen_in_module, residual()), PIXELS, images(32, 1), images(64),
        emulated=16, saturated=16,
    )  # fmt: skip
    section = int8.compared(subject)
    assert [text for text in section.missed if text.startswith("bnexport, ")] == []
    rows = {(row[0], row[1]): dict(zip(section.heads, row, strict=True)) for row in section.cells}
    assert ("NNCF, defaults", "not installed") in rows
    for name in ("bnexport, without data", "bnexport, calibrated"):
        row = rows[name, "default"]
        assert row["channels that can saturate"].startswith("0 of ")
        assert int(row["labels changed"]) <= int(rows["quantize_static, per channel", "precise"]["labels changed"])
        assert 1 / 1.5 < float(row["noise, measured / predicted"]) < 1.5
        assert float(row["agreement"]) == pytest.approx(1 - int(row["labels changed"]) / 64, abs=1e-3)
    monkeypatch.setattr(int8, "_SETS", 2)
    sets = int8.repeated(lambda _number: subject).cells
    assert [row[1] for row in sets] == [
        "quantize_static, per channel",
        "bnexport, without data",
        "bnexport, calibrated",
    ]
    for row in sets:
        assert row[2].split(", ") == 2 * [str(int(row[3]) // 2)]
    assert all(int(row[4]) - int(row[5]) == int(row[3]) - int(sets[0][3]) for row in sets[1:])
    worse = int8.Section("small", section.heads, section.cells[:1], [], ["it is worse"])
    measured: list[str] = []

    def part(name: str, found: int8.Section) -> int8.Section:
        measured.append(name)
        return found

    parts = {"one": partial(part, "one", section), "two": partial(part, "two", worse)}
    monkeypatch.setattr(int8, "PARTS", parts)
    for arguments in (["one"], [], []):
        monkeypatch.setattr(sys, "argv", ["int8", *arguments, "--results", str(tmp_path)])
        code = int8.main()
    assert measured == ["one", "two"]
    assert code == 1
    text = capsys.readouterr().out.rpartition("# int8 on a CPU")[2]
    assert text.count("## small") == 1
    assert text.count("| float32 |") == 2
    assert "Target missed: it is worse." in text


def interrupted() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    signal.pause()


def refused(error: type[Exception]) -> Callable[[], None]:
    def action() -> None:
        raise error("it can't", remedy="Do it")

    return action


@pytest.mark.parametrize(
    ("action", "code", "message"),
    [
        (lambda: None, 0, ""),
        (lambda: 1, 1, ""),
        (refused(BundleError), 2, "x: it can't. Do it.\n"),
        (refused(MissingDependency), 3, "x: it can't. Do it.\n"),
        (refused(ProofError), 1, "x: it can't. Do it.\n"),
        (interrupted, 130, "x: interrupted, so there is no result\n"),
    ],
    ids=["done", "missed", "bad input", "missing", "wrong", "SIGTERM"],
)
def test_a_command_ends_with_the_codes_of_bnexport(
    action: Callable[[], int | None], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        finish("x", action)
    assert left.value.code == code
    assert capsys.readouterr().err.replace(". Do it\n", ". Do it.\n") == message


def test_names_are_of_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    parser = options("x", "Measure.")
    assert known(parser, [], ["a", "b"], "way") == ["a", "b"]
    assert known(parser, ["b"], ["a", "b"], "way") == ["b"]
    with pytest.raises(SystemExit, match="2"):
        known(parser, ["c"], ["a"], "way")
    assert "python -m benchmarks.x: error: unknown way c" in capsys.readouterr().err


def test_prose_is_wrapped_and_everything_else_stays(tmp_path: Path) -> None:
    words = "word " * 40
    code = "`" + "code " * 4 + "end`"
    row = "| " + "x " * 100 + "|"
    write_page(
        [f"# Title {words}\n\n\n{words}\n{words}", f"- {words}\n- b\n{row}\n```\n{words}\n```\n{code * 9}"],
        tmp_path / "p.md",
    )
    lines = (tmp_path / "p.md").read_text().splitlines()
    assert lines[:3] == [f"# Title {words}", "", " ".join(["word"] * 24)]
    assert len([line for line in lines if line.startswith("word")]) == 5, (
        "two lines are one paragraph, and code is not wrapped"
    )
    assert [line[:3] for line in lines if line.startswith(("- ", "  "))] == ["- w", "  w", "- b"]
    assert row in lines
    assert lines[-1].startswith("`code code")
    assert all(len(line) <= 120 for line in lines if line not in (lines[0], row, words, lines[-1]))


def test_a_cell_can_t_break_its_table() -> None:
    text = table_page(["x", "y", "z"], [["a|b", "", 3]], "n = 1")
    assert "| a\\|b |  | 3 |\n" in text
    assert ranged(Spread(0.5, 1.25, 2.0, 3), 1) == "1.2 (0.5 to 2.0)"


def commands() -> list[str]:
    """Return the commands in the README's table."""
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    return re.findall(r"^\| `(benchmarks\.[\w.]+)", text, re.MULTILINE)


def test_the_readme_names_every_command() -> None:
    files = (path for path in (ROOT / "benchmarks").rglob("*.py") if "    finish(" in path.read_text(encoding="utf-8"))
    parts = [path.relative_to(ROOT).with_suffix("").parts for path in files if path.parent.name != "gpu"]
    assert sorted(commands()) == sorted(".".join(part for part in each if part != "__main__") for each in parts)


@pytest.mark.parametrize("name", commands())
def test_a_command_has_help(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", [name, "--help"])
    with warnings.catch_warnings(), pytest.raises(SystemExit) as left:
        warnings.simplefilter("ignore", RuntimeWarning)  # a module that is imported already runs once more
        runpy.run_module(name, run_name="__main__")
    shown = capsys.readouterr().out
    assert left.value.code == 0
    assert shown.startswith(f"usage: python -m {name} ")
    assert re.search(r"take|need", shown), "it names its time"
