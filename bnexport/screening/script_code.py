"""The source text inside a TorchScript file: only arithmetic, no files, no sockets, no code of others.

The words are looked for in any form, since TorchScript lets a function be renamed (``f = torch.save``), put in brackets
or fetched by ``getattr`` with a text that is written in pieces or with escapes.
"""

from __future__ import annotations

import re

from bnexport.screening.refusal import Refusal, shown

#: Operators that write a file, map one or read one by its name: those of torch's operators that take a file's name.
FORBIDDEN = frozenset({"save", "from_file", "load_tensor"})
#: ``ops.<namespace>.<operator>``: torch's own, torchvision's, and those of quantised layers.
NAMESPACES = frozenset({"aten", "prim", "prims", "torchvision", "quantized", "_quantized", "quantized_decomposed"})
#: Classes written in C++; those of quantised and recurrent layers hold weights, others open files and sockets.
NATIVE = frozenset({"quantized", "rnn"})
#: Comments and texts. Whatever is inside quotes for torch's lexer must be so here too, so a quote left over is refused.
_TEXT = re.compile(
    r'#[^\n]*|"""(?:[^\\]|\\.)*?"""|\'\'\'(?:[^\\]|\\.)*?\'\'\'|"(?:[^"\\\n]|\\.)*"|\'(?:[^\'\\\n]|\\.)*\'', re.DOTALL
)
_WORD = re.compile(r"(?<![\w])(?:" + "|".join(sorted(FORBIDDEN)) + r")(?![\w])")
_MODULE = re.compile(r"(?<![\w.])(torch|ops|__torch__)(?![\w])(\s*\.\s*(\w+))?(\s*\.)?")
_FETCHED = re.compile(r"getattr\s*\(\s*\(*\s*(?:torch|ops|__torch__)(?![\w])")
_NATIVE = re.compile(r"(?<![\w])classes\s*\.\s*(\w+)")
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|([0-7]{1,3}))")


def check(content: bytes) -> None:
    """Refuse source text that calls what a network does not need.

    Raises:
        Refusal: Naming the operator.
    """
    source = content.decode("utf-8", "replace")
    texts = [found.group() for found in _TEXT.finditer(source)]
    code = _TEXT.sub(lambda found: " " if found.group().startswith("#") else '""', source)
    if "'" in code or code.replace('""', "").count('"') or "\\" in code:
        raise Refusal("has code with a quote that does not end, or a backslash outside of a text")
    for found in (_WORD.search(code), *(_WORD.fullmatch(_plain(text)) for text in texts)):
        if found is not None:
            raise Refusal(f"has code that calls {found.group()}, which reads or writes files")
    _check_modules(code)
    if "getattr" in code and (_FETCHED.search(code) or re.search(r'""\s*""', code)):
        raise Refusal("has code that fetches an operator by a text")
    for found in _NATIVE.finditer(code):
        if found.group(1) not in NATIVE:
            raise Refusal(f"has code that uses the native class {shown(found.group(1))}")


def _check_modules(code: str) -> None:
    """Modules stand before a dot and nowhere else, so that none gets another name."""
    for found in _MODULE.finditer(code):
        module, name, more = found.group(1), found.group(3), found.group(4)
        if name is None or (module == "ops" and more is None):
            raise Refusal(f"has code that gives {found.group().strip()} another name")
        if module == "ops" and name not in NAMESPACES:
            raise Refusal(f"has code that calls operators of {shown(name)}, which are not torch's")


def _plain(text: str) -> str:
    """What a text in quotes says, with its escapes of letters written out."""
    inner = text.strip("\"'")
    return _ESCAPE.sub(lambda found: chr(int(found.group(1), 16) if found.group(1) else int(found.group(2), 8)), inner)
