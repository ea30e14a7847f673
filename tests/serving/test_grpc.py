"""The gRPC server in a separate process: answers, health, tokens, TLS, counters, log lines."""

import queue
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from support.grpc_calls import HEALTH, SERVICE, ask, call, channel_to, infer, infer_request, logits_of_message
from support.serving import PATIENCE, Server, close, serving, tensor

from bnexport import __version__
from bnexport.serving.grpc.inference import classes

INFER = SERVICE + "ModelInfer"


def message(kind: str, **fields: Any) -> Any:
    return classes()[kind](**fields)


def test_the_same_answer_as_over_http_bit_by_bit(
    server: Server, channel: grpc.Channel, images: np.ndarray, logits: np.ndarray
) -> None:
    got = infer(channel, images)
    assert close(got, logits)
    over_http = server.infer({"inputs": [tensor(images)]}).json["outputs"][0]["data"]
    assert np.array_equal(np.array(over_http, np.float32).reshape(got.shape), got)


def test_typed_contents_and_raw_ones(channel: grpc.Channel, images: np.ndarray) -> None:
    request = infer_request(images, id="mine", model_version="1")
    del request.raw_input_contents[:]
    request.inputs[0].contents.fp32_contents.extend(images.reshape(-1).tolist())
    reply = call(channel, INFER, request.SerializeToString())
    assert np.array_equal(logits_of_message(reply.data), infer(channel, images))
    answer = classes()["ModelInferResponse"].FromString(reply.data)
    assert (answer.model_name, answer.model_version, answer.id) == ("bn_lenet", "1", "mine")


def test_a_remembered_description_answers_each_request_by_its_own_data(channel: grpc.Channel, images, logits) -> None:
    for number in (0, 1, 2, 0):
        request = infer_request(images[number : number + 1], id=str(number))
        answer = call(channel, INFER, request.SerializeToString())
        assert close(logits_of_message(answer.data), logits[number : number + 1])
        assert classes()["ModelInferResponse"].FromString(answer.data).id == str(number)
    request = infer_request(images[:1])
    request.raw_input_contents[0] += b"four"
    assert "3140 bytes" in call(channel, INFER, request.SerializeToString()).message


def test_fields_in_any_order_are_one_message(channel: grpc.Channel, images: np.ndarray, logits: np.ndarray) -> None:
    """In protobuf, fields may come in any order, and the last of several values counts."""
    request = infer_request(images, id="last")
    raw = classes()["ModelInferRequest"](raw_input_contents=request.raw_input_contents).SerializeToString()
    del request.raw_input_contents[:]
    first = classes()["ModelInferRequest"](model_name="other", id="first").SerializeToString()
    answer = call(channel, INFER, first + raw + request.SerializeToString())
    assert close(logits_of_message(answer.data), logits)
    assert classes()["ModelInferResponse"].FromString(answer.data).id == "last"


def test_a_timeout(channel: grpc.Channel, images: np.ndarray) -> None:
    request = infer_request(images)
    request.parameters["timeout"].int64_param = 30_000_000
    assert call(channel, INFER, request.SerializeToString()).code == "OK"


def test_metadata_and_statistics_of_the_server(channel: grpc.Channel) -> None:
    reply = ask(channel, "ServerMetadata", "ServerMetadataResponse", message("ServerMetadataRequest"))
    assert (reply.name, reply.version) == ("bnexport", __version__)
    (found,) = ask(channel, "ModelStatistics", "ModelStatisticsResponse", message("ModelStatisticsRequest")).model_stats
    assert (found.name, found.version) == ("bn_lenet", "1")
    before = found.inference_stats.success.count
    infer(channel, np.zeros((5, 1, 28, 28), np.float32))
    request = message("ModelStatisticsRequest", name="bn_lenet")
    (found,) = ask(channel, "ModelStatistics", "ModelStatisticsResponse", request).model_stats
    assert found.inference_stats.success.count == before + 1
    assert 5 in [row.batch_size for row in found.batch_stats]
    for ready, count in ((True, 1), (False, 1)):
        request = message("RepositoryIndexRequest", ready=ready)
        assert len(ask(channel, "RepositoryIndex", "RepositoryIndexResponse", request).models) == count


def check(channel: grpc.Channel, service: str = "") -> str:
    request = message("HealthCheckRequest", service=service)
    status = ask(channel, HEALTH + "Check", "HealthCheckResponse", request).status
    return str(classes()["HealthCheckResponse"].ServingStatus.Name(status))


