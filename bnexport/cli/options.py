"""Options of the command line, made from the request classes, converted to the library's values, or read from a file.

``--config FILE`` is a TOML file with every option of a command; the command line wins.
"""

from __future__ import annotations

import contextlib
import math
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import click

from bnexport.data.dataset_table import DATASETS, FOLDER, is_dataset
from bnexport.errors import UsageError
from bnexport.exporting.export_request import ExportRequest, image_preprocessing, parse_inputs, read_labels
from bnexport.optional import one_line
from bnexport.runtimes.catalogue import RUNNERS

#: Types of the options that name files and folders, and runtimes.
PATH = click.Path(path_type=Path)
RUNTIME = click.Choice([spec.name for spec in RUNNERS])


def options_of(request: type, *, first: str = "", last: str = "") -> Callable[[Any], Any]:
    """Return a decorator that adds one option per field of a request class, from the field ``first`` to ``last``.

    Only fields made by ``request_fields.option`` are options; a field whose factory is a request class adds that class's.
    """
    names = [item.name for item in fields(request)]
    chosen = fields(request)[names.index(first) if first else 0 : names.index(last) + 1 if last else None]

    def decorate(command: Any) -> Any:
        for item in reversed(chosen):
            if (nested := _nested(item)) is not None:
                command = options_of(nested)(command)
            elif "help" in item.metadata:
                command = _option(item)(command)
        return command

    return decorate


def _nested(item: Field[Any]) -> type | None:
    """Return the request class that is a field's own kind."""
    factory: Any = item.default_factory
    return factory if isinstance(factory, type) and is_dataclass(factory) else None


def _option(item: Field[Any]) -> Callable[[Any], Any]:
    keywords = {"show_default": True, **item.metadata}
    flag, choices = keywords.pop("flag", "--" + item.name.replace("_", "-")), keywords.pop("choices", None)
    keywords |= _kind(item).click
    if item.name == "dataset":
        keywords["type"] = DatasetName()
    elif choices is not None:
        keywords["type"] = click.Choice(choices)
    if _kind(item).read is None and "multiple" not in keywords:
        keywords["default"] = item.default
    if item.type == "bool" and not item.default:
        keywords["is_flag"] = True
    elif item.type in ("bool", "bool | None"):
        flag = f"{flag}/--no-{flag[2:]}"
    return click.option(flag, item.name, **keywords)


