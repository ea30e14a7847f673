"""The GPU lane on made-up engines, so that all of it has run before a GPU is available."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.bundles import copy_bundle, flip_bit

from benchmarks.clock import Spread
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import lane as gpu_lane
from benchmarks.gpu import refusals
from benchmarks.gpu import sweeps as tables
from benchmarks.gpu.__main__ import NOT_MEASURED, page, write_document
from benchmarks.gpu.lane import LaneInput, require, run_lane
from benchmarks.gpu.refusals import REFUSALS, HiddenLibrary, Refused, refuse, refused_rightly
from benchmarks.gpu.results import GpuSpeed, Lane, merge, read_results, write_results
from benchmarks.gpu.sweeps import Sweep, cpu_sweeps, emulated_spec, gpu_sweeps
from benchmarks.gpu.training import gpu_speeds
from bnexport.bundle import MODEL_ONNX, Bundle
from bnexport.errors import DataError, RuntimeUnavailable, UsageError
from bnexport.runtimes.base import CONV_SEARCHES, OPTIMISATIONS, Runner, RunSettings
from bnexport.runtimes.catalogue import RunnerSpec, runner_spec
from bnexport.runtimes.reference_runner import EmulatedRunner
from bnexport.verification.scope import Scope

ROOT = Path(__file__).parents[3]
BOTH = ("float32", "tf32")
Change = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


class Engine(EmulatedRunner):
    """A made-up GPU: it rounds to a given precision and reports its nodes on CUDA."""

    def __init__(self, bundle: Bundle, precision: str, change: Change) -> None:
        super().__init__(bundle, precision)
        self.name, self.effective_device, self._change = "onnxruntime-cuda", "cuda:0", change
        self.description |= {"device": "cuda:0", "nodes": {"CUDAExecutionProvider": 11}}

    def _run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self._change(dict(super()._run(feeds)))


class GpuSpec(RunnerSpec):
    """A row that opens in this process, because a child process does not have it."""

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


def measured(bundle: Bundle, sweeps: Sequence[Sweep], samples: int = 20, **options: Any) -> Lane:
    """Run sweeps alone; by default in this process."""
    shared = {"training": False, "refusals": (), "jobs": 0}
    return run_lane(LaneInput(bundle, max_samples=samples), sweeps, **(shared | options))


def lane(bundle: Bundle, spec: RunnerSpec, scope: Scope | None = None) -> Lane:
    return measured(bundle, [Sweep(spec, scope or Scope(BOTH, drift=False))], samples=80)


@pytest.fixture(scope="module")
def good(bundle: Bundle) -> Lane:
    """The lane on a made-up GPU without a fault."""
    return lane(bundle, gpu())


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
    text = page(found)
    assert "FAIL: 2 settings of 1 runtimes" in text
    assert f"- onnxruntime-cuda, float32: {strict.reason}" in text
    assert "| **FAIL** |" in text


def jittering(share: float) -> Change:
    """Each run has a different error."""
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
        # In TF32 another order of sums tips numbers that are close to a tie, so a batch size may differ as much as the error.
        assert 0 < run.batches < (1e-5 if run.stage == "strict" else run.error)
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
    assert "- onnxruntime-cuda: onnxruntime-cuda can't run here: no y" in page(found)
    sweeps = [Sweep(spec, Scope(("float32",), drift=False)) for spec in (emulated_spec(), replace(gpu(), opener=never))]
    found = measured(bundle, sweeps)
    assert [run.passed for run in found.runs] == [True]
    assert not found.passed


def test_a_spoiled_bundle_fails_the_lane(bundle: Bundle, tmp_path: Path) -> None:
    flip_bit(copy_bundle(bundle, tmp_path / "1") / MODEL_ONNX)
    found = lane(Bundle.open(tmp_path / "1"), gpu())
    assert not found.passed
    assert MODEL_ONNX in found.broken


def test_the_table_of_a_gpu_holds_every_combination() -> None:
    wide = [
        settings
        for sweep in gpu_sweeps()
        if sweep.spec.name == "onnxruntime-cuda"
        for settings in sweep.scope.settings_of(sweep.spec)
    ]
    assert len(set(wide)) == 2 * len(OPTIMISATIONS) * 2 * len(CONV_SEARCHES)
    assert all(settings.isolated for settings in wide)
    names = {sweep.spec.name for sweep in gpu_sweeps()}
    assert names == {"torch-cuda", "torchscript-cuda", "torch-export-cuda", "onnxruntime-cuda", "onnxruntime-tensorrt"}
    for name in names:
        requested = {kind for sweep in gpu_sweeps() if sweep.spec.name == name for kind in sweep.scope.precisions}
        assert requested == set(BOTH)
    assert {sweep.spec.name for sweep in cpu_sweeps()} == {
        "emulated-cpu", "onnxruntime-cpu", "openvino-cpu", "torch-cpu", "torchscript-cpu", "torch-export-cpu"
    }  # fmt: skip
    for sweeps in (gpu_sweeps(), cpu_sweeps()):
        assert len({sweep.name for sweep in sweeps}) == len(sweeps)


def made_up_tables(monkeypatch: pytest.MonkeyPatch, *, real: bool) -> None:
    """Tables that a test can run in this process: a made-up GPU, or no GPU and the emulation."""
    row = gpu() if real else replace(gpu(), prober=lambda _device: "no GPU")
    monkeypatch.setattr(tables, "gpu_sweeps", lambda: (Sweep(row, Scope(BOTH, drift=False)),))
    monkeypatch.setattr(tables, "cpu_sweeps", lambda: (Sweep(emulated_spec(), Scope(BOTH, drift=False)),))
    monkeypatch.setattr(command, "absent_runtimes", lambda: {} if real else {"onnxruntime-cuda": "no GPU"})


def run_command(bundle: Bundle, out: Path, *arguments: str) -> int:
    results = ("--out", str(out / "gpu.md"), "--json", str(out / "gpu.json"))
    with pytest.raises(SystemExit) as ended:
        command.main(
            ["--bundle", str(bundle.path), "--max-samples", "8", "--no-refusals", "--jobs", "0", *results, *arguments]
        )
    return int(ended.value.code or 0)


def test_without_a_gpu_the_emulation_stands_in_and_the_page_states_it(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made_up_tables(monkeypatch, real=False)
    assert run_command(bundle, tmp_path) == 0
    found = read_results(tmp_path / "gpu.json")
    assert not found.real
    assert found.machine == {}
    assert found.passed
    captured = capsys.readouterr()
    assert captured.err == "emulated-cpu\n"
    assert captured.out.startswith("PASS: 2 settings; ")
    text = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert NOT_MEASURED in text
    assert "not a measurement of a GPU" in " ".join(text.split())
    assert "| tf32 | shipping |" in text
    assert "Measured on" not in text
    assert max(len(line) for line in text.splitlines() if not line.startswith("|")) <= 120
    assert run_command(bundle, tmp_path) == 0  # one rehearsal can replace another


def test_an_emulation_never_replaces_a_measurement(good: Lane, tmp_path: Path) -> None:
    assert good.measured
    measured = replace(good, machine={"GPU": "NVIDIA H0", "driver": "1.2", "CUDA": "13.0"})
    write_document(measured, out := tmp_path / "gpu.md")
    text = out.read_text(encoding="utf-8")
    assert "Measured on GPU NVIDIA H0, driver 1.2, CUDA 13.0." in text
    assert "| float32 | strict |" in text
    assert "11 CUDA" in text
    with pytest.raises(UsageError, match="holds measurements of a GPU"):
        write_document(replace(good, real=False), out)
    assert out.read_text(encoding="utf-8") == text
    write_document(measured, out)


@pytest.mark.parametrize(
    ("code", "message", "passed"),
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
def test_conditions_of_a_refusal(code: int, message: str, passed: bool) -> None:
    refusal = HiddenLibrary("no cuRAND", "onnxruntime-cuda", ("libcurand.so.10",))
    assert refused_rightly(refusal, code, message) is passed


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux's loader can be made to miss a library")
@pytest.mark.sampled(2)
@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda row: f"{row.name}, {row.runtime}")
def test_a_hidden_library_is_named_with_exit_code_3(bundle: Bundle, refusal: HiddenLibrary) -> None:
    """On any machine the hidden library is missing."""
    found = refuse(refusal, bundle.path)
    assert found.passed, found
    assert found.code == 3
    assert refusals.tempfile.gettempdir() not in found.said


@pytest.mark.slow
def test_a_runtime_that_answers_all_the_same_is_not_a_refusal(bundle: Bundle) -> None:
    found = refuse(HiddenLibrary("nothing", "onnxruntime-cpu", environment={"CUDA_VISIBLE_DEVICES": ""}), bundle.path)
    assert found.code == 0
    assert not found.passed


def test_refusals_are_part_of_the_verdict(good: Lane) -> None:
    refused = Refused(
        HiddenLibrary("no driver", "onnxruntime-cuda", ("libcuda.so.1",)), passed=False, code=0, said="PASS a|b"
    )
    found = replace(good, refused=(refused,))
    assert not found.passed
    assert r"| no driver (`libcuda.so.1`) | onnxruntime-cuda | 0 | PASS a\|b | **FAIL** |" in page(found).splitlines()


def test_required_parts(monkeypatch: pytest.MonkeyPatch) -> None:
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
    [
        (["--only", "nothing"], "", 2),
        (["--only", "onnxruntime-cpu"], "", 2),
        (["--sweep", "nothing"], "", 2),
        (["--bundle", "nowhere"], "", 2),
        (["--merge", "nowhere.json"], "", 2),
        (["--only", "onnxruntime-cuda"], "", 3),
        ([], "cuda", 3),
    ],
)
def test_bad_input_and_a_missing_device_are_one_sentence(
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
    made_up_tables(monkeypatch, real=False)
    monkeypatch.setenv("BNEXPORT_REQUIRE", required)
    assert run_command(bundle, tmp_path, *arguments) == code
    assert not (tmp_path / "gpu.md").exists()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert [line for line in captured.err.splitlines() if line.startswith("gpu_lane: ")] == captured.err.splitlines()[
        -1:
    ]


def test_two_calls_make_the_page_of_one(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By --merge and by --add, in any order; a part that a call did not measure is not a PASS."""

    def opener(*arguments: object) -> Runner:
        runner = emulated_spec().opener(*arguments)  # type: ignore[arg-type]
        runner.name = "other-cpu"
        return runner

    other = replace(emulated_spec(), engine="other", opener=opener)
    both = (Sweep(emulated_spec(), Scope(("tf32",), drift=False)), Sweep(other, Scope(("float32",), drift=False)))
    monkeypatch.setattr(tables, "cpu_sweeps", lambda: both)
    folders = [tmp_path / name for name in ("one", "a", "b", "merged", "added")]
    one, a, b, merged, added = folders
    assert run_command(bundle, one, "--rehearse", "--no-training") == 0
    assert run_command(bundle, a, "--rehearse", "--no-training", "--sweep", "emulated-cpu") == 0
    assert run_command(bundle, b, "--rehearse", "--no-training", "--sweep", "other-cpu") == 0
    assert "- other-cpu: not requested" in (a / "gpu.md").read_text()
    both_files = ("--merge", str(a / "gpu.json"), str(b / "gpu.json"))
    assert run_command(bundle, merged, *both_files) == 0
    for name in ("other-cpu", "emulated-cpu"):
        assert run_command(bundle, added, "--rehearse", "--no-training", "--add", "--sweep", name) == 0
    assert (merged / "gpu.md").read_text() == (one / "gpu.md").read_text()
    assert json.loads((merged / "gpu.json").read_text()) == json.loads((one / "gpu.json").read_text())
    assert read_results(added / "gpu.json") == read_results(one / "gpu.json")
    capsys.readouterr()


