"""A program for an environment with Triton's client: models of a real Triton, and the same ones of ``bnexport serve``.

Use: python client_program.py < task.json, with {"http": port, "grpc": port, "ours": port of bnexport serve, "models": [{"name",
"arrays": .npz of "in:NAME" and "out:NAME", "labels": list or null, "max_batch": 0 where it does not vary}]}; ours has those
with labels. Prints one JSON object: what was tried, and what was wrong.
"""

from __future__ import annotations

import json
import queue
import re
import sys
from functools import partial
from importlib import metadata
from typing import Any

import numpy as np
import tritonclient.grpc as over_grpc
import tritonclient.http as over_http
from tritonclient.utils import InferenceServerException

REQUESTS = 256
SCORE = re.compile(r"(-?\d+\.\d{6}):(\d+):(.+)")
done: list[str] = []
wrong: list[str] = []


def check(what: str, passed: object) -> None:
    (done if passed else wrong).append(what)


def close(got: np.ndarray, expected: np.ndarray) -> bool:
    same = got.size == expected.size and len(got) == len(expected)
    return same and np.abs(got.reshape(expected.shape) - expected).max() < 1e-5 * np.abs(expected).max()


def items(kit: Any, model: dict[str, Any], start: int = 0, stop: int | None = None) -> list[Any]:
    """Inputs as the configuration describes them: a value per sample is a row of one, where Triton counts the samples."""
    made = []
    for name, array in model["inputs"].items():
        part = array[start:stop]
        part = part[:, None] if part.ndim == 1 and model["max_batch"] else part
        item = kit.InferInput(name, list(part.shape), "FP32")
        item.set_data_from_numpy(np.ascontiguousarray(part))
        made.append(item)
    return made


def classes(kit: Any, client: Any, model: dict[str, Any]) -> list[list[tuple[float, int, str]]]:
    """Score, index and label of the three best classes of each sample."""
    output = next(iter(model["outputs"]))
    wanted = [kit.InferRequestedOutput(output, class_count=3)]
    rows = client.infer(model["name"], items(kit, model), outputs=wanted).as_numpy(output)
    found = [[SCORE.fullmatch(text.decode()) for text in row] for row in rows]
    return [[(float(match[1]), int(match[2]), match[3]) for match in row] for row in found]


def drive(label: str, kit: Any, client: Any, model: dict[str, Any]) -> None:
    name, inputs, outputs = model["name"], model["inputs"], model["outputs"]
    count = len(next(iter(inputs.values())))
    check(f"{label} ready", client.is_model_ready(name))
    result = client.infer(name, items(kit, model))
    for output, expected in outputs.items():
        check(f"{label} {output}", close(result.as_numpy(output), expected))
    if model["max_batch"]:
        for number in range(count):
            result = client.infer(name, items(kit, model, number, number + 1))
            for output, expected in outputs.items():
                check(f"{label} {output} of {number}", close(result.as_numpy(output), expected[number : number + 1]))
        many = model | {
            "inputs": {key: np.repeat(value[:1], model["max_batch"] + 1, 0) for key, value in inputs.items()}
        }
        refused(f"{label} too large a batch", client, name, items(kit, many), str(model["max_batch"]))
        result = client.infer(name, items(kit, many, 1))
        check(f"{label} the largest batch", len(result.as_numpy(next(iter(outputs)))) == model["max_batch"])
    else:
        refused(f"{label} another batch", client, name, items(kit, model, 0, count - 1), "unexpected shape")
    narrow = model | {"inputs": {key: value[..., :-1] if value.ndim > 1 else value for key, value in inputs.items()}}
    refused(f"{label} another shape", client, name, items(kit, narrow), "unexpected shape")
    if model["labels"]:
        expected = next(iter(outputs.values()))
        for row, scores in zip(classes(kit, client, model), expected, strict=True):
            best = [int(index) for index in np.argsort(-scores)[:3]]
            check(f"{label} labels {row}", [item[1:] for item in row] == [(i, model["labels"][i]) for i in best])
            check(f"{label} scores {row}", close(np.array([item[0] for item in row]), scores[best]))


def refused(what: str, client: Any, name: str, sent: list[Any], word: str = "") -> None:
    try:
        client.infer(name, sent)
        wrong.append(f"{what} is not refused")
    except InferenceServerException as error:
        check(f"{what}: {error.message()}", word in str(error.message()))


def batching(port: int, model: dict[str, Any]) -> None:
    """Requests at the same time share batches, and each gets its own answer."""
    name, count = model["name"], len(next(iter(model["inputs"].values())))
    answers: queue.Queue[tuple[int, Any, Any]] = queue.Queue()

    def counters() -> tuple[int, int, set[int]]:
        (found,) = client.get_inference_statistics(name).model_stats
        return found.inference_count, found.execution_count, {item.batch_size for item in found.batch_stats}

    with over_grpc.InferenceServerClient(f"127.0.0.1:{port}") as client:
        before = counters()
        for number in range(REQUESTS):
            sent, deliver = items(over_grpc, model, number % count, number % count + 1), partial(keep, answers, number)
            client.async_infer(name, sent, callback=deliver)
        for _ in range(REQUESTS):
            number, result, error = answers.get(timeout=240)
            for output, expected in model["outputs"].items():
                row = expected[number % count : number % count + 1]
                check(f"batched {output} {number}", error is None and close(result.as_numpy(output), row))
        after = counters()
    samples, runs = (after[index] - before[index] for index in (0, 1))
    check(f"{samples} samples of {name} in {runs} runs", samples == REQUESTS > 4 * runs)
    check(f"batches of {sorted(after[2])} are within the bound", max(after[2]) <= model["max_batch"])


def keep(answers: queue.Queue[tuple[int, Any, Any]], number: int, result: Any, error: Any) -> None:
    answers.put((number, result, error))


def same_as_ours(port: int, ours: int, model: dict[str, Any]) -> None:
    """The same client gets the same from both servers."""
    answered = []
    for number in (port, ours):
        with over_http.InferenceServerClient(f"127.0.0.1:{number}") as client:
            known = client.get_model_metadata(model["name"])
            answered.append(
                ([known[key] for key in ("name", "versions", "inputs", "outputs")], classes(over_http, client, model))
            )
    check(f"metadata {answered[0][0]}", answered[0][0] == answered[1][0])
    theirs, own = (np.array([[item[0] for item in row] for row in rows]) for _, rows in answered)
    check("scores of both", close(own, theirs))
    theirs, own = ([[item[1:] for item in row] for row in rows] for _, rows in answered)
    check("labels of both", own == theirs)


task = json.load(sys.stdin)
for model in task["models"]:
    arrays = np.load(model["arrays"])
    for side, mark in (("inputs", "in:"), ("outputs", "out:")):
        model[side] = {key.removeprefix(mark): arrays[key] for key in arrays.files if key.startswith(mark)}
    for kit, port in ((over_http, task["http"]), (over_grpc, task["grpc"])):
        with kit.InferenceServerClient(f"127.0.0.1:{port}") as client:
            drive(f"{kit.__name__} {model['name']}", kit, client, model)
            release = client.get_server_metadata()
    if model["max_batch"]:
        batching(task["grpc"], model)
    if model["labels"]:
        same_as_ours(task["http"], task["ours"], model)
versions = {name: metadata.version(name) for name in ("nvidia-pytriton", "tritonclient", "onnxruntime", "numpy")}
print(json.dumps({"done": done, "wrong": wrong, "versions": versions | {"triton": release.version}}))
