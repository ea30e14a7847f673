"""Imports of packages that may be missing, with an error that names the remedy."""

from __future__ import annotations

import importlib
from types import ModuleType

from bnexport.errors import MissingDependency

#: Import name -> what to install. A package that is missing here is installed under its own name.
INSTALL: dict[str, str] = {
    "torch": "torch",
    "onnxruntime": "onnxruntime-gpu[cuda,cudnn]",
    "PIL": "pillow",
}


def require(name: str, *, purpose: str) -> ModuleType:
    """Import a package, or say what needs it and how to get it.

    Args:
        name: Import name, such as ``"onnxruntime"``.
        purpose: What needs it, as the start of a sentence: "the TorchScript runner".

    Raises:
        MissingDependency: The package, or a library that it loads, is not here.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingDependency(
            f"{purpose} needs {name}, which can't be imported here ({one_line(error)})",
            remedy=f"Install it: pip install '{INSTALL.get(name, name)}'",
        ) from error


def one_line(error: BaseException, limit: int = 300) -> str:
    """The text of a foreign error as one line of at most ``limit`` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
