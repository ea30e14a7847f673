"""The GPU lane on engines that are made up, so that all of it has run before a GPU comes."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bnexport.auditing import gpu_lane, refusals
from bnexport.auditing.gpu_lane import Lane, Sweep, cpu_sweeps, emulated_spec, gpu_sweeps, require, run_lane
from bnexport.auditing.gpu_lane_document import NOT_MEASURED, page, write_document
from bnexport.auditing.refusals import REFUSALS, Refusal, Refused, refuse, refused_rightly
from bnexport.bundle import MODEL_ONNX, Bundle
from bnexport.errors import RuntimeUnavailable, UsageError
from bnexport.runtimes.base import Runner
from bnexport.runtimes.catalogue import RunnerSpec, runner_spec
from bnexport.runtimes.emulation import EmulatedRunner
from bnexport.runtimes.settings import CONV_SEARCHES, OPTIMISATIONS, RunSettings
from bnexport.verification.scope import Scope

ROOT = Path(__file__).parents[3]
BOTH = ("float32", "tf32")
Change = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


class Engine(EmulatedRunner):
    """A GPU that is made up: it rounds as it is told and says that its nodes are on CUDA."""

    def __init__(self, bundle: Bundle, precision: str, change: Change) -> None:
        super().__init__(bundle, precision)
        self.name, self.effective_device, self._change = "onnxruntime-cuda", "cuda:0", change
        self.description |= {"device": "cuda:0", "nodes": {"CUDAExecutionProvider": 11}}

    def _run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self._change(dict(super()._run(feeds)))


class GpuSpec(RunnerSpec):
    """A row that opens in this process: a child would not know it."""

    def open(self, bundle: Bundle, *, module: object = None, settings: RunSettings | None = None) -> Runner:
        return super().open(bundle, settings=replace(settings or RunSettings(), isolated=False))


def gpu(
    *, precision: str | None = None, change: Change = lambda outputs: outputs, seen: list[RunSettings] | None = None
) -> GpuSpec:
    def opener(bundle: Bundle, _device: str, _module: object, settings: RunSettings) -> Runner:
        if seen is not None:
            seen.append(settings)
        return Engine(bundle, precision or settings.precision, change)

    return GpuSpec("onnxruntime", "cuda", MODEL_ONNX, opener, lambda _device: None, "tf32", BOTH)


def lane(bundle: Bundle, spec: RunnerSpec, scope: Scope | None = None) -> Lane:
    scope = scope or Scope(BOTH, drift=False)
    return run_lane(bundle, sweeps=[Sweep(spec, scope)], refusals=(), max_samples=80)


def test_every_combination_is_run_and_measured(bundle: Bundle) -> None:
    seen: list[RunSettings] = []
    scope = Scope(BOTH, ("all", "none"), (False, True), ("heuristic", "exhaustive"), drift=False)
    found = lane(bundle, gpu(seen=seen), scope)
    assert found.passed, (found.broken, [run.reason for run in found.runs])
    assert found.real
    assert len(found.runs) == len({(run.runtime, run.settings) for run in found.runs}) == 2**4
    wanted = {replace(settings, isolated=False) for settings in scope.settings_of(gpu())}
    assert set(seen) == wanted
    strict = [run for run in found.runs if run.stage == "strict"]
    assert len(strict) == 8
    assert all(run.error < 1e-5 and run.detected == "float32" for run in strict)
    for run in (run for run in found.runs if run.stage == "shipping"):
        assert run.settings.startswith("tf32")
        assert run.error > 1e-5
        assert run.error / run.predicted == pytest.approx(1, rel=1e-2)
        assert run.detected == "tf32"
    for run in found.runs:
        assert run.nodes == {"CUDAExecutionProvider": 11}
        assert run.repeat == 0
        assert run.batches is not None
        assert run.n >= 80
    assert set(found.sessions) == {
        ("onnxruntime-cuda", name) for name in ("", "exhaustive search", "tf32", "tf32, exhaustive search")
    }


def test_tf32_left_on_fails_the_lane_and_is_named(bundle: Bundle) -> None:
    found = lane(bundle, gpu(precision="tf32"))
    assert not found.passed
    strict, shipping = found.runs
    assert (strict.passed, shipping.passed) == (False, True)
    assert strict.detected == "tf32"
    text = "\n".join(page(found))
    assert "FAIL: 2 settings of 1 runtimes" in text
    assert f"- onnxruntime-cuda, float32: {strict.reason}" in text
    assert "| **FAIL** |" in text


def jittering(share: float) -> Change:
    """Each run is off by another part of the scale."""
    rng = np.random.default_rng(0)

    def change(outputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {
            name: value + (share * np.abs(value).max(initial=0.0) * rng.uniform(0.5, 1)).astype(value.dtype)
            for name, value in outputs.items()
        }

    return change


def test_jitter_is_measured_within_and_between_sessions(bundle: Bundle) -> None:
    found = lane(bundle, gpu(change=jittering(3e-6)))
    assert found.passed, [run.reason for run in found.runs]
    for run in found.runs:
        assert 0 < run.repeat < 3e-6
        assert 0 < run.batches < 1e-5
    assert all(0 < value < 3e-6 for value in found.sessions.values())
    assert not lane(bundle, gpu(change=jittering(1e-3)), Scope(("float32",), drift=False)).passed


def test_an_engine_that_fails_midway_fails_the_lane(bundle: Bundle) -> None:
    def fail(_outputs: object) -> dict[str, np.ndarray]:
        raise RuntimeUnavailable("out of memory", remedy="free it")

    found = lane(bundle, gpu(change=fail))
    assert not found.passed
    assert any("out of memory" in run.reason for run in found.runs)

    def never(*_arguments: object) -> Runner:
        raise RuntimeUnavailable("onnxruntime-cuda can't run here: no y", remedy="z")

    found = lane(bundle, replace(gpu(), opener=never))
    assert not found.passed
    assert found.broken == {"onnxruntime-cuda": "onnxruntime-cuda can't run here: no y"}
    assert "- onnxruntime-cuda: onnxruntime-cuda can't run here: no y" in "\n".join(page(found))
    sweeps = [Sweep(spec, Scope(("float32",), drift=False)) for spec in (emulated_spec(), replace(gpu(), opener=never))]
    found = run_lane(bundle, sweeps=sweeps, refusals=(), max_samples=20)
    assert [run.passed for run in found.runs] == [True]
    assert not found.passed


def test_a_spoiled_bundle_fails_the_lane(bundle: Bundle, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(bundle.path, tmp_path / "1")
    content = bytearray((tmp_path / "1" / MODEL_ONNX).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "1" / MODEL_ONNX).write_bytes(content)
    found = lane(Bundle.open(tmp_path / "1"), gpu())
    assert not found.passed
    assert MODEL_ONNX in found.broken


def test_the_table_of_a_gpu_holds_every_combination() -> None:
    wide = [sweep.scope.settings_of(sweep.spec) for sweep in gpu_sweeps() if sweep.spec.name == "onnxruntime-cuda"][-1]
    assert len(set(wide)) == 2 * len(OPTIMISATIONS) * 2 * len(CONV_SEARCHES)
    assert all(settings.isolated for settings in wide)
    names = {sweep.spec.name for sweep in gpu_sweeps()}
    assert names == {"torch-cuda", "torchscript-cuda", "torch-export-cuda", "onnxruntime-cuda", "onnxruntime-tensorrt"}
    assert all(sweep.scope.precisions == BOTH for sweep in gpu_sweeps())
    assert {sweep.spec.name for sweep in cpu_sweeps()} == {"emulated-cpu", "onnxruntime-cpu", "openvino-cpu"}


def test_without_a_gpu_the_emulation_stands_in_and_the_page_says_so(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        gpu_lane, "gpu_sweeps", lambda: (Sweep(replace(gpu(), prober=lambda _device: "no GPU"), Scope()),)
    )
    monkeypatch.setattr(gpu_lane, "cpu_sweeps", lambda: (Sweep(emulated_spec(), Scope(BOTH, drift=False)),))
    told: list[str] = []
    found = run_lane(bundle, refusals=(), max_samples=40, tell=told.append)
    assert not found.real
    assert found.machine == {}
    assert found.passed
    assert told == ["emulated-cpu: 2 settings"]
    write_document(found, out := tmp_path / "gpu.md")
    text = out.read_text(encoding="utf-8")
    assert NOT_MEASURED in text
    assert "nothing about any GPU" in text
    assert "| tf32 | shipping |" in text
    assert "Measured on" not in text
    assert max(len(line) for line in text.splitlines() if not line.startswith("|")) <= 120
    write_document(found, out)  # one emulation may replace another


def test_an_emulation_never_replaces_a_measurement(bundle: Bundle, tmp_path: Path) -> None:
    found = lane(bundle, gpu())
    measured = replace(found, machine={"GPU": "NVIDIA H0", "driver": "1.2", "CUDA": "13.0"})
    write_document(measured, out := tmp_path / "gpu.md")
    text = out.read_text(encoding="utf-8")
    assert "Measured on GPU NVIDIA H0, driver 1.2, CUDA 13.0." in text
    assert "| float32 | strict |" in text
    assert "11 CUDA" in text
    with pytest.raises(UsageError, match="holds measurements of a GPU"):
        write_document(replace(found, real=False), out)
    assert out.read_text(encoding="utf-8") == text
    write_document(measured, out)


@pytest.mark.parametrize(
    ("code", "said", "passed"),
    [
        (3, "Error: onnxruntime-cuda can't run here: (libcurand.so.10: file too short)", True),
        (3, "Error: onnxruntime-cuda can't run here: this onnxruntime is built without CUDA", True),
        (3, "Error: onnxruntime-cuda can't run here: (libcublas.so.12: not found)", False),
        (3, "Traceback: onnxruntime-cuda libcurand.so.10", False),
        (3, "libcurand.so.10", False),
        (0, "PASS onnxruntime-cuda libcurand.so.10", False),
        (1, "FAIL onnxruntime-cuda libcurand.so.10", False),
    ],
)
def test_what_counts_as_a_refusal(code: int, said: str, passed: bool) -> None:
    refusal = Refusal("no cuRAND", "onnxruntime-cuda", ("libcurand.so.10",))
    assert refused_rightly(refusal, code, said) is passed


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux's loader can be made to miss a library")
@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda row: f"{row.name}, {row.runtime}")
def test_a_hidden_library_is_named_with_exit_code_3(bundle: Bundle, refusal: Refusal) -> None:
    """On any machine: what is hidden is missing, whatever else is."""
    found = refuse(refusal, bundle.path)
    assert found.passed, found
    assert found.code == 3
    assert refusals.tempfile.gettempdir() not in found.said


def test_a_runtime_that_answers_all_the_same_is_no_refusal(bundle: Bundle) -> None:
    found = refuse(Refusal("nothing", "onnxruntime-cpu", environment={"CUDA_VISIBLE_DEVICES": ""}), bundle.path)
    assert found.code == 0
    assert not found.passed


def test_refusals_are_part_of_the_verdict(bundle: Bundle) -> None:
    found = lane(bundle, gpu())
    refused = Refused(
        Refusal("no driver", "onnxruntime-cuda", ("libcuda.so.1",)), passed=False, code=0, said="PASS a|b"
    )
    found = replace(found, refused=(refused,))
    assert not found.passed
    assert r"| no driver (`libcuda.so.1`) | onnxruntime-cuda | 0 | PASS a\|b | **FAIL** |" in list(page(found))


def test_what_must_be_here(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, runtime in gpu_lane.REQUIRED.items():
        row = replace(runner_spec(runtime), prober=lambda _device: "no such thing")
        monkeypatch.setattr(gpu_lane, "runner_spec", lambda _name, row=row: row)
        with pytest.raises(RuntimeUnavailable, match=f"{runtime} can't run here: no such thing"):
            require(f"data, {name}")
        monkeypatch.setattr(gpu_lane, "runner_spec", lambda _name: gpu())
        require(f"data, {name}")
    require("")


@pytest.mark.parametrize(
    ("arguments", "required", "code"),
    [([], "", 0), (["--only", "nothing"], "", 2), (["--bundle", "nowhere"], "", 2), ([], "cuda", 3)],
)
def test_the_script(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    bundle: Bundle,
    arguments: list[str],
    required: str,
    code: int,
) -> None:
    if required == "cuda" and runner_spec("torch-cuda").available() is None:
        pytest.skip("this machine has what is required")
    monkeypatch.setattr(gpu_lane, "gpu_sweeps", lambda: ())
    monkeypatch.setattr(gpu_lane, "cpu_sweeps", lambda: (Sweep(emulated_spec(), Scope(BOTH, drift=False)),))
    monkeypatch.setattr(gpu_lane.run_lane, "__kwdefaults__", gpu_lane.run_lane.__kwdefaults__ | {"refusals": ()})
    monkeypatch.setenv("BNEXPORT_REQUIRE", required)
    out = tmp_path / "gpu.md"
    given = ["gpu_lane.py", "--bundle", str(bundle.path), "--out", str(out), "--max-samples", "20", *arguments]
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "scripts" / "gpu_lane.py"), run_name="__main__")
    assert ended.value.code == code
    assert out.is_file() is (code == 0)
    captured = capsys.readouterr()
    assert captured.out.startswith("PASS: 2 settings" if code == 0 else "")
    assert captured.err.count("\n") == 1  # one line of progress, or one sentence


def test_the_committed_page_is_the_lane_s_own() -> None:
    text = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    assert text.startswith("# GPU runtimes\n")
    assert (NOT_MEASURED in text) is not ("Measured on GPU" in text)
    assert "**FAIL**" not in text
    for refusal in REFUSALS:
        assert f"| {refusal.name} (" in text
