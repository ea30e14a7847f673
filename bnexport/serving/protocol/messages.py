"""Requests and answers, independent of HTTP and gRPC (Open Inference Protocol v2, "Inference").

They are named tuples: every request makes several, and a frozen dataclass takes three times as long to make.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from bnexport.errors import BadInput, BnexportError, BundleError, MissingDependency, NotServing, RequestError
from bnexport.tensors import ELEMENT_TYPES, Array

#: numpy's element type -> the protocol's ("Tensor Data Types").
DATATYPES: dict[str, str] = {name: row.datatype for name, row in ELEMENT_TYPES.items()}
#: The protocol's type for texts; only answers have it (classes with labels).
BYTES = "BYTES"


class RequestedOutput(NamedTuple):
    """One output that a client requests."""

    name: str  # Name of the model's output
    datatype: str  # The protocol's element type of the tensor
    binary: bool = False  # Send the tensor as bytes after the JSON
    classes: int = 0  # Number of best classes to send as texts instead of the tensor; 0 for the tensor


class InferRequest(NamedTuple):
    """A request that fits its model; the element types, shapes and values of its inputs are checked."""

    inputs: dict[str, Array]  # Input name -> array; may be read-only
    rows: int  # Samples: the size of the batch dimension
    # Requested outputs, in order; every output of the model if the client named none
    outputs: tuple[RequestedOutput, ...]
    id: str = ""  # The client's id, repeated in the answer; "" without one
    timeout: float | None = None  # Seconds that the client waits; None for the server's deadline


class OutputTensor(NamedTuple):
    """One output of an answer."""

    name: str  # Name of the model's output
    datatype: str  # The protocol's element type
    shape: tuple[int, ...]  # Shape of the tensor
    data: Array | Sequence[str]  # The tensor; for BYTES the texts in row-major order
    binary: bool  # Send the tensor as bytes after the JSON


class InferResponse(NamedTuple):
    """An answer."""

    model: str  # Name of the model that answered
    version: str  # Its version
    outputs: tuple[OutputTensor, ...]  # Outputs in the requested order
    id: str = ""  # The client's id


def status_of(error: BnexportError) -> int:
    """Return the HTTP status of an error; other protocols translate it."""
    if isinstance(error, RequestError | NotServing):
        return error.status
    if isinstance(error, MissingDependency):
        return 501
    # The client did not cause the failure of a bundle that is served.
    return 400 if isinstance(error, BadInput) and not isinstance(error, BundleError) else 500


def sentence_of(error: BnexportError) -> str:
    """Return fact and remedy without control characters."""
    return printable(error.sentence)


def printable(text: str) -> str:
    """Replace control characters, which could change a terminal, and characters that are not UTF-8."""
    return "".join(char if char.isprintable() else "?" for char in text)
