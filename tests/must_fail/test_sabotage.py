"""Every sabotage on every runtime has to FAIL; the untouched bundle has to PASS.

Most pairs of a sabotage and a runtime are slow, see ``support.runtimes.pairs``.

The spoiled bundles are sealed again, so that the hashes hold and the numbers themselves have to give the fault away; the
faults of files as such (a flipped bit, a truncated file) are left with the old seal.
"""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
from onnx import numpy_helper
from support import bundles
from support.bundles import PAIRS, copy_bundle, flip_bit, fold_by_hand, network, reseal
from support.runtimes import READS_EXPORTED, RUNTIMES, pairs, parameter

from bnexport.bundle import MODEL_EXPORTED, MODEL_ONNX, MODEL_TORCHSCRIPT, WEIGHTS, Bundle
from bnexport.data.preprocessing import Preprocessing
from bnexport.runtimes import small_model
from bnexport.runtimes.catalogue import RUNNERS
from bnexport.tensors import Signature, TensorSpec
from bnexport.verification import budget as verifying
from bnexport.verification.self_test.norm_faults import NORM_FAULTS, NormFault, norms_of
from bnexport.verification.verify import verify

State = dict[str, torch.Tensor]
FILE_OF = {spec.name: spec.file for spec in RUNNERS}


