"""The route ``classify``: labels one picture, or several in a multipart form.

The multipart reader is written by hand on purpose: it counts parts and bytes before it keeps any.
"""

from __future__ import annotations

import asyncio
import re
from typing import NamedTuple

import numpy as np

from bnexport.data.images import read_picture
from bnexport.data.preprocessing import Preprocessing
from bnexport.errors import RequestError
from bnexport.serving.http.exchange import Exchange, Reply, json_reply, read_body
from bnexport.serving.predictor import labelled
from bnexport.serving.state import ServerState
from bnexport.tensors import Array
from bnexport.validation.limits import shown

_PICTURES = (b"image/png", b"image/jpeg", b"image/jpg", b"application/octet-stream", b"")
_BOUNDARY = re.compile(rb'boundary=(?:"([^"\r\n]{1,70})"|([^\s";,]{1,70}))(?:\s*;|\s*\Z)', re.IGNORECASE)
_FILENAME = re.compile(rb'filename="([^"\r\n]*)"')
_CODING = re.compile(rb"content-transfer-encoding:\s*(?!(?:binary|8bit|7bit)\s*(?:\r|\Z))", re.IGNORECASE)
_PART_HEADERS = 8192
_AGAIN = "Write the body with an HTTP library"


class Picture(NamedTuple):
    """One picture of a request: the client's name for it, and its bytes."""

    name: str
    content: bytes


def pictures_of(body: bytes, content_type: bytes, *, most: int) -> list[Picture]:
    """Return the pictures of a request."""
    kind = content_type.partition(b";")[0].strip().lower()
    if kind == b"multipart/form-data":
        found = _parts(body, content_type, most)
    elif kind in _PICTURES:
        found = [Picture("image", body)]
    else:
        raise RequestError(
            f"the content-type {shown(kind.decode('latin-1'))} is not that of a picture",
            remedy="Send image/png, image/jpeg, or several as multipart/form-data",
            status=415,
        )
    if not found or not all(picture.content for picture in found):
        raise RequestError("a picture is empty or missing", remedy="Send a PNG or JPEG")
    return found


def _parts(body: bytes, content_type: bytes, most: int) -> list[Picture]:
    match = _BOUNDARY.search(content_type)
    if match is None:
        raise RequestError(
            "the content-type multipart/form-data has no boundary", remedy="Write the header with an HTTP library"
        )
    mark = b"--" + (match[1] or match[2])
    if not body.startswith(mark + b"\r\n"):
        raise RequestError("the multipart data does not begin with its boundary", remedy=_AGAIN)
    if body.count(b"\r\n" + mark) > most:
        raise RequestError(f"the request has more than {most} pictures", remedy="Send several requests", status=413)
    first, *rest = body.split(b"\r\n" + mark)
    if not rest or rest[-1] not in (b"--", b"--\r\n"):
        raise RequestError("the multipart data ends before its last boundary", remedy=_AGAIN)
    pieces = [first[len(mark) :], *rest[:-1]]
    return [_part(piece, index) for index, piece in enumerate(pieces)]


def _part(piece: bytes, index: int) -> Picture:
    head, gap, content = piece.partition(b"\r\n\r\n")
    if not head.startswith(b"\r\n") or not gap or len(head) > _PART_HEADERS:
        raise RequestError(f"part {index} of the multipart data has no headers", remedy=_AGAIN)
    if _CODING.search(head):
        raise RequestError(
            f"part {index} of the multipart data is encoded", remedy="Send the picture's bytes unchanged"
        )
    name = _FILENAME.search(head)
    filename = name[1].decode("utf-8", "replace")[:200] if name else ""
    return Picture(filename or f"image {index}", content)


async def classify(state: ServerState, exchange: Exchange, name: str, version: str | None = None) -> Reply:
    """Label PNG or JPEG pictures by the model's own preprocessing: label, probability and raw logits of each."""
    model = exchange.model = state.repository.resolve(name, version)
    preprocessing = model.preprocessing
    if preprocessing is None:
        raise RequestError(
            f"model {name!r} has no preprocessing for pictures, or is not an image classifier",
            remedy="Send tensors to its infer route, or export it by bnexport fold-and-export with --mean and --std",
        )
    body = await read_body(state, exchange)
    pictures = pictures_of(body, exchange.headers.get(b"content-type", b""), most=state.settings.limits.parts)
    exchange.rows = len(pictures)
    # Decoding takes milliseconds; other requests continue meanwhile.
    pixels = await asyncio.to_thread(_read, pictures, preprocessing)
    # The model may have been replaced meanwhile; one with another input size refuses the pictures.
    model = exchange.model = state.repository.resolve(name, version)
    logits = await model.logits(pixels)
    if not np.isfinite(logits).all():
        raise RequestError("the model's answer contains NaN or infinity", remedy="Run bnexport verify on the bundle")
    predictions = [
        labelled(picture.name, row, model.labels).to_json() for picture, row in zip(pictures, logits, strict=True)
    ]
    return json_reply({"model_name": model.name, "model_version": model.version, "predictions": predictions})


def _read(pictures: list[Picture], preprocessing: Preprocessing) -> Array:
    return np.stack([read_picture(picture.content, preprocessing, name=picture.name) for picture in pictures])
