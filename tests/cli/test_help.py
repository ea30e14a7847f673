"""The help of every command: complete sentences, an example that its parser accepts, 80 columns."""

import re
import shlex

import click
import pytest
from click.testing import CliRunner

from bnexport.cli.main import COMMANDS, SECTIONS, cli

#: Starts of a text that needs its neighbours to be understood.
HEADLESS = re.compile(r"(Of|For|Per|Its|Not|What|Whether|How|Divided|Subtracted|To|[a-z])\b")
PATHS = [(name,) for name in COMMANDS] + [("deploy", target) for target in ("triton", "kserve", "docker")]


def found(path: tuple[str, ...]) -> click.Command:
    command: click.Command = cli
    for name in path:
        assert isinstance(command, click.Group)
        inner = command.get_command(click.Context(command), name)
        assert inner is not None
        command = inner
    return command


def options(path: tuple[str, ...]) -> list[click.Option]:
    return [option for option in found(path).params if isinstance(option, click.Option)]


def test_the_commands_stand_in_sections() -> None:
    shown = CliRunner().invoke(cli, ["--help"], terminal_width=80).output
    assert [line[:-1] for line in shown.splitlines() if line in {f"{name}:" for name in SECTIONS}] == list(SECTIONS)
    assert [line.split()[0] for line in shown.partition("Train:")[2].splitlines() if line.startswith("  ")] == list(
        COMMANDS
    )


@pytest.mark.parametrize("path", PATHS, ids=" ".join)
def test_every_option_is_a_sentence_that_stands_alone(path: tuple[str, ...]) -> None:
    for option in options(path):
        text = (option.help or "").partition("  [default")[0]
        assert len(text.split()) > 1, (option.opts, text)
        assert not HEADLESS.match(text), (option.opts, text)
        assert text.endswith("."), (option.opts, text)
        assert not re.search(r"\b(goes on|may be given again|nobody|a hand|a door)\b", text), (option.opts, text)


@pytest.mark.parametrize("path", [(), *PATHS], ids=" ".join)
def test_help_fits_80_columns(path: tuple[str, ...]) -> None:
    shown = CliRunner().invoke(cli, [*path, "--help"], terminal_width=80)
    assert shown.exit_code == 0
    assert max(map(len, shown.output.splitlines())) <= 80
    assert not any(line.endswith("...") for line in shown.output.partition("Commands:")[2].splitlines()), (
        "a cut sentence"
    )


@pytest.mark.parametrize("path", PATHS, ids=" ".join)
def test_the_example_is_one_that_the_command_takes(path: tuple[str, ...]) -> None:
    command = found(path)
    words = shlex.split((command.epilog or "").removeprefix("Example: "))
    assert words[: 1 + len(path)] == ["bnexport", *path]
    context = command.make_context(path[-1], words[1 + len(path) :])
    assert context.command is command
