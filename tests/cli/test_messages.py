"""Messages name only options that the command has, and in Python the arguments instead of options."""

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from bnexport.cli.main import COMMANDS, cli
from bnexport.errors import MissingDependency, UsageError

PACKAGE = Path(__file__).parents[2] / "bnexport"
_DATA = ("train", "evaluate", "recalibrate", "inspect", "fold-and-export", "verify")
_OWN = ("evaluate", "recalibrate", "inspect")
_EXPORT = ("fold-and-export",)
#: Module or package -> the commands that raise its errors. The longest name that fits counts. Modules whose errors every
#: command may raise name no option, or a command with it.
RAISED_BY: dict[str, tuple[str, ...]] = {
    "auditing": ("audit",),
    "benchmarking": ("benchmark",),
    "data": _DATA,
    "data/classes": ("fold-and-export", "verify"),
    "data/samples": ("verify",),
    "deploying": ("deploy kserve",),
    "deploying/releases": ("deploy triton", "deploy kserve", "deploy docker"),
    "evaluating/evaluate": ("evaluate",),
    "evaluating/network": ("evaluate", "recalibrate"),
    "evaluating/recalibration": ("recalibrate",),
    "evaluating/network_options": _OWN,
    "exporting": _EXPORT,
    "files": (
        "train",
        "fold",
        "recalibrate",
        "fold-and-export",
        "deploy triton",
        "deploy kserve",
        "deploy docker",
        "predict",
    ),
    "folding": _EXPORT,
    "loading": ("fold-and-export", "fold", "audit"),
    "nn/soundness": _EXPORT,
    "nn/synced_batch_norm": ("train",),
    "onnx_pipeline": _EXPORT,
    "pipeline": _EXPORT,
    "quantization": _EXPORT,
    "reporting/results": ("evaluate",),
    "reporting/tables": _EXPORT,
    "reporting/summary": ("verify",),
    "runtimes": (),
    "verification/int8": _EXPORT,
    "serving": ("serve",),
    "serving/bulk": ("predict",),
    "serving/predictor": ("predict", "evaluate"),
    "training": ("train",),
    "validation/file_kinds": ("fold-and-export", "fold", "audit"),
    "verification": ("verify",),
    "verification/inputs": ("verify", "fold-and-export"),
}
#: Messages of a module that only some of its commands raise: (module, option) -> the commands.
_NARROWER: dict[tuple[str, str], tuple[str, ...]] = {
    ("evaluating/network", "--dataset"): _OWN,
    ("quantization/writer", "--repair"): ("audit",),
    ("reporting/results", "--all"): ("inspect",),
    ("reporting/summary", "--float-layers"): _EXPORT,
    ("evaluating/network", "--input"): _OWN,
    ("evaluating/network", "--source"): _OWN,
    ("evaluating/network", "--model-option"): _OWN,
    ("loading/sources", "--source"): _OWN,
}
#: Programs with their own options.
_FOREIGN = ("docker", "--gpus", "pip install", "tritonserver", "torchrun")
_OPTION = re.compile(r"(?:bnexport (?P<command>[a-z-]+)(?: with)? )?(?<![\w-])(?P<option>--[a-z][a-z-]*[a-z])")


def options_of(command: str) -> set[str]:
    name, _, inner = command.partition(" ")
    found: Any = cli.get_command(click.Context(cli), name)
    if inner:
        found = found.commands[inner]
    return {
        flag
        for option in found.params
        if isinstance(option, click.Option)
        for flag in (*option.opts, *option.secondary_opts)
    }


def texts(tree: ast.Module) -> Iterator[str]:
    """Every text of a module but its docstrings; what is filled in is {}."""
    inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    plain = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and not {id(node)} & (inner | plain):
            yield node.value


def raised_by(module: str, option: str) -> tuple[str, ...]:
    if (module, option) in _NARROWER:
        return _NARROWER[module, option]
    parts = module.split("/")
    names = ["/".join(parts[:size]) for size in range(len(parts), 0, -1)]
    return next((RAISED_BY[name] for name in names if name in RAISED_BY), tuple(COMMANDS))


def test_messages_name_only_options_that_the_command_has() -> None:
    known = {command: options_of(command) for commands in RAISED_BY.values() for command in commands}
    wrong, seen = [], 0
    for file in sorted(PACKAGE.rglob("*.py")):
        module = file.relative_to(PACKAGE).with_suffix("").as_posix()
        if module.startswith("cli/") or module == "errors":
            continue
        for text in texts(ast.parse(file.read_text(encoding="utf-8"))):
            if any(word in text for word in _FOREIGN):
                continue
            named = ""
            for found in _OPTION.finditer(text):
                named = found["command"] or named
                for command in (named,) if named else raised_by(module, found["option"]):
                    seen += 1
                    if found["option"] not in known.setdefault(command, options_of(command)):
                        wrong.append(f"{module}: {command} has no {found['option']}: {text}")
    assert wrong == []
    assert seen > 150


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "deploy"])
def test_the_texts_of_a_command_name_only_its_options(command: str) -> None:
    module = COMMANDS[command][0].partition(":")[0]
    file = Path(str(importlib.import_module(module).__file__))
    found = {option["option"] for text in texts(ast.parse(file.read_text())) for option in _OPTION.finditer(text)}
    commands = [name for name, (target, _) in COMMANDS.items() if target.partition(":")[0] == module]
    assert found <= {"--nproc-per-node"}.union(*map(options_of, commands))


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("Pass --mean and --std", "Pass mean= and std="),
        ("Pass --weights FILE, or --allow-untrained", "Pass weights=FILE, or allow_untrained=True"),
        ("as --input 3x64x64 --mean 0.5", "as input=3x64x64 mean=0.5"),
        ("--allow-flips 'many' is neither", "allow_flips='many' is neither"),
        ("Leave --model-option out", "Leave model_options= out"),
        ("Run bnexport fold-and-export --force", "Run bnexport fold-and-export --force"),
    ],
)
def test_python_reads_arguments_and_the_command_line_options(message: str, expected: str) -> None:
    error = UsageError("this is wrong", remedy=message)
    assert str(error) == f"this is wrong. {expected}"
    assert error.sentence == f"this is wrong. {message}"
    assert str(MissingDependency("bnexport verify --html needs jinja2", remedy="Install it")).startswith(
        "bnexport verify --html"
    )
