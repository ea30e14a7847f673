"""The protocol over HTTP, as a client uses it."""

import gzip
import http.client
import json
import re
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from support.serving import INFER, PATIENCE, Server, binary, close, logits_of, serving, tensor, together, until

from bnexport import __version__
from bnexport.runtimes.catalogue import runner_spec


def test_health(server: Server) -> None:
    assert server.ask("GET", "/v2/health/live").json == {"live": True}
    assert server.ask("GET", "/v2/health/ready").json == {"ready": True}
    answer = server.ask("HEAD", "/v2/health/ready")
    assert (answer.status, answer.body) == (200, b"")


def test_server_metadata(server: Server) -> None:
    value = server.ask("GET", "/v2").json
    assert (value["name"], value["version"]) == ("bnexport", __version__)
    assert {"binary_tensor_data", "classification"} <= set(value["extensions"])


@pytest.mark.parametrize("version", ["", "/versions/1"])
def test_model_metadata_and_state(server: Server, version: str) -> None:
    value = server.ask("GET", f"/v2/models/bn_lenet{version}").json
    assert value == {
        "name": "bn_lenet",
        "versions": ["1"],
        "platform": "onnxruntime_onnx",
        "inputs": [{"name": "input", "datatype": "FP32", "shape": [-1, 1, 28, 28]}],
        "outputs": [{"name": "logits", "datatype": "FP32", "shape": [-1, 10]}],
    }
    assert server.ask("GET", f"/v2/models/bn_lenet{version}/ready").json == {"name": "bn_lenet", "ready": True}
    config = server.ask("GET", f"/v2/models/bn_lenet{version}/config").json
    assert config["input"] == [{"name": "input", "data_type": "TYPE_FP32", "dims": [1, 28, 28]}]
    assert config["max_batch_size"] == 64


def test_repository_index(server: Server) -> None:
    answer = server.ask("POST", "/v2/repository/index", b"{}")
    assert answer.json == [{"name": "bn_lenet", "version": "1", "state": "READY", "reason": ""}]


@pytest.mark.parametrize("version", ["", "/versions/1"])
def test_json_in_json_out(server: Server, images: np.ndarray, logits: np.ndarray, version: str) -> None:
    answer = server.infer({"id": "a7", "inputs": [tensor(images)]}, f"/v2/models/bn_lenet{version}/infer")
    assert close(logits_of(answer), logits)
    value = answer.json
    assert (value["id"], value["model_name"], value["model_version"]) == ("a7", "bn_lenet", "1")
    nested = dict(tensor(images), data=images.tolist())
    assert server.infer({"inputs": [nested]}).json["outputs"] == value["outputs"]


@pytest.mark.parametrize("both", [True, False])
def test_binary_in(server: Server, images: np.ndarray, logits: np.ndarray, both: bool) -> None:
    body, headers = binary(images, parameters={"binary_data_output": both})
    answer = server.ask("POST", INFER, body, headers)
    assert ("inference-header-content-length" in answer.headers) == both
    assert close(logits_of(answer), logits)


def test_binary_out_of_json_in(server: Server, images: np.ndarray, logits: np.ndarray) -> None:
    wanted = [{"name": "logits", "parameters": {"binary_data": True}}]
    answer = server.infer({"inputs": [tensor(images)], "outputs": wanted})
    assert answer.headers["content-type"] == "application/octet-stream"
    assert close(logits_of(answer), logits)


def test_json_keeps_every_bit(server: Server, images: np.ndarray) -> None:
    body, headers = binary(images[:1], parameters={"binary_data_output": True})
    exact = logits_of(server.ask("POST", INFER, body, headers))
    assert np.array_equal(logits_of(server.infer({"inputs": [tensor(images[:1])]})), exact)


def test_raw_binary_request(server: Server, images: np.ndarray, logits: np.ndarray) -> None:
    headers = {"content-type": "application/octet-stream", "inference-header-content-length": "0"}
    answer = server.ask("POST", INFER, images.tobytes(), headers)
    assert close(logits_of(answer), logits)


@pytest.mark.parametrize("as_binary", [True, False])
def test_classification(server: Server, images: np.ndarray, logits: np.ndarray, as_binary: bool) -> None:
    wanted = {"name": "logits", "parameters": {"classification": 3, "binary_data": as_binary}}
    answer = server.infer({"inputs": [tensor(images)], "outputs": [wanted]})
    length = int(answer.headers.get("inference-header-content-length", len(answer.body)))
    output = json.loads(answer.body[:length])["outputs"][0]
    assert (output["datatype"], output["shape"]) == ("BYTES", [12, 3])
    texts = output.get("data") or unpacked_texts(answer.body[length:])
    best = np.argsort(-logits, axis=1)[:, :3]
    assert [text.split(":")[1:] for text in texts] == [[str(i), str(i)] for i in best.reshape(-1)]
    scores = np.array([float(text.split(":")[0]) for text in texts]).reshape(12, 3)
    assert np.allclose(scores, np.take_along_axis(logits, best, 1), rtol=0, atol=1e-4)


def unpacked_texts(data: bytes) -> list[str]:
    texts = []
    while data:
        (length,) = struct.unpack_from("<I", data)
        texts.append(data[4 : 4 + length].decode())
        data = data[4 + length :]
    return texts