def values_of(request: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a request class from click's values, each converted by the type of its field.

    A field without an option in the command keeps its default.
    """
    values: dict[str, Any] = {}
    for item in fields(request):
        if (nested := _nested(item)) is not None:
            values[item.name] = nested(**values_of(nested, options))
        elif "help" in item.metadata:
            given, read = options.get(item.name), _kind(item).read
            if given in (None, ()):
                given = item.default if item.default_factory is MISSING else item.default_factory()
            elif read is not None:
                given = read(given, f"--{item.name}")
            values[item.name] = given
    return values


def export_request(**options: Any) -> ExportRequest:
    """Return the request of fold-and-export."""
    if options["formats"] and "onnx" not in options["formats"]:
        raise UsageError("a bundle without model.onnx can't be verified", remedy="Add --format onnx")
    alone = "--precision int8" if options["precision"] == "int8" else "--pack-pools" if options["pack_pools"] else None
    if alone and (others := [name for name in options["formats"] or () if name != "onnx"]):
        raise UsageError(
            f"{alone} writes model.onnx alone, and --format {others[0]} is given", remedy="Leave --format out"
        )
    images = preprocessing(options["inputs"], options["mean"], options["std"])
    return ExportRequest(**values_of(ExportRequest, options), preprocessing=images)


def read_model_options(texts: tuple[str, ...]) -> dict[str, bool | int | float | str]:
    """Return ``KEY=VALUE`` texts as a constructor's named arguments: whole numbers, numbers, true and false, else text."""
    options: dict[str, bool | int | float | str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise UsageError(
                f"--model-option {text!r} is not of the form KEY=VALUE", remedy="Write it as num_classes=10"
            )
        if key in options:
            raise UsageError(f"--model-option {key} is given twice", remedy="Give each option once")
        options[key] = _value(value)
    return options


def _value(text: str) -> bool | int | float | str:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            if math.isfinite(value := kind(text)):  # JSON, in which the options are kept, has no infinity
                return value
    return text


def preprocessing(inputs: tuple[str, ...], mean: str | None, std: str | None) -> dict[str, Any] | None:
    """Return the preprocessing of a network that takes one image, if --mean and --std are given."""
    means, stds = numbers(mean, "--mean"), numbers(std, "--std")
    specs = parse_inputs(inputs) if inputs and (means, stds) != (None, None) else ()
    return image_preprocessing(specs, means, stds)


def numbers(text: str | None, option: str) -> tuple[float, ...] | None:
    """Return a text like "0.485,0.456,0.406" as numbers; None without a text."""
    try:
        return None if text is None else tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(
            f"{option} {text!r} is not a list of numbers", remedy="Write it as 0.485,0.456,0.406"
        ) from error


class DatasetName(click.Choice[str]):
    """A row of DATASETS, or ``folder:PATH``."""

    def __init__(self) -> None:
        super().__init__(tuple(DATASETS))

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str | None:  # noqa: ARG002
        """Return the choices for the help."""
        return f"[{'|'.join(DATASETS)}|{FOLDER}PATH]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the name of a data set; any other text is refused with the list of names."""
        if isinstance(value, str) and value not in DATASETS and is_dataset(value):
            return value
        return super().convert(value, param, ctx)

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:  # noqa: ARG002
        """Return the list of names, or the name of a folder that exists."""
        hint = f" Your own images are {FOLDER}{value}." if str(value).strip() and Path(str(value)).is_dir() else ""
        return f"{value!r} is not one of {', '.join(DATASETS)}, {FOLDER}PATH.{hint}"


@dataclass(frozen=True)
class _Kind:
    """An option for one type of field: click's keywords, and the conversion of a value and its flag where click has none."""

    click: Mapping[str, Any] = field(default_factory=dict)
    read: Callable[[Any, str], Any] | None = None


_KINDS: dict[str, _Kind] = {
    "int": _Kind({"type": int}),
    "float": _Kind({"type": float}),
    "Path": _Kind({"type": PATH}),
    "tuple[str, ...]": _Kind({"multiple": True}),
    "tuple[str, ...] | None": _Kind({"type": PATH}, lambda path, _: read_labels(path)),
    "tuple[float, ...]": _Kind({}, numbers),
    "tuple[float, ...] | None": _Kind({}, numbers),
    "Mapping": _Kind({"multiple": True}, lambda texts, _: read_model_options(texts)),
}


def _kind(item: Field[Any]) -> _Kind:
    name = str(item.type)
    return _KINDS.get(name) or _KINDS.get(name.removesuffix(" | None").partition("[")[0], _Kind())


def config_option(table: str) -> Callable[..., Any]:
    """Return the option --config, which reads this command's ``table`` of the file, or a file without that table as a whole."""

    def read(context: click.Context, _: click.Parameter, path: Path | None) -> Path | None:
        if path is not None:
            context.default_map = {**(context.default_map or {}), **_file_values(context.command, path, table)}
        return path

    return click.option(
        "--config",
        type=PATH,
        metavar="FILE",
        is_eager=True,
        expose_value=False,
        callback=read,
        help="TOML file with options of this command, as batch-size = 128. The command line overrides the file.",
    )


def was_given(context: click.Context, name: str) -> bool:
    """Return True if the user gave an option: on the command line, in a configuration file, or in the environment."""
    return context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT


def given_options() -> dict[str, str]:
    """Return name -> flag of the running command's arguments and options that the user gave."""
    context = click.get_current_context()
    return {item.name: item.opts[0] for item in context.command.params if item.name and was_given(context, item.name)}


def _file_values(command: click.Command, path: Path, table: str) -> dict[str, Any]:
    """Return the file's values by click's names of the options."""
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
        values[option.name] = _file_value(path, key, value, option)
    return values


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(
            f"{path} can't be read: {one_line(error)}",
            remedy='Give a TOML file, with lines such as lr = 0.5 or model = "bn_lenet"',
        ) from error


def _file_value(path: Path, key: str, value: Any, option: click.Option) -> Any:
    """Return a value as the command line would give it; its TOML type must fit the option."""
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
