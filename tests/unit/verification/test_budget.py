"""The number of samples that a verification compares, and evaluations of inputs of one size in one call."""

import itertools
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from support.onnx_builder import Builder
from torch import nn

from bnexport.bundle import MODEL_ONNX, Bundle, Manifest, seal, write_golden
from bnexport.errors import BundleError
from bnexport.runtimes.base import RunSettings
from bnexport.runtimes.catalogue import runner_spec
from bnexport.tensors import Array, Signature, TensorSpec
from bnexport.verification.budget import Work, budget_of
from bnexport.verification.evidence import prepare
from bnexport.verification.inputs import Batch, each_once
from bnexport.verification.runs import run_runtime
from bnexport.verification.scope import Scope

LENET, RESNET50 = 280_000, 4_100_000_000


def test_a_small_network_is_compared_on_every_image() -> None:
    found = budget_of(Work(LENET))
    assert found.real > 10_000
    assert (found.noise, found.one_hot, found.constant) == (256, 784, 2)
    assert found.batch_sizes == (1, 2, 7, 64)
    assert found.proof == found.proof_other == 512
    assert budget_of(Work(LENET), thorough=True).proof > 2_000
    assert budget_of(Work(LENET), thorough=True).synthetic == found.synthetic


def test_a_large_network_has_few_samples_of_each_kind_and_more_on_request() -> None:
    found, thorough = budget_of(Work(RESNET50)), budget_of(Work(RESNET50), thorough=True)
    assert (found.real, found.noise, found.one_hot, found.constant) == (8, 4, 1, 1)
    assert (found.batch_sizes, found.repeat) == ((1, 2), 2)
    assert (found.proof, found.proof_other) == (2, 1)
    assert budget_of(Work(RESNET50), given=True).real == 16
    assert min(thorough.real, thorough.noise, thorough.one_hot, thorough.repeat) == 16
    assert thorough.batch_sizes == (1, 2, 7, 64)
    assert (thorough.proof, thorough.proof_other) == (2, 2)


@pytest.mark.parametrize("cost", [0, 1, LENET, RESNET50])
def test_a_maximum_holds_for_every_kind(cost: int) -> None:
    found = budget_of(Work(cost), most=1, thorough=True, given=True)
    counts = (found.real, found.noise, found.one_hot, found.constant, found.proof, found.proof_other)
    assert counts == (1, 1, 1, 1, 1, 1)


def test_more_work_never_gives_more_samples() -> None:
    budgets = [budget_of(Work(10**power)) for power in range(3, 12)]
    for less, more in itertools.pairwise(budgets):
        assert (less.real, less.synthetic, less.proof) >= (more.real, more.synthetic, more.proof)
        assert set(less.batch_sizes) >= set(more.batch_sizes)


def test_large_samples_are_fewer() -> None:
    """A sample of 5 MB, whose values take 60 MB in all, of a network that multiplies little."""
    found = budget_of(Work(10**7, 5 * 10**6, 6 * 10**7))
    assert (found.real, found.noise, found.one_hot, found.proof) == (20, 10, 10, 10)
    assert (found.call, found.repeat, found.batch_sizes) == (8, 8, (1, 2, 7))
    huge = budget_of(Work(1, 10**9, 10**10), thorough=True)
    assert (huge.real, huge.noise, huge.call) == (16, 16, 4), "the smallest numbers hold whatever a sample costs"


