"""Requests and answers, independent of HTTP and gRPC, and the encoding of answers as JSON and binary tensors.

They are named tuples: every request makes several, and a frozen dataclass takes three times as long to make.

Sources: Open Inference Protocol v2, "Inference"; Triton, "Classification Extension" and "Binary Tensor Data Extension".
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import orjson

from bnexport.errors import BadInput, BnexportError, BundleError, MissingDependency, NotServing, RequestError
from bnexport.plain_table import printable
from bnexport.serving.serving_limits import BoundedCache
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


def all_finite(array: Array) -> bool:
    """Return True if no value is NaN or infinite, for one image in a third of the time of ``np.isfinite(array).all()``."""
    return array.dtype.kind != "f" or b"\0" not in np.isfinite(array).tobytes()


def answer(
    arrays: Mapping[str, Array], wanted: Sequence[RequestedOutput], labels: Sequence[str] | None
) -> tuple[OutputTensor, ...]:
    """Return the outputs that a client requested."""
    tensors = []
    for want in wanted:
        array = arrays[want.name]
        if not all_finite(array):
            raise RequestError(
                f"the model's output {want.name!r} for these inputs contains NaN or infinity",
                remedy="Send inputs in the range that the model was trained on",
            )
        if want.classes:
            texts, shape = classify(array, want.classes, labels)
            tensors.append(OutputTensor(want.name, BYTES, shape, texts, want.binary))
        else:
            tensors.append(OutputTensor(want.name, want.datatype, array.shape, array, want.binary))
    return tuple(tensors)


def classify(scores: Array, count: int, labels: Sequence[str] | None) -> tuple[list[str], tuple[int, ...]]:
    """Return the best classes of each sample as texts "score:index:label", row by row, and their shape (n, count)."""
    count = min(count, scores.shape[1])
    best = np.argsort(-scores.astype(np.float64), axis=1, kind="stable")[:, :count]
    names = labels or ()
    texts = [
        f"{score:f}:{index}" + (f":{names[index]}" if index < len(names) else "")
        for row, indices in zip(scores.tolist(), best.tolist(), strict=True)
        for index, score in ((index, row[index]) for index in indices)
    ]
    return texts, (len(scores), count)


#: The JSON before binary tensors is the same in many answers.
_heads: BoundedCache[tuple[Any, ...], bytes] = BoundedCache(256)


def encode_response(response: InferResponse) -> tuple[bytes, int | None]:
    """Return the body of an answer, and the length of the JSON before binary tensors; None without binary tensors."""
    key = _key(response)
    if key is not None and (head := _heads.get(key)) is not None:
        return b"".join((head, *(tensor.data.tobytes() for tensor in response.outputs))), len(head)  # type: ignore[union-attr]
    chunks: list[bytes] = []
    outputs = [_described(tensor, chunks) for tensor in response.outputs]
    value: dict[str, Any] = {"model_name": response.model, "model_version": response.version, "outputs": outputs}
    if response.id:
        value["id"] = response.id
    text = orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
    if not any(tensor.binary for tensor in response.outputs):
        return text, None
    if key is not None:
        _heads[key] = text
    return b"".join((text, *chunks)), len(text)


def _key(response: InferResponse) -> tuple[Any, ...] | None:
    """Return a key that determines the JSON before binary tensors; None if the JSON contains data or a client's id."""
    if response.id:
        return None
    parts: list[Any] = [response.model, response.version]
    for tensor in response.outputs:
        if not tensor.binary or tensor.datatype == BYTES:
            return None
        parts += (tensor.name, tensor.datatype, tensor.shape)
    return tuple(parts)


def _described(tensor: OutputTensor, chunks: list[bytes]) -> dict[str, Any]:
    """Return one output's JSON; append the bytes of a binary one to ``chunks``."""
    described: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": tensor.shape}
    if tensor.binary:
        chunk = binary_texts(cast(list[str], tensor.data)) if tensor.datatype == BYTES else tensor.data.tobytes()  # type: ignore[union-attr]
        described["parameters"] = {"binary_data_size": len(chunk)}
        chunks.append(chunk)
    elif tensor.datatype == BYTES:
        described["data"] = tensor.data
    else:
        described["data"] = np.ascontiguousarray(tensor.data).reshape(-1)
    return described


def binary_texts(texts: list[str]) -> bytes:
    """Pack texts as the protocol does: each as its length in four bytes, little-endian, and its UTF-8."""
    encoded = [text.encode() for text in texts]
    return b"".join(part for text in encoded for part in (struct.pack("<I", len(text)), text))
