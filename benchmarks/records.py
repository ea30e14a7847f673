"""Results as plain JSON: dataclasses of a measurement read back from the file that their ``asdict`` was written to."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any, get_args, get_origin, get_type_hints


def from_json(kind: Any, value: Any) -> Any:
    """Return a value of a type, in which dataclasses may contain others, in tuples, lists and mappings, too.

    TypeError, KeyError or AttributeError: the JSON is of another type.
    """
    origin, parts = get_origin(kind), get_args(kind)
    if isinstance(kind, type) and is_dataclass(kind):
        return kind(**{name: from_json(_hints(kind)[name], item) for name, item in value.items()})
    if origin in (tuple, list):
        return origin(from_json(parts[0], item) for item in value)
    if origin is Mapping:
        return {name: from_json(parts[1], item) for name, item in value.items()}
    return value


_hints = functools.cache(get_type_hints)
