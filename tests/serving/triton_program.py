"""A program for an environment with tritonclient: every call of the protocol, over HTTP and over asyncio.

Use: python triton_program.py PORT INPUTS.npy LOGITS.npy. Prints one JSON object: what was tried, and what was wrong.
"""

from __future__ import annotations

import asyncio
import inspect
import json
from importlib import metadata

import numpy as np
import tritonclient.http as sync
import tritonclient.http.aio as aio
from triton_checks import URL, check, close, done, expected, inputs, wrong
from tritonclient.utils import InferenceServerException


def variants(kit):
    """Ways to ask for the same: data and answer in JSON or binary, outputs named or not, packed or not."""
    for binary in (True, False):
        item = kit.InferInput("input", list(inputs.shape), "FP32")
        item.set_data_from_numpy(inputs, binary_data=binary)
        for wanted in (None, True, False):
            outputs = None if wanted is None else [kit.InferRequestedOutput("logits", binary_data=wanted)]
            for packing in (None, "gzip", "deflate"):
                options = {"request_compression_algorithm": packing, "response_compression_algorithm": packing}
                yield f"binary={binary} outputs={wanted} {packing}", [item], outputs, options


async def every_call(kit, client) -> None:
    async def call(name, *args, **kwargs):
        answer = getattr(client, name)(*args, **kwargs)
        return await answer if inspect.isawaitable(answer) else answer

    for name in ("is_server_live", "is_server_ready"):
        check(name, await call(name) is True)
    for version in ("", "1"):
        check("is_model_ready", await call("is_model_ready", "bn_lenet", version) is True)
        metadata_of = await call("get_model_metadata", "bn_lenet", version)
        check(
            "get_model_metadata",
            metadata_of["inputs"] == [{"name": "input", "datatype": "FP32", "shape": [-1, 1, 28, 28]}],
        )
        config = await call("get_model_config", "bn_lenet", version)
        check("get_model_config", config["name"] == "bn_lenet" and config["max_batch_size"] == 64)
        statistics = await call("get_inference_statistics", "bn_lenet", version)
        check("get_inference_statistics", statistics["model_stats"][0]["name"] == "bn_lenet")
    check("is_model_ready of none", await call("is_model_ready", "unknown") is False)
    check("get_server_metadata", (await call("get_server_metadata"))["name"] == "bnexport")
    index = await call("get_model_repository_index")
    check("get_model_repository_index", index[0]["state"] == "READY")
    check("statistics of all", (await call("get_inference_statistics"))["model_stats"])
    for variant, items, outputs, options in variants(kit):
        result = await call("infer", "bn_lenet", items, outputs=outputs, request_id="r1", **options)
        check(f"infer {variant}", close(result.as_numpy("logits")) and result.get_response()["id"] == "r1")
    result = await call("infer", "bn_lenet", items, model_version="1", timeout=20_000_000, priority=1)
    check("infer of a version, with a timeout", close(result.as_numpy("logits")))
    classes = [kit.InferRequestedOutput("logits", class_count=3)]
    result = await call("infer", "bn_lenet", items, outputs=classes)
    texts = result.as_numpy("logits")
    best = [[int(text.split(b":")[1]) for text in row] for row in texts]
    check("classification", best == np.argsort(-expected, 1)[:, :3].tolist())
    for name, args in (("infer", ("unknown", items)), ("unload_model", ("bn_lenet",)), ("load_model", ("bn_lenet",))):
        try:
            await call(name, *args)
            check(f"{name} is refused", False)
        except InferenceServerException as error:
            check(f"{name} is refused", str(error.message()))
    item = kit.InferInput("input", [1, 1, 28, 27], "FP32")
    item.set_data_from_numpy(np.zeros((1, 1, 28, 27), np.float32))
    try:
        await call("infer", "bn_lenet", [item])
        check("a wrong shape is refused", False)
    except InferenceServerException as error:
        check("a wrong shape is refused", "1x1x28x27" in str(error.message()))


async def over_asyncio() -> None:
    async with aio.InferenceServerClient(URL) as client:
        await every_call(aio, client)
        results = await asyncio.gather(*(client.infer("bn_lenet", items) for _, items, _, _ in variants(aio)))
        check("many at a time", all(close(result.as_numpy("logits")) for result in results))


with sync.InferenceServerClient(URL, concurrency=8) as blocking:
    asyncio.run(every_call(sync, blocking))
    handles = [blocking.async_infer("bn_lenet", items) for _, items, _, _ in variants(sync)]
    check("async_infer", all(close(handle.get_result().as_numpy("logits")) for handle in handles))
asyncio.run(over_asyncio())
versions = {name: metadata.version(name) for name in ("tritonclient", "protobuf")}
print(json.dumps({"done": done, "wrong": wrong, "versions": versions}))
