"""Every malformed request gets a 4xx with one sentence, the process lives, and the next good request is answered."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from serving.malformed import CASES, INFER, Case, good
from support.serving import PATIENCE, Answer, Server, close, logits_of, read_answer, serving, tensor, together

from bnexport.bundle import MODEL_ONNX, Manifest, seal, write_golden
from bnexport.tensors import Signature, TensorSpec


def alive(server: Server, images: np.ndarray, logits: np.ndarray) -> None:
    assert server.process.poll() is None
    assert close(logits_of(server.infer({"inputs": [tensor(images)]})), logits)


def refused(got: bytes) -> tuple[int, str]:
    """Status and sentence of an answer."""
    head, _, body = got.partition(b"\r\n\r\n")
    error = json.loads(body)["error"]
    assert error.isprintable()
    assert len(error) < 700
    return int(head.split()[1]), error


def test_the_table_is_long_enough() -> None:
    assert len(CASES) >= 100
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_refused_with_a_reason(server: Server, images: np.ndarray, logits: np.ndarray, case: Case) -> None:
    status, error = refused(server.raw(case.data))
    assert (status, case.reason in error) == (case.status, True), error
    alive(server, images, logits)


def test_the_process_stayed_small(server: Server) -> None:
    """After the requests above; the unpacked content of a bomb would show."""
    assert server.resident() < 700e6


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of a model that looks up its input in a table of ten; its signature does not limit the values."""
    folder = tmp_path_factory.mktemp("table") / "lookup" / "1"
    folder.mkdir(parents=True)
    weights = np.arange(20, dtype=np.float32).reshape(10, 2)
    node = helper.make_node("Gather", ["table", "ids"], ["rows"])
    signature = Signature((TensorSpec("ids", "int64", ("batch",)),), (TensorSpec("rows", "float32", ("batch", 2)),))
    values = [
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch"])],
        [helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["batch", 2])],
    ]
    graph = helper.make_graph([node], "lookup", *values, [numpy_helper.from_array(weights, "table")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (folder / MODEL_ONNX).write_bytes(model.SerializeToString())
    ids = np.array([3, 1, 9], np.int64)
    write_golden(folder, signature, {"ids": ids}, {"rows": weights[ids]})
    seal(folder, Manifest("lookup", 1, signature, {"source": "lookup.onnx", "options": {}}))
    with serving(folder, tmp_path_factory.mktemp("log") / "log") as running:
        yield running


def look_up(server: Server, ids: list[int]) -> Answer:
    return server.infer({"inputs": [tensor(np.array(ids, np.int64), "ids", "INT64")]}, "/v2/models/lookup/infer")


def test_values_that_the_engine_refuses_are_the_client_s_fault(table: Server) -> None:
    answer = look_up(table, [1, 10])
    assert (answer.status, "idx=10 must be within" in answer.error) == (400, True), answer.error
    assert "fold-and-export" not in answer.error, "the bundle is not at fault"
    assert look_up(table, [9]).json["outputs"][0]["data"] == [18, 19]


def test_one_client_s_values_do_not_fail_the_others(table: Server) -> None:
    """They share batches."""

    def ask(number: int) -> None:
        good = number % 3 > 0
        assert [look_up(table, [4 if good else 10]).status for _ in range(60)] == [200 if good else 400] * 60

    together(9, ask)


@pytest.fixture(scope="module")
def hasty(models: Path, tmp_path_factory: pytest.TempPathFactory):
    """A server that waits for half a second instead of half a minute."""
    waits = [word for name in ("head", "body") for word in ("--limit", f"{name}_seconds=0.5")]
    with serving(models, tmp_path_factory.mktemp("hasty") / "log", *waits) as running:
        yield running


_HEAD = b"POST " + INFER.encode() + b" HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
SLOW = {
    "headers that stop": (_HEAD, b""),
    "headers that drip": (_HEAD, b"x"),
    "a body that stops": (_HEAD + b"content-length: 1000\r\n\r\n{", b""),
    "a body that drips": (_HEAD + b"content-length: 1000\r\n\r\n{", b" "),
    "chunks without an end": (_HEAD + b"transfer-encoding: chunked\r\n\r\n1\r\n{\r\n", b"1\r\n \r\n"),
}


@pytest.mark.parametrize("name", SLOW)
def test_slow_clients_get_a_reason_and_are_dropped(
    hasty: Server, images: np.ndarray, logits: np.ndarray, name: str
) -> None:
    start, more = SLOW[name]
    with socket.create_connection(("127.0.0.1", hasty.port), timeout=PATIENCE) as client:
        client.sendall(start)
        stop = threading.Event()

        def drip() -> None:
            while more and not stop.wait(0.1):
                with contextlib.suppress(OSError):
                    client.sendall(more)

        thread = threading.Thread(target=drip)
        thread.start()
        try:
            status, error = refused(read_answer(client))
        finally:
            stop.set()
            thread.join(PATIENCE)
    assert status == 408
    assert "Send it faster" in error
    alive(hasty, images, logits)


def test_a_silent_client_is_dropped(hasty: Server) -> None:
    with socket.create_connection(("127.0.0.1", hasty.port), timeout=PATIENCE) as client:
        assert read_answer(client).startswith(b"HTTP/1.1 408")


def test_disconnecting_clients_harm_no_other(server: Server, images: np.ndarray, logits: np.ndarray) -> None:
    body = json.dumps(good()).encode()
    whole = _HEAD + b"content-length: %d\r\n\r\n" % len(body) + body
    for length in (10, 60, len(_HEAD) + 5, len(whole) - 1, len(whole)):
        with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as client:
            client.sendall(whole[:length])
    alive(server, images, logits)


def test_requests_one_after_the_other_without_waiting(server: Server) -> None:
    body = json.dumps(good()).encode()
    whole = _HEAD + b"content-length: %d\r\n\r\n" % len(body) + body
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as client:
        client.sendall(whole * 5)
        got, deadline = b"", time.monotonic() + PATIENCE
        while got.count(b"HTTP/1.1 200") < 5:
            assert time.monotonic() < deadline
            got += client.recv(65536)


@pytest.mark.parametrize("declared", [True, False], ids=["declared", "chunked"])
def test_a_body_that_is_too_large(models: Path, tmp_path: Path, declared: bool) -> None:
    with serving(models, tmp_path / "log", "--limit", "body_bytes=100000") as small:
        body = b"x" * 300_000
        if declared:
            data = _HEAD + b"content-length: 300000\r\n\r\n" + body
        else:
            data = _HEAD + b"transfer-encoding: chunked\r\n\r\n" + b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
        status, error = refused(small.raw(data))
        assert (status, "the limit is 100000" in error) == (413, True)
        assert small.ask("GET", "/v2/health/live").status == 200
