"""What is inside a .pt2 file: torch.export.load unpickles, resolves names and evaluates expressions, so each is checked.

``torch.export.load`` tries ``weights_only`` first and then unpickles without it, looks up an operator by walking from the
module ``torch`` along any dotted name, and hands expressions to ``sympy.sympify``, which evaluates Python
(torch/_export/serde/serialize.py, torch 2.11 to 2.15). So a model file may run code unless names, pickles and
expressions are what a network needs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from bnexport.screening import expressions
from bnexport.screening.json_text import parse_json
from bnexport.screening.limits import limit
from bnexport.screening.refusal import Refusal, shown
from bnexport.screening.script_code import FORBIDDEN, NAMESPACES

_MODEL = "models/model.json"
_SAMPLES = "data/sample_inputs/"
#: Folders and files that torch writes for one exported network.
_KNOWN = re.compile(
    r"models/[\w-]+\.json|data/(?:weights|constants)/(?:(?:weight|tensor)_\d+|[\w-]+_config\.json)"
    r"|data/sample_inputs/[\w-]+\.pt|archive_format|archive_version|byteorder|version"
    r"|\.data/(?:version|serialization_id)|\.format_version|\.storage_alignment|extra/.+"
)
_OPERATOR = re.compile(r"torch\.ops\.(\w+)\.(\w+)(?:\.\w+)?")
_SYMBOLIC = re.compile(r"torch\.(?:sym_(?:int|float|max|min|not|ite|sum|sqrt)|_sym_sqrt)")
_PYTHON = re.compile(
    r"_operator\.(?:add|sub|mul|truediv|floordiv|mod|pow|neg|pos|abs|eq|ne|lt|le|gt|ge|and_|or_|xor|not_|getitem)"
    r"|math\.(?:ceil|floor|trunc|sqrt)"
)
_GRAPHS = frozenset({"cond", "while_loop", "map_impl", "scan", "wrap_with_set_grad_enabled", "wrap_with_autocast"})
#: Names end up in Python source that torch writes and runs, so they are plain words, or words with dots.
_WORD = re.compile(r"[A-Za-z_]\w{0,254}|")
_DOTTED = re.compile(r"[\w./ -]{0,1024}")
_WORD_KEYS = frozenset({"name", "as_name"})
_DOTTED_KEYS = frozenset(
    {"parameter_name", "buffer_name", "tensor_constant_name", "custom_obj_name", "user_input_name", "fqn", "path_name"}
)
#: Containers of a network's arguments that can be told in JSON; others are looked up by their name.
_CONTAINERS = frozenset(
    {None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict", "torch.Size"}
)


def check(sizes: Mapping[str, int], read: Callable[[str, int], bytes], pickled: Callable[[str], None]) -> None:
    """Refuse a .pt2 file that holds more than one network's graph and tensors.

    Args:
        sizes: File inside the archive -> its bytes.
        read: Gives the bytes of a file that has no more than so many.
        pickled: Refuses a file that is unpickled when the archive is loaded.

    Raises:
        Refusal: Code, native code, other names or expressions, or files that torch.export does not write.
    """
    if _MODEL not in sizes:
        raise Refusal(f"is no file of torch.export: it has no {_MODEL}")
    for name in sizes:
        if _KNOWN.fullmatch(name) is None:
            raise Refusal(f"holds {shown(name)}, which is no part of an exported network")
        if name.startswith(_SAMPLES):
            if sizes[name]:  # an empty one is not unpickled: the author left the samples out
                pickled(name)
        elif name.startswith("models/"):
            _check_model(parse_json(read(name, limit("code-bytes")), max_bytes=limit("code-bytes")))
        elif name.endswith("_config.json"):
            _check_payloads(name, sizes, parse_json(read(name, limit("code-bytes")), max_bytes=limit("code-bytes")))


def _check_model(model: Any) -> None:
    if not isinstance(model, dict):
        raise Refusal(f"has a {_MODEL} that is no table")
    sizes: set[str | None] = set()
    for key, value in _pairs(model):
        if key == "target":
            _check_target(value)
        elif key == "expr_str":
            sizes.add(value if isinstance(value, str) else None)
        elif key in _WORD_KEYS or key in _DOTTED_KEYS:
            _check_name(value, _WORD if key in _WORD_KEYS else _DOTTED)
        elif key == "forward_arg_names":
            for name in value or ():
                _check_name(name, _WORD)
        elif key in ("in_spec", "out_spec", "dataclass_name", "as_custom_obj", "as_operator"):
            _check_spec(key, value)
    for size in sizes:  # each text once: a network with varying sizes repeats a few thousand times
        expressions.check_size(size)
    for symbol in _table(model, "range_constraints"):
        if not expressions.is_symbol(symbol):  # torch counts up to the number in the name
            raise Refusal(f"has a size with the odd name {shown(symbol)}")
    for guard in model.get("guards_code") or ():
        expressions.check_guard(guard)


def _pairs(value: Any) -> Iterator[tuple[str, Any]]:
    """Every (key, value) at every depth; the depth is bounded by the parser."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield key, item
            yield from _pairs(item)
    elif isinstance(value, list):
        for item in value:
            yield from _pairs(item)


