from pathlib import Path

import numpy as np
import pytest
from support.bundles import copy_bundle, reseal

from bnexport.bundle import Bundle
from bnexport.errors import BundleError
from bnexport.runtimes.catalogue import runner_spec
from bnexport.runtimes.replay import GOLDEN_BOUND, WIDEST_BOUND, golden_bound, largest_error, replay_golden


def row(**changes: object) -> dict[str, object]:
    return {"stage": "golden", "subject": "onnxruntime-cpu", "passed": True, "bound": 0.004, "settings": ""} | changes


def half(bundle: Bundle, folder: Path, *rows: dict[str, object]) -> Bundle:
    onnx = {"opset": 18, "ir_version": 8, "precision": "float16"}
    return reseal(copy_bundle(bundle, folder), onnx=onnx, verification={"rows": list(rows)})


def test_the_golden_vectors_are_run_and_compared(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    with runner_spec("onnxruntime-cpu").open(bundle) as runner:
        replay = replay_golden(runner, bundle)
        assert (replay.n, replay.bound) == (3, GOLDEN_BOUND)
        assert 0 < replay.error < 2e-6
        run, largest = runner._run, np.abs(bundle.golden()[1]["logits"]).max()
        for shift, passes in ((0.5 * GOLDEN_BOUND, True), (3 * GOLDEN_BOUND, False)):
            off = np.float32(shift * largest)
            monkeypatch.setattr(runner, "_run", lambda feeds, off=off: {"logits": run(feeds)["logits"] + off})
            if passes:
                assert replay_golden(runner, bundle).error > 0.4 * GOLDEN_BOUND
            else:
                with pytest.raises(BundleError, match="of scale on the golden vectors, but at most"):
                    replay_golden(runner, bundle)
        monkeypatch.setattr(runner, "_run", lambda feeds: {"logits": run(feeds)["logits"] * np.float32(np.nan)})
        with pytest.raises(BundleError, match="not finite"):
            replay_golden(runner, bundle)


def test_half_precision_has_the_bound_of_its_verdict(bundle: Bundle, tmp_path: Path) -> None:
    rows = [row(), row(bound=0.001), row(subject="openvino-cpu", bound=0.02), row(settings="bfloat16", bound=0.03)]
    manifest = half(bundle, tmp_path / "1", *rows).manifest
    assert golden_bound(manifest, "onnxruntime-cpu") == 0.004
    assert golden_bound(manifest, "onnxruntime-cuda") == 0.004
    assert golden_bound(bundle.manifest, "onnxruntime-cpu") == GOLDEN_BOUND


@pytest.mark.parametrize(
    ("recorded", "bound"), [(3e-5, 3e-5), (1e-7, GOLDEN_BOUND), (0.004, GOLDEN_BOUND), (None, GOLDEN_BOUND)]
)
def test_a_network_with_noisy_float32_has_the_bound_of_its_verdict(
    bundle: Bundle, tmp_path: Path, recorded: float | None, bound: float
) -> None:
    noisy = reseal(copy_bundle(bundle, tmp_path / "1"), verification={"rows": [row(bound=recorded)]})
    assert golden_bound(noisy.manifest, "onnxruntime-cpu") == bound
    assert golden_bound(noisy.manifest, "openvino-cpu") == GOLDEN_BOUND


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"passed": False},
        {"subject": "torch-cpu"},
        {"bound": 2 * WIDEST_BOUND},
        {"bound": None},
        {"stage": "strict"},
    ],
)
def test_without_a_verdict_half_precision_can_not_be_judged(bundle: Bundle, tmp_path: Path, change) -> None:
    rows = [row(**change)] if change else []
    with pytest.raises(BundleError, match="was not verified on onnxruntime at export"):
        golden_bound(half(bundle, tmp_path / "1", *rows).manifest, "onnxruntime-cpu")


def test_a_zero_reference_counts_absolutely() -> None:
    assert largest_error(np.array([[0.5]]), np.array([[0.0]])) == 0.5
    assert largest_error(np.array([[3.0]]), np.array([[2.0]])) == 0.5
