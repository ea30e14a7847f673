"""A program for an environment with KServe's SDK: every call of its inference clients with protocol version 2.

Use: python kserve_program.py < task.json, with {"drive": a name of DRIVES, "url": of HTTP, "grpc": HOST:PORT, "token": text,
"inputs": file, "logits": file}. Prints one JSON object with the checks and the failures. It takes no command line, because the
SDK parses the command line at import.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import Awaitable, Iterator
from importlib import metadata

import grpc
import httpx
import numpy as np
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest, RESTConfig
from kserve.protocol.infer_type import RequestedOutput

task = json.load(sys.stdin)
inputs, expected = np.load(task["inputs"]), np.load(task["logits"])
DATATYPE = {"float32": "FP32", "uint8": "UINT8"}[inputs.dtype.name]
done: list[str] = []
wrong: list[str] = []


def check(what: str, passed: object) -> None:
    (done if passed else wrong).append(what)


def close(got: np.ndarray, repeats: int = 1) -> bool:
    wanted = np.tile(expected, (repeats, 1))
    return got.shape == wanted.shape and np.abs(got - wanted).max() < 1e-5 * np.abs(wanted).max()


def tensor(array: np.ndarray = inputs, *, binary: bool = True, datatype: str = DATATYPE) -> InferInput:
    item = InferInput("input", list(array.shape), datatype)
    item.set_data_from_numpy(array, binary_data=binary)
    return item


def large() -> InferInput:
    """Return 3 MB, which take longer than a millisecond: clocks of clients are not finer."""
    return tensor(np.tile(inputs, (80, 1, 1, 1)))


def ways_to_send() -> Iterator[tuple[str, InferInput]]:
    yield "binary", tensor()
    yield "JSON", tensor(binary=False)
    yield "an array", InferInput("input", list(inputs.shape), DATATYPE, inputs)
    yield "a flat list", InferInput("input", list(inputs.shape), DATATYPE, inputs.reshape(-1).tolist())
    yield "a nested list", InferInput("input", list(inputs.shape), DATATYPE, inputs.tolist())
    again = tensor()
    again.set_data_from_numpy(inputs, binary_data=False)
    yield "JSON after binary", again


def ways_to_request() -> Iterator[tuple[str, dict]]:
    yield "anything", {}
    yield "the output", {"request_outputs": [RequestedOutput("logits")]}
    for binary in (True, False):
        yield f"binary_data={binary}", {"request_outputs": [RequestedOutput("logits", {"binary_data": binary})]}
        yield f"binary_data_output={binary}", {"parameters": {"binary_data_output": binary}}


async def refused(what: str, call: Awaitable[object], status: int, *words: str) -> None:
    """Check that the server's status and sentence reach the caller."""
    try:
        await call
        wrong.append(f"{what} is not refused")
    except httpx.HTTPStatusError as error:
        message = str(error)
        check(f"{what}: {message}", error.response.status_code == status and all(word in message for word in words))


async def drive_rest(url: str) -> None:
    async with InferenceRESTClient(RESTConfig(protocol="v2")) as client:
        await health(client, url)
        await answers(client, url)
        await refusals(client, url)
        check("live after all refusals", await client.is_server_live(url) is True)
    # Retries work only in a transport: the SDK creates one and does not use it.
    retrying = RESTConfig(protocol="v2", transport=httpx.AsyncHTTPTransport(retries=3), timeout=30, verbose=True)
    async with InferenceRESTClient(retrying) as client:
        calls = [client.infer(url, InferRequest("bn_lenet", [tensor()]), "bn_lenet") for _ in range(32)]
        check("many at a time", all(close(a.outputs[0].as_numpy()) for a in await asyncio.gather(*calls)))
        try:
            await client.infer(url, InferRequest("bn_lenet", [large()]), "bn_lenet", timeout=0.001)
            wrong.append("a millisecond was enough")
        except httpx.TimeoutException:
            check("a timeout", True)
        again = await client.infer(url, InferRequest("bn_lenet", [tensor()]), "bn_lenet")
        check("an answer after a timeout", close(again.outputs[0].as_numpy()))


async def health(client: InferenceRESTClient, url: str) -> None:
    for base in (url, f"{url}/"):
        check("is_server_live", await client.is_server_live(base) is True)
        check("is_server_ready", await client.is_server_ready(base) is True)
    for name, there in (("bn_lenet", True), ("bn_lenet/versions/1", True), ("bn_lenet/versions/7", False)):
        check(f"is_model_ready {name}", await client.is_model_ready(url, name) is there)
    check("is_model_ready of none", await client.is_model_ready(url, "unknown") is False)


