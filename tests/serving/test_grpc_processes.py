"""The gRPC server of several processes: one port, one sum of counters, and a killed process costs its own calls alone."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
from support.grpc_calls import SERVICE, call, channel_to, infer, infer_request
from support.processes import counted, killed, running, serving_twice
from support.serving import Server, refused, until

from bnexport.serving.grpc.inference import classes

INFER = SERVICE + "ModelInfer"
CALLS = 24


def inferences(server: Server) -> int:
    """Return the server's statistics of the model."""
    request = classes()["ModelStatisticsRequest"](name="bn_lenet").SerializeToString()
    with channel_to(server) as channel:
        answer = classes()["ModelStatisticsResponse"].FromString(
            call(channel, SERVICE + "ModelStatistics", request).data
        )
    return int(answer.model_stats[0].inference_stats.success.count)


def test_one_port_one_sum_and_a_killed_process(
    models: Path, tmp_path: Path, images: np.ndarray, logits: np.ndarray
) -> None:
    with serving_twice(models, tmp_path / "log", "--grpc-port", "0") as server:
        for _ in range(CALLS):
            with channel_to(server) as channel:
                assert np.allclose(infer(channel, images), logits, atol=1e-3)
        until(lambda: inferences(server) == CALLS)  # processes publish their counters ten times a second
        assert counted(server, r'bnexport_grpc_calls_total\{.*code="OK".*ModelInfer"') == CALLS
        # The system spreads the connections; lines of calls come a tenth of a second later.
        until(lambda: {line["process"] for line in server.events() if line.get("path") == INFER} == {0, 1})
        killed(server, 0)
        assert inferences(server) == CALLS, "what the dead one counted stays"
        for _ in range(CALLS):
            with channel_to(server) as channel:
                assert np.allclose(infer(channel, images), logits, atol=1e-3)
        until(lambda: inferences(server) == 2 * CALLS)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(240) == 0
        assert len(server.events("stopped")) == 2


def test_calls_on_a_connection_to_a_killed_process_fail_and_the_next_ones_do_not(
    models: Path, tmp_path: Path, images: np.ndarray, logits: np.ndarray
) -> None:
    data = infer_request(images).SerializeToString()
    with serving_twice(models, tmp_path / "log", "--grpc-port", "0") as server, channel_to(server) as channel:
        assert call(channel, INFER, data).code == "OK"
        until(lambda: any(line.get("path") == INFER for line in server.events()))
        (process,) = {line["process"] for line in server.events() if line.get("path") == INFER}
        os.kill(running(server)[process], signal.SIGKILL)
        codes = {call(channel, INFER, data, timeout=240, wait_for_ready=True).code for _ in range(20)}
        assert codes <= {"OK", "UNAVAILABLE"}
        assert np.allclose(infer(channel, images, wait_for_ready=True), logits, atol=1e-3)


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_port_that_is_taken(models: Path, tmp_path: Path, processes: str) -> None:
    with serving_twice(models, tmp_path / "log", "--grpc-port", "0") as server:
        words = (str(models), "--port", "0", "--grpc-port", str(server.grpc_port), "--processes", processes)
        message = refused(*words, code=2)
        assert f"port {server.grpc_port} can't be used" in message
        assert "Choose another --host or --grpc-port" in message
