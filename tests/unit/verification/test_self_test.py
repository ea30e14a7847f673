"""The self-test: a right verifier catches every fault, and the self-test detects a verifier that does not."""

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.bundles import copy_bundle, reseal
from support.models import randomise
from torch import nn

from bnexport.bundle import MANIFEST, MODEL_EXPORTED, MODEL_ONNX, MODEL_TORCHSCRIPT, WEIGHTS, Bundle
from bnexport.exporting.export_onnx import stamp_metadata
from bnexport.exporting.export_request import ExportRequest
from bnexport.files import sha256
from bnexport.pipeline import fold_and_export
from bnexport.verification import budget, evidence, stages, tolerances
from bnexport.verification.scope import Scope
from bnexport.verification.self_test import tester as testing
from bnexport.verification.self_test.faults import FAULTS, PIXEL_FAULTS, Fault, faults_of
from bnexport.verification.self_test.tester import self_test
from bnexport.verification.tolerances import Tolerance
from bnexport.verification.verdict import FaultResult
from bnexport.verification.verify import verify

REFERENCE = Path(__file__).parents[3] / "models" / "bn_lenet" / "1"


@pytest.fixture(scope="module", autouse=True)
def few_samples() -> Iterator[tuple[int, int]]:
    """The number of samples of the largest network, since few samples hide faults best. The value is the default numbers."""
    before = testing._SAMPLES, testing._MANY_SAMPLES
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(testing, "_SAMPLES", 16)
        patch.setattr(testing, "_MANY_SAMPLES", 128)
        for name in ("_REAL_WORK", "_SYNTHETIC_WORK", "_PROOF_WORK"):
            patch.setattr(budget, name, 1.0)
        yield before


@pytest.fixture(scope="module")
def proven(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The BN-LeNet with random statistics, with all that an export writes: metadata and the verdict."""
    folder = copy_bundle(bundle, tmp_path_factory.mktemp("proven") / "1")
    stamp_metadata(folder / MODEL_ONNX, bundle.manifest.model_facts())
    report = verify(reseal(folder), runtimes=["onnxruntime-cpu"], scope=Scope(max_samples=64, drift=False))
    assert report.passed, report.failures
    return reseal(folder, verification=report.to_json())


@pytest.fixture(scope="module")
def results(proven: Bundle) -> dict[tuple[str, str], FaultResult]:
    """The result of every fault by its name and the file of its row."""
    found = self_test(proven)
    return {(row.name, row.where): result for row, result in zip(faults_of(proven), found, strict=True)}


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Keeps only the faults with these names."""

    def keep(*names: str) -> None:
        monkeypatch.setattr(testing, "faults_of", lambda bundle: named(faults_of(bundle), names))

    return keep


def named(faults: Iterable[Fault], names: tuple[str, ...]) -> tuple[Fault, ...]:
    kept = tuple(fault for fault in faults if fault.name in names)
    assert {fault.name for fault in kept} == set(names)
    return kept


def contents(bundle: Bundle) -> dict[str, str]:
    return {name: sha256(bundle.path / name) for name in sorted(os.listdir(bundle.path)) if "." in name}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.name}-{fault.where}")
def test_every_fault_is_caught_by_its_stage(results: dict[tuple[str, str], FaultResult], fault: Fault) -> None:
    found = results[fault.name, fault.where]
    if fault.name in SPECIAL:
        assert found.outcome == "not tried", found
        return
    assert found.outcome == "caught", found
    assert found.expected == fault.expected
    assert fault.expected in found.caught, found
    assert found.reason
    assert "integrity" not in found.caught, "the copy was sealed again"
    if fault.evaluate is not None and fault.name != "NaN in a weight":
        assert found.effect is not None
        assert found.effect > (0 if fault.expected == "weights" else 1e-6)


def test_a_flipped_bit_is_caught_in_every_file(proven: Bundle, results: dict[tuple[str, str], FaultResult]) -> None:
    for name in (*proven.manifest.files, MANIFEST):
        found = results["one flipped bit", name]
        assert (found.outcome, found.where, found.caught[0]) == ("caught", name, "integrity")
        assert name in found.reason
    assert len(results) == len(FAULTS) + len(proven.manifest.files) + 1


def test_the_lowest_bit_is_below_every_tolerance(results: dict[tuple[str, str], FaultResult]) -> None:
    for name in (MODEL_ONNX, MODEL_TORCHSCRIPT, MODEL_EXPORTED):
        found = results["lowest bit of a weight, sealed again", name]
        assert found.caught == ("weights",)
        assert found.effect is not None
        assert found.effect < 1e-6