async def answers(client: InferenceRESTClient, url: str) -> None:
    for how, item in ways_to_send():
        for what, requested in ways_to_request():
            for name in ("bn_lenet", "bn_lenet/versions/1"):
                request = InferRequest(name, [item], request_id="r1", **requested)
                answer = await client.infer(url, request, name)
                good = close(answer.outputs[0].as_numpy()) and (answer.id, answer.model_name) == ("r1", "bn_lenet")
                check(f"infer {name} with {how}, requesting {what}", good)
    plain = {"inputs": [{"name": "input", "shape": list(inputs.shape), "datatype": DATATYPE, "data": inputs.tolist()}]}
    headers: dict[str, str] = {}
    answer = await client.infer(url, plain, "bn_lenet", headers={"X-Request-Id": "t7"}, response_headers=headers)
    check("infer of a dict", close(answer.outputs[0].as_numpy()))
    check("headers both ways", headers["x-request-id"] == "t7")
    graph = await client.infer(f"{url}/v2/models/bn_lenet/infer", plain, is_graph_endpoint=True)
    check("infer of a whole address", graph["model_version"] == "1" and graph["outputs"][0]["name"] == "logits")
    for what, requested in ways_to_request():  # more than a kilobyte, which is packed on its way
        many = InferRequest("bn_lenet", [tensor(np.tile(inputs, (5, 1, 1, 1)))], **requested)
        answer = await client.infer(url, many, "bn_lenet", response_headers=headers)
        packed = headers.get("content-encoding") in ("gzip", "deflate")
        check(f"a packed answer to {what}", packed and close(answer.outputs[0].as_numpy(), 5))
    for binary in (True, False):
        parameters = {"classification": 3, "binary_data": binary}
        request = InferRequest("bn_lenet", [tensor()], request_outputs=[RequestedOutput("logits", parameters)])
        output = (await client.infer(url, request, "bn_lenet")).outputs[0]
        texts = [text.decode() if isinstance(text, bytes) else text for text in output.as_numpy().reshape(-1)]
        best = np.array([int(text.split(":")[1]) for text in texts]).reshape(output.shape)
        check(f"classification, binary={binary}", (best == np.argsort(-expected, 1)[:, :3]).all())


async def refusals(client: InferenceRESTClient, url: str) -> None:
    def ask(*items: InferInput, name: str = "bn_lenet", **options: object) -> Awaitable[object]:
        return client.infer(url, InferRequest(name, list(items), **options), name)

    await refused("an unknown model", ask(tensor(), name="unknown"), 404, "unknown")
    await refused("an unknown version", ask(tensor(), name="bn_lenet/versions/7"), 404, "7")
    for binary in (True, False):
        narrow = tensor(inputs[:1, :, :, :27], binary=binary)
        await refused("a wrong shape", ask(narrow), 400, "1x1x28x27")
        double = tensor(inputs.astype(np.float64), binary=binary, datatype="FP64")
        await refused("a wrong datatype", ask(double), 400, "FP64", "FP32")
    # In JSON the SDK writes NaN as null.
    await refused("NaN", ask(tensor(np.full_like(inputs, np.nan))), 400)
    await refused("null", ask(tensor(np.full_like(inputs[:1], np.nan), binary=False)), 400)
    await refused("no input", ask(), 400, "inputs")
    await refused("an input twice", ask(tensor(), tensor()), 400)
    named = InferInput("image", [1], "FP32", [0.0])
    await refused("an unknown input", ask(named), 400, "image")
    short = InferInput("input", [2, 1, 28, 28], "FP32", [0.0])
    await refused("too little data", ask(short), 400)
    none = ask(tensor(), request_outputs=[RequestedOutput("probabilities")])
    await refused("an unknown output", none, 400, "probabilities")
    async with InferenceRESTClient(RESTConfig(protocol="v1")) as older:
        await refused("protocol version 1", older.infer(url, {"instances": [[0.0]]}, "bn_lenet"), 404)


async def drive_pixels(url: str, address: str) -> None:
    """Drive a server of a model that takes uint8: every way to send pixels; other numbers and float32 are refused."""
    async with InferenceRESTClient(RESTConfig(protocol="v2")) as client:
        await answers(client, url)

        def ask(item: InferInput) -> Awaitable[object]:
            return client.infer(url, InferRequest("bn_lenet", [item]), "bn_lenet")

        rest = inputs.reshape(-1).tolist()[1:]
        for value in (256, -1, 0.5):
            await refused(
                f"the pixel {value}", ask(InferInput("input", list(inputs.shape), "UINT8", [value, *rest])), 400
            )
        for binary in (True, False):
            floats = tensor(inputs.astype(np.float32), binary=binary, datatype="FP32")
            await refused("float32", ask(floats), 400, "FP32", "UINT8")
    async with InferenceGRPCClient(address) as client:
        await grpc_answers(client)


async def drive_token(url: str, token: str) -> None:
    """Drive a server that requires a token: health without a token, inference only with the token."""
    headers = {"Authorization": f"Bearer {token}"}
    request = InferRequest("bn_lenet", [tensor(binary=False)])
    async with InferenceRESTClient(RESTConfig(protocol="v2")) as client:
        check(
            "ready without a token", await client.is_server_ready(url) and await client.is_model_ready(url, "bn_lenet")
        )
        await refused("no token", client.infer(url, request, "bn_lenet"), 401)
        await refused("a wrong token", client.infer(url, request, "bn_lenet", {"Authorization": "Bearer no"}), 401)
        answer = await client.infer(url, request, "bn_lenet", headers)
        check("a token in headers", close(answer.outputs[0].as_numpy()))

    def bearer(sent: httpx.Request) -> httpx.Request:
        sent.headers.update(headers)
        return sent

    async with InferenceRESTClient(RESTConfig(protocol="v2", auth=bearer)) as client:
        answer = await client.infer(url, request, "bn_lenet")
        check("a token by auth", close(answer.outputs[0].as_numpy()))


async def grpc_answers(client: InferenceGRPCClient) -> None:
    for how, item in ways_to_send():
        if how in ("an array", "a nested list"):  # the SDK has no message for these
            continue
        item.parameters = None
        for version in (None, "1"):
            request = InferRequest("bn_lenet", [item], request_id="r1", model_version=version)
            answer = await client.infer(request, timeout=30, headers=[("x-request-id", "trace-1")])
            named = (answer.id, answer.model_name, answer.model_version) == ("r1", "bn_lenet", "1")
            check(f"grpc infer with {how}, version {version}", close(answer.outputs[0].as_numpy()) and named)


async def drive_grpc(url: str) -> None:
    """Make every call of the client for gRPC, which has no version in readiness and logs each error."""
    logging.disable(logging.ERROR)

    async def fails(what: str, call: Awaitable[object], *codes: grpc.StatusCode) -> None:
        try:
            check(f"{what} is refused", await call is False)
        except grpc.RpcError as error:
            check(f"{what}: {error.code()} {error.details()}", error.code() in codes and error.details())

    async with InferenceGRPCClient(url) as client:
        check("grpc is_server_live", await client.is_server_live() is True)
        check("grpc is_server_ready", await client.is_server_ready() is True)
        check("grpc is_model_ready", await client.is_model_ready("bn_lenet") is True)
        await fails("grpc is_model_ready of none", client.is_model_ready("unknown"), grpc.StatusCode.NOT_FOUND)
        await grpc_answers(client)
        calls = [client.infer(InferRequest("bn_lenet", [tensor()])) for _ in range(32)]
        check("grpc many at a time", all(close(a.outputs[0].as_numpy()) for a in await asyncio.gather(*calls)))
        narrow = InferRequest("bn_lenet", [tensor(inputs[:1, :, :, :27])])
        await fails("grpc wrong shape", client.infer(narrow), grpc.StatusCode.INVALID_ARGUMENT)
        unknown = InferRequest("unknown", [tensor()])
        await fails("grpc unknown model", client.infer(unknown), grpc.StatusCode.NOT_FOUND)
        late = client.infer(InferRequest("bn_lenet", [large()]), timeout=0.001)
        await fails("grpc deadline", late, grpc.StatusCode.DEADLINE_EXCEEDED)
        check("grpc live after all refusals", await client.is_server_live() is True)


async def drive_unready(url: str) -> None:
    """Drive a server whose only model did not pass its verification."""
    async with InferenceRESTClient(RESTConfig(protocol="v2")) as client:
        check("live without a model", await client.is_server_live(url) is True)
        check("a model that is not ready", await client.is_model_ready(url, "bn_lenet") is False)
        await refused("readiness", client.is_server_ready(url), 503)
        request = InferRequest("bn_lenet", [tensor()])
        await refused("a model that is not served", client.infer(url, request, "bn_lenet"), 503, "model.onnx")


DRIVES = {
    "rest": lambda: drive_rest(task["url"]),
    "token": lambda: drive_token(task["url"], task["token"]),
    "unready": lambda: drive_unready(task["url"]),
    "grpc": lambda: drive_grpc(task["grpc"]),
    "pixels": lambda: drive_pixels(task["url"], task["grpc"]),
}
logging.basicConfig(stream=sys.stderr)
asyncio.run(DRIVES[task["drive"]]())
versions = {name: metadata.version(name) for name in ("kserve", "protobuf", "httpx", "grpcio")}
print(json.dumps({"done": done, "wrong": wrong, "versions": versions}))
