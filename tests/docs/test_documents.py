"""All pages: links and anchors, options, pictures; the pages with outputs run, and print what they show."""

import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from support import dialect, fold_picture
from support.documents import PAGES, ROOT, anchors, broken_links, elided, stale, steps, words
from support.documents import blocks as blocks_of

from bnexport.cli.main import cli

#: Options of other programs that the pages name.
FOREIGN = {
    "--all",
    "--disable-auto-complete-config",
    "--init",
    "--nproc-per-node",
    "--profile",
    "--stop-timeout",
    "--timeout",
}


def options() -> set[str]:
    """Return every option of every command."""
    found: set[str] = set()

    def collect(command: click.Command, context: click.Context) -> None:
        for parameter in command.params:
            found.update(parameter.opts, parameter.secondary_opts)
        if isinstance(command, click.Group):
            for name in command.list_commands(context):
                if (inner := command.get_command(context, name)) is not None:
                    collect(inner, click.Context(inner, info_name=name, parent=context))

    collect(cli, click.Context(cli, info_name="bnexport"))
    return found | {"--help"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_anchors_exist(page: Path) -> None:
    assert list(broken_links(page)) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# One two\n[a](#one-two) [b](page.md#one-two) [c](#three) [d](none.md) ![e](no.png) [f](https://x.org)\n"
    )
    assert list(broken_links(page)) == ["#three", "none.md", "no.png"]
    assert anchors("# What's `in` it?\n```\n# no\n```\n## On-line\n") == {"whats-in-it", "on-line"}


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: page.name)
def test_options_in_the_text_are_those_of_a_command(page: Path) -> None:
    if page.parts[-2:][0] in ("results", "benchmarks") or page.name in ("gpu.md", "CONTRIBUTING.md"):
        pytest.skip("a page on programs of benchmarks/ and tests/")
    text = re.sub(r"^```(?!console).*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))
    assert named - options() - FOREIGN == set()


def test_every_page_is_in_the_list() -> None:
    """docs/README.md leads to every page below docs/."""
    text = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"\]\(([^)#]+)\)", text))
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in PAGES if ROOT / "docs" in page.parents}
    assert pages - {"README.md"} - linked == set()


def test_the_picture_of_a_fold_is_current() -> None:
    """``python tests/support/fold_picture.py`` draws it again."""
    assert fold_picture.PICTURE.read_text(encoding="utf-8") == fold_picture.draw()


def test_python_blocks_compile_and_that_of_folding_runs() -> None:
    for page in PAGES:
        for block in blocks_of(page.read_text(encoding="utf-8"), "python"):
            compile(block.text, f"{page.name}: {block.file}", "exec")
    (block,) = blocks_of((ROOT / "docs" / "folding.md").read_text(encoding="utf-8"), "python")
    exec(block.text, {})  # it asserts what it shows


def test_the_tables_to_add_to_exist() -> None:
    """Each `NAME` in `file` of docs/architecture.md is assigned in that file, and each path exists."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("## Where to add something\n")[1]
    places = re.findall(r"((?:`\w+`(?:, | and | or )?)+) in\s+`([\w/.]+)`", text)
    assert len(places) > 40
    for names, place in places:
        found = [folder / place for folder in (ROOT, ROOT / "bnexport") if (folder / place).exists()]
        assert found, place
        files = [found[0]] if found[0].is_file() else sorted(found[0].glob("*.py"))
        source = "\n".join(file.read_text(encoding="utf-8") for file in files)
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"^(?:class |def )?{name}\b", source, re.MULTILINE), (name, place)
    for path in re.findall(r"`((?:\w+/)+[\w.]*)`", text):
        assert any((folder / path).exists() for folder in (ROOT, ROOT / "bnexport", ROOT / "benchmarks" / "serving")), (
            path
        )


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["docs/tutorial.md", "docs/reading_the_output.md", "README.md"])
@pytest.mark.needs("data")
def test_the_outputs_are_real(name: str, tmp_path: Path) -> None:
    """``python tests/support/documents.py PAGE`` writes them again."""
    pytest.importorskip("uvicorn")
    assert stale(ROOT / name, tmp_path) == []


def test_outputs_are_compared_and_shortened() -> None:
    (block,) = blocks_of("```console\n$ a \\\n  b\nx 1\n...\nPASS z\n$ c\n```\n", "console")
    assert steps(block) == [("a \\\n  b", "x 1\n...\nPASS z\n"), ("c", "")]
    assert elided("old\n...\nold\n", "1\n2\n3\n4\n") == "1\n...\n4\n"
    assert elided("old\n", "1\n2\n") == "1\n2\n"
    assert words("PASS: 95 rows in a/b.pt") == {"PASS", "rows"}


@pytest.mark.slow
@pytest.mark.needs("pdoc")
def test_the_reference_is_built_without_a_warning(tmp_path: Path) -> None:
    environ = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    words = [str(ROOT / "scripts" / "build_docs"), str(tmp_path / "site")]
    done = subprocess.run(words, env=environ, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    page = (tmp_path / "site" / "bnexport.html").read_text(encoding="utf-8")
    assert "fold_and_export" in page


def test_the_dialect_is_counted() -> None:
    assert dialect.main([]) == 0
    assert [line for _, line in dialect.found_in('"""What it is."""\nThe file says 3.\nA person asks.\nplain\n')] == [
        1,
        2,
        3,
    ]
