"""Stage 1 for model.pt and model.pt2: right files pass far below the bound, and each fault is caught by one of its rows."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import CASES, Case
from support import bundles
from support.bundles import copy_bundle, fold_by_hand, network, reseal
from torch import Tensor, nn

import bnexport
from bnexport.bundle import MODEL_EXPORTED, MODEL_ONNX, MODEL_TORCHSCRIPT, Bundle, Manifest, seal
from bnexport.errors import BundleError, MissingDependency, ProofError
from bnexport.exporting.export_onnx import export_onnx
from bnexport.exporting.formats import export_program, export_torchscript
from bnexport.exporting.half import in_precision
from bnexport.exporting.signature import ExportJob, signature_of
from bnexport.onnx_files.float64 import Float64Evaluator
from bnexport.onnx_files.models import read_model
from bnexport.runtimes import torch_float64
from bnexport.runtimes.torch_float64 import TorchFloat64Evaluator
from bnexport.tensors import Array, Signature
from bnexport.verification.inputs import Batch
from bnexport.verification.inputs import Case as ComparedCase
from bnexport.verification.reference import Reference
from bnexport.verification.stages import float64_rows, format_rows
from bnexport.verification.verdict import Row

FILES = (MODEL_TORCHSCRIPT, MODEL_EXPORTED)
WRITERS: dict[str, Callable[..., None]] = {
    MODEL_TORCHSCRIPT: bundles.write_torchscript,
    MODEL_EXPORTED: bundles.write_exported,
}
#: Not functions of their inputs alone, a BatchNorm in training mode, modules that can't be copied, inputs without a batch.
LEFT_OUT = (
    "monte-carlo-dropout",
    "weight-changed-in-forward",
    "training-mode",
    "weight-norm-by-hook",
    "pruned",
    "unbatched-conv1d",
)
X = np.random.default_rng(2).random((9, 1, 28, 28), dtype=np.float32)


def write_both(
    folder: Path, model: nn.Module, inputs: tuple[Tensor, ...], precision: str = "float32", **options: object
) -> tuple[Signature, nn.Module]:
    folded = bnexport.fold(model, inputs, **options).model
    names = tuple(f"x{index}" for index in range(len(inputs)))
    signature = signature_of(folded, inputs, input_names=names)
    shipped = in_precision(folded, inputs, precision)
    export_torchscript(shipped, folder / MODEL_TORCHSCRIPT)
    export_program(ExportJob(shipped, inputs, signature), folder / MODEL_EXPORTED)
    return signature, shipped


def feeds_of(signature: Signature, inputs: tuple[Tensor, ...]) -> dict[str, Array]:
    return {spec.name: item.numpy() for spec, item in zip(signature.inputs, inputs, strict=True)}


def error_of(found: dict[str, Array], wanted: dict[str, Array]) -> float:
    assert list(found) == list(wanted)
    assert all(array.dtype == np.float64 for array in found.values() if array.dtype.kind == "f")
    return max(float(np.abs(found[k] - wanted[k]).max() / max(np.abs(wanted[k]).max(), 1e-30)) for k in wanted)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.sampled(6, 2)
@pytest.mark.parametrize("case", [case for case in CASES if case.name not in LEFT_OUT], ids=lambda case: case.name)
def test_every_case_is_proved(case: Case, tmp_path: Path) -> None:
    model = case.model()
    signature, _ = write_both(tmp_path, model, case.inputs(), max_growth=case.max_growth, clamps=case.clamps)
    feeds = feeds_of(signature, case.inputs(batch=5))
    wanted = Reference(model, signature, description="").evaluate(feeds)
    for name in FILES:
        found = TorchFloat64Evaluator(tmp_path / name, signature).evaluate(feeds)
        assert error_of(found, wanted) < 1e-6, name


def rows_of(bundle: Bundle, name: str, cases: list[ComparedCase], **options: object) -> list[Row]:
    model = read_model(bundle.file(MODEL_ONNX)) if MODEL_ONNX in bundle.manifest.files else None
    return format_rows(bundle, name, cases, model=model, **{"rounding": no_rounding, **options})


def no_rounding(_case: ComparedCase, *, always: bool = False) -> None:
    """The fixed bound holds."""


@pytest.fixture(scope="module")
def images(bundle: Bundle) -> ComparedCase:
    answer = Reference(network(), bundle.manifest.signature, description="").evaluate({"input": X})
    return ComparedCase(Batch("images", {"input": X}), answer)


@pytest.mark.parametrize("name", FILES)
def test_a_right_file_passes(bundle: Bundle, images: ComparedCase, name: str) -> None:
    weights, proof = rows_of(bundle, name, [images.head(7)])
    assert (weights.stage, weights.subject, weights.case, weights.passed) == ("weights", name, "bits", True)
    assert (proof.stage, proof.subject, proof.case, proof.passed, proof.n) == ("file-proof", name, "images", True, 7)
    assert proof.device == "float64 in torch"
    assert proof.error is not None
    assert 0 < proof.error < 2e-7


def eps_dropped(bn: nn.Module) -> tuple[Tensor, Tensor]:
    scale = bn.weight.double() / torch.sqrt(bn.running_var.double())
    return scale, bn.bias.double() - scale * bn.running_mean.double()


def changed(change: Callable[[dict[str, Tensor]], None]) -> dict[str, Tensor]:
    state = {name: tensor.clone() for name, tensor in fold_by_hand(network()).items()}
    change(state)
    return state


def swap_channels(state: dict[str, Tensor]) -> None:
    for name in ("conv2.weight", "conv2.bias"):
        state[name][[3, 4]] = state[name][[4, 3]].clone()


def flip_bit(place: int) -> Callable[[dict[str, Tensor]], None]:
    def flip(state: dict[str, Tensor]) -> None:
        state["fc2.weight"].view(torch.int32)[5, 5] ^= 1 << place

    return flip


def change_sign(state: dict[str, Tensor]) -> None:
    state["conv1.weight"][3] *= -1


#: Fault -> (weights of the file, whether the row of bits passes, whether that of the proof does).
FAULTS: dict[str, tuple[Callable[[], dict[str, Tensor]], bool, bool]] = {
    "eps dropped": (lambda: fold_by_hand(network(), eps_dropped), False, False),
    "sign of a channel": (lambda: changed(change_sign), False, False),
    "exponent bit": (lambda: changed(flip_bit(29)), False, False),
    # The same numbers at another place: only the proof shows it.
    "channels swapped": (lambda: changed(swap_channels), True, False),
    # Too small for any proof in float64: only the bits show it.
    "last bit": (lambda: changed(flip_bit(0)), False, True),
    "not a number": (lambda: changed(lambda state: state["fc3.bias"].fill_(float("nan"))), False, False),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_one_file_is_caught_by_its_own_rows(
    bundle: Bundle, images: ComparedCase, tmp_path: Path, fault: str, name: str
) -> None:
    make, bits, proved = FAULTS[fault]
    folder = copy_bundle(bundle, tmp_path / "1")
    WRITERS[name](folder / name, make())
    spoiled = reseal(folder)
    weights, proof = rows_of(spoiled, name, [images.head(9)])
    assert (weights.passed, proof.passed) == (bits, proved)
    assert weights.subject == proof.subject == name
    assert all(row.reason for row in (weights, proof) if not row.passed)
    other = next(item for item in FILES if item != name)
    assert all(row.passed for row in rows_of(spoiled, other, [images.head(9)]))


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_can_t_be_read_is_a_failed_row(
    bundle: Bundle, images: ComparedCase, tmp_path: Path, name: str
) -> None:
    folder = copy_bundle(bundle, tmp_path / "1")
    (folder / name).write_bytes(b"no model")
    rows = rows_of(reseal(folder), name, [images.head(9)])
    failed = [(row.stage, row.case, row.passed) for row in rows]
    assert failed == [("weights", "bits", False), ("file-proof", "open", False)]
    assert all("\n" not in row.reason for row in rows)


def test_without_torch_the_report_states_it(
    bundle: Bundle, images: ComparedCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str, *, purpose: str) -> None:
        raise MissingDependency(f"{purpose} needs {name}", remedy="Install it")

    monkeypatch.setattr("bnexport.verification.stages.require", missing)
    with pytest.raises(MissingDependency, match=r"the proof of model\.pt needs torch"):
        rows_of(bundle, MODEL_TORCHSCRIPT, [images.head(2)])


class Narrow(nn.Module):
    """In float32 it loses most of its input's digits: in the casts, and in tensors made with and without a type."""

    def __init__(self) -> None:
        super().__init__()
        self.constant = torch.full((1, 1), 1 / 3)

    def forward(self, x: Tensor) -> Tensor:
        y = (x + 4096.0).to(torch.float32).float() - 4096.0
        made = torch.full((1, 1), 1e7, dtype=torch.float32) + x[:, :1] - torch.full((1, 1), 1e7)
        return y + made + torch.zeros_like(x, dtype=torch.float32) + self.constant.expand(1, x.shape[1])


