"""How a screen says no: one sentence, which the reader turns into an error of its own kind."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from bnexport.errors import BadInput


class Refusal(ValueError):
    """Why a file is not opened, as a sentence that lacks its subject: "holds 70000 files, more than 65536"."""


@contextlib.contextmanager
def refusing(name: object, kind: type[BadInput], *, remedy: str) -> Iterator[None]:
    """Turn a Refusal inside the block into an error that names the file.

    Args:
        name: The subject of the sentence, mostly a path.
        kind: The error to raise.
        remedy: What to do about it.
    """
    try:
        yield
    except Refusal as refusal:
        raise kind(f"{name} {refusal}", remedy=remedy) from refusal


def shown(name: str, limit: int = 80) -> str:
    """A foreign name for a sentence: quoted, without invisible characters, cut when it is long."""
    text = repr(name) if name.isprintable() and name.isascii() else ascii(name)
    return text if len(text) <= limit else f"{text[: limit - 4]}...'"
