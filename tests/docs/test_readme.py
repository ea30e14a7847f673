"""The README can't rot: its commands, options, tables and Python are those of the code."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
from support.documents import PAGES, blocks, commands

from bnexport.bundle import (
    GOLDEN,
    MANIFEST,
    MODEL_EXPORTED,
    MODEL_FLOAT32,
    MODEL_ONNX,
    MODEL_TORCHSCRIPT,
    REPORT,
    WEIGHTS,
)
from bnexport.cli.main import COMMANDS, EXIT_CODES, EXIT_FAULT, EXIT_INTERRUPTED, cli

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
REFERENCE = ROOT / "models" / "bn_lenet" / "1"


def table(heading: str) -> list[list[str]]:
    """Rows of the first table below a heading, without its first two lines."""
    section = README.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


#: Programs of the reader's machine that console blocks may call.
PROGRAMS = {"python", "curl", "find", "pip"}


def problem(words: list[str]) -> str | None:
    """Return the reason why a command line can't be run as written; None when it can."""
    if words[0] in PROGRAMS:
        return None
    if words[0].startswith(("scripts/", ".ci/")):
        return None if os.access(ROOT / words[0], os.X_OK) else f"{words[0]} is not an executable file"
    if words[0] == "torchrun" and "bnexport" in words:
        words = words[words.index("bnexport") :]
    if words[0] != "bnexport":
        return f"{words[0]} is not a command of this project"
    context = click.Context(cli, info_name="bnexport")
    command = cli.get_command(context, words[1])
    if command is None:
        return f"bnexport has no command {words[1]}"
    rest = words[2:]
    while isinstance(command, click.Group):
        context = click.Context(command, info_name=words[1], parent=context)
        if not rest or (command := command.get_command(context, rest.pop(0))) is None:
            return f"{' '.join(words[:3])} is not a command"
    try:
        inner = click.Context(command, info_name=words[1], parent=context)
        command.make_parser(inner).parse_args(rest)
    except click.UsageError as error:
        return error.format_message()
    return None


@pytest.mark.parametrize("words", [words for file in PAGES for words in commands(file.read_text(encoding="utf-8"))])
def test_console_lines_are_real_commands(words: list[str]) -> None:
    assert problem(words) is None


@pytest.mark.parametrize(
    "line",
    [
        "bnexport tarin",
        "bnexport train --epoch-count 3",
        "bnexport verify --json",
        "scripts/none",
        "rm -r x",
        "bnexport deploy nomad x",
        "bnexport deploy triton x --uri",
    ],
)
def test_console_check_finds_what_is_wrong(line: str) -> None:
    assert problem(shlex.split(line)) is not None


def test_every_command_is_shown() -> None:
    assert {words[1] for words in commands(README) if words[0] == "bnexport"} == set(COMMANDS)


def test_exit_codes_are_those_of_the_code() -> None:
    codes = {0, *(code for _, code in EXIT_CODES), EXIT_FAULT, EXIT_INTERRUPTED}
    assert {int(row[0]) for row in table("Exit codes")} == codes


def test_bundle_files_are_those_of_the_code() -> None:
    named = {row[0].strip("`") for row in table("What is in a bundle")}
    files = {MODEL_ONNX, MODEL_TORCHSCRIPT, MODEL_EXPORTED, WEIGHTS, MANIFEST, REPORT}
    assert named == files | {f"{GOLDEN}/", MODEL_FLOAT32, "../config.pbtxt"}
    assert files | {GOLDEN} == {path.name for path in REFERENCE.iterdir()}
    assert (REFERENCE.parent / "config.pbtxt").is_file()


def test_the_first_screen_is_short() -> None:
    assert README.count("\n") <= 200
    assert (
        README.index("docs/pictures/fold.svg")
        < README.index("$ bnexport train")
        < README.index("<!-- parity-table -->")
    )


def test_result_blocks_can_be_filled() -> None:
    for name in ("accuracy-table", "parity-table"):
        assert re.search(rf"<!-- {name} -->\n.*<!-- /{name} -->", README, re.DOTALL)


@pytest.mark.slow
@pytest.mark.skipif(not REFERENCE.is_dir(), reason="models/bn_lenet/1 is not there yet")
def test_python_block_runs(tmp_path: Path) -> None:
    (source,) = (block.text for block in blocks(README, "python"))
    environ = {
        key: value for key, value in os.environ.items() if key != "BNEXPORT_DATA"
    }  # real images have their own test
    environ |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default", "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", source], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "bn1 backward conv1" in done.stdout
    assert "PASS" in done.stdout
