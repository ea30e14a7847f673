"""What goes between a client and a model, whatever carries it (Open Inference Protocol v2, "Inference").

Named tuples: every request makes some, and a frozen dataclass takes three times as long to make.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from bnexport.errors import BadInput, BnexportError, BundleError, MissingDependency, NotServing, RequestError
from bnexport.tensors import ELEMENT_TYPES, Array

#: numpy's element type -> the protocol's ("Tensor Data Types").
DATATYPES: dict[str, str] = {name: row.datatype for name, row in ELEMENT_TYPES.items()}
#: Texts; only answers have them (classes by name).
BYTES = "BYTES"


class RequestedOutput(NamedTuple):
    """One output that a client requests."""

    name: str  # Name of the model's output
    datatype: str  # The protocol's, of the tensor
    binary: bool = False  # Send the tensor as bytes after the JSON
    classes: int = 0  # Number of best classes to send as texts instead of the tensor; 0 for the tensor


class InferRequest(NamedTuple):
    """A request that fits its model."""

    inputs: dict[str, Array]  # Input name -> array of the signature's element type and shape; may be read-only
    rows: int  # Samples: the size of the batch dimension
    # Requested outputs, in order; every output of the model if the client named none
    outputs: tuple[RequestedOutput, ...]
    id: str = ""  # The client's, to be repeated in the answer; "" without one
    timeout: float | None = None  # Seconds that the client waits; None leaves it to the server


class OutputTensor(NamedTuple):
    """One output of an answer."""

    name: str  # Name of the model's output
    datatype: str  # The protocol's
    shape: tuple[int, ...]  # Shape of the tensor
    data: Array | Sequence[str]  # The tensor; for BYTES its texts in row-major order
    binary: bool  # To be sent as bytes after the JSON


class InferResponse(NamedTuple):
    """An answer."""

    model: str  # Name of the model that answered
    version: str  # Its version
    outputs: tuple[OutputTensor, ...]  # In the order that was asked for
    id: str = ""  # The client's


def status_of(error: BnexportError) -> int:
    """Return the HTTP status of an error; other protocols translate it."""
    if isinstance(error, RequestError | NotServing):
        return error.status
    if isinstance(error, MissingDependency):
        return 501
    # A bundle that fails while it serves is no fault of the client's.
    return 400 if isinstance(error, BadInput) and not isinstance(error, BundleError) else 500


def sentence_of(error: BnexportError) -> str:
    """Return fact and remedy, without characters that would steer a terminal."""
    return printable(error.sentence)


def printable(text: str) -> str:
    """Replace characters that would steer a terminal, or that are not UTF-8."""
    return "".join(char if char.isprintable() else "?" for char in text)
