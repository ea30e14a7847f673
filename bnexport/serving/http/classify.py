"""Pictures in, labels out: the one route that is not of the protocol."""

from __future__ import annotations

import asyncio

import numpy as np

from bnexport.data.images import read_picture
from bnexport.data.preprocessing import Preprocessing
from bnexport.errors import RequestError
from bnexport.serving.http.exchange import Exchange
from bnexport.serving.http.pictures import Picture, pictures_of
from bnexport.serving.http.reply import Reply, json_reply
from bnexport.serving.http.state import State
from bnexport.serving.predictor import labelled
from bnexport.tensors import Array


async def classify(state: State, exchange: Exchange, name: str, version: str | None = None) -> Reply:
    """Label PNG or JPEG pictures by the model's own preprocessing: label, probability and raw logits of each."""
    model = exchange.model = state.repository.resolve(name, version)
    preprocessing = model.preprocessing
    if preprocessing is None:
        raise RequestError(
            f"model {name!r} does not say how a picture becomes an input, or is no image classifier",
            remedy="Send tensors to its infer route, or export it with --mean and --std",
        )
    body = await state.body(exchange)
    try:
        pictures = pictures_of(body, exchange.headers.get(b"content-type", b""), most=state.settings.limits.parts)
        exchange.rows = len(pictures)
        # Unpacking takes milliseconds; the other clients' requests go on meanwhile.
        pixels = await asyncio.to_thread(_read, pictures, preprocessing)
    finally:
        state.intake.release(body)
    # It may have been switched meanwhile; one that takes other pictures says so.
    model = exchange.model = state.repository.resolve(name, version)
    logits = await model.logits(pixels)
    if not np.isfinite(logits).all():
        raise RequestError("the model's answer holds NaN or infinity", remedy="Run bnexport verify on the bundle")
    predictions = [
        labelled(picture.name, row, model.labels).to_json() for picture, row in zip(pictures, logits, strict=True)
    ]
    return json_reply({"model_name": model.name, "model_version": model.version, "predictions": predictions})


def _read(pictures: list[Picture], preprocessing: Preprocessing) -> Array:
    return np.stack([read_picture(picture.content, preprocessing, name=picture.name) for picture in pictures])
