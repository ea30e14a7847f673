"""Fields of request classes that are options of the command line too."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def option(help_text: str, default: Any, **more: Any) -> Any:
    """Return a dataclass field whose metadata describe its option; ``cli/options.py`` makes the option.

    Args:
        help_text: The line of ``--help``.
        default: The default; a class is a factory: ``dict``.
        more: ``flag`` where it is not the field's name, ``choices``, ``metavar``, ``show_default``.
    """
    metadata = {"help": help_text, **more}
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)