class Watch:
    """Yield the statuses that Watch sends."""

    def __init__(self, channel: grpc.Channel, service: str) -> None:
        data = message("HealthCheckRequest", service=service).SerializeToString()
        self.call = channel.unary_stream(HEALTH + "Watch")(data, timeout=PATIENCE)

    def next(self) -> str:
        status = classes()["HealthCheckResponse"].FromString(next(self.call)).status
        return str(classes()["HealthCheckResponse"].ServingStatus.Name(status))


def test_health(channel: grpc.Channel) -> None:
    for service in ("", "bn_lenet", "inference.GRPCInferenceService"):
        assert check(channel, service) == "SERVING"
    watch = Watch(channel, "unknown")
    assert watch.next() == "SERVICE_UNKNOWN"
    watch.call.cancel()


def test_health_follows_loading_and_stopping(models: Path, tmp_path: Path, images: np.ndarray) -> None:
    shutil.copytree(models / "bn_lenet", tmp_path / "m" / "bn_lenet")
    words = ["--grpc-port", "0", "--allow-load", "--grace", "8"]
    with serving(tmp_path / "m", tmp_path / "log", *words) as server, channel_to(server) as channel:
        server_watch, model_watch = Watch(channel, ""), Watch(channel, "bn_lenet")
        assert [server_watch.next(), model_watch.next()] == ["SERVING", "SERVING"]
        unload = message("RepositoryModelUnloadRequest", model_name="bn_lenet")
        ask(channel, "RepositoryModelUnload", "RepositoryModelUnloadResponse", unload)
        assert [server_watch.next(), model_watch.next()] == ["NOT_SERVING", "NOT_SERVING"]
        assert check(channel) == check(channel, "bn_lenet") == "NOT_SERVING"
        answer = call(channel, INFER, infer_request(images).SerializeToString())
        assert (answer.code, "not ready" in answer.message) == ("UNAVAILABLE", True)
        ready = message("ModelReadyRequest", name="bn_lenet")
        assert ask(channel, "ModelReady", "ModelReadyResponse", ready).ready is False
        load = message("RepositoryModelLoadRequest", model_name="bn_lenet")
        ask(channel, "RepositoryModelLoad", "RepositoryModelLoadResponse", load)
        assert [server_watch.next(), model_watch.next()] == ["SERVING", "SERVING"]
        as_kserve = message(
            "RepositoryModelLoadRequest", repository_name="bn_lenet"
        )  # KServe's field for the model's name
        ask(channel, "RepositoryModelLoad", "RepositoryModelLoadResponse", as_kserve)
        load.parameters["config"].string_param = "{}"
        answer = call(channel, SERVICE + "RepositoryModelLoad", load.SerializeToString())
        assert (answer.code, "without parameters" in answer.message) == ("INVALID_ARGUMENT", True)
        for what in ("Load", "Unload"):
            unknown = message(f"RepositoryModel{what}Request", model_name="unknown").SerializeToString()
            assert call(channel, f"{SERVICE}RepositoryModel{what}", unknown).code == "NOT_FOUND"
        server.process.send_signal(signal.SIGTERM)
        assert [server_watch.next(), model_watch.next()] == ["NOT_SERVING", "NOT_SERVING"]
        assert ask(channel, "ServerLive", "ServerLiveResponse", message("ServerLiveRequest")).live is True
        assert list(server_watch.call) == list(model_watch.call) == [], "the server ends them when it closes"
        assert server.process.wait(PATIENCE) == 0


def test_a_token(models: Path, tmp_path: Path, images: np.ndarray) -> None:
    token = "correct-horse-battery-staple"
    (tmp_path / "token").write_text(token + "\n")
    words = ["--grpc-port", "0", "--token-file", str(tmp_path / "token")]
    with serving(models, tmp_path / "log", *words) as server, channel_to(server) as channel:
        bearer = ("authorization", f"Bearer {token}")
        assert infer(channel, images, metadata=[bearer]).shape == (12, 10)
        data = infer_request(images).SerializeToString()
        for given in ([], [("authorization", token)], [("authorization", f"Bearer {token[:-1]}")], [bearer, bearer]):
            answer = call(channel, INFER, data, metadata=given)
            assert (answer.code, token in answer.message) == ("UNAUTHENTICATED", False)
        stream = channel.stream_stream(SERVICE + "ModelStreamInfer")(iter([data]), timeout=PATIENCE)
        with pytest.raises(grpc.RpcError) as refused:
            next(stream)
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert call(channel, SERVICE + "ServerMetadata", b"").code == "UNAUTHENTICATED"
        for probe in ("ServerLive", "ServerReady", "ModelReady"):
            assert call(channel, SERVICE + probe, b"").code == "OK"
        assert check(channel) == "SERVING"
    assert token not in server.log.read_text()


