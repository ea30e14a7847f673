"""Models other than batch of images to batch of scores: answers must not depend on concurrent requests."""

import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import orjson
import pyarrow.parquet as pq
import pytest
from onnx import helper, numpy_helper
from support.connections import House, quiet
from support.pictures import png
from unit.serving.conftest import loaded

from bnexport.bundle import MODEL_ONNX, Manifest, seal, write_golden
from bnexport.data.preprocessing import Preprocessing
from bnexport.errors import BundleError
from bnexport.serving.access_log import JsonLog
from bnexport.serving.bulk.bulk_prediction import predict_in_bulk
from bnexport.serving.bulk.bulk_request import BulkRequest
from bnexport.serving.predictor import Predictor
from bnexport.serving.repository import Repository
from bnexport.serving.served_model import ServingSettings
from bnexport.tensors import Signature, TensorSpec

SMALL = Preprocessing(height=4, width=4)


def f32(name: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name, "float32", shape)


class Model:
    """A graph with the shapes that it declares."""

    def __init__(self, inputs: list[TensorSpec], outputs: list[TensorSpec], *nodes: Any, **stored: Any) -> None:
        self.signature, self.nodes = Signature(tuple(inputs), tuple(outputs)), nodes
        self.stored = [numpy_helper.from_array(np.asarray(value), name) for name, value in stored.items()]

    def write(self, folder: Path, **more: Any) -> None:
        folder.mkdir(parents=True)
        values = [
            [helper.make_tensor_value_info(spec.name, onnx.TensorProto.FLOAT, spec.shape) for spec in specs]
            for specs in (self.signature.inputs, self.signature.outputs)
        ]
        graph = helper.make_graph(self.nodes, "graph", *values, self.stored)
        content = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
        (folder / MODEL_ONNX).write_bytes(content.SerializeToString())
        rng = np.random.default_rng(3)
        feeds = {
            spec.name: np.asarray(rng.random([3 if isinstance(dim, str) else dim for dim in spec.shape]), np.float32)
            for spec in self.signature.inputs
        }
        session = onnxruntime.InferenceSession(str(folder / MODEL_ONNX), providers=["CPUExecutionProvider"])
        names = [spec.name for spec in self.signature.outputs]
        write_golden(folder, self.signature, feeds, dict(zip(names, session.run(names, feeds), strict=True)))
        facts = {"opset": 18, "ir_version": 8}
        seal(folder, Manifest("any", 1, self.signature, {"source": "any", "options": {}}, onnx=facts, **more))


