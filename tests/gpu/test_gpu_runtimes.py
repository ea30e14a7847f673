"""Tests that need a GPU. Each one skips without a GPU, and fails if BNEXPORT_REQUIRE names the missing part.

The table of settings is the GPU lane's own, so that what is documented is what is tested.
"""

from pathlib import Path

import numpy as np
import pytest
from support.bundles import fold_by_hand, network, write_exported, write_onnx, write_torchscript
from support.runtimes import parameter

from benchmarks.gpu.lane import LaneInput, run_lane
from benchmarks.gpu.measure import RuntimeRun, between_sessions
from benchmarks.gpu.refusals import REFUSALS, HiddenLibrary, refuse
from benchmarks.gpu.results import Lane
from benchmarks.gpu.sweeps import Sweep, gpu_sweeps
from bnexport.bundle import MODEL_EXPORTED, MODEL_ONNX, MODEL_TORCHSCRIPT, Bundle
from bnexport.runtimes.base import CONV_SEARCHES, OPTIMISATIONS, RunSettings
from bnexport.runtimes.catalogue import RUNNERS, runner_spec
from bnexport.verification.scope import Scope
from bnexport.verification.verify import verify

GPU = [parameter(spec) for spec in RUNNERS if spec.device != "cpu"]
TORCH = [parameter(spec) for spec in RUNNERS if spec.device == "cuda" and spec.engine != "onnxruntime"]
BOTH = ("float32", "tf32")
X = np.random.default_rng(4).random((64, 1, 28, 28), dtype=np.float32)
#: TF32 came with compute capability 8.0; an older GPU computes in float32 in any case.
TF32_SINCE = (8, 0)


def has_tf32() -> bool:
    import torch

    return torch.cuda.get_device_capability(0) >= TF32_SINCE


def measured(bundle: Bundle, name: str, scope: Scope) -> Lane:
    sweep = Sweep(runner_spec(name), scope)
    return run_lane(LaneInput(bundle, max_samples=200), [sweep], training=False, refusals=(), jobs=0)


def right(run: RuntimeRun) -> None:
    assert run.passed, run.reason
    assert run.detected == "float32" if run.stage == "strict" else run.detected != ""


@pytest.mark.parametrize("name", GPU)
def test_both_stages_pass_on_the_gpu_and_batches_agree(bundle: Bundle, name: str) -> None:
    found = measured(bundle, name, Scope(BOTH))
    assert found.passed, (found.broken, [run.reason for run in found.runs])
    strict, shipping = found.runs
    right(strict)
    right(shipping)
    assert strict.error < 1e-5
    assert strict.repeat < 1e-5
    assert strict.batches < 1e-5
    if has_tf32():
        assert shipping.error > strict.error


@pytest.mark.needs("ort-cuda")
def test_every_way_of_calling_cuda(bundle: Bundle) -> None:
    """{TF32 on, off} x {HEURISTIC, DEFAULT, EXHAUSTIVE} x {run, IO binding} x optimisation level, all nodes on CUDA."""
    found = measured(bundle, "onnxruntime-cuda", Scope(BOTH, OPTIMISATIONS, (False, True), CONV_SEARCHES, drift=False))
    assert found.passed, (found.broken, [run.reason for run in found.runs if not run.passed])
    assert len(found.runs) == 2 * len(OPTIMISATIONS) * 2 * len(CONV_SEARCHES)
    for run in found.runs:
        right(run)
        assert list(run.nodes) == ["CUDAExecutionProvider"]


@pytest.mark.needs("tensorrt")
def test_every_way_of_calling_tensorrt(bundle: Bundle) -> None:
    sweep = gpu_sweeps()[-1]
    found = measured(bundle, "onnxruntime-tensorrt", sweep.scope)
    assert found.passed, (found.broken, [run.reason for run in found.runs if not run.passed])
    for run in found.runs:
        assert run.nodes["TensorrtExecutionProvider"] > 0
        assert "CPUExecutionProvider" not in run.nodes


