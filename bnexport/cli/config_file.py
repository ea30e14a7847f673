"""``--config FILE``: every option of a command in a TOML file; what is given on the command line wins."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from bnexport.errors import UsageError
from bnexport.optional import one_line


def config_option(table: str) -> Callable[..., Any]:
    """The option itself.

    Args:
        table: Name of the table in the file that is this command's; a file without such a table is read as a whole.
    """

    def read(context: click.Context, _: click.Parameter, path: Path | None) -> Path | None:
        if path is not None:
            context.default_map = {**(context.default_map or {}), **_values(context.command, path, table)}
        return path

    return click.option(
        "--config",
        type=click.Path(path_type=Path),
        metavar="FILE",
        is_eager=True,
        expose_value=False,
        callback=read,
        help="TOML file with these options, as batch-size = 128; the command line wins.",
    )


def was_given(context: click.Context, name: str) -> bool:
    """Whether an option's value comes from the user: the command line, a configuration file, or the environment."""
    return context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT


def _values(command: click.Command, path: Path, table: str) -> dict[str, Any]:
    """The file's values by the names that click has for the options."""
    found = _read(path)
    options = {
        flag.removeprefix("--"): option
        for option in command.params
        if isinstance(option, click.Option) and option.expose_value
        for flag in option.opts
    }
    if isinstance(inner := found.get(table), dict):
        if outside := [key for key in found if key.replace("_", "-") in options]:
            raise UsageError(
                f"{path} has {outside[0]!r} outside of its table [{table}]", remedy=f"Move it below [{table}]"
            )
        found = inner
    values = {}
    for key, value in found.items():
        option = options.get(key.replace("_", "-"))
        if option is None or option.name is None:
            raise UsageError(f"{path} has the option {key!r}, which is unknown", remedy=f"Known: {', '.join(options)}")
        values[option.name] = _value(path, key, value, option)
    return values


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(
            f"{path} can't be read: {one_line(error)}",
            remedy='Give a TOML file, with lines as lr = 0.5 or model = "bn_lenet"',
        ) from error


def _value(path: Path, key: str, value: Any, option: click.Option) -> Any:
    """A value as the command line would give it; TOML's own kinds must be the option's."""
    if isinstance(value, dict) and option.multiple:  # [model-option] with num_classes = 10
        return [f"{name}={_text(item)}" for name, item in value.items()]
    if isinstance(value, list) and (option.multiple or option.type is click.STRING):
        items = [_text(item) for item in value]
        return items if option.multiple else ",".join(items)
    kind, fits = "a number or a text", isinstance(value, int | float | str) and not isinstance(value, bool)
    if option.is_flag:
        kind, fits = "true or false", isinstance(value, bool)
    elif option.type is click.INT:
        kind, fits = "a whole number", type(value) is int
    elif option.type is click.FLOAT:
        kind, fits = "a number", type(value) in (int, float)
    if not fits:
        raise UsageError(f"{path}: {key} is {value!r}", remedy=f"Give {kind}")
    if option.multiple:
        return [_text(value)]
    return value if option.is_flag else _text(value)


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