NODE = helper.make_node
MODELS: dict[str, Model] = {
    "four": Model([f32("x", 4, 3)], [f32("y", 4, 3)], NODE("Neg", ["x"], ["y"])),
    "table": Model(
        [f32("x", "batch", 3), f32("k", 5, 3)], [f32("y", "batch", 5)],
        NODE("Transpose", ["k"], ["t"]), NODE("MatMul", ["x", "t"], ["y"]),
    ),
    "factor": Model([f32("x", "batch", 3), f32("k")], [f32("y", "batch", 3)], NODE("Mul", ["x", "k"], ["y"])),
    "sum": Model(
        [f32("x", "batch", 3)], [f32("y", "batch", 3), f32("sum", 3)],
        NODE("Neg", ["x"], ["y"]), NODE("ReduceSum", ["x", "axis"], ["sum"], keepdims=0), axis=[0],
    ),
    "pairs": Model(
        [f32("x", "n", 3), f32("k", "m", 3)], [f32("y", "n", "m")],
        NODE("Transpose", ["k"], ["t"]), NODE("MatMul", ["x", "t"], ["y"]),
    ),
    "image": Model(
        [f32("x", 4, 1, 4, 4)], [f32("y", 4, 16)], NODE("Reshape", ["x", "shape"], ["y"]), shape=[4, 16],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    folder = tmp_path_factory.mktemp("models")
    for name, model in MODELS.items():
        model.write(folder / name / "1", preprocessing=SMALL.to_json() if name == "image" else None)
    return loaded(folder)


def item(name: str, array: np.ndarray) -> dict[str, Any]:
    return {"name": name, "shape": list(array.shape), "datatype": "FP32", "data": array.reshape(-1).tolist()}


def request(model: str, feeds: Mapping[str, np.ndarray]) -> bytes:
    body = json.dumps({"inputs": [item(name, np.asarray(array)) for name, array in feeds.items()]}).encode()
    head = f"POST /v2/models/{model}/infer HTTP/1.1\r\nhost: here\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def rows(count: int, first: float = 1.0) -> np.ndarray:
    return (np.arange(count * 3, dtype=np.float32) + np.float32(first)).reshape(count, 3)


def outputs_of(answer: bytes) -> dict[str, np.ndarray]:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 "), answer
    return {tensor["name"]: np.reshape(tensor["data"], tensor["shape"]) for tensor in json.loads(body)["outputs"]}


REQUESTS: dict[str, tuple[dict[str, np.ndarray], dict[str, np.ndarray]]] = {
    "four": ({"x": rows(4)}, {"y": -rows(4)}),
    "table": ({"x": rows(2), "k": rows(5)}, {"y": rows(2) @ rows(5).T}),
    "factor": ({"x": rows(2), "k": np.array(3.0)}, {"y": rows(2) * 3}),
    "sum": ({"x": rows(2)}, {"y": -rows(2), "sum": rows(2).sum(0)}),
    "pairs": ({"x": rows(2), "k": rows(4)}, {"y": rows(2) @ rows(4).T}),
}


@pytest.mark.parametrize("name", REQUESTS)
async def test_clients_at_the_same_time_do_not_change_the_answer(repository: Repository, name: str) -> None:
    feeds, expected = REQUESTS[name]

    house = House(repository)
    clients = [house.connect() for _ in range(4)]
    for connection, _ in clients:
        connection.data_received(request(name, feeds))
    await quiet(house)
    for connection, wire in clients:
        got = outputs_of(wire.written)
        assert got.keys() == expected.keys()
        for output, values in expected.items():
            assert np.array_equal(got[output], values), output
        connection.connection_lost(None)


@pytest.mark.parametrize("name", ["four", "sum", "pairs", "factor"])
def test_the_configuration_of_models_without_batch(repository: Repository, name: str) -> None:
    config = repository.resolve(name).config()
    assert (config["max_batch_size"], "dynamic_batching" in config) == (0, False)
    dims = [[-1 if isinstance(dim, str) else dim for dim in spec.shape] for spec in MODELS[name].signature.inputs]
    assert [tensor["dims"] for tensor in config["input"]] == dims


@pytest.mark.parametrize("count", [1, 4, 6])
async def test_pictures_for_a_batch_that_does_not_vary(repository: Repository, count: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 4, 4), np.uint8)

    model = repository.resolve("image")
    expected = SMALL.apply(pixels).reshape(count, 16)
    assert np.array_equal(await model.logits(pixels), expected)
    with Predictor(model.bundle) as predictor:
        assert np.array_equal(predictor.logits(pixels), expected)
    house = House(repository)
    parts = b"".join(b'--b\r\ncontent-disposition: form-data; name="i"\r\n\r\n%s\r\n' % png(one) for one in pixels)
    body = parts + b"--b--\r\n"
    head = "POST /v2/models/image/classify HTTP/1.1\r\nhost: here\r\ncontent-type: multipart/form-data; boundary=b\r\n"
    answer = await house.ask(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
    found = json.loads(answer.partition(b"\r\n\r\n")[2])["predictions"]
    assert [row["index"] for row in found] == pixels.reshape(count, 16).argmax(1).tolist()


def test_many_pictures_for_a_batch_that_does_not_vary(repository: Repository, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (11, 4, 4), np.uint8)
    np.save(tmp_path / "pixels.npy", pixels[..., None])
    request = BulkRequest(workers=1, shard_rows=6, batch_size=5, logits=True)
    predict_in_bulk(repository.resolve("image").bundle, [tmp_path / "pixels.npy"], tmp_path / "out", request=request)
    files = sorted((tmp_path / "out").glob("*.parquet"))
    logits = np.concatenate([pq.read_table(file)["logits"].to_pylist() for file in files])
    assert np.array_equal(logits.astype(np.float32), SMALL.apply(pixels).reshape(11, 16))


def test_a_fault_with_one_bundle_does_not_keep_the_others_from_being_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bnexport.serving import repository as module

    def opened(name: str, *rest: Any) -> Any:
        if name == "bad":
            raise ZeroDivisionError("on purpose")
        return original(name, *rest)

    original = module.open_served
    for name in ("bad", "good"):
        MODELS["four"].write(tmp_path / name / "1")
    monkeypatch.setattr(module, "open_served", opened)
    repository = loaded(tmp_path)
    assert [name for name, _, entry in repository.each() if entry.served is not None] == ["good"]
    assert repository.problems() == {"bad/1": "ZeroDivisionError: on purpose"}


def test_a_file_whose_name_is_not_utf8_is_reported(tmp_path: Path) -> None:
    for name in ("bad", "good"):
        MODELS["four"].write(tmp_path / name / "1")
    os.close(os.open(os.fsencode(tmp_path / "bad" / "1") + b"/b\xffd", os.O_CREAT))
    log = JsonLog(stream := io.StringIO())
    repository = loaded(tmp_path, log.event)
    log.close()
    assert [name for name, _, entry in repository.each() if entry.served is not None] == ["good"]
    orjson.dumps(repository.index())
    assert "b?d is not in the manifest" in json.loads(stream.getvalue().splitlines()[0])["reason"]


async def test_a_file_that_is_written_over_with_its_old_time_is_noticed(tmp_path: Path) -> None:
    MODELS["four"].write(tmp_path / "four" / "1")
    repository = loaded(tmp_path)
    file = tmp_path / "four" / "1" / MODEL_ONNX
    content, times = bytearray(file.read_bytes()), file.stat()
    content[-1] ^= 1
    with file.open("r+b") as opened:
        opened.write(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    await repository.poll()
    assert "was changed" in repository.problems()["four/1"]


def test_misnamed_bundles_are_reported(tmp_path: Path) -> None:
    for place in ("my model/1", "four/v2", "four/01", ".new/1"):
        MODELS["four"].write(tmp_path / place)
    events: list[tuple[str, Any]] = []
    repository = Repository(
        tmp_path, ServingSettings(), lambda what, **fields: events.append((what, fields.get("folder")))
    )
    with pytest.raises(BundleError, match="four/01 can't be served under its name"):
        repository.load()
    MODELS["four"].write(tmp_path / "four" / "1")
    repository.load()
    left_out = [path for what, path in events if what == "folder left out"]
    assert left_out == [str(tmp_path / place) for place in ("four/01", "four/v2", "my model/1")]
    assert [(name, version) for name, version, _ in repository.each()] == [("four", "1")]
