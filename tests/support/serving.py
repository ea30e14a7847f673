"""A server in a separate process, and clients that may misbehave."""

import contextlib
import http.client
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
#: Seconds that anything may take here; a deadline and no measurement.
PATIENCE = 240.0
PROGRAM = (sys.executable, "-m", "bnexport")
INFER = "/v2/models/bn_lenet/infer"


@dataclass
class Answer:
    """An answer of a server; its headers are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        return str(self.json["error"])


@dataclass
class Server:
    """A running ``bnexport serve``."""

    process: subprocess.Popen[str]
    port: int
    log: Path
    grpc_port: int = 0

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | str | None = None,
        headers: dict[str, str] | None = None,
        connection: http.client.HTTPConnection | None = None,
    ) -> Answer:
        client = connection or http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            client.request(method, path, body, headers or {})
            found = client.getresponse()
            return Answer(found.status, {k.lower(): v for k, v in found.getheaders()}, found.read())
        finally:
            if connection is None:
                client.close()

    def infer(self, value: object, path: str = INFER, **headers: str) -> Answer:
        named = {"content-type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()}
        return self.ask("POST", path, json.dumps(value), named)

    def raw(self, data: bytes, *, seconds: float = PATIENCE, end: bool = False) -> bytes:
        """Return what the server answers to bytes, until it closes or an answer is whole."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=seconds) as client:
            with contextlib.suppress(OSError):
                client.sendall(data)
                if end:
                    client.shutdown(socket.SHUT_WR)
            return read_answer(client)

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        """Return the whole lines of the log, or the events of one name; the last line may be written at this moment."""
        whole = self.log.read_text().rpartition("\n")[0]
        lines = [json.loads(line) for line in whole.splitlines() if line.startswith("{")]
        return lines if name is None else [line for line in lines if line.get("event") == name]

    def metrics(self) -> str:
        return self.ask("GET", "/metrics").body.decode()

    def resident(self) -> float:
        """Return the bytes of memory that the server reports."""
        found = re.search(r"^process_resident_memory_bytes (\S+)", self.metrics(), re.MULTILINE)
        if found is None:
            pytest.skip("this system does not report how much memory a process has")
        return float(found[1])

    def drain(self) -> None:
        """Send SIGTERM, and wait until the server reports that it is not ready."""
        self.process.send_signal(signal.SIGTERM)
        until(lambda: self.ask("GET", "/v2/health/ready").status == 503)

    def stopping(self) -> bool:
        """Return True if the server is not ready, or does not listen."""
        try:
            return self.ask("GET", "/v2/health/ready").status == 503
        except (OSError, http.client.HTTPException):
            return True

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(PATIENCE)


def read_answer(client: socket.socket) -> bytes:
    got = b""
    while True:
        try:
            chunk = client.recv(65536)
        except ConnectionResetError:
            return got
        got += chunk
        if not chunk or _whole(got):
            return got


def _whole(got: bytes) -> bool:
    head, gap, body = got.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head)
    return bool(gap) and length is not None and len(body) >= int(length[1])


@contextlib.contextmanager
def starting(
    path: Path, log: Path, *options: str, env: dict[str, str] | None = None, program: tuple[str, ...] = PROGRAM
) -> Iterator[Server]:
    """Start a server of a bundle or a folder of models on a free port, yield before it serves, and kill it at the end."""
    words = [*program, "serve", str(path), "--port", "0", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(env or {})}
    with log.open("w") as stderr:
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment)
    with process:
        try:
            yield Server(process, 0, log)
        finally:
            process.kill()


@contextlib.contextmanager
def serving(path: Path, log: Path, *options: str, **started: Any) -> Iterator[Server]:
    """Yield a server that serves; the arguments are those of ``starting``."""
    with starting(path, log, *options, **started) as server:
        assert server.process.stdout is not None
        ready, _, _ = select.select([server.process.stdout], [], [], PATIENCE)
        line = server.process.stdout.readline() if ready else ""
        match = re.search(r":(\d+)$", line.strip())
        assert match, (line, log.read_text(), server.process.poll())
        grpc = re.search(r"grpc://\S*:(\d+)", line)
        server.port, server.grpc_port = int(match[1]), int(grpc[1]) if grpc else 0
        yield server


def tensor(array: np.ndarray, name: str = "input", datatype: str = "FP32") -> dict[str, Any]:
    """An input of a request in JSON."""
    return {"name": name, "shape": list(array.shape), "datatype": datatype, "data": array.reshape(-1).tolist()}


def binary(array: np.ndarray, **extra: Any) -> tuple[bytes, dict[str, str]]:
    """Body and headers of a request with its input in binary."""
    item = {"name": "input", "shape": list(array.shape), "datatype": "FP32"}
    item["parameters"] = {"binary_data_size": array.nbytes}
    head = json.dumps({"inputs": [item], **extra}).encode()
    headers = {"content-type": "application/octet-stream", "inference-header-content-length": str(len(head))}
    return head + array.tobytes(), headers


def logits_of(answer: Answer) -> np.ndarray:
    """The first output of an answer, in JSON or in binary."""
    assert answer.status == 200, answer.body
    length = answer.headers.get("inference-header-content-length")
    head = json.loads(answer.body if length is None else answer.body[: int(length)])
    output = head["outputs"][0]
    if length is None:
        return np.array(output["data"], np.float32).reshape(output["shape"])
    assert output["parameters"]["binary_data_size"] == len(answer.body) - int(length)
    return np.frombuffer(answer.body, np.float32, offset=int(length)).reshape(output["shape"])


def close(got: np.ndarray, want: np.ndarray) -> bool:
    """Return True for arrays of one shape that differ by at most 1e-5 of the largest value."""
    return got.shape == want.shape and bool(np.abs(got - want).max() <= 1e-5 * np.abs(want).max())


def together(count: int, call: Callable[[int], object]) -> None:
    """Call a function with 0, 1, ... in threads at the same time, and raise what one of them raises."""
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(call, range(count)))


def until(check: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE
    while not (found := check()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def refused(*words: str, code: int, program: tuple[str, ...] = PROGRAM) -> str:
    """Return the messages of a server that can't start."""
    done = subprocess.run(
        [*program, "serve", *words],
        capture_output=True, text=True, timeout=PATIENCE, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr
