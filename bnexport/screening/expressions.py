"""Expressions of sizes in a .pt2 file: sums and products of symbols, checked as Python's grammar reads them."""

from __future__ import annotations

import ast
import re
from typing import Any

from bnexport.optional import no_warnings
from bnexport.screening.limits import limit
from bnexport.screening.refusal import Refusal, shown
from bnexport.screening.tensor_sizes import check_view, count_elements

#: What torch writes into an expression (torch.utils._sympy.functions, and sympy's Max, Min and comparisons).
FUNCTIONS = frozenset(
    {"FloorDiv", "ModularIndexing", "Where", "PythonMod", "Mod", "CleanDiv", "CeilToInt", "FloorToInt", "CeilDiv"}
    | {"PowByNatural", "FloatPow", "FloatTrueDiv", "IntTrueDiv", "TruncToFloat", "TruncToInt", "RoundToInt", "ToFloat"}
    | {"Identity", "IsNonOverlappingAndDenseIndicator", "Max", "Min", "Abs", "Eq", "Ne", "Lt", "Le", "Gt", "Ge"}
    | {
        "And",
        "Or",
        "Not",
        "ceiling",
        "floor",
        "oo",
        "int_oo",
        "Add",
        "Mul",
        "Pow",
        "Integer",
        "Rational",
        "true",
        "false",
    }
    | {"Equality", "Unequality", "StrictLessThan", "StrictGreaterThan", "LessThan", "GreaterThan", "Symbol", "Float"}
)
#: A size that varies. Six digits: torch counts up to the number.
_SYMBOL = re.compile(r"[a-z]{1,8}\d{1,6}")
#: Functions whose first argument is a text, and what that text may be.
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
    """Refuse an expression that is more than arithmetic on symbols.

    Raises:
        Refusal: Quoting it.
    """
    nodes = list(ast.walk(_tree(text)))
    texts = {id(node.args[0]) for node in nodes if isinstance(node, ast.Call) and _names_text(node)}
    for node in nodes:
        odd = not isinstance(node, (*_SHARED, ast.keyword))
        if isinstance(node, ast.Name):
            odd = node.id not in FUNCTIONS and not is_symbol(node.id)
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
    """Whether a call is of a kind that takes a text first, and has one that is as it should be."""
    name = call.func.id if isinstance(call.func, ast.Name) else ""
    first = call.args[0] if call.args else None
    if name not in _TEXTS or not isinstance(first, ast.Constant) or not isinstance(first.value, str):
        return False
    return _TEXTS[name].fullmatch(first.value) is not None


def _is_large_power(call: ast.Call) -> bool:
    """Pow(x, Integer(2)) is harmless, a tower of powers takes for ever."""
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
    """Refuse a condition on inputs that is more than a comparison of their sizes.

    Raises:
        Refusal: Quoting it.
    """
    for node in ast.walk(_tree(text)):
        odd = not isinstance(node, (*_SHARED, ast.Subscript, ast.Attribute))
        if isinstance(node, ast.Name):
            odd = node.id not in _GUARD_NAMES and not is_symbol(node.id)
        elif isinstance(node, ast.Attribute):
            of_torch = isinstance(node.value, ast.Name) and node.value.id == "torch"
            odd = node.attr not in (_TORCH_CALLS if of_torch else _GUARD_CALLS)
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow | ast.LShift):
            odd = True
        if odd:
            raise Refusal(f"has {shown(str(text))} where a condition on sizes is expected")


def check_tensor(meta: Any, size: int, name: str) -> None:
    """Refuse a stored tensor that is larger than its file.

    Args:
        meta: ``{"dtype": 7, "sizes": [{"as_int": 4}], "strides": [...], "storage_offset": {"as_int": 0}}``.
        size: Bytes of the file.
        name: Of the tensor.

    Raises:
        Refusal: It does not fit, or has a size that is no number.
    """
    try:
        sizes = [item["as_int"] for item in meta["sizes"]]
        strides = [item["as_int"] for item in meta["strides"]]
        offset, width = meta["storage_offset"]["as_int"], WIDTHS.get(meta["dtype"], 1)
    except (TypeError, KeyError) as error:
        raise Refusal(f"has no plain sizes for {shown(name)}") from error
    if type(offset) is not int or size % width:
        raise Refusal(f"has {size} bytes for {shown(name)}, which is no whole number of elements")
    if count_elements(sizes) > size // width:
        raise Refusal(f"says that {shown(name)} has {count_elements(sizes)} elements; {size // width} are there")
    check_view(size // width, offset, sizes, strides)


def _tree(text: Any) -> ast.Expression:
    if not isinstance(text, str) or len(text) > limit("expression"):
        raise Refusal(f"has an expression that is no text, or longer than {limit('expression')} characters")
    try:
        with no_warnings:  # the compiler remarks on odd texts; what matters is raised
            return ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise Refusal(f"has {shown(text)} where a size is expected") from error


def is_symbol(name: str) -> bool:
    """Whether a text is the name of a size that varies: s0, u12, zuf3."""
    return _SYMBOL.fullmatch(name) is not None


def _is_small(value: object, most: int = 2**63) -> bool:
    return type(value) in (int, float, bool) and abs(value) <= most  # type: ignore[arg-type]
