"""Answers as JSON, and as JSON with the tensors behind it in binary (Triton, "Binary Tensor Data Extension")."""

from __future__ import annotations

import struct
from typing import Any, cast

import numpy as np
import orjson

from bnexport.serving.protocol.messages import BYTES, InferResponse, OutputTensor

#: The JSON of answers that are all binary is the same again and again.
_heads: dict[tuple[Any, ...], bytes] = {}
_REMEMBERED = 256


def encode_response(response: InferResponse) -> tuple[bytes, int | None]:
    """The body of an answer.

    Returns:
        The body, and the length of the JSON at its start; None when all of it is JSON.
    """
    key = _key(response)
    if key is not None and (head := _heads.get(key)) is not None:
        return b"".join((head, *(tensor.data.tobytes() for tensor in response.outputs))), len(head)  # type: ignore[union-attr]
    chunks: list[bytes] = []
    outputs = [_described(tensor, chunks) for tensor in response.outputs]
    value: dict[str, Any] = {
        "model_name": response.model,
        "model_version": response.version,
        "outputs": outputs,
    }
    if response.id:
        value["id"] = response.id
    text = orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
    if not any(tensor.binary for tensor in response.outputs):
        return text, None
    if key is not None:
        if len(_heads) >= _REMEMBERED:
            _heads.clear()
        _heads[key] = text
    return b"".join((text, *chunks)), len(text)


def _key(response: InferResponse) -> tuple[Any, ...] | None:
    """All that the JSON before binary tensors depends on; None where it holds data or a client's id."""
    if response.id:
        return None
    parts: list[Any] = [response.model, response.version]
    for tensor in response.outputs:
        if not tensor.binary or tensor.datatype == BYTES:
            return None
        parts += (tensor.name, tensor.datatype, tensor.shape)
    return tuple(parts)


def _described(tensor: OutputTensor, chunks: list[bytes]) -> dict[str, Any]:
    """One output's JSON; the bytes of a binary one go to ``chunks``."""
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
    """Texts as the protocol packs them: the length of each in four bytes, little-endian, then its UTF-8."""
    encoded = [text.encode() for text in texts]
    return b"".join(part for text in encoded for part in (struct.pack("<I", len(text)), text))
