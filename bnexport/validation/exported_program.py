"""Contents of .pt2 files, and source code in TorchScript archives.

``torch.export.load`` tries ``weights_only`` first and then unpickles without it, looks up an operator by walking from the
module ``torch`` along any dotted name, and hands expressions to ``sympy.sympify``, which evaluates Python
(torch/_export/serde/serialize.py, torch 2.11 to 2.15). So a model file may run code unless its names, pickles
and expressions are limited to those of a network.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from bnexport.files import Refusal
from bnexport.optional import no_warnings
from bnexport.validation.json_text import parse_json
from bnexport.validation.limits import check_view, count_elements, limit, shown

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
#: Containers of a network's arguments that JSON can describe; others are looked up by their name.
_CONTAINERS = frozenset(
    {None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict", "torch.Size"}
)


def check_exported(sizes: Mapping[str, int], read: Callable[[str, int], bytes], pickled: Callable[[str], None]) -> None:
    """Refuse a .pt2 file that holds anything except one network's graph and tensors."""
    if _MODEL not in sizes:
        raise Refusal(f"is not a file of torch.export: it has no {_MODEL}")
    for name in sizes:
        if _KNOWN.fullmatch(name) is None:
            raise Refusal(f"holds {shown(name)}, which is not part of an exported network")
        if name.startswith(_SAMPLES):
            if sizes[name]:  # an empty file is not unpickled: the author left the samples out
                pickled(name)
        elif name.startswith("models/"):
            _check_model(_parsed(read(name, limit("code-bytes"))))
        elif name.endswith("_config.json"):
            _check_payloads(name, sizes, _parsed(read(name, limit("code-bytes"))))


def _parsed(text: bytes) -> Any:
    return parse_json(text, max_bytes=limit("code-bytes"))


def _check_model(model: Any) -> None:
    if not isinstance(model, dict):
        raise Refusal(f"has a {_MODEL} that is not a table")
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
    for size in sizes:  # each text once: a network with varying sizes repeats them a few thousand times
        check_size(size)
    for symbol in _table(model, "range_constraints"):
        if _SYMBOL.fullmatch(symbol) is None:  # torch counts up to the number in the name
            raise Refusal(f"has a size with the invalid name {shown(symbol)}")
    for guard in model.get("guards_code") or ():
        check_guard(guard)


def _pairs(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield every (key, value) at every depth; the parser bounds the depth."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield key, item
            yield from _pairs(item)
    elif isinstance(value, list):
        for item in value:
            yield from _pairs(item)


def _check_target(target: Any) -> None:
    """Check the name of an operator; attributes of a graph are inputs and not targets in this format."""
    if not isinstance(target, str):
        return  # a field of another kind that has the same name
    if _SYMBOLIC.fullmatch(target) or _PYTHON.fullmatch(target):
        return
    found = _OPERATOR.fullmatch(target)
    namespace, name = found.groups() if found else ("", "")
    of_graphs = namespace == "higher_order" and name in _GRAPHS
    if not of_graphs and (namespace not in NAMESPACES or name in FORBIDDEN):
        raise Refusal(f"calls {shown(target)}, which is not an operator of a network")


def _check_name(value: Any, allowed: re.Pattern[str]) -> None:
    if isinstance(value, str) and not (value.isascii() and allowed.fullmatch(value)):
        raise Refusal(f"has the name {shown(value)}, which is not a plain word")
    if value is not None and not isinstance(value, str | dict):
        raise Refusal("has a name that is not a string")


def _check_spec(key: str, value: Any) -> None:
    """Check the containers of a call's arguments, as JSON in a string."""
    if key not in ("in_spec", "out_spec"):
        if value:
            raise Refusal(f"has an object of a custom class ({key})")
        return
    if not isinstance(value, str):
        raise Refusal(f"has an invalid {key}")
    if not value:
        return
    for name, kind in _pairs(_parsed(value.encode("utf-8", "replace"))):
        if name == "type" and kind not in _CONTAINERS:
            raise Refusal(f"has arguments in a container of the kind {shown(str(kind))}")
        if name == "context" and isinstance(kind, str):
            keys = _parsed(kind.encode("utf-8", "replace"))  # of a dictionary of arguments
            for item in keys if isinstance(keys, list) else ():
                if not isinstance(item, int):
                    _check_name(item, _DOTTED)


def _check_payloads(name: str, sizes: Mapping[str, int], value: Any) -> None:
    folder = name.rpartition("/")[0]
    for key, payload in _table(value, "config").items():
        if not isinstance(payload, dict):
            raise Refusal(f"has an invalid entry {shown(key)} in {name}")
        if payload.get("use_pickle") is not False:
            raise Refusal(f"keeps {shown(key)} as a pickle, not as a plain tensor")
        file = f"{folder}/{payload.get('path_name')}"
        if file not in sizes:
            raise Refusal(f"has no data for {shown(key)}")
        check_tensor(payload.get("tensor_meta"), sizes[file], key)


def _table(value: Any, key: str) -> dict[str, Any]:
    found = value.get(key) if isinstance(value, dict) else None
    if not isinstance(found, dict):
        raise Refusal(f"has no table {key!r} where torch.export writes one")
    return found


#: Names that torch writes into an expression (torch.utils._sympy.functions, and sympy's Max, Min and comparisons).
FUNCTIONS = frozenset({
    "FloorDiv", "ModularIndexing", "Where", "PythonMod", "Mod", "CleanDiv", "CeilToInt", "FloorToInt", "CeilDiv",
    "PowByNatural", "FloatPow", "FloatTrueDiv", "IntTrueDiv", "TruncToFloat", "TruncToInt", "RoundToInt", "ToFloat",
    "Identity", "IsNonOverlappingAndDenseIndicator", "Max", "Min", "Abs", "Eq", "Ne", "Lt", "Le", "Gt", "Ge", "And", "Or",
    "Not", "ceiling", "floor", "oo", "int_oo", "Add", "Mul", "Pow", "Integer", "Rational", "true", "false", "Equality",
    "Unequality", "StrictLessThan", "StrictGreaterThan", "LessThan", "GreaterThan", "Symbol", "Float",
})  # fmt: skip
#: Name of a size that varies: s0, u12, zuf3. It has at most six digits, because torch counts up to the number.
_SYMBOL = re.compile(r"[a-z]{1,8}\d{1,6}")
#: Function whose first argument is a text -> pattern of the text.
_TEXTS = {"Symbol": _SYMBOL, "Float": re.compile(r"-?\d{1,20}(\.\d{1,20})?(e-?\d{1,3})?")}
_KEYWORDS = frozenset({"positive", "nonnegative", "integer", "real", "zero", "finite", "precision"})
_GUARD_NAMES = frozenset({"L", "args", "kwargs", "True", "False", "None", "len", "torch"}) | FUNCTIONS
_GUARD_CALLS = frozenset({"size", "stride", "storage_offset", "dim"})
_TORCH_CALLS = frozenset({"sym_max", "sym_min", "sym_int", "sym_float", "sym_not", "sym_ite", "sym_sum", "sym_sqrt"})
_SHARED = (
    ast.Expression, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.Call, ast.Name, ast.Constant, ast.Load,
    ast.operator, ast.unaryop, ast.boolop, ast.cmpop,
)  # fmt: skip
_MAX_POWER = 16
#: torch's numbers of element types (torch._export.serde.schema.ScalarType) -> bytes.
WIDTHS = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 2, 7: 4, 8: 8, 9: 4, 10: 8, 11: 16, 12: 1, 13: 2, 28: 2}


