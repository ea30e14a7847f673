"""Triton's stock client, unchanged, in a separate environment: its protobuf is older than onnx's."""

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.serving import Server

from bnexport.proto_messages import INFERENCE, message_classes
from bnexport.serving.grpc.grpc_server import METHODS, STREAM

pytestmark = pytest.mark.slow


def run(python: Path, program: str, port: int, folder: Path) -> dict[str, Any]:
    words = [str(Path(__file__).with_name(program)), str(port), str(folder / "inputs.npy"), str(folder / "logits.npy")]
    done = subprocess.run([str(python), *words], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture
def data(tmp_path: Path, images: np.ndarray, logits: np.ndarray) -> Path:
    np.save(tmp_path / "inputs.npy", images)
    np.save(tmp_path / "logits.npy", logits)
    return tmp_path


def good(result: Mapping[str, Any], count: int) -> None:
    assert result["wrong"] == []
    assert tuple(map(int, result["versions"]["tritonclient"].split(".")[:2])) >= (2, 60)
    assert result["versions"]["protobuf"].startswith("6.")
    assert len(result["done"]) > count


def test_every_call(python: Path, server: Server, data: Path) -> None:
    good(run(python, "triton_program.py", server.port, data), 70)


def test_every_call_over_grpc(python: Path, server: Server, data: Path) -> None:
    result = run(python, "triton_grpc_program.py", server.grpc_port, data)
    good(result, 80)
    the_same_messages(result["messages"])
    service = f"/{INFERENCE}.GRPCInferenceService/"
    ours = {path.removeprefix(service) for path in (*METHODS, STREAM) if path.startswith(service)}
    assert ours <= set(result["methods"])
    left_out = {name for name in set(result["methods"]) - ours if "SharedMemory" not in name}
    assert left_out == {"TraceSetting", "LogSettings"}


def the_same_messages(theirs: Mapping[str, Any]) -> None:
    """Every field has the number, the type and the label that it has in the client."""
    ours = [kind.DESCRIPTOR for kind in message_classes("a test").values() if kind.DESCRIPTOR.file.package == INFERENCE]
    assert len(ours) > 40
    for message in ours:
        for field in message.fields:
            inner = field.message_type or field.enum_type
            kind = field.type if inner is None else inner.full_name
            declared = theirs[message.full_name][field.name]
            assert declared == [field.number, kind, field.is_repeated], field.full_name