@pytest.mark.needs("ort-cuda")
@pytest.mark.parametrize("search", CONV_SEARCHES)
@pytest.mark.parametrize("precision", BOTH)
def test_the_settings_of_cuda_are_read_back(bundle: Bundle, precision: str, search: str) -> None:
    settings = RunSettings(precision, "basic", search, binding=True, isolated=True)
    with runner_spec("onnxruntime-cuda").open(bundle, settings=settings) as runner:
        runner.run({"input": X})
        found = runner.description
    assert found["device"] == "cuda:0"
    assert found["precision"] == precision
    assert found["optimisation"] == "basic"
    assert found["memory"] == "bound on cuda"
    assert found["process"] == "its own"
    assert found["options"]["CUDAExecutionProvider"]["use_tf32"] == ("1" if precision == "tf32" else "0")
    assert found["options"]["CUDAExecutionProvider"]["cudnn_conv_algo_search"] == search.upper()


@pytest.mark.needs("ort-cuda")
@pytest.mark.parametrize("search", CONV_SEARCHES)
def test_two_sessions_agree_within_strict_float32(bundle: Bundle, search: str) -> None:
    settings = RunSettings(conv_search=search, isolated=True)
    assert between_sessions(runner_spec("onnxruntime-cuda"), bundle, settings) < 1e-5


@pytest.mark.needs("ort-cuda")
@pytest.mark.parametrize("size", [0, 1, 7, 64, 3])
def test_bound_memory_of_one_batch_size_is_not_used_for_another(bundle: Bundle, size: int) -> None:
    spec = runner_spec("onnxruntime-cuda")
    with spec.open(bundle) as plain, spec.open(bundle, settings=RunSettings(binding=True)) as bound:
        bound.run({"input": X})
        np.testing.assert_allclose(
            bound.run({"input": X[:size]})["logits"], plain.run({"input": X[:size]})["logits"], rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("name", TORCH)
def test_the_global_state_does_not_change(bundle: Bundle, name: str) -> None:
    import torch

    def state() -> tuple[object, ...]:
        cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
        return cudnn.deterministic, cudnn.benchmark, cudnn.conv.fp32_precision, products.fp32_precision

    before = state()
    for isolated in (False, True):
        for precision in BOTH:
            with runner_spec(name).open(bundle, settings=RunSettings(precision, isolated=isolated)) as runner:
                runner.run({"input": X})
                assert state() == before
    assert state() == before


@pytest.mark.parametrize("name", GPU)
def test_a_wrong_fold_is_caught_in_both_stages(bundle: Bundle, tmp_path: Path, name: str) -> None:
    """A variance off by 256/255 is as small as TF32's own noise on some inputs; strict float32 must detect it."""
    if runner_spec(name).engine == "torch":
        pytest.skip("the original network has no fold")
    from support.bundles import copy_bundle, reseal

    def biased(bn: object) -> tuple[object, object]:
        scale = bn.weight.double() / (bn.running_var.double() * 256 / 255 + bn.eps).sqrt()
        return scale, bn.bias.double() - scale * bn.running_mean.double()

    folder, state = copy_bundle(bundle, tmp_path / "1"), fold_by_hand(network(), biased)
    write_onnx(folder / MODEL_ONNX, state)
    write_torchscript(folder / MODEL_TORCHSCRIPT, state)
    write_exported(folder / MODEL_EXPORTED, state)
    report = verify(reseal(folder), runtimes=[name], scope=Scope(BOTH, max_samples=200, drift=False))
    assert "strict" in {row.stage for row in report.failures if row.subject == name}


def capability(refusal: HiddenLibrary) -> object:
    (needed,) = parameter(runner_spec(refusal.runtime)).marks
    return pytest.param(refusal, marks=needed, id=f"{refusal.name}, {refusal.runtime}")


@pytest.mark.parametrize("refusal", [capability(row) for row in REFUSALS])
def test_a_hidden_library_is_refused_by_name(bundle: Bundle, refusal: HiddenLibrary) -> None:
    """Everything else is there, so that only what is hidden can be the reason."""
    found = refuse(refusal, bundle.path)
    assert found.passed, found
    assert found.code == 3
    assert "PASS" not in found.said