def check_size(text: Any) -> None:
    """Refuse an expression that is more than arithmetic on symbols."""
    nodes = list(ast.walk(_tree(text)))
    texts = {id(node.args[0]) for node in nodes if isinstance(node, ast.Call) and _names_text(node)}
    for node in nodes:
        odd = not isinstance(node, (*_SHARED, ast.keyword))
        if isinstance(node, ast.Name):
            odd = node.id not in FUNCTIONS and _SYMBOL.fullmatch(node.id) is None
        elif isinstance(node, ast.Call):
            odd = not isinstance(node.func, ast.Name) or node.func.id not in FUNCTIONS or _is_large_power(node)
        elif isinstance(node, ast.keyword):
            odd = node.arg not in _KEYWORDS
        elif isinstance(node, ast.Constant):
            odd = not _is_small(node.value) and id(node) not in texts
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow | ast.LShift | ast.RShift | ast.MatMult):
            odd = not isinstance(node.op, ast.Pow) or not _is_small_whole(node.right)
        if odd:
            raise Refusal(f"has {shown(str(text))} where a size is expected")


def _names_text(call: ast.Call) -> bool:
    """Return True if the first argument of a call is a valid text by _TEXTS."""
    name = call.func.id if isinstance(call.func, ast.Name) else ""
    first = call.args[0] if call.args else None
    if name not in _TEXTS or not isinstance(first, ast.Constant) or not isinstance(first.value, str):
        return False
    return _TEXTS[name].fullmatch(first.value) is not None


def _is_large_power(call: ast.Call) -> bool:
    """Return True for a power that takes too long to compute; Pow(x, Integer(2)) is harmless, nested powers are not."""
    if not isinstance(call.func, ast.Name) or call.func.id not in ("Pow", "PowByNatural", "FloatPow"):
        return False
    power = call.args[1] if len(call.args) == 2 else None
    if isinstance(power, ast.Call) and isinstance(power.func, ast.Name) and power.func.id in ("Integer", "Rational"):
        return not power.args or not all(map(_is_small_whole, power.args))
    return power is None or not _is_small_whole(power)


def _is_small_whole(node: ast.expr) -> bool:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        node = node.operand
    return isinstance(node, ast.Constant) and _is_small(node.value, _MAX_POWER)


