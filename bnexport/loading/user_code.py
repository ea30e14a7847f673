"""Import of a user's own code; errors in the code are reported with their line."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from bnexport.errors import ModelError
from bnexport.optional import one_line


def call_factory(source: str, options: Mapping[str, Any]) -> nn.Module:
    """Import a user's code and call the factory that it names.

    Args:
        source: ``file.py:factory`` or ``package.module:factory``.
        options: Named arguments of the factory; usually none.

    Raises:
        ModelError: The code is missing, fails, or does not return a module.
    """
    place = source.rpartition(":")[0]
    file = Path(place) if place.endswith(".py") else None
    # A file can import its neighbours, as with python FILE; a package in the current folder is found, as with python -m.
    # The user's code may print, which on standard output would break --json.
    with (
        _importing_from("" if file is None else str(file.parent.resolve())),
        contextlib.redirect_stdout(sys.stderr),
    ):
        module = _import_module(place) if file is None else _import_file(file)
        return _made_by(module, source, options)


def _made_by(module: Any, source: str, options: Mapping[str, Any]) -> nn.Module:
    place, _, name = source.rpartition(":")
    factory = getattr(module, name, None)
    if not callable(factory):
        raise ModelError(
            f"{place} has no function {name!r}", remedy="Name a function or class that returns the network"
        )
    try:
        network = factory(**options)
    except (Exception, SystemExit) as error:
        raise ModelError(
            f"{source} failed{_line_of(error, place)}: {type(error).__name__}: {one_line(error)}",
            remedy="The factory is called without arguments (or the given ones) and must return a torch.nn.Module",
        ) from error
    if not isinstance(network, nn.Module):
        raise ModelError(
            f"{source} returned a {type(network).__name__}, not a torch.nn.Module",
            remedy="Return the network itself from the factory",
        )
    return network


def _import_file(path: Path) -> Any:
    if not path.is_file():
        raise ModelError(f"{path} does not exist", remedy="Give the path of a Python file, then a colon and a function")
    name = f"bnexport_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles of the user's module look themselves up here
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        sys.modules.pop(name, None)
        if not isinstance(error, (Exception, SystemExit)):
            raise
        raise ModelError(
            f"{path} can't be run{_line_of(error, str(path))}: {type(error).__name__}: {one_line(error)}",
            remedy="Fix that line; python FILE shows the whole error",
        ) from error
    return module


def _import_module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise ModelError(
            f"the module {name} can't be imported: {type(error).__name__}: {one_line(error)}",
            remedy="Install it, run from the folder that holds it, or name its file: path/file.py:factory",
        ) from error


@contextlib.contextmanager
def _importing_from(folder: str) -> Iterator[None]:
    """Search ``folder`` first for imports; folders that the user's code adds to the path stay."""
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)


def _line_of(error: BaseException, place: str) -> str:
    if isinstance(error, SyntaxError) and error.lineno:
        return f" at line {error.lineno}"
    place = str(Path(place))  # ./net.py is net.py in a traceback
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename.endswith(place)]
    return f" at line {lines[-1]}" if lines else ""
