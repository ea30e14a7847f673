"""Fields of request classes that are also options of the command line."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def option(help_text: str, default: Any, **more: Any) -> Any:
    """Return a dataclass field with the metadata from which ``cli/options.py`` makes the option.

    ``default`` may be a factory: ``dict``. ``more``: ``flag`` if it is not the field's name, ``choices``, ``metavar``,
    ``show_default``.
    """
    metadata = {"help": help_text, **more}
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)