def pooled(folder: Path) -> tuple[Bundle, nn.Module]:
    """A convolution of one tap over 100 x 100 pixels: 0.12 MB of inputs and 0.76 MB of values per sample."""
    builder = Builder()
    builder.input("batch", 3, 100, 100)
    maps = builder.conv("x", 3, 16, 1)
    builder.node("Flatten", builder.node("GlobalAveragePool", maps), outputs=("y",))
    builder.output("y", rank=2)
    onnx.save(builder.model(), folder / MODEL_ONNX)
    module = nn.Sequential(nn.Conv2d(3, 16, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    with torch.no_grad():
        for parameter, tensor in zip(module.parameters(), builder.stored, strict=True):
            parameter.copy_(torch.tensor(numpy_helper.to_array(tensor)))
    image, scores = ("batch", 3, 100, 100), ("batch", 16)
    signature = Signature((TensorSpec("x", "float32", image),), (TensorSpec("y", "float32", scores),))
    x = np.random.default_rng(0).standard_normal((2, 3, 100, 100)).astype(np.float32)
    write_golden(folder, signature, {"x": x}, {"y": module.double()(torch.from_numpy(x).double()).detach().numpy()})
    return seal(folder, Manifest("pooled", 1, signature, {"source": "mine.py:pooled"})), module.float()


def test_a_cheap_network_of_large_images_is_verified_in_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, module = pooled(tmp_path)
    evidence = prepare(bundle, module, seed=0, scope=Scope())
    assert max(case.batch.feeds["x"].nbytes for case in evidence.cases) <= 5e7
    calls: list[int] = []
    with runner_spec("onnxruntime-cpu").open(bundle) as runner:
        plain = runner.run

        def counted(feeds: dict[str, Array]) -> dict[str, Array]:
            calls.append(len(feeds["x"]))
            return plain(feeds)

        monkeypatch.setattr(runner, "run", counted)
        run = run_runtime(runner, RunSettings(), evidence, file=MODEL_ONNX)
    assert all(row.passed for row in run.rows), run.rows
    assert sum(calls) > sum(case.batch.n for case in evidence.cases) > 500
    assert max(calls) * 4 * (3 + 16) * 100**2 <= 5e8


class Doubling:
    """Doubles its input, and records the batches that it was called with."""

    def __init__(self, refused: float | None = None, *, first_only: bool = False) -> None:
        self.calls: list[int] = []
        self.refused, self.first_only = refused, first_only

    def __call__(self, feeds: dict[str, Array]) -> dict[str, Array]:
        x = feeds["x"]
        self.calls.append(len(x))
        if self.refused is not None and (x == self.refused).any():
            raise BundleError(f"no {self.refused}", remedy="none")
        return {"y": 2 * x[0] if self.first_only else 2 * x}


def batch(name: str, value: float, *shape: int, smallest: bool = False) -> Batch:
    return Batch(name, {"x": np.full(shape, value)}, smallest)


BATCHES = (batch("a", 1, 3, 2), batch("wide", 2, 1, 5), batch("b", 3, 2, 2), batch("least", 4, 2, 2, smallest=True))


def test_batches_of_one_sample_shape_are_evaluated_in_one_call() -> None:
    evaluate = Doubling()
    found = each_once(BATCHES, evaluate)
    assert evaluate.calls == [5, 1, 2]
    for item, outputs in zip(BATCHES, found, strict=True):
        assert not isinstance(outputs, Exception)
        np.testing.assert_array_equal(outputs["y"], 2 * item.feeds["x"])


def test_a_fixed_batch_is_evaluated_alone() -> None:
    evaluate = Doubling()
    each_once(BATCHES, evaluate, together=False)
    assert evaluate.calls == [3, 1, 2, 2]


def test_an_error_is_that_of_its_own_batch() -> None:
    found = each_once(BATCHES, Doubling(refused=3))
    assert [isinstance(item, BundleError) for item in found] == [False, False, True, False]
    assert found[0]["y"].shape == (3, 2)  # type: ignore[index]


def test_outputs_without_a_batch_are_evaluated_one_by_one() -> None:
    evaluate = Doubling(first_only=True)
    found = each_once(BATCHES[:1] + BATCHES[2:3], evaluate)
    assert evaluate.calls == [5, 3, 2]
    assert [item["y"].tolist() for item in found] == [[2, 2], [6, 6]]  # type: ignore[index]
