"""Clients that send requests without a pause, and record each lost request."""

import http.client
import json
import threading
from typing import Self

import numpy as np
from support.serving import INFER, PATIENCE, Server, binary, logits_of


class Threads:
    """Threads that run ``_run`` until ``stop`` is set."""

    def __init__(self, count: int) -> None:
        self.stop = threading.Event()
        self.threads = [threading.Thread(target=self._run) for _ in range(count)]

    def __enter__(self) -> Self:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.join()

    def join(self) -> None:
        for thread in self.threads:
            thread.join(PATIENCE)
        assert not any(thread.is_alive() for thread in self.threads)

    def _run(self) -> None:
        raise AssertionError("each kind of client has its own")


class Clients(Threads):
    """Threads that send requests without a pause, and record each answer's version and ratio to the logits."""

    def __init__(self, server: Server, images: np.ndarray, logits: np.ndarray, *, count: int = 6):
        super().__init__(count)
        self.server, self.logits = server, logits
        self.body, self.headers = binary(images, parameters={"binary_data_output": True})
        self.answers, self.failures = [], []  # type: ignore[var-annotated]

    def _run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=PATIENCE)
        while not self.stop.is_set():
            if connection.sock is None:  # the server closed it after the answer
                try:
                    connection.connect()
                except (ConnectionRefusedError, ConnectionResetError):  # it does not listen any more: nothing was sent
                    break
            try:
                answer = self.server.ask("POST", INFER, self.body, self.headers, connection)
                logits = logits_of(answer)
                version = json.loads(answer.body[: int(answer.headers["inference-header-content-length"])])[
                    "model_version"
                ]
                self.answers.append((version, float(np.abs(logits / self.logits).mean())))
            except Exception as error:  # everything is a lost request
                self.failures.append(repr(error))
                break
        connection.close()
