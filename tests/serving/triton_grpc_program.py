"""A program for an environment with tritonclient[grpc]: every call of the protocol, plain, over asyncio, and as a stream.

Use: python triton_grpc_program.py PORT INPUTS.npy LOGITS.npy. Prints one JSON object: the checks, the failures, and the
messages and methods of the client.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import queue
from importlib import metadata

import grpc
import numpy as np
import tritonclient.grpc as sync
import tritonclient.grpc.aio as aio
from triton_checks import URL, check, close, done, expected, inputs, wrong
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException


def tensor(kit):
    item = kit.InferInput("input", list(inputs.shape), "FP32")
    item.set_data_from_numpy(inputs)
    return item


async def every_call(kit, client) -> None:
    async def call(name, *args, **kwargs):
        answer = getattr(client, name)(*args, **kwargs)
        return await answer if inspect.isawaitable(answer) else answer

    for name in ("is_server_live", "is_server_ready"):
        check(name, await call(name) is True)
    for version in ("", "1"):
        check("is_model_ready", await call("is_model_ready", "bn_lenet", version) is True)
        described = await call("get_model_metadata", "bn_lenet", version)
        (item,) = described.inputs
        check("get_model_metadata", (item.name, item.datatype, list(item.shape)) == ("input", "FP32", [-1, 1, 28, 28]))
        check("versions", (list(described.versions), described.platform) == (["1"], "onnxruntime_onnx"))
        config = (await call("get_model_config", "bn_lenet", version)).config
        check("get_model_config", (config.name, config.max_batch_size) == ("bn_lenet", 64))
        check("data_type", config.input[0].data_type == model_config_pb2.TYPE_FP32)
        check("dims", list(config.input[0].dims) == [1, 28, 28])
        check("parameters", config.parameters["intra_op_thread_count"].string_value == "1")
        counted = (await call("get_inference_statistics", "bn_lenet", version)).model_stats
        check("get_inference_statistics", counted[0].name == "bn_lenet")
    as_json = await call("get_model_metadata", "bn_lenet", as_json=True)
    check("as_json", as_json["outputs"][0]["name"] == "logits")
    check("is_model_ready of none", await call("is_model_ready", "unknown") is False)
    server = await call("get_server_metadata")
    check("get_server_metadata", (server.name, "statistics" in server.extensions) == ("bnexport", True))
    index = await call("get_model_repository_index")
    check("get_model_repository_index", [row.state for row in index.models] == ["READY"])
    for wanted in (None, [kit.InferRequestedOutput("logits")]):
        for packing in (None, "gzip", "deflate"):
            result = await call(
                "infer", "bn_lenet", [tensor(kit)], outputs=wanted, request_id="r1", compression_algorithm=packing
            )
            good = close(result.as_numpy("logits")) and result.get_response().id == "r1"
            check(f"infer outputs={wanted is not None} {packing}", good)
    more = {"model_version": "1", "timeout": 20_000_000, "priority": 1, "client_timeout": 20.0}
    result = await call("infer", "bn_lenet", [tensor(kit)], parameters={"mine": "x"}, headers={"a": "b"}, **more)
    check("infer of a version, with a timeout", close(result.as_numpy("logits")))
    check("name and version", result.get_response().model_version == "1")
    classes = [kit.InferRequestedOutput("logits", class_count=3)]
    texts = (await call("infer", "bn_lenet", [tensor(kit)], outputs=classes)).as_numpy("logits")
    best = [[int(text.split(b":")[1]) for text in row] for row in texts]
    check("classification", best == np.argsort(-expected, 1)[:, :3].tolist())
    shape = kit.InferInput("input", [1, 1, 28, 27], "FP32")
    shape.set_data_from_numpy(np.zeros((1, 1, 28, 27), np.float32))
    for name, args, code, reason in (
        ("infer", ("unknown", [tensor(kit)]), "NOT_FOUND", "no model 'unknown'"),
        ("infer", ("bn_lenet", [tensor(kit)], "7"), "NOT_FOUND", "no version '7'"),
        ("infer", ("bn_lenet", [shape]), "INVALID_ARGUMENT", "1x1x28x27"),
        ("get_model_config", ("unknown",), "NOT_FOUND", "no model"),
        ("load_model", ("bn_lenet",), "PERMISSION_DENIED", "--allow-load"),
        ("unload_model", ("bn_lenet",), "PERMISSION_DENIED", "--allow-load"),
        ("get_system_shared_memory_status", (), "UNIMPLEMENTED", "no method"),
        ("get_trace_settings", (), "UNIMPLEMENTED", "no method"),
        ("get_log_settings", (), "UNIMPLEMENTED", "no method"),
    ):
        try:
            await call(name, *args)
            check(f"{name} is refused", False)
        except InferenceServerException as error:
            check(f"{name}: {code}", error.status() == f"StatusCode.{code}" and reason in error.message())


def over_a_stream(client) -> None:
    answers: queue.Queue = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    for number in range(5):
        client.async_stream_infer("bn_lenet", [tensor(sync)], request_id=str(number))
    client.async_stream_infer("unknown", [tensor(sync)], request_id="bad")
    client.async_stream_infer("bn_lenet", [tensor(sync)], request_id="last", enable_empty_final_response=True)
    found = [answers.get(timeout=240) for _ in range(7)]
    client.stop_stream()
    good = [result for result, error in found if error is None]
    check("stream: ids in order", [r.get_response().id for r in good] == [*map(str, range(5)), "last"])
    check("stream: answers", all(close(r.as_numpy("logits")) for r in good))
    check("stream: final", all(r.get_response().parameters["triton_final_response"].bool_param for r in good))
    check("stream: an error ends no stream", "no model 'unknown'" in str(found[5][1]))


async def over_asyncio() -> None:
    async with aio.InferenceServerClient(URL) as client:
        await every_call(aio, client)
        results = await asyncio.gather(*(client.infer("bn_lenet", [tensor(aio)]) for _ in range(20)))
        check("many at a time", all(close(result.as_numpy("logits")) for result in results))

        async def requests():
            for number in range(3):
                yield {"model_name": "bn_lenet", "inputs": [tensor(aio)], "request_id": str(number)}

        found = [pair async for pair in client.stream_infer(requests())]
        check("aio stream", [(r.get_response().id, e) for r, e in found] == [("0", None), ("1", None), ("2", None)])


def fields(descriptor) -> dict:
    def kind(field):
        inner = field.message_type or field.enum_type
        return field.type if inner is None else inner.full_name

    repeated = {f.name: f.is_repeated if hasattr(f, "is_repeated") else f.label == 3 for f in descriptor.fields}
    return {f.name: [f.number, kind(f), repeated[f.name]] for f in descriptor.fields}


def messages(descriptors) -> dict:
    found = {}
    for descriptor in descriptors:
        found[descriptor.full_name] = fields(descriptor)
        found |= messages(descriptor.nested_types)
    return found


with sync.InferenceServerClient(URL) as blocking:
    asyncio.run(every_call(sync, blocking))
    waiting: queue.Queue = queue.Queue()
    for _ in range(20):
        blocking.async_infer("bn_lenet", [tensor(sync)], lambda result, error: waiting.put((result, error)))
    got = [waiting.get(timeout=240) for _ in range(20)]
    check("async_infer", all(error is None and close(result.as_numpy("logits")) for result, error in got))
    over_a_stream(blocking)
asyncio.run(over_asyncio())
with grpc.insecure_channel(URL) as channel:
    stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
    typed = service_pb2.ModelInferRequest(model_name="bn_lenet", id="typed")
    item = typed.inputs.add(name="input", datatype="FP32", shape=inputs.shape)
    item.contents.fp32_contents.extend(inputs.reshape(-1).tolist())
    answer = stub.ModelInfer(typed, timeout=240)
    values = np.frombuffer(answer.raw_output_contents[0], np.float32).reshape(answer.outputs[0].shape)
    check("typed contents", close(values) and answer.id == "typed")
descriptors = [*service_pb2.DESCRIPTOR.message_types_by_name.values()]
descriptors += model_config_pb2.DESCRIPTOR.message_types_by_name.values()
service = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
known = {"messages": messages(descriptors), "methods": [method.name for method in service.methods]}
versions = {name: metadata.version(name) for name in ("tritonclient", "protobuf", "grpcio")}
print(json.dumps({"done": done, "wrong": wrong, "versions": versions, **known}))
