"""Errors of the tree as a client gets them: a status and a sentence."""

from __future__ import annotations

from bnexport.errors import BadInput, BnexportError, BundleError, MissingDependency, NotServing, RequestError


def status_of(error: BnexportError) -> int:
    """The HTTP status of an error of the tree; other protocols translate it."""
    if isinstance(error, RequestError | NotServing):
        return error.status
    if isinstance(error, MissingDependency):
        return 501
    # A bundle that fails while it serves is no fault of the client's.
    return 400 if isinstance(error, BadInput) and not isinstance(error, BundleError) else 500


def sentence_of(error: BnexportError) -> str:
    """What is wrong and what to do, without characters that would steer a terminal."""
    return printable(str(error))


def printable(text: str) -> str:
    """A text without characters that would steer a terminal, or that are no UTF-8."""
    return "".join(char if char.isprintable() else "?" for char in text)