@pytest.fixture(autouse=True)
def few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault has to be seen on the samples that the largest network gets: 8 images, 4 of noise, 1 of each other kind."""
    for name in ("_REAL_WORK", "_SYNTHETIC_WORK", "_PROOF_WORK"):
        monkeypatch.setattr(verifying, name, 1.0)


def with_fault(row: NormFault, *, everywhere: bool = False) -> State:
    """Return the hand-made fold of a network with one fault of the shipped table, by default in the second BatchNorm alone."""
    spoiled = copy.deepcopy(network())
    norms = norms_of(spoiled)
    with torch.no_grad():
        for _, norm in norms if everywhere else norms[1:2]:
            row.change(norm)
    return fold_by_hand(spoiled)


def changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> State:
    state = fold_by_hand(network())
    state[name] = change(state[name].clone())
    return state


def one_channel(factor: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(weight: torch.Tensor) -> torch.Tensor:
        weight[3] *= factor
        return weight

    return change


def nan_in(weight: torch.Tensor) -> torch.Tensor:
    weight.view(-1)[11] = float("nan")
    return weight


def swapped(weight: torch.Tensor) -> torch.Tensor:
    return weight[[0, 1, 2, 4, 3, *range(5, len(weight))]].contiguous()


def other_weights() -> State:
    state = fold_by_hand(network())
    generator = torch.Generator().manual_seed(99)
    return {name: tensor + 0.01 * torch.randn(tensor.shape, generator=generator) for name, tensor in state.items()}


#: Name -> folded weights with one fault.
WRONG_WEIGHTS: dict[str, Callable[[], State]] = {
    **{row.name: partial(with_fault, row) for row in NORM_FAULTS},
    "scale x 1.01 in one channel": lambda: changed("conv2.weight", one_channel(1.01)),
    "scale x 1.01 in one channel of a linear layer": lambda: changed("fc2.weight", one_channel(1.01)),
    "swapped biases": lambda: changed("fc1.bias", swapped),
    "NaN in a weight": lambda: changed("fc1.weight", nan_in),
    "infinite bias": lambda: changed("fc3.bias", lambda bias: bias.index_fill(0, torch.tensor([2]), float("inf"))),
    "weights of a later epoch": other_weights,
}


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_the_untouched_bundle_passes(bundle: Bundle, tmp_path: Path, runtime: str) -> None:
    report = verify(bundle, runtimes=[runtime])
    assert report.passed, report.failures
    # Written once more and sealed again, as the sabotages are: still right.
    folder = copy_bundle(bundle, tmp_path / "1")
    write_models(folder, fold_by_hand(network()))
    report = verify(reseal(folder), runtimes=[runtime])
    assert report.passed, report.failures


def write_models(folder: Path, state: State) -> None:
    bundles.write_onnx(folder / MODEL_ONNX, state)
    bundles.write_torchscript(folder / MODEL_TORCHSCRIPT, state)
    bundles.write_exported(folder / MODEL_EXPORTED, state)


@pytest.mark.parametrize(("fault", "runtime"), pairs(WRONG_WEIGHTS, READS_EXPORTED))
def test_a_wrong_fold_fails_in_the_proof_and_on_the_runtime(
    bundle: Bundle, tmp_path: Path, fault: str, runtime: str
) -> None:
    folder = copy_bundle(bundle, tmp_path / "1")
    write_models(folder, WRONG_WEIGHTS[fault]())
    report = verify(reseal(folder), runtimes=[runtime])
    assert not report.passed
    assert "integrity" not in {row.stage for row in report.failures}
    proof = [row for row in report.rows if row.stage == "file-proof"]
    assert any(not row.passed for row in proof)
    # The comparison of the runtime finds the fault too, without the proof.
    assert any(not row.passed for row in report.rows if row.stage == "strict" and row.subject == runtime)
    assert all(row.reason for row in report.failures)


@pytest.mark.parametrize("fault", ["scale x 1.01 in one channel", "NaN in a weight", "weights of a later epoch"])
def test_one_format_made_from_other_weights_fails_the_bit_comparison(
    bundle: Bundle, tmp_path: Path, fault: str
) -> None:
    folder = copy_bundle(bundle, tmp_path / "1")
    bundles.write_torchscript(folder / MODEL_TORCHSCRIPT, WRONG_WEIGHTS[fault]())
    report = verify(reseal(folder), runtimes=["onnxruntime-cpu"])
    assert {(row.stage, row.subject) for row in report.failures} == {
        ("weights", MODEL_TORCHSCRIPT),
        ("file-proof", MODEL_TORCHSCRIPT),
    }


def test_one_bit_of_one_weight_fails_the_bit_comparison(bundle: Bundle, tmp_path: Path) -> None:
    """The error is below every tolerance, so only the bits show it."""
    folder = copy_bundle(bundle, tmp_path / "1")
    state = fold_by_hand(network())
    state["fc2.weight"].view(torch.int32)[5, 5] ^= 1
    bundles.write_torchscript(folder / MODEL_TORCHSCRIPT, state)
    report = verify(reseal(folder), runtimes=["torchscript-cpu"])
    assert [row.stage for row in report.failures] == ["weights"]
    assert "'fc2.weight'" in report.failures[0].reason


STATISTICS = {
    "one sign": ("bn2.weight", one_channel(-1)),
    "variance x 1.01": ("bn1.running_var", one_channel(1.01)),
    "NaN": ("bn3.running_mean", nan_in),
}


@pytest.mark.parametrize(("fault", "runtime"), pairs(STATISTICS))
def test_other_unfolded_weights_fail(bundle: Bundle, tmp_path: Path, fault: str, runtime: str) -> None:
    """weights.safetensors is stale: the golden vectors and the files were made of another network."""
    folder = copy_bundle(bundle, tmp_path / "1")
    state, (name, change) = safetensors.torch.load_file(folder / WEIGHTS), STATISTICS[fault]
    safetensors.torch.save_file({**state, name: change(state[name].clone())}, folder / WEIGHTS)
    report = verify(reseal(folder), runtimes=[runtime])
    assert any(row.stage == "golden-reference" for row in report.failures)
    if FILE_OF[runtime] == WEIGHTS:
        assert any(row.stage == "golden" and row.subject == runtime for row in report.failures)


@pytest.mark.parametrize("runtime", [parameter(spec) for spec in READS_EXPORTED])
def test_a_foreign_network_without_its_code_still_fails_on_the_golden_vectors(
    bundle: Bundle, tmp_path: Path, runtime: str
) -> None:
    folder = copy_bundle(bundle, tmp_path / "1")
    (fault,) = (row for row in NORM_FAULTS if row.name == "eps dropped")
    write_models(folder, with_fault(fault, everywhere=True))
    report = verify(reseal(folder, network={"source": "mine.py:net"}), runtimes=[runtime])
    assert {"golden", "file-proof", "strict"} <= {row.stage for row in report.failures}


def rename_output(file: Path) -> None:
    model = onnx.load(file)
    model.graph.output[0].name = model.graph.node[-1].output[0] = "scores"
    onnx.save(model, file)


def cut_classes(file: Path) -> None:
    model = onnx.load(file)
    for tensor in model.graph.initializer:
        if tensor.name.startswith("fc3."):
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor)[:9].copy(), tensor.name))
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 9
    del model.graph.value_info[:]
    onnx.save(model, file)


def fix_batch(file: Path) -> None:
    model = onnx.load(file)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    onnx.save(model, file)


#: Damage to a file.
BAD_FILES: dict[str, Callable[[Path], object]] = {
    "one flipped bit": flip_bit,
    "truncated": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "empty": lambda file: file.write_bytes(b""),
    "a foreign file": lambda file: file.write_text("this is not a model\n" * 20),
    "missing": Path.unlink,
}
#: Valid files that are not this bundle's.
OTHER_FILES = {
    (MODEL_ONNX, "a missing output"): rename_output,
    (MODEL_ONNX, "fewer classes"): cut_classes,
    (MODEL_ONNX, "a fixed batch"): fix_batch,
    (MODEL_ONNX, "another model"): small_model.write_onnx,
    (MODEL_TORCHSCRIPT, "another model"): small_model.write_torchscript,
}


@pytest.mark.parametrize(("fault", "runtime"), pairs(BAD_FILES))
def test_a_bad_file_fails_by_its_hash_and_is_not_opened(
    bundle: Bundle, tmp_path: Path, fault: str, runtime: str
) -> None:
    folder = copy_bundle(bundle, tmp_path / "1")
    BAD_FILES[fault](folder / FILE_OF[runtime])
    report = verify(folder, runtimes=[runtime])
    assert not report.passed
    assert [row.subject for row in report.failures if row.stage == "integrity"] == [FILE_OF[runtime]]
    own = [row for row in report.rows if row.subject == runtime]
    assert [(row.stage, row.passed) for row in own] == [("strict", False)]
    assert "not opened" in own[0].reason


@pytest.mark.parametrize(
    ("fault", "runtime"), pairs(name for name in BAD_FILES if name not in ("one flipped bit", "missing"))
)
def test_a_bad_file_under_a_new_seal_fails_in_one_sentence(
    bundle: Bundle, tmp_path: Path, fault: str, runtime: str
) -> None:
    folder = copy_bundle(bundle, tmp_path / "1")
    BAD_FILES[fault](folder / FILE_OF[runtime])
    report = verify(reseal(folder), runtimes=[runtime])
    own = [row for row in report.failures if row.subject == runtime]
    assert own
    assert all(row.reason and "\n" not in row.reason for row in report.failures)


@pytest.mark.parametrize(("fault", "runtime"), pairs(OTHER_FILES, READS_EXPORTED, name="-".join))
def test_another_model_under_a_new_seal_fails(
    bundle: Bundle, tmp_path: Path, fault: tuple[str, str], runtime: str
) -> None:
    folder, file = copy_bundle(bundle, tmp_path / "1"), fault[0]
    OTHER_FILES[fault](folder / file)
    report = verify(reseal(folder), runtimes=[runtime])
    assert not report.passed
    assert any(row.subject in (runtime, file) for row in report.failures)


@pytest.mark.parametrize(
    ("output", "runtime"),
    pairs(
        [TensorSpec("scores", "float32", ("batch", 10)), TensorSpec("logits", "float16", ("batch", 10))],
        name=lambda output: output.name,
    ),
)
def test_a_manifest_that_promises_another_output_fails(
    bundle: Bundle, tmp_path: Path, output: TensorSpec, runtime: str
) -> None:
    folder = copy_bundle(bundle, tmp_path / "1")
    other = Signature(bundle.manifest.signature.inputs, (output,))
    if output.name == "scores" and FILE_OF[runtime] != MODEL_ONNX:
        pytest.skip("torch outputs have no names")
    report = verify(reseal(folder, signature=other), runtimes=[runtime])
    assert any(row.subject == runtime for row in report.failures)


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("change", "runtime"), pairs([{"scale": 1.0}, {"mean": (0.5,), "std": (0.5,)}, {"scale": 0.5 / 255}])
)
def test_other_preprocessing_fails_by_the_accuracy_at_export(
    bundle: Bundle, tmp_path: Path, change: dict[str, object], runtime: str
) -> None:
    """Reference and candidate get the same wrong inputs, so that only the accuracy shows the fault."""
    before = verify(bundle, runtimes=[runtime]).to_json()
    folder = copy_bundle(bundle, tmp_path / "1")
    spoiled = reseal(folder, verification=before, preprocessing=Preprocessing(**change).to_json())
    report = verify(spoiled, runtimes=[runtime])
    assert {row.stage for row in report.failures} == {"accuracy"}
    assert "first image" in {row.case for row in report.failures}  # the number of right labels may be the same


def test_the_faults_are_real_faults() -> None:
    """Each wrong fold differs from the right one; a sabotage that changes nothing would pass for a caught one."""
    right = fold_by_hand(network())
    for name, make in WRONG_WEIGHTS.items():
        state = make()
        assert set(state) == set(right)
        assert any(not np.array_equal(state[key].numpy(), right[key].numpy()) for key in right), name
    assert len(PAIRS) == 4