def test_a_budget_that_is_spent_is_not_a_pass(
    bundle: Bundle, good: Lane, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(bundle, tmp_path, "--rehearse", "--no-training", "--seconds", "0") == 1
    assert capsys.readouterr().out.startswith(f"INCOMPLETE: {len(cpu_sweeps())} parts not reached; ")
    found = read_results(tmp_path / "gpu.json")
    assert found.unreached == tuple(sweep.name for sweep in cpu_sweeps())
    assert not (tmp_path / "gpu.md").exists()
    assert good.verdict == "PASS"
    partial = replace(good, unreached=("torch-cuda",))
    assert (partial.verdict, partial.passed) == ("INCOMPLETE", False)
    text = page(partial)
    assert "INCOMPLETE: 2 settings of 1 runtimes" in text
    assert "1 requested parts were not reached." in text
    assert "- torch-cuda: not reached, because the time was up" in text
    assert "- torchscript-cuda: not requested" in text


def test_no_sweep_starts_after_the_budget(bundle: Bundle) -> None:
    """The first sweep spends it: the results of the first are kept, the second is listed as not reached."""
    begun: list[str] = []
    now = [0.0]

    def slow(outputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        now[0] += 100.0
        return outputs

    kept: list[Lane] = []
    sweeps = [Sweep(gpu(change=slow), Scope(("float32",), drift=False), label) for label in ("a", "b")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_lane.time, "monotonic", lambda: now[0])
        found = measured(bundle, sweeps, seconds=50, on_line=begun.append, keep=kept.append)
    assert begun == ["onnxruntime-cuda, a"]
    assert list(found.sweeps) == ["onnxruntime-cuda, a"]
    assert found.unreached == ("onnxruntime-cuda, b",)
    assert [(len(lane.sweeps), len(lane.unreached)) for lane in kept] == [(0, 2), (1, 1)]


def test_a_crash_of_one_sweep_keeps_the_others(
    bundle: Bundle, good: Lane, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each sweep is a process; one dies by a signal, one prints an error and fails, one writes no result."""
    code = {
        "good": "import shutil; shutil.copy(sys.argv[1], out)",
        "dies": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
        "fails": "print('ValueError: no such thing'); sys.exit(1)",
        "empty": "pass",
    }
    result = next(iter(good.sweeps.values()))
    write_results(replace(good, sweeps={"emulated-cpu, good": result}), made := tmp_path / "made.json")
    popen = gpu_lane.subprocess.Popen

    def child(arguments: list[str], **options: object) -> object:
        request = json.loads(arguments[-1])
        name = request["part"].partition(", ")[2]
        start = f"import sys; out = {request['out']!r}; "
        return popen([sys.executable, "-c", start + code[name], str(made)], **options)

    monkeypatch.setattr(gpu_lane.subprocess, "Popen", child)
    sweeps = [Sweep(emulated_spec(), Scope(), name) for name in code]
    found = measured(bundle, sweeps, jobs=2)
    assert list(found.sweeps) == ["emulated-cpu, good"]
    assert found.sweeps["emulated-cpu, good"].passed
    assert dict(found.failed) == {
        "emulated-cpu, dies": "its process ended: killed by SIGSEGV",
        "emulated-cpu, fails": "its process ended: exit code 1 (ValueError: no such thing)",
        "emulated-cpu, empty": "its process ended without a result",
    }
    assert found.verdict == "FAIL"
    assert "- emulated-cpu, dies: its process ended: killed by SIGSEGV" in page(found)


def test_the_order_is_that_of_the_table(bundle: Bundle, good: Lane, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order is not that in which the parts end."""
    result = next(iter(good.sweeps.values()))

    def in_child(job: LaneInput, part: str, *_rest: object) -> Lane:
        time.sleep({"a": 0.4, "b": 0.2, "c": 0.0}[part[-1]])
        return replace(job.empty(), sweeps={part: result})

    def refuse(refusal: HiddenLibrary, _bundle: Path) -> Refused:
        time.sleep(0.2 if refusal.name == "first" else 0.0)
        return Refused(refusal, passed=True, code=3, said="no")

    monkeypatch.setattr(gpu_lane, "_in_child", in_child)
    monkeypatch.setattr(gpu_lane, "refuse", refuse)
    sweeps = [Sweep(emulated_spec(), Scope(), name) for name in "abc"]
    hidden = [HiddenLibrary(name, "torch-cuda") for name in ("first", "second")]
    found = measured(bundle, sweeps, refusals=hidden, jobs=3)
    assert list(found.sweeps) == [f"emulated-cpu, {name}" for name in "abc"]
    if sys.platform.startswith("linux"):
        assert [item.refusal.name for item in found.refused] == ["first", "second"]
    assert found.passed


def test_an_interrupt_ends_the_processes_of_the_parts(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lane does not wait for a part that still runs."""
    popen, children = gpu_lane.subprocess.Popen, []

    def child(arguments: list[str], **options: object) -> object:
        code = "pass" if '"emulated-cpu, quick"' in arguments[-1] else "import time; time.sleep(600)"
        children.append(popen([sys.executable, "-c", code], **options))
        return children[-1]

    def keep(found: Lane) -> None:
        if not found.failed:
            return
        while len(children) < 2:
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_lane.subprocess, "Popen", child)
    sweeps = [Sweep(emulated_spec(), Scope(), name) for name in ("endless", "quick")]
    with pytest.raises(KeyboardInterrupt):
        measured(bundle, sweeps, jobs=2, keep=keep)
    assert min(process.wait(240) for process in children) < 0


def test_a_part_that_does_not_end_is_stopped(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    popen = gpu_lane.subprocess.Popen
    endless = [sys.executable, "-c", "print('half', flush=True); import time; time.sleep(600)"]
    monkeypatch.setattr(gpu_lane.subprocess, "Popen", lambda _arguments, **options: popen(endless, **options))
    monkeypatch.setattr(gpu_lane, "PART_SECONDS", 3.0)
    found = measured(bundle, [Sweep(emulated_spec(), Scope())], jobs=1)
    assert found.failed["emulated-cpu"].startswith("its process was stopped after 3 s")
    assert found.verdict == "FAIL"


@pytest.mark.slow
def test_a_sweep_runs_in_a_separate_process(bundle: Bundle) -> None:
    sweep = cpu_sweeps()[0]
    found = run_lane(LaneInput(bundle, max_samples=20, real=False), [sweep], training=False, refusals=(), jobs=1)
    assert found.verdict == "PASS", found.broken
    assert list(found.sweeps) == ["onnxruntime-cpu"]
    assert [run.runtime for run in found.runs] == ["onnxruntime-cpu"]
    assert found.reference != "nothing"


def test_an_absent_runtime_is_neither_a_failure_nor_unreached(bundle: Bundle, good: Lane) -> None:
    row = replace(gpu(), prober=lambda _device: "no GPU")
    begun: list[str] = []
    sweeps = [Sweep(row, Scope(("float32",)), label) for label in ("", "wide")]
    found = measured(bundle, sweeps, on_line=begun.append)
    assert dict(found.absent) == {"onnxruntime-cuda": "no GPU"}
    assert found.unreached == ()
    assert begun == ["onnxruntime-cuda"], "the second sweep of an absent runtime was tried"
    assert found.verdict == "FAIL", "nothing was measured"
    again = merge([found, good])
    assert (again.absent, again.verdict) == ({}, "PASS")


def test_a_failure_is_not_hidden_by_another_call(bundle: Bundle, good: Lane) -> None:
    bad = lane(bundle, gpu(precision="tf32"))
    crashed = replace(good, sweeps={}, failed={"onnxruntime-cuda": "its process ended"})
    for other in (bad, crashed):
        assert merge([good, other]).verdict == merge([other, good]).verdict == "FAIL"
    assert not next(run for run in merge([bad, good]).runs if run.settings == "").passed


def test_results_of_different_origin_are_not_merged(good: Lane) -> None:
    for change in ({"bundle": "0"}, {"machine": {"GPU": "another"}}, {"real": False}, {"environment": {"cores": 1}}):
        with pytest.raises(UsageError, match=r"different|rehearsal"):
            merge([good, replace(good, **change)])


def test_results_are_read_as_they_were_written(good: Lane, tmp_path: Path) -> None:
    refused = Refused(
        HiddenLibrary("no GPU", "torch-cuda", ("a.so",), environment={"A": "b"}), passed=True, code=3, said="no"
    )
    speed = GpuSpeed("torch", True, 256, 60_000, Spread(1.0, 2.0, 3.0, 10), 4.0)
    found = replace(good, refused=(refused,), training=(speed,), unreached=("torch-cuda",), failed={"training": "no"})
    write_results(found, tmp_path / "a.json")
    assert read_results(tmp_path / "a.json") == found
    for content in ("", "[]", '{"format": "other"}', '{"format": "bnexport-gpu-lane/1", "sweeps": []}'):
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(DataError, match=r"a\.json does not hold results of the GPU lane"):
            read_results(tmp_path / "a.json")


def test_the_training_table(good: Lane) -> None:
    speed = GpuSpeed("scratch", True, 256, 60_000, Spread(100_000.0, 200_000.0, 300_000.0, 10), 4.0)
    found = replace(good, training=(speed,))
    row = "| scratch | 256 | 60,000 | recorded as a CUDA graph | 100,000 | 200,000 | 300,000 | 4.00 |"
    assert row in page(found).splitlines()
    rehearsed = page(replace(found, machine={}))
    assert row not in rehearsed
    assert "Not measured yet." in rehearsed


def test_the_training_speed_is_measured_row_by_row() -> None:
    rows = list(gpu_speeds(torch.device("cpu"), train=64, test=16, batch_sizes=(32,)))
    assert [(row.norm, row.captured, row.images) for row in rows] == [("torch", False, 64), ("scratch", False, 64)]
    assert all(0 < row.images_per_s.low <= row.images_per_s.high for row in rows)


def test_the_script_starts_from_any_folder(tmp_path: Path) -> None:
    done = subprocess.run(
        [str(ROOT / "scripts" / "gpu_lane"), "--help"], cwd=tmp_path, env=os.environ | {"PYTHON": sys.executable},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "--merge FILE" in done.stdout


def test_the_committed_page_is_the_lane_s_own() -> None:
    text = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    assert text.startswith("# GPU runtimes\n")
    assert (NOT_MEASURED in text) is not ("Measured on GPU" in text)
    assert "**FAIL**" not in text
    for refusal in REFUSALS:
        assert f"| {refusal.name} (" in text
