"""Strict parsing of untrusted JSON: a text has one meaning, and its cost is bounded by its size."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from bnexport.files import Refusal
from bnexport.optional import one_line
from bnexport.validation.limits import limit, shown

#: A string, closed or not. A pattern that can fail at the end would be tried again from every quote.
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)', re.DOTALL)
_NESTING = re.compile(rb"[\[\]{}]")
#: A whole pair, an escaped backslash (the characters after it are not an escape), or a lone half of a character, which is the
#: group: such a string can't be encoded.
_ESCAPES = re.compile(
    r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|\\\\|(\\u[dD][89a-fA-F][0-9a-fA-F]{2})"
)


def parse_json(content: bytes, *, max_bytes: int) -> Any:
    """Parse UTF-8 JSON strictly.

    A repeated key is refused, because parsers disagree on its meaning. NaN and Infinity are refused, because they are not
    JSON. Numbers beyond 64 bits, and single surrogates, which can't be written again, are refused too.
    """
    if len(content) > max_bytes:
        raise Refusal(f"has more than {max_bytes} bytes of JSON")
    _check_nesting(content)
    try:
        text = content.decode("utf-8")
        value = json.loads(
            text, object_pairs_hook=_object, parse_constant=_constant, parse_int=_whole, parse_float=_number
        )
    except UnicodeDecodeError as error:
        raise Refusal(f"is not UTF-8 text: {one_line(error)}") from error
    except Refusal:
        raise
    except (ValueError, RecursionError) as error:
        raise Refusal(f"is not JSON: {one_line(error)}") from error
    if "\\u" in text and any(found.group(1) for found in _ESCAPES.finditer(text)):
        raise Refusal("has an unpaired surrogate in a string")
    return value


def check_keys(value: Any, allowed: Sequence[str], what: str) -> None:
    """Refuse an object with unknown keys."""
    if isinstance(value, Mapping):
        for key in value:
            if key not in allowed:
                raise Refusal(f"has the unknown key {shown(key)} in {what}")


def _check_nesting(content: bytes) -> None:
    """Check depth and number of values from the punctuation alone, before anything is built."""
    bare = _STRING.sub(b"", content)
    if bare.count(b",") + bare.count(b"[") + bare.count(b"{") > limit("json-values"):
        raise Refusal(f"has more than {limit('json-values')} values in its JSON")
    depth = 0
    for found in _NESTING.finditer(bare):
        depth += 1 if found.group() in b"[{" else -1
        if depth > limit("json-depth"):
            raise Refusal(f"has JSON more than {limit('json-depth')} levels deep")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise Refusal(f"has the key {shown(twice)} twice in one JSON object")
    return value


def _constant(text: str) -> NoReturn:
    raise Refusal(f"has the number {text}, which is not JSON")


def _whole(text: str) -> int:
    if len(text) > limit("json-digits"):
        raise Refusal(f"has a whole number of {len(text)} digits in its JSON")
    return int(text)


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise Refusal("has a number in its JSON that is too large for a float")
    return value
