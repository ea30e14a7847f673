"""From a model's arrays to the tensors that a client asked for; the classification extension."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from bnexport.errors import RequestError
from bnexport.serving.protocol.json_data import all_finite
from bnexport.serving.protocol.messages import BYTES, OutputTensor, RequestedOutput
from bnexport.tensors import Array


def answer(
    arrays: Mapping[str, Array], wanted: Sequence[RequestedOutput], labels: Sequence[str] | None
) -> tuple[OutputTensor, ...]:
    """The outputs that a client asked for.

    Args:
        arrays: Output name -> (n, ...), all outputs of the model.
        wanted: In the client's order.
        labels: Class names in the order of the scores, if the model has some.

    Raises:
        RequestError: The model's answer to these inputs is not finite.
    """
    tensors = []
    for want in wanted:
        array = arrays[want.name]
        if not all_finite(array):
            raise RequestError(
                f"the model's answer {want.name!r} to these inputs holds NaN or infinity",
                remedy="Send inputs in the range that the model was trained on",
            )
        if want.classes:
            texts, shape = classify(array, want.classes, labels)
            tensors.append(OutputTensor(want.name, BYTES, shape, texts, want.binary))
        else:
            tensors.append(OutputTensor(want.name, want.datatype, array.shape, array, want.binary))
    return tuple(tensors)


def classify(scores: Array, count: int, labels: Sequence[str] | None) -> tuple[list[str], tuple[int, ...]]:
    """The best classes of each sample as texts "score:index:label" (Triton, "Classification Extension").

    Args:
        scores: (n, classes).
        count: How many per sample; as many as there are classes if that is less.
        labels: Class names; without them the texts are "score:index".

    Returns:
        The texts, row by row, and their shape (n, count).
    """
    count = min(count, scores.shape[1])
    best = np.argsort(-scores.astype(np.float64), axis=1, kind="stable")[:, :count]
    names = labels or ()
    texts = [
        f"{score:f}:{index}" + (f":{names[index]}" if index < len(names) else "")
        for row, indices in zip(scores.tolist(), best.tolist(), strict=True)
        for index, score in ((index, row[index]) for index in indices)
    ]
    return texts, (len(scores), count)