def test_a_fault_in_a_batch_norm_goes_into_the_written_file(results: dict[tuple[str, str], FaultResult]) -> None:
    """The fold puts the fault there; model.pt and model.pt2 keep the right weights, so the bits differ too."""
    for name in ("eps dropped", "sign of one gamma", "stale moving statistics", "a BatchNorm skipped"):
        found = results[name, MODEL_ONNX]
        assert found.where.startswith("bn")
        assert {"file-proof", "weights"} <= set(found.caught)
    assert "accuracy" in results["pixels 0 to 255 for 0 to 1", MANIFEST].caught


def test_the_bundle_stays_as_it_was_and_nothing_is_left(
    proven: Bundle, temporary: Path, only: Callable[..., None]
) -> None:
    only("eps dropped", "NaN in a weight", "one flipped bit")
    before, reported = contents(proven), []
    found = self_test(proven, progress=lambda *step: reported.append(step))
    assert contents(proven) == before
    assert proven.problems() == []
    assert list(temporary.iterdir()) == []
    assert [number for number, _, _ in reported] == list(range(1, len(found) + 1))
    assert reported[0] == (1, len(found), "eps dropped in model.onnx")


@pytest.mark.parametrize("where", ["between", "inside"])
def test_an_interrupt_leaves_nothing(
    proven: Bundle, temporary: Path, only: Callable[..., None], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    only("NaN in a weight", "another opset claimed")
    seen: list[int] = []

    def interrupted(*_: object) -> None:
        seen.append(len(list(temporary.iterdir())))
        raise KeyboardInterrupt

    if where == "inside":
        monkeypatch.setattr(testing, "effect_of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        self_test(proven, **({"progress": interrupted} if where == "between" else {}))
    assert seen == [0 if where == "between" else 1]
    assert list(temporary.iterdir()) == []


def test_a_blind_stage_is_detected(proven: Bundle, only: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    only("labels permuted", "another opset claimed", "another output name")
    monkeypatch.setattr(stages, "declaration_problem", lambda *_: None)
    found = {result.fault: result for result in self_test(proven)}
    for name in ("labels permuted", "another opset claimed"):
        assert (found[name].outcome, found[name].caught) == ("missed", ())
    assert found["another output name"].outcome == "caught", "the names of the outputs differ"
    assert "declaration" not in found["another output name"].caught
    report = verify(proven, runtimes=["onnxruntime-cpu"], scope=Scope(("float32",), max_samples=16, drift=False))
    assert report.passed
    assert not report.with_self_test(tuple(found.values())).passed


def test_a_bound_that_is_too_wide_excuses_nothing(
    proven: Bundle, only: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    only("eps dropped", "sign of one gamma")
    for stage in ("file-proof", "golden", "strict", "golden-reference"):
        monkeypatch.setitem(tolerances.TOLERANCES, stage, Tolerance(1e9, "too wide"))
    seen = {result.fault: result for result in self_test(proven)}
    assert {result.caught for result in seen.values()} == {("weights",)}, "a stage other than the expected one"
    assert {result.outcome for result in seen.values()} == {"caught"}
    monkeypatch.setattr(evidence, "format_rows", lambda *_, **__: [])
    blind = {result.fault: result for result in self_test(proven)}
    assert [result.outcome for result in blind.values()] == ["missed", "missed"]
    assert all((result.effect or 0) > 1e-6 for result in blind.values())


def test_a_fault_without_effect_is_harmless(only: Callable[..., None]) -> None:
    """Every gamma of the reference bundle is positive."""
    only("absolute gamma", "sign of one gamma")
    found = {result.fault: result for result in self_test(REFERENCE)}
    assert found["absolute gamma"].outcome == "harmless"
    assert found["absolute gamma"].caught == ()
    assert "no golden output by more than 1e-06" in found["absolute gamma"].reason
    assert found["sign of one gamma"].outcome == "caught"


def test_nothing_is_tried_on_a_bundle_that_fails(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each copy would fail as well, with any fault."""
    folder = copy_bundle(bundle, tmp_path / "1")
    (folder / "extra").write_text("x")
    found = self_test(folder)
    assert {result.outcome for result in found} == {"not tried"}
    assert all("extra is not in the manifest" in result.reason for result in found)


def foreign() -> nn.Module:
    """A user's network: two convolutions, the first without a bias, and a linear layer."""
    torch.manual_seed(1)
    layers = (nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12))
    return randomise(nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(12 * 64, 5))).eval()


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    request = ExportRequest(inputs=("3x12x12",), labels=tuple("abcde"))
    exported = fold_and_export(foreign(), tmp_path_factory.mktemp("foreign") / "net" / "1", request=request)
    assert exported.bundle is not None, exported.verification.failures
    return exported.bundle


#: Faults of int8 bundles and of bundles that take pixels, which tests/must_fail and tests/conformance have.
SPECIAL = {fault.name for fault in FAULTS if fault.expected == "quantization" or fault.name in PIXEL_FAULTS}
#: Faults on a foreign network in the fast lane: one of each kind, and one that can't be tried there.
_FEW = ("eps dropped", "a BatchNorm skipped", "high bit, sealed again", "pixels 0 to 255 for 0 to 1")


@pytest.mark.parametrize("names", [_FEW, pytest.param((), marks=pytest.mark.slow)], ids=["few", "all"])
def test_a_foreign_network_that_is_given_is_folded_again(
    theirs: Bundle, only: Callable[..., None], names: tuple[str, ...]
) -> None:
    only(*names) if names else None
    found = {(item.fault, item.where.rpartition(" ")[2]): item for item in self_test(theirs, module=foreign())}
    untried = {fault for (fault, _), item in found.items() if item.outcome == "not tried"}
    impossible = {"pixels 0 to 255 for 0 to 1", "other mean and deviation", "high bit, sealed again", *SPECIAL}
    assert untried == (impossible & set(names) if names else impossible)
    assert found["high bit, sealed again", WEIGHTS].outcome == "not tried"
    tried = [item for item in found.values() if item.outcome != "not tried"]
    assert all(item.outcome == "caught" and item.expected in item.caught for item in tried), tried
    places = {found[name, MODEL_ONNX].where for name in ("eps dropped", "a BatchNorm skipped")}
    assert places <= {"1 in model.onnx", "4 in model.onnx"}


def test_without_its_code_the_folded_layer_itself_is_changed(theirs: Bundle) -> None:
    found = {item.fault: item for item in self_test(theirs) if item.expected == "file-proof"}
    impossible = {"stale moving statistics", "absolute gamma", "beta dropped", "a BatchNorm skipped", *PIXEL_FAULTS}
    assert {name for name, item in found.items() if item.outcome == "not tried"} == impossible
    assert "can't be folded again here" in found["beta dropped"].reason
    for name in ("another eps, 1e-3", "variance times 256/255", "moving mean dropped", "sign of one gamma"):
        assert found[name].outcome == "caught"
        assert "file-proof" in found[name].caught


@pytest.mark.slow
def test_half_precision(tmp_path: Path, only: Callable[..., None]) -> None:
    """An effect within the rounding of the weights is harmless; NaN is a fault, not an exception."""
    request = ExportRequest(inputs=("3x12x12",), precision="float16")
    exported = fold_and_export(foreign(), tmp_path / "net" / "1", request=request)
    assert exported.bundle is not None
    only("NaN in a weight", "moving mean dropped", "TF32 left on in strict mode")
    found = {item.fault: item for item in self_test(exported.bundle, module=foreign())}
    assert found["NaN in a weight"].outcome == "caught"
    assert "file-proof" in found["moving mean dropped"].caught
    assert found["TF32 left on in strict mode"].outcome == "not tried"


def test_few_samples_of_strict_float32_alone(
    proven: Bundle, only: Callable[..., None], monkeypatch: pytest.MonkeyPatch, few_samples: tuple[int, int]
) -> None:
    only("another opset claimed", "other mean and deviation")
    monkeypatch.setattr(testing, "_SAMPLES", few_samples[0])
    monkeypatch.setattr(testing, "_MANY_SAMPLES", few_samples[1])
    scopes: list[Scope] = []

    def watched(*arguments: object, **options: object) -> object:
        scopes.append(options["scope"])
        return verify(*arguments, **(options | {"scope": replace(scopes[-1], max_samples=8)}))

    monkeypatch.setattr(testing, "verify", watched)
    self_test(proven)
    assert [scope.max_samples for scope in scopes] == [256, 256, 64]
    assert {scope.precisions for scope in scopes} == {("float32",)}
    monkeypatch.setattr(testing, "_WORK", 1.0)  # as of a large network
    self_test(proven)
    assert [scope.max_samples for scope in scopes[3:]] == [256, 256, 8]