@pytest.mark.parametrize(("coding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_packed_bodies(server: Server, images: np.ndarray, logits: np.ndarray, coding: str, pack) -> None:
    body, headers = binary(images)
    answer = server.ask("POST", INFER, pack(body), headers | {"content-encoding": coding, "accept-encoding": coding})
    assert answer.headers["content-encoding"] == coding, "12 rows of JSON are more than 1 kB"
    answer.body = gzip.decompress(answer.body) if coding == "gzip" else zlib.decompress(answer.body)
    assert close(logits_of(answer), logits)


def test_small_answers_are_not_packed(server: Server, images: np.ndarray) -> None:
    for accepted in ("gzip", "gzip;q=0, identity", "br"):
        answer = server.infer({"inputs": [tensor(images[:1])]}, accept_encoding=accepted)
        assert "content-encoding" not in answer.headers


def test_statistics_and_metrics_count(server: Server, images: np.ndarray) -> None:
    def count() -> tuple[int, int]:
        (stats,) = server.ask("GET", "/v2/models/bn_lenet/stats").json["model_stats"]
        return stats["inference_count"], stats["inference_stats"]["success"]["count"]

    before = count()
    server.infer({"inputs": [tensor(images)]})
    rows, requests = (after - earlier for after, earlier in zip(count(), before, strict=True))
    assert (rows, requests) == (12, 1)
    assert server.ask("GET", "/v2/models/stats").json["model_stats"][0]["name"] == "bn_lenet"
    text = server.metrics()
    assert re.search(r'bnexport_samples_total\{model="bn_lenet",version="1"\} \d', text)
    assert 'bnexport_model_ready{model="bn_lenet",version="1"} 1.0' in text
    assert re.search(r'bnexport_request_seconds_bucket\{le="\+Inf",model="bn_lenet",version="1"\} \d', text)


def test_request_ids_and_the_access_log(server: Server, images: np.ndarray) -> None:
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    answer = server.infer({"inputs": [tensor(images)]}, x_request_id="my-7", traceparent=trace)
    assert answer.headers["x-request-id"] == "my-7"
    own = server.infer({"inputs": []}, x_request_id="x" * 300).headers["x-request-id"]
    assert re.fullmatch("[0-9a-f]{13,}", own)
    until(lambda: len([line for line in server.events() if line.get("id") in ("my-7", own)]) == 2)
    good, bad = [line for line in server.events() if line.get("id") in ("my-7", own)]
    logged = {key: good[key] for key in ("method", "path", "status", "model", "version", "rows", "trace", "client")}
    assert logged == {
        "method": "POST", "path": INFER, "status": 200, "model": "bn_lenet", "version": "1", "rows": 12,
        "trace": trace, "client": "127.0.0.1",
    }  # fmt: skip
    assert bad["status"] == 400


def test_the_connection_stays_open(server: Server, images: np.ndarray) -> None:
    client = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    body, headers = binary(images)
    server.ask("GET", "/v2/health/live", connection=client)
    first = client.sock
    for _ in range(3):
        assert server.ask("POST", INFER, body, headers, client).status == 200
        assert server.ask("GET", "/nowhere", None, None, client).status == 404
    assert client.sock is first
    client.close()


@pytest.mark.parametrize("coding", ["gzip", "identity"])
def test_a_half_closed_client_still_reads_the_answer(server: Server, images: np.ndarray, coding: str) -> None:
    """As ``nc -N`` does: the connection is closed in one direction while the answer is made."""
    body, headers = binary(np.tile(images, (20, 1, 1, 1)))
    body = gzip.compress(body) if coding == "gzip" else body
    lines = [f"{name}: {value}" for name, value in headers.items()]
    lines = [f"POST {INFER} HTTP/1.1", "host: x", f"content-length: {len(body)}", f"content-encoding: {coding}", *lines]
    data = "\r\n".join([*lines, "", ""]).encode() + body
    for _ in range(5):
        head, _, content = server.raw(data, end=True).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")
        assert f"content-length: {len(content)}\r\n".encode() in head, "all of the answer"


def test_many_clients_get_their_own_answers(server: Server, images: np.ndarray, logits: np.ndarray) -> None:
    """Requests that share a batch must not get each other's rows."""

    def client(index: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
        rows = slice(index, index + 1 + index % 3)
        body, headers = binary(images[rows], parameters={"binary_data_output": True})
        for _ in range(25):
            assert close(logits_of(server.ask("POST", INFER, body, headers, connection)), logits[rows])
        connection.close()

    together(9, client)
    (stats,) = server.ask("GET", "/v2/models/bn_lenet/stats").json["model_stats"]
    assert max({row["batch_size"] for row in stats["batch_stats"]} - {12}) > 3, "no request ever shared a batch"


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys, bnexport.serving.http.http_server; "
        "print(sorted({'torch', 'onnx', 'pydantic', 'starlette', 'PIL', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.sampled(2)
@pytest.mark.parametrize("runtime", ["torchscript-cpu", "torch-cpu", "openvino-cpu"])
def test_other_runtimes_serve_too(models, tmp_path, images: np.ndarray, logits: np.ndarray, runtime: str) -> None:
    if (reason := runner_spec(runtime).available()) is not None:
        pytest.skip(reason)
    with serving(models, tmp_path / "log", "--runtime", runtime) as other:
        assert close(logits_of(other.infer({"inputs": [tensor(images)]})), logits)
        assert other.ask("GET", "/v2/models/bn_lenet/config").json["instance_group"][0]["kind"] == "KIND_CPU"


def test_models_are_not_loaded_by_request_unless_allowed(server: Server) -> None:
    for what in ("load", "unload"):
        answer = server.ask("POST", f"/v2/repository/models/bn_lenet/{what}", b"{}")
        assert answer.status == 403
        assert "--allow-load" in answer.error