def _check_target(target: Any) -> None:
    """The name of an operator; attributes of a graph are inputs and not targets in this format."""
    if not isinstance(target, str):
        return  # a field of another kind that has the same name
    if _SYMBOLIC.fullmatch(target) or _PYTHON.fullmatch(target):
        return
    found = _OPERATOR.fullmatch(target)
    if found is None:
        raise Refusal(f"calls {shown(target)}, which is no operator of a network")
    namespace, name = found.groups()
    if namespace == "higher_order" and name in _GRAPHS:
        return
    if namespace not in NAMESPACES or name in FORBIDDEN:
        raise Refusal(f"calls {shown(target)}, which is no operator of a network")


def _check_name(value: Any, allowed: re.Pattern[str]) -> None:
    if isinstance(value, str) and not (value.isascii() and allowed.fullmatch(value)):
        raise Refusal(f"has the name {shown(value)}, which is no plain word")
    if value is not None and not isinstance(value, str | dict):
        raise Refusal("has a name that is no text")


def _check_spec(key: str, value: Any) -> None:
    """The containers of a call's arguments, as JSON in a string."""
    if key not in ("in_spec", "out_spec"):
        if value:
            raise Refusal(f"has an object of its own kind ({key})")
        return
    if not isinstance(value, str):
        raise Refusal(f"has an odd {key}")
    if not value:
        return
    for name, kind in _pairs(parse_json(value.encode("utf-8", "replace"), max_bytes=limit("code-bytes"))):
        if name == "type" and kind not in _CONTAINERS:
            raise Refusal(f"has arguments in a container of the kind {shown(str(kind))}")
        if name == "context" and isinstance(kind, str):
            _check_context(kind)


def _check_context(text: str) -> None:
    """Keys of a dictionary of arguments."""
    keys = parse_json(text.encode("utf-8", "replace"), max_bytes=limit("code-bytes"))
    for key in keys if isinstance(keys, list) else ():
        if not isinstance(key, int):
            _check_name(key, _DOTTED)


def _check_payloads(name: str, sizes: Mapping[str, int], value: Any) -> None:
    folder = name.rpartition("/")[0]
    for key, payload in _table(value, "config").items():
        if not isinstance(payload, dict):
            raise Refusal(f"has an odd entry {shown(key)} in {name}")
        if payload.get("use_pickle") is not False:
            raise Refusal(f"keeps {shown(key)} as a pickle, not as a plain tensor")
        file = f"{folder}/{payload.get('path_name')}"
        if file not in sizes:
            raise Refusal(f"has no data for {shown(key)}")
        expressions.check_tensor(payload.get("tensor_meta"), sizes[file], key)


def _table(value: Any, key: str) -> dict[str, Any]:
    found = value.get(key) if isinstance(value, dict) else None
    if not isinstance(found, dict):
        raise Refusal(f"has no table {key!r} where torch.export writes one")
    return found
