"""Every error that bnexport raises on purpose.

Each carries a message (what is wrong, and where) and a remedy (what to do about it); both are required::

    BnexportError
    |-- BadInput                what was given can't be used
    |   |-- UsageError          options or arguments that do not fit together
    |   |   `-- Diverged        a training whose loss is no longer finite
    |   |-- ModelError          a model, factory or weights file that can't be loaded
    |   |   `-- UntracedError   torch.export can't trace the model
    |   |-- RefusedModel        a model that loads but must not be shipped (NaN weights, untrained statistics, ...)
    |   |-- ExportError         a file that can't be written as asked (opset, IR version, size)
    |   |-- DataError           a data set, image or array that can't be read
    |   |-- FeedError           inputs that do not fit a model's signature
    |   |-- BundleError         a bundle that is incomplete, changed or not a bundle
    |   |-- RequestError        a request over the network that can't be answered as it was asked
    |   `-- OutputError         an output path that exists already or can't be written
    |-- Unavailable             this machine can't do it
    |   |-- MissingDependency   a package is not installed
    |   |-- RuntimeUnavailable  an engine or device that is not here, or fell back to another
    |   |-- NotServing          a server that can't take a request now: not ready, full, too late
    |   `-- NetworkError        a download that did not come
    `-- ProofError              bnexport's own check of its own work failed; nothing was written
"""

from __future__ import annotations

import re

#: Options without a value, which are True in Python.
_FLAGS = (
    "allow-low-accuracy", "allow-untrained", "clamps", "dynamic-size", "force", "rename-classes", "resume", "recalibrate",
)  # fmt: skip
#: Option -> argument in Python, where the names differ in more than hyphens.
_ARGUMENTS = {"model-option": "model_options", "format": "formats"}
#: An option, its value in capitals or digits if one follows, and the command that is named before it, if any.
_OPTION = re.compile(r"(?P<command>bnexport [a-z-]+ )?--(?P<name>[a-z][a-z-]*[a-z])(?P<value> (?=[A-Z0-9]|folder:))?")


def _in_python(text: str) -> str:
    """Return a text with options as arguments: "Pass --mean 0.5" becomes "Pass mean=0.5"; a command is kept as it is."""

    def argument(found: re.Match[str]) -> str:
        if found["command"]:
            return found[0]
        name = _ARGUMENTS.get(found["name"], found["name"].replace("-", "_"))
        return f"{name}=True{found['value'] or ''}" if found["name"] in _FLAGS else f"{name}="

    return _OPTION.sub(argument, text)


class BnexportError(Exception):
    """Base of the tree.

    Args:
        message: One sentence: what is wrong, and where.
        remedy: One sentence: what to do about it.
    """

    def __init__(self, message: str, *, remedy: str) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        """Return fact and remedy for a caller in Python: options of the command line are named as arguments."""
        return _in_python(self.sentence)

    @property
    def sentence(self) -> str:
        """Fact and remedy, with the options of the command line."""
        return f"{self.message}. {self.remedy}" if self.remedy else self.message

    def __reduce__(self) -> tuple[object, ...]:
        # The keyword-only remedy does not survive the default pickling of exceptions (worker processes send errors so).
        return _rebuild, (type(self), self.message, self.remedy)


def _rebuild(kind: type[BnexportError], message: str, remedy: str) -> BnexportError:
    return kind(message, remedy=remedy)


class BadInput(BnexportError):
    """What was given can't be used."""


class UsageError(BadInput):
    """Options or arguments that do not fit together."""


class Diverged(UsageError):
    """A training whose loss or weights are no longer finite."""


class ModelError(BadInput):
    """A model, factory or weights file that can't be loaded."""


class UntracedError(ModelError):
    """A model that torch.export can't trace."""


class RefusedModel(BadInput):
    """A model that loads but must not be shipped as it is."""


class ExportError(BadInput):
    """A file that can't be written as asked."""


class DataError(BadInput):
    """A data set, image or array that can't be read."""


class FeedError(BadInput):
    """Inputs that do not fit a model's signature."""


class BundleError(BadInput):
    """A bundle that is incomplete, changed, or not a bundle."""


class RequestError(BadInput):
    """A request over the network that can't be answered as it was asked.

    Args:
        message: As in BnexportError.
        remedy: As in BnexportError.
        status: The HTTP status that says so (RFC 9110, chapter 15.5); another protocol translates it.
        allow: Of 405, the methods that would do.
    """

    def __init__(self, message: str, *, remedy: str, status: int = 400, allow: tuple[str, ...] = ()) -> None:
        super().__init__(message, remedy=remedy)
        self.status = status
        self.allow = allow


class OutputError(BadInput):
    """An output path that exists already or can't be written."""


class Unavailable(BnexportError):
    """This machine can't do what was asked."""


class MissingDependency(Unavailable):
    """A package that is not installed."""


class RuntimeUnavailable(Unavailable):
    """An engine or device that is not here, or that fell back to another."""


class NotServing(Unavailable):
    """A server that can't take a request now.

    Args:
        message: As in BnexportError.
        remedy: As in BnexportError.
        status: The HTTP status that says so (RFC 9110, chapter 15.6): 503, or 504 when it took too long.
    """

    def __init__(self, message: str, *, remedy: str, status: int = 503) -> None:
        super().__init__(message, remedy=remedy)
        self.status = status


class NetworkError(Unavailable):
    """A download that did not come."""


class ProofError(BnexportError):
    """bnexport's own check of its own work failed."""
