"""The exceptions of bnexport.

Each has a message (the fact and the value that was found) and a remedy (what to do); both are required::

    BnexportError
    |-- BadInput                the input can't be used
    |   |-- UsageError          options or arguments are invalid or contradict each other
    |   |   `-- Diverged        the loss of a training is no longer finite
    |   |-- ModelError          a model, factory or weights file can't be loaded
    |   |   `-- UntracedError   torch.export can't trace the model
    |   |-- RefusedModel        a loaded model must not be shipped (NaN weights, untrained statistics, ...)
    |   |-- ExportError         a file can't be written with these options (opset, IR version, size)
    |   |-- DataError           a data set, image or array can't be read
    |   |-- FeedError           inputs do not fit a model's signature
    |   |-- BundleError         a bundle is incomplete or was changed, or the folder is not a bundle
    |   |-- RequestError        a network request is invalid
    |   `-- OutputError         an output path exists already or can't be written
    |-- Unavailable             this machine lacks something
    |   |-- MissingDependency   a package is not installed
    |   |-- RuntimeUnavailable  an engine or device is missing, or fell back to another
    |   |-- NotServing          a server can't accept a request now: not ready, full, too late
    |   `-- NetworkError        a download failed
    `-- ProofError              a check of bnexport's own result failed; nothing was written
"""

from __future__ import annotations

import re

#: Remedy for a damaged bundle, and for a file in it.
REBUILD = "Write the bundle again with bnexport fold-and-export, or copy it again from its source"
#: Options without a value; in Python they are True.
_FLAGS = (
    "allow-low-accuracy", "allow-untrained", "clamps", "dynamic-size", "force", "rename-classes", "resume", "recalibrate",
)  # fmt: skip
#: Option -> argument in Python, if the names differ in more than hyphens.
_ARGUMENTS = {"model-option": "model_options", "format": "formats"}
#: An option, its value in capitals, digits or quotes, and the command before it; value and command are optional.
_OPTION = re.compile(
    r"""(?P<command>bnexport [a-z-]+ )?--(?P<name>[a-z][a-z-]*[a-z])(?P<value> (?=[A-Z0-9'"]|folder:))?"""
)


def _in_python(text: str) -> str:
    """Return a text with options as arguments: "Pass --mean 0.5" becomes "Pass mean=0.5"; commands are unchanged."""

    def argument(found: re.Match[str]) -> str:
        if found["command"]:
            return found[0]
        name = _ARGUMENTS.get(found["name"], found["name"].replace("-", "_"))
        return f"{name}=True{found['value'] or ''}" if found["name"] in _FLAGS else f"{name}="

    return _OPTION.sub(argument, text)


class BnexportError(Exception):
    """Base class of all exceptions of bnexport.

    Example:
        >>> try:
        ...     bnexport.Bundle.open("no/such/folder")
        ... except bnexport.BnexportError as error:
        ...     print(error.message)
        no/such/folder does not exist

    Args:
        message: The fact and the value that was found, as one sentence without its full stop.
        remedy: What to do, as one sentence without its full stop.
    """

    def __init__(self, message: str, *, remedy: str) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        """Return message and remedy for a caller in Python, with options of the command line as arguments."""
        return _in_python(self.sentence)

    @property
    def sentence(self) -> str:
        """Message and remedy, with options of the command line."""
        return f"{self.message}. {self.remedy}" if self.remedy else self.message

    def __reduce__(self) -> tuple[object, ...]:
        # The default pickling of exceptions, by which worker processes send errors, loses the keyword-only remedy.
        return _rebuild, (type(self), self.message, self.remedy)


def _rebuild(kind: type[BnexportError], message: str, remedy: str) -> BnexportError:
    return kind(message, remedy=remedy)


class BadInput(BnexportError):
    """The input can't be used."""


class UsageError(BadInput):
    """Options or arguments are invalid or contradict each other."""


class Diverged(UsageError):
    """The loss or the weights of a training are no longer finite."""


class ModelError(BadInput):
    """A model, factory or weights file can't be loaded."""


class UntracedError(ModelError):
    """torch.export can't trace the model."""


class RefusedModel(BadInput):
    """A loaded model must not be shipped."""


class ExportError(BadInput):
    """A file can't be written with these options."""


class DataError(BadInput):
    """A data set, image or array can't be read."""


class FeedError(BadInput):
    """Inputs do not fit a model's signature."""


class BundleError(BadInput):
    """A bundle is incomplete or was changed, or the folder is not a bundle."""


class RequestError(BadInput):
    """A network request is invalid.

    ``status`` is the HTTP status (RFC 9110, chapter 15.5), which other protocols translate; ``allow`` the allowed methods
    for 405.
    """

    def __init__(self, message: str, *, remedy: str, status: int = 400, allow: tuple[str, ...] = ()) -> None:
        super().__init__(message, remedy=remedy)
        self.status = status
        self.allow = allow


class OutputError(BadInput):
    """An output path exists already or can't be written."""


class Unavailable(BnexportError):
    """This machine lacks something."""


class MissingDependency(Unavailable):
    """A package is not installed."""


class RuntimeUnavailable(Unavailable):
    """An engine or device is missing, or fell back to another."""


class NotServing(Unavailable):
    """A server can't accept a request now; ``status`` is 503, or 504 after a time limit (RFC 9110, chapter 15.6)."""

    def __init__(self, message: str, *, remedy: str, status: int = 503) -> None:
        super().__init__(message, remedy=remedy)
        self.status = status


class NetworkError(Unavailable):
    """A download failed."""


class ProofError(BnexportError):
    """A check of bnexport's own result failed."""