def check_guard(text: Any) -> None:
    """Refuse a condition on inputs that is more than a comparison of their sizes."""
    for node in ast.walk(_tree(text)):
        odd = not isinstance(node, (*_SHARED, ast.Subscript, ast.Attribute))
        if isinstance(node, ast.Name):
            odd = node.id not in _GUARD_NAMES and _SYMBOL.fullmatch(node.id) is None
        elif isinstance(node, ast.Attribute):
            of_torch = isinstance(node.value, ast.Name) and node.value.id == "torch"
            odd = node.attr not in (_TORCH_CALLS if of_torch else _GUARD_CALLS)
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow | ast.LShift):
            odd = True
        if odd:
            raise Refusal(f"has {shown(str(text))} where a condition on sizes is expected")


def check_tensor(meta: Any, size: int, name: str) -> None:
    """Refuse a stored tensor that is larger than its file."""
    try:
        sizes = [item["as_int"] for item in meta["sizes"]]
        strides = [item["as_int"] for item in meta["strides"]]
        offset, width = meta["storage_offset"]["as_int"], WIDTHS.get(meta["dtype"], 1)
    except (TypeError, KeyError) as error:
        raise Refusal(f"has no plain sizes for {shown(name)}") from error
    if type(offset) is not int or size % width:
        raise Refusal(f"has {size} bytes for {shown(name)}, which is not a whole number of elements")
    if count_elements(sizes) > size // width:
        raise Refusal(f"declares {count_elements(sizes)} elements for {shown(name)}, but has {size // width}")
    check_view(size // width, offset, sizes, strides)


def _tree(text: Any) -> ast.Expression:
    if not isinstance(text, str) or len(text) > limit("expression"):
        raise Refusal(f"has an expression that is not a string, or is longer than {limit('expression')} characters")
    try:
        with no_warnings:  # the compiler warns about odd texts; errors are raised
            return ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise Refusal(f"has {shown(text)} where a size is expected") from error


def _is_small(value: object, most: int = 2**63) -> bool:
    return type(value) in (int, float, bool) and abs(value) <= most  # type: ignore[arg-type]


#: The operators of torch that take the name of a file: they write, map or read the file.
FORBIDDEN = frozenset({"save", "from_file", "load_tensor"})
#: Namespaces in ``ops.<namespace>.<operator>``: those of torch, torchvision and quantised layers.
NAMESPACES = frozenset({"aten", "prim", "prims", "torchvision", "quantized", "_quantized", "quantized_decomposed"})
#: Allowed classes in C++: those of quantised and recurrent layers hold weights. Other classes open files and sockets.
NATIVE = frozenset({"quantized", "rnn"})
#: Comments and texts. The same characters must be inside quotes as for torch's lexer, so an unmatched quote is refused.
_TEXT = re.compile(
    r'#[^\n]*|"""(?:[^\\]|\\.)*?"""|\'\'\'(?:[^\\]|\\.)*?\'\'\'|"(?:[^"\\\n]|\\.)*"|\'(?:[^\'\\\n]|\\.)*\'', re.DOTALL
)
_FORBIDDEN_WORD = re.compile(r"(?<![\w])(?:" + "|".join(sorted(FORBIDDEN)) + r")(?![\w])")
_MODULE = re.compile(r"(?<![\w.])(torch|ops|__torch__)(?![\w])(\s*\.\s*(\w+))?(\s*\.)?")
_FETCHED = re.compile(r"getattr\s*\(\s*\(*\s*(?:torch|ops|__torch__)(?![\w])")
_NATIVE = re.compile(r"(?<![\w])classes\s*\.\s*(\w+)")
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|([0-7]{1,3}))")


def check_code(content: bytes) -> None:
    """Refuse source text that calls operators which a network does not need."""
    source = content.decode("utf-8", "replace")
    texts = [found.group() for found in _TEXT.finditer(source)]
    code = _TEXT.sub(lambda found: " " if found.group().startswith("#") else '""', source)
    if "'" in code or code.replace('""', "").count('"') or "\\" in code:
        raise Refusal("has code with an unterminated string, or a backslash outside of a string")
    for found in (_FORBIDDEN_WORD.search(code), *(_FORBIDDEN_WORD.fullmatch(_plain(text)) for text in texts)):
        if found is not None:
            raise Refusal(f"has code that calls {found.group()}, which reads or writes files")
    _check_modules(code)
    if "getattr" in code and (_FETCHED.search(code) or re.search(r'""\s*""', code)):
        raise Refusal("has code that fetches an operator by a string")
    for found in _NATIVE.finditer(code):
        if found.group(1) not in NATIVE:
            raise Refusal(f"has code that uses the native class {shown(found.group(1))}")


def _check_modules(code: str) -> None:
    """Refuse a module name without a dot after it, so that no module gets another name."""
    for found in _MODULE.finditer(code):
        module, name, more = found.group(1), found.group(3), found.group(4)
        if name is None or (module == "ops" and more is None):
            raise Refusal(f"has code that gives {found.group().strip()} another name")
        if module == "ops" and name not in NAMESPACES:
            raise Refusal(f"has code that calls operators of {shown(name)}, which are not torch's")


def _plain(text: str) -> str:
    """Return the content of a quoted text, with its escapes of letters resolved."""
    inner = text.strip("\"'")
    return _ESCAPE.sub(lambda found: chr(int(found.group(1), 16) if found.group(1) else int(found.group(2), 8)), inner)
