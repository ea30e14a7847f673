from collections.abc import Callable, Mapping

import numpy as np
import pytest

from bnexport.errors import BundleError, FeedError, RuntimeUnavailable, UsageError
from bnexport.runtimes.base import Runner, device_remedy, plain_reason
from bnexport.tensors import Array, Signature, TensorSpec

SIGNATURE = Signature((TensorSpec("x", "float32", ("batch", 3)),), (TensorSpec("y", "float32", ("batch", 2)),))
X = np.ones((4, 3), np.float32)


class Fake(Runner):
    def __init__(self, function: Callable[[Array], Mapping[str, Array]], *, device: str = "cpu") -> None:
        self.name, self.signature, self.effective_device, self.description = "fake", SIGNATURE, device, {}
        self.function = function

    def _run(self, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        return self.function(feeds["x"])


def test_a_fitting_output_is_returned_in_separate_memory() -> None:
    inner = np.zeros((4, 2), np.float32)
    with Fake(lambda _x: {"y": inner}) as runner:
        first = runner.run({"x": X})["y"]
        first += 5
        assert inner.max() == 0
        assert runner.run({"x": X})["y"].max() == 0
        assert first.flags.owndata
        assert first.flags.writeable


@pytest.mark.parametrize(
    ("outputs", "words"),
    [
        ({}, "no output 'y', only none"),
        ({"z": np.zeros((4, 2), np.float32)}, "no output 'y', only 'z'"),
        ({"y": np.zeros((4, 3), np.float32)}, "has shape 4x3, expected 4x2"),
        ({"y": np.zeros((3, 2), np.float32)}, "has shape 3x2, expected 4x2"),
        ({"y": np.zeros((8,), np.float32)}, "has shape 8, expected 4x2"),
        ({"y": np.zeros((4, 2), np.float64)}, "is float64, expected float32"),
    ],
)
def test_an_output_that_does_not_fit_the_signature_is_refused(outputs: dict[str, Array], words: str) -> None:
    with Fake(lambda _x: outputs) as runner, pytest.raises(BundleError, match=words):
        runner.run({"x": X})


@pytest.mark.parametrize(
    ("feeds", "words"),
    [
        ({}, "'x' is missing"),
        ({"x": X, "z": X}, "no input 'z'"),
        ({"x": X.astype(np.float64)}, "is float64, expected float32"),
        ({"x": X[:, :2]}, "has shape 4x2"),
    ],
)
def test_feeds_that_do_not_fit_never_reach_the_engine(feeds: dict[str, Array], words: str) -> None:
    def never(_x: Array) -> Mapping[str, Array]:
        raise AssertionError("the engine was called")

    with Fake(never) as runner, pytest.raises(FeedError, match=words):
        runner.run(feeds)


def test_values_that_are_not_finite_are_left_to_the_verifier() -> None:
    with Fake(lambda _x: {"y": np.full((4, 2), np.nan, np.float32)}) as runner:
        assert np.isnan(runner.run({"x": X})["y"]).all()


def test_the_engine_gets_contiguous_arrays() -> None:
    def check(x: Array) -> Mapping[str, Array]:
        assert x.flags.c_contiguous
        return {"y": x[:, :2]}

    with Fake(check) as runner:
        strided = np.arange(24, dtype=np.float32).reshape(3, 8).T[::2]
        np.testing.assert_array_equal(runner.run({"x": strided})["y"], strided[:, :2])


@pytest.mark.parametrize(("device", "kind"), [("cpu", BundleError), ("cuda:0", RuntimeUnavailable)])
def test_foreign_exceptions_are_translated_to_one_line(device: str, kind: type[Exception]) -> None:
    def fail(_x: Array) -> Mapping[str, Array]:
        raise RuntimeError("out\nof   memory")

    with Fake(fail, device=device) as runner, pytest.raises(kind, match="out of memory"):
        runner.run({"x": X})


MEMORY, KERNELS, DRIVER = "Free the GPU's memory", "has kernels for this GPU", "Update the NVIDIA driver"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("CUDA out of memory. Tried to allocate 2.00 GiB", MEMORY),
        ("CUDA failure 2: out of memory ; GPU=0 ; hostname=h ; expr=cudaMalloc((void**)&p, size);", MEMORY),
        ("BFCArena::AllocateRawInternal Failed to allocate memory for requested buffer of size 939524096", MEMORY),
        ("Available memory of 1024 is smaller than requested bytes of 2048", MEMORY),
        ("CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ; expr=cublasCreate(&cublas_handle_);", MEMORY),
        ("CUDA error: no kernel image is available for execution on the device", KERNELS),
        ("CUDA failure 35: CUDA driver version is insufficient for CUDA runtime version", DRIVER),
        ("CUDNN failure 4000: CUDNN_STATUS_INTERNAL_ERROR", "new process"),
        ("CUDA failure 700: an illegal memory access was encountered", "new process"),
    ],
)
def test_a_fault_on_a_gpu_has_the_remedy_for_its_cause(text: str, words: str) -> None:
    def fail(_x: Array) -> Mapping[str, Array]:
        raise RuntimeError(text)

    with Fake(fail, device="cuda:0") as runner, pytest.raises(RuntimeUnavailable) as caught:
        runner.run({"x": X})
    assert words in caught.value.remedy
    assert caught.value.remedy == device_remedy(text)
    assert (MEMORY in caught.value.remedy) == (words == MEMORY)


def test_a_closed_runner_reports_it() -> None:
    with Fake(lambda x: {"y": x[:, :2]}) as runner:
        pass
    with pytest.raises(UsageError, match="closed"):
        runner.run({"x": X})


def test_the_probe_is_left_out_where_no_size_is_known() -> None:
    calls = []
    runner = Fake(lambda x: calls.append(x.shape) or {"y": x[:, :2]})
    runner.probe()
    assert calls == [(2, 3)]
    runner.signature = Signature((TensorSpec("x", "float32", ("batch", "length")),), SIGNATURE.outputs)
    runner.probe()
    assert len(calls) == 1


def test_small_helpers() -> None:
    assert [shape for _, shape, _, _ in Fake(lambda x: {})._outputs_for({"x": X})] == [(4, 2)]
    assert plain_reason("a", RuntimeUnavailable("a can't run here: no b", remedy="c")) == "no b"