@pytest.mark.parametrize("name", FILES)
def test_types_named_inside_are_widened(tmp_path: Path, name: str) -> None:
    inputs = (torch.randn(2, 4),)
    signature, _ = write_both(tmp_path, Narrow().eval(), inputs)
    x = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    (found,) = TorchFloat64Evaluator(tmp_path / name, signature).evaluate({"x0": x}).values()
    wide = x.astype(np.float64)
    np.testing.assert_allclose(found, wide + wide[:, :1] + np.float64(np.float32(1 / 3)), rtol=0, atol=2e-9)
    assert torch.get_default_dtype() is torch.float32


def test_a_computation_that_leaves_float64_proves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Made(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.full((1, 1), 0.5, dtype=torch.float32)

    signature, _ = write_both(tmp_path, Made().eval(), (torch.randn(2, 4),))
    monkeypatch.setattr(torch_float64, "_wide_type", lambda value: value)
    evaluator = TorchFloat64Evaluator(tmp_path / MODEL_EXPORTED, signature)
    with pytest.raises(ProofError, match="left float64 at"):
        evaluator.evaluate({"x0": np.zeros((3, 4), np.float32)})


def test_a_script_that_is_not_frozen_is_proved_as_well(bundle: Bundle, images: ComparedCase, tmp_path: Path) -> None:
    folder = copy_bundle(bundle, tmp_path / "1")
    plain = bnexport.bn_lenet("none").eval()
    plain.load_state_dict(fold_by_hand(network()))
    torch.jit.save(torch.jit.script(plain), str(folder / MODEL_TORCHSCRIPT))
    assert all(row.passed for row in rows_of(reseal(folder), MODEL_TORCHSCRIPT, [images.head(9)]))


def test_a_script_that_changes_itself_is_not_a_function(tmp_path: Path) -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x + self.calls

    signature, _ = write_both(tmp_path, Narrow().eval(), (torch.randn(2, 4),))
    torch.jit.save(torch.jit.script(Counter().eval()), str(tmp_path / MODEL_TORCHSCRIPT))
    with pytest.raises(BundleError, match="it changes its own weights during a call"):
        TorchFloat64Evaluator(tmp_path / MODEL_TORCHSCRIPT, signature)


@pytest.mark.parametrize("name", FILES)
def test_chunks_are_put_together_in_order(bundle: Bundle, images: ComparedCase, name: str) -> None:
    signature = bundle.manifest.signature
    found = [TorchFloat64Evaluator(bundle.file(name), signature, chunk=n).evaluate({"input": X}) for n in (2, 4, 64)]
    assert error_of(found[0], found[2]) < 1e-14
    assert error_of(found[1], found[2]) < 1e-14


@pytest.mark.parametrize("name", FILES)
def test_another_number_of_outputs_is_refused(bundle: Bundle, name: str) -> None:
    signature = bundle.manifest.signature
    twice = Signature(signature.inputs, signature.outputs * 2)
    with pytest.raises(BundleError, match="returns 1 outputs, but the manifest states 2"):
        TorchFloat64Evaluator(bundle.file(name), twice).evaluate({"input": X})


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_half_precision_is_judged_by_what_its_weights_rounding_does(tmp_path: Path, precision: str) -> None:
    case = next(case for case in CASES if case.name == "conv2d")
    model, inputs = case.model(), case.inputs()
    signature, shipped = write_both(tmp_path, model, inputs, precision)
    manifest = Manifest("half", 1, signature, {"source": "test"})
    feeds = feeds_of(signature, case.inputs(batch=5))
    answer = Reference(model, signature, description="").evaluate(feeds)
    given = ComparedCase(Batch("noise", feeds), answer)
    if precision == "float16":  # opset 18 has no convolution in bfloat16
        export_onnx(ExportJob(shipped, inputs, signature), tmp_path / MODEL_ONNX)
        exact = Float64Evaluator(tmp_path / MODEL_ONNX).evaluate(feeds)
        for name in FILES:
            assert error_of(TorchFloat64Evaluator(tmp_path / name, signature).evaluate(feeds), exact) < 1e-12
    bundle = seal(tmp_path, manifest)
    for name in FILES:
        *bits, strict = rows_of(bundle, name, [given.head(9)])
        *_, judged = rows_of(bundle, name, [given.head(9)], rounding=lambda _, row=strict, **_options: row.error)
        assert all(row.passed for row in bits), bits
        assert (strict.passed, judged.passed) == (False, True)
        assert judged.predicted == strict.error


@pytest.mark.parametrize(
    ("noise", "on_all", "passed"),
    [(1.2e-6, None, True), (0.8e-6, 1.2e-6, True), (0.8e-6, 0.9e-6, False), (None, None, False)],
)
def test_a_network_that_amplifies_rounding_is_judged_by_its_own(
    noise: float | None, on_all: float | None, passed: bool
) -> None:
    """An error of 3e-6 is a fault in most networks, and the rounding of the weights in a few; there some samples have most."""
    case = ComparedCase(Batch("noise", {"input": np.ones((2, 1))}), {"y": np.array([[1.0], [0.5]])})
    asked: list[str] = []

    def rounding(_case: ComparedCase, **options: bool) -> float | None:
        asked.append(max(options, default=""))
        return {"": None, "always": noise, "on_all": on_all}[asked[-1]]

    found = {"y": np.array([[1.0 + 3e-6], [0.5]])}
    (row,) = float64_rows("model.onnx", [case], [found], rounding, device="cpu")
    assert (row.passed, row.predicted) == (passed, on_all or noise)
    assert asked == ["", "always", "on_all"][: 2 if on_all is None else 3]
    asked.clear()
    (right,) = float64_rows("model.onnx", [case], [{"y": case.expected["y"]}], rounding, device="cpu")
    assert (right.passed, right.predicted) == (True, None)
    assert asked == [""]  # it costs several evaluations, so it is measured only where it decides