def test_tls(
    models: Path, tmp_path: Path, images: np.ndarray, logits: np.ndarray, certified: tuple[Path, Path]
) -> None:
    certificate, key = certified
    words = ["--grpc-port", "0", "--tls-cert", str(certificate), "--tls-key", str(key)]
    with serving(models, tmp_path / "log", *words) as server:
        with channel_to(server, certificate.read_bytes()) as channel:
            assert close(infer(channel, images), logits)
        with channel_to(server) as plain:
            assert call(plain, SERVICE + "ServerLive", b"", timeout=2.0).code != "OK"


def test_counters_and_log_lines(models: Path, tmp_path: Path, images: np.ndarray) -> None:
    with serving(models, tmp_path / "log", "--grpc-port", "0") as server, channel_to(server) as channel:
        data = infer_request(images).SerializeToString()
        answer = call(channel, INFER, data, metadata=[("x-request-id", "abc-1"), ("traceparent", "00-1-2-01")])
        assert answer.metadata["x-request-id"] == "abc-1"
        other = call(channel, INFER, data, metadata=[("x-request-id", "x" * 1000)]).metadata["x-request-id"]
        assert re.fullmatch("[0-9a-f]{13,20}", other)
        assert call(channel, INFER, b"nonsense").code == "INVALID_ARGUMENT"
        assert call(channel, "/a/b", b"").code == "UNIMPLEMENTED"
        metrics = server.metrics()
        for label, count in (
            (f'{{code="OK",method="{INFER}"}}', 2),
            (f'{{code="INVALID_ARGUMENT",method="{INFER}"}}', 1),
            ('{code="UNIMPLEMENTED",method="none"}', 1),
        ):
            assert f"bnexport_grpc_calls_total{label} {count}.0" in metrics
        assert "bnexport_grpc_calls_active 0.0" in metrics
        assert "bnexport_http_requests_active 1.0" in metrics
        assert 'bnexport_samples_total{model="bn_lenet",version="1"} 24.0' in metrics
        assert server.stop() == 0
    first = next(event for event in server.events() if event.get("id") == "abc-1")
    assert {key: first[key] for key in ("client", "method", "path", "status", "in", "model", "version", "rows")} == {
        "client": "127.0.0.1", "method": "gRPC", "path": INFER, "status": "OK", "in": len(data),
        "model": "bn_lenet", "version": "1", "rows": 12,
    }  # fmt: skip
    assert (first["trace"], first["out"] > 480, first["us"] > 0) == ("00-1-2-01", True, True)
    assert [event["status"] for event in server.events() if "status" in event and event["method"] == "gRPC"] == [
        "OK", "OK", "INVALID_ARGUMENT", "UNIMPLEMENTED",
    ]  # fmt: skip


def test_a_stream_answers_each_request_in_turn(channel: grpc.Channel, images: np.ndarray, logits: np.ndarray) -> None:
    requests: queue.Queue[bytes | None] = queue.Queue()
    answers = channel.stream_stream(SERVICE + "ModelStreamInfer")(iter(requests.get, None), timeout=PATIENCE)
    for number in range(4):
        requests.put(infer_request(images[number : number + 1], id=str(number)).SerializeToString())
        answer = classes()["ModelStreamInferResponse"].FromString(next(answers))
        assert (answer.error_message, answer.infer_response.id) == ("", str(number))
        got = logits_of_message(answer.infer_response.SerializeToString())
        assert close(got, logits[number : number + 1])
    requests.put(b"nonsense")
    answer = classes()["ModelStreamInferResponse"].FromString(next(answers))
    assert "not an inference.ModelInferRequest" in answer.error_message
    requests.put(infer_request(images, id="mine", model_name="x").SerializeToString())
    answer = classes()["ModelStreamInferResponse"].FromString(next(answers))
    assert ("no model 'x'" in answer.error_message, answer.infer_response.id) == (True, "mine")
    requests.put(infer_request(images).SerializeToString())
    assert classes()["ModelStreamInferResponse"].FromString(next(answers)).infer_response.outputs[0].shape == [12, 10]
    requests.put(None)
    assert list(answers) == []


def test_many_clients_get_their_own_answers(server: Server, images: np.ndarray, logits: np.ndarray) -> None:
    with channel_to(server) as channel:
        ask_for = channel.unary_unary(INFER)
        started = [
            (number, ask_for.future(infer_request(images[number : number + 1]).SerializeToString(), timeout=PATIENCE))
            for number in list(range(12)) * 10
        ]
        for number, future in started:
            assert close(logits_of_message(future.result()), logits[number : number + 1])


def test_one_server_does_not_close_the_other(server: Server, channel: grpc.Channel, images: np.ndarray) -> None:
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        assert infer(channel, images[:1]).shape == (1, 10)
        assert server.infer({"inputs": [tensor(images[:1])]}).status == 200
