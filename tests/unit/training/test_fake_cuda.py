"""Training on CUDA tensors without numbers (torch's FakeTensorMode): mixed devices and waits of the host, without a GPU.

torch's autograd wants one CUDA device before it runs backward on such tensors. A shim of a few functions, compiled here and
loaded before torch, pretends that device to a child process; nothing is computed on it.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from unit.training.fake_cuda_child import CASES

HERE = Path(__file__).parent
SHIM = """
int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaSetDevice(int device) { return 0; }
int cudaGetLastError(void) { return 0; }
int cudaPeekAtLastError(void) { return 0; }
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = *greatest = 0; return 0; }
int cudaStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
/* Compute capability 9.0, at the place that CUDA 12 and 13 have it; convolutions in bfloat16 read it. */
int cudaGetDeviceProperties(char *properties, int device) {
    *(int *)(properties + 308) = 32; *(int *)(properties + 360) = 9; *(int *)(properties + 364) = 0; return 0;
}
int cudaGetDeviceProperties_v2(char *properties, int device) { return cudaGetDeviceProperties(properties, device); }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 0; return 0; }
"""
COMPILER = shutil.which("gcc") or shutil.which("cc")
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux" or COMPILER is None, reason="needs Linux and a C compiler"),
    pytest.mark.skipif(torch.version.cuda is None, reason="needs a torch that is built for CUDA"),
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[str, str]:
    """The outcome of every case that the selected tests need."""
    chosen = [
        item.callspec.params["name"]
        for item in request.session.items
        if item.path == request.path and hasattr(item, "callspec")
    ]
    names = [name for name in CASES if name.removeprefix("planted ") in chosen]
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.c").write_text(SHIM)
    shim, paths = (
        folder / "libcuda.so.1",
        [str(HERE.parents[1]), os.environ.get("PYTHONPATH", ""), str(HERE.parents[2])],
    )
    words = [str(COMPILER), "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(shim), str(folder / "shim.c")]
    subprocess.run(words, check=True, capture_output=True)
    environment = {
        **os.environ, "LD_PRELOAD": str(shim), "LD_LIBRARY_PATH": str(folder), "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }  # fmt: skip
    found = subprocess.run(
        [sys.executable, str(HERE / "fake_cuda_child.py"), *names], env=environment, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    outcomes: dict[str, str] = json.loads(found.stdout)
    return outcomes


RIGHT = [name for name in CASES if not name.startswith("planted")]
#: A planted fault -> part of the message about it.
PLANTED = {
    "constant_on_the_cpu": ("two", "devices", "cuda", "cpu"),
    "statistics_on_the_cpu": ("two", "devices", "cuda", "cpu"),
    "momentum_on_the_cpu": ("_fused_sgd_", "['cpu', 'cuda']"),
    "labels_on_the_cpu": ("two", "devices", "cuda", "cpu"),
    "a_loss_that_is_read": ("the host waits: aten._local_scalar_dense",),
    "indices_that_block": ("the host waits: aten._to_copy.default to cuda",),
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", RIGHT)
def test_everything_is_on_the_device_and_no_step_waits_for_it(outcomes: dict[str, str], name: str) -> None:
    assert outcomes[name] == "right"


def test_every_planted_fault_has_its_words() -> None:
    assert {f"planted {name}" for name in PLANTED} == set(CASES) - set(RIGHT)


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_found(outcomes: dict[str, str], name: str) -> None:
    for words in PLANTED[name]:
        assert words in outcomes[f"planted {name}"]
