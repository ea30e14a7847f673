"""Statistics, variants, verdicts and recommendations of a benchmark, with a fake clock and fake processes; the self-check."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bnexport.benchmarking import benchmark as module
from bnexport.benchmarking import benchmark_report as reporting
from bnexport.benchmarking import benchmark_request as planning
from bnexport.benchmarking.benchmark import benchmark, save_tunings
from bnexport.benchmarking.benchmark_report import (
    BUSY_LIMIT,
    BenchmarkReport,
    Loaded,
    Round,
    RuntimeVerdict,
    results_of,
    verdict_on,
)
from bnexport.benchmarking.benchmark_request import BARE, BenchmarkRequest, Subject, Variant
from bnexport.benchmarking.benchmark_worker import GOLDEN_EVERY, Inputs, inputs_of, measure, order_of, timed_calls
from bnexport.benchmarking.spread import LEAST_CALLS, LEAST_ROUNDS, ROUNDS, Quantile, p99, quantile, ratio
from bnexport.bundle import TUNED, Bundle
from bnexport.errors import BundleError, RuntimeUnavailable, UsageError
from bnexport.progress import silent
from bnexport.runtimes.replay import incomparable
from bnexport.tuned import Tuning, read_tuning
from bnexport.verification.verdict import VerificationReport

REFERENCE = Path(__file__).parents[3] / "models" / "bn_lenet" / "1"
PASS = RuntimeVerdict("PASS", "now")
IDLE = {"instructions": ["avx2"], "governor": None, "load": 0.1, "load_after": 0.2, "others": 0.01}


def report_of(*rows: Any, **changes: Any) -> BenchmarkReport:
    results = results_of(rows)
    subjects = tuple(dict.fromkeys(item.variant.subject for item in results))
    values = {"environment": {"cores": 2}, "machine": IDLE, "inputs": {}, "seconds": 1.0, "rounds": 5, **changes}
    return BenchmarkReport(subjects, results, {}, **values)


@pytest.fixture
def subject() -> Subject:
    return Subject("A", "models/bn_lenet/1", Bundle.open(REFERENCE))


def row(
    subject: Subject, ms: list[float], *, batch: int = 1, sessions: int = 1, cpu: float = 1.0,
    verdict: RuntimeVerdict = PASS, error: float = 0.0, runtime: str = "onnxruntime-cpu",
) -> Any:  # fmt: skip
    """A row that makes 100 calls of ``ms`` milliseconds in each round, and uses ``cpu`` cores of each session."""
    rounds = [Round((time / 1e3,) * 100 * sessions, 0.1 * time, 0.1 * time * cpu * sessions, error) for time in ms]
    return Variant(subject, runtime, batch, 1, sessions), Loaded(0.1, 0.2, 0.3, 10**8), rounds, verdict


# Quantiles and ratios.


def test_a_quantile_is_a_value_between_its_order_statistics() -> None:
    found = quantile(list(range(1, 1001)), 0.99)
    assert (found.value, found.n) == (990, 1000)
    assert (found.low, found.high) == (983, 997)  # ranks of B(1000, 0.99): P(B < 983) = 0.0138, P(B < 997) = 0.9899
    assert quantile([3.0, 1.0, 2.0, 10.0], 0.5).value == 2.5
    few = quantile([5.0, 1.0, 2.0, 4.0, 3.0], 0.5)
    assert (few.low, few.value, few.high) == (1, 3, 5), "the range of 5 rounds"
    many = quantile(list(range(1, 10)), 0.5)
    assert (many.low, many.high) == (2, 8), "9 values: the second and the last but one enclose the median with 96 %"


@pytest.mark.parametrize(("share", "n"), [(0.5, 5), (0.5, 9), (0.5, 400), (0.99, 400), (0.99, 5000)])
def test_the_interval_holds_the_true_quantile_as_often_as_stated(share: float, n: int) -> None:
    rng = np.random.default_rng(1)
    truth = -math.log(1 - share)  # of the exponential distribution
    found = [quantile(rng.exponential(size=n).tolist(), share) for _ in range(1000)]
    held = statistics.fmean(item.low <= truth <= item.high for item in found)
    assert 0.92 <= held <= 0.99, held


def test_a_p99_needs_300_calls() -> None:
    assert p99([0.1] * (LEAST_CALLS - 1)) is None
    found = p99([*([0.1] * 297), 0.2, 0.3, 0.4])
    assert found is not None
    assert (found.value, found.high, found.n) == (0.1, 0.4, 300)


def test_a_ratio_compares_the_rounds_one_by_one() -> None:
    slow, fast = [2.2, 4.4, 1.1, 3.3, 2.2], [2.0, 4.0, 1.0, 3.0, 2.0]
    found = ratio(slow, fast)
    assert found.value == pytest.approx(1.1)
    assert not found.holds_one
    assert ratio([2.0, 1.1, 0.9, 3.0, 2.0], [2.1, 1.0, 1.0, 3.0, 2.0]).holds_one
    assert ratio(slow, fast[:3]).n == 3, "an interrupted round is left out"


# The loop of calls.


def test_no_input_is_used_twice_in_a_row_and_the_golden_one_comes_regularly() -> None:
    for count, start in ((3, 0), (65, 7)):
        order = order_of(count, start)
        used = [next(order) for _ in range(200)]
        assert all(now != then for now, then in itertools.pairwise(used))
        assert [at + 1 for at, number in enumerate(used) if number == 0] == list(range(1, 201, GOLDEN_EVERY))
        assert set(used) == set(range(count))


class FakeClock:
    """A clock that only the calls move."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: Callable[[], float]) -> Callable[[Any], Any]:
        def run(feeds: Mapping[str, Any]) -> Mapping[str, Any]:
            self.now += seconds()
            return feeds

        return run


INPUTS = Inputs([{"x": np.full(2, number)} for number in range(9)], {"x": np.zeros(2)}, {"x": 1.0})


def test_calls_are_timed_until_the_seconds_are_over() -> None:
    clock = FakeClock()
    times, answers = timed_calls(clock.work(lambda: 2**-7), INPUTS, 1.0, clock=clock)
    assert times == [2**-7] * 128
    assert len(answers) == 128 // GOLDEN_EVERY
    assert INPUTS.error(answers[0]) == 0
    slow, answers = timed_calls(clock.work(lambda: 5.0), INPUTS, 1.0, clock=clock)
    assert slow == [5.0]
    assert len(answers) == 1, "the first call gets the golden inputs"


def test_windows_of_the_samples_follow_the_golden_inputs() -> None:
    samples, golden = {"x": np.arange(70.0).reshape(35, 2)}, {"x": np.array([[7.0, 8.0], [9.0, 10.0]])}
    found = inputs_of(samples, golden, {"y": np.array([[1.0], [-4.0]])}, 3)
    assert found.feeds[0]["x"].tolist() == [[7, 8], [9, 10], [7, 8]]
    assert len({feeds["x"].tobytes() for feeds in found.feeds}) == len(found.feeds) == 1 + 33
    right = {"y": np.array([[1.0], [-4.0], [1.0]])}
    assert found.error(right) == 0
    assert found.error({"y": right["y"] + [[0.0], [0.0], [0.4]]}) == pytest.approx(0.1)
    assert found.error({"y": right["y"] * np.nan}) == math.inf
    assert incomparable("y", right["y"][:2], right["y"])
    assert found.error({"y": right["y"][:2]}) == math.inf


def test_several_sessions_call_at_the_same_time_and_a_wrong_answer_is_found() -> None:
    seen: list[set[int]] = [set(), set()]

    def session(number: int) -> Callable[[Any], Any]:
        def run(feeds: Mapping[str, Any]) -> Mapping[str, Any]:
            seen[number].add(int(feeds["x"][0]))
            return {"x": feeds["x"] + (0.5 if number == 1 else 0.0)}

        return run

    facts, times = measure([session(0), session(1)], INPUTS, 0.02)
    assert facts["golden"] == 0.5, "the second session's answers are compared too"
    assert seen == [set(range(9)), set(range(9))]
    assert len(times) >= 6
    assert facts["elapsed"] > 0

    def broken(_feeds: Any) -> Any:
        raise ValueError("no such kernel")

    with pytest.raises(ValueError, match="no such kernel"):
        measure([broken], INPUTS, 0.01)


# Rows and recommendations.


def test_rows_are_compared_with_the_first_of_their_batch_size(subject: Subject) -> None:
    times = ([1.0, 2.0, 3.0, 4.0, 5.0], [1.1, 2.2, 3.3, 4.4, 5.5], [1.0, 2.1, 2.9, 4.2, 5.0])
    found = results_of([*(row(subject, ms) for ms in times), row(subject, [9.0] * 5, batch=8)])
    assert [item.ratio.value for item in found] == pytest.approx([1.0, 1.1, 1.0, 1.0])
    assert [item.ratio.holds_one for item in found] == [True, False, True, True]
    (two,) = results_of([row(subject, [4.0] * 5, batch=8, sessions=2)])
    assert two.images_per_second == pytest.approx(2 * 8 / 4e-3)
    assert two.p50.value == pytest.approx(4e-3)
    assert two.cpu_per_image == pytest.approx(4e-3 / 8)


def test_one_row_is_recommended_per_goal_and_ties_are_named(subject: Subject) -> None:
    rows = [
        row(subject, [1.0, 1.1, 0.9, 1.0, 1.0]),
        row(subject, [1.0, 1.0, 1.0, 1.0, 1.1]),
        row(subject, [8.0] * 5, batch=32, sessions=2, cpu=2.0),
        row(subject, [12.0] * 5, batch=32),
    ]
    report = report_of(*rows)
    latency, throughput, cpu = report.recommended
    assert (latency.best, latency.ties) == (report.results[0], (report.results[1],))
    assert (throughput.best, throughput.ties) == (report.results[2], ())
    assert (cpu.best, cpu.ties) == (report.results[3], ())
    assert throughput.sentence == (
        "highest throughput: A onnxruntime-cpu, batch 32, 1 thread, 2 sessions (8,000 images/s)"
    )
    assert "no difference to A onnxruntime-cpu, batch 1" in latency.sentence
    assert json.dumps(report.to_json(), allow_nan=False)


def test_of_rows_without_a_difference_the_one_on_fewer_cores_is_recommended(subject: Subject) -> None:
    rows = [
        row(subject, [1.0, 1.1, 0.9, 1.0, 1.0], sessions=2),
        row(subject, [1.02, 1.0, 1.0, 1.02, 1.1]),
        row(subject, [0.5, 1.5, 1.5, 1.5, 1.5]),  # its range holds 1, but its median is far away
    ]
    report = report_of(*rows)
    latency = report.recommended[0]
    assert latency.best is report.results[1]
    assert latency.ties == (report.results[0], report.results[2])


def test_a_wrong_or_failed_or_unverified_row_is_never_recommended(subject: Subject) -> None:
    rows = [
        row(subject, [3.0] * 5),
        row(subject, [1.0] * 5, error=1e-3),  # the golden vectors' bound is 1e-5
        row(subject, [1.0] * 5, error=math.nan),
        row(subject, [1.0] * 5, verdict=RuntimeVerdict("FAIL", "now", "strict: it differs")),
        row(subject, [1.0] * 5, runtime=BARE, verdict=RuntimeVerdict("-", "not verified")),
    ]
    results = results_of(rows)
    assert [item.word for item in results] == ["PASS", "WRONG", "WRONG", "FAIL", "-"]
    assert {item.best for item in reporting.recommendations(results)} == {results[0]}
    nothing = report_of(*rows[1:])
    assert (nothing.right, nothing.recommended) == (False, ())
    assert nothing.no_winner == "no measured variant has the verdict PASS and right answers"


@pytest.mark.parametrize(
    ("machine", "words"),
    [
        ({"others": BUSY_LIMIT}, ""),
        ({"others": BUSY_LIMIT + 0.01}, "other processes used 16% of this machine's CPU time"),
        ({"others": None, "load": 1.0}, ""),
        ({"others": None, "load": 1.2}, "the load average was 1.2 on 2 cores"),
        ({"others": None, "load": None}, ""),
    ],
)
def test_a_busy_machine_names_no_winner(subject: Subject, machine: dict[str, Any], words: str) -> None:
    report = report_of(row(subject, [1.0] * 5), machine=IDLE | machine)
    assert report.busy.startswith(words)
    assert bool(report.recommended) == (not words)
    assert report.no_winner == report.busy


def test_an_interrupted_measurement_names_no_winner(subject: Subject) -> None:
    report = report_of(row(subject, [1.0] * 3), interrupted=True)
    assert (report.recommended, report.no_winner) == ((), "the measurement was interrupted")
    assert len(report.results) == 1


def test_a_verdict_is_of_one_runtime_and_the_files() -> None:
    manifest = Bundle.open(REFERENCE).manifest
    whole = VerificationReport.from_json(manifest.verification)
    found = verdict_on(whole, "openvino-cpu", manifest, "at export")
    assert (found.word, found.source, found.bound, found.accuracy) == ("PASS", "at export", 1e-5, 0.8607)

    def failing(stage: str, subject: str, settings: str = "") -> VerificationReport:
        changes = {"passed": False, "reason": "it differs", "settings": settings}
        wrong = ((item.stage, item.subject) == (stage, subject) for item in whole.rows)
        rows = (replace(item, **changes) if spoil else item for item, spoil in zip(whole.rows, wrong, strict=True))
        return replace(whole, rows=tuple(rows))

    assert verdict_on(failing("strict", "openvino-cpu"), "onnxruntime-cpu", manifest, "now").word == "PASS"
    failed = verdict_on(failing("strict", "openvino-cpu"), "openvino-cpu", manifest, "now")
    assert (failed.word, failed.reason) == ("FAIL", "strict: it differs")
    assert verdict_on(failing("file-proof", "model.onnx"), "torch-cpu", manifest, "now").word == "FAIL"
    other = failing("strict", "openvino-cpu", "bfloat16")
    assert verdict_on(other, "openvino-cpu", manifest, "now").word == "PASS", "those kernels are not measured"
    assert verdict_on(whole, "onnxruntime-cuda", manifest, "now").word == "-"


# The plan.


def request(**changes: Any) -> BenchmarkRequest:
    return BenchmarkRequest(**{"bundles": (REFERENCE,), "batches": (1, 4), **changes})


def test_variants_are_files_runtimes_batches_threads_and_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "available_cores", lambda: 4)
    named, file = ("torchscript-cpu", "onnxruntime-cpu"), REFERENCE / "model.onnx"
    wanted = request(runtimes=named, threads=(2, "all"), against=file)
    subjects = planning.subjects_of(wanted)
    variants, left = planning.variants_of(wanted, subjects, wanted.specs())
    assert wanted.ways() == ((2, 1), (4, 1)), "two sessions of two threads are in no list, four would need eight cores"
    assert [(item.subject.label, item.runtime, item.batch, item.threads) for item in variants[:3]] == [
        ("-", BARE, 1, 2), ("-", BARE, 1, 4), ("A", "torchscript-cpu", 1, 2),
    ]  # fmt: skip
    assert (len(variants), left) == (2 * 2 * 3, {})
    assert request(threads=(1,), sessions=(1, "all")).ways() == ((1, 1), (1, 4))
    quick = request(quick=True, batches=())
    assert [quick.rounds_for(slowest) for slowest in (0.001, 0.02, 0.05, 3.0)] == [50, 25, 10, 5]
    assert request(rounds=7).rounds_for(3.0) == 7
    assert {spec.engine for spec in quick.specs()} <= {"onnxruntime", "openvino"}
    assert quick.batches_of(subjects[1]) == (1, 32)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"runtimes": ("tensorflow",)}, "the runtime 'tensorflow' is unknown"),
        ({"batches": (0,)}, "--batch is 0"),
        ({"batches": (1, 100_000)}, "--batch is 100000"),
        ({"threads": (0,)}, "--threads is 0"),
        ({"sessions": (0,)}, "--sessions is 0"),
        ({"sessions": (9,)}, "--sessions is 9, but this process has 2 cores"),
        ({"threads": (3,)}, "--threads is 3, but this process has 2 cores"),
        ({"threads": (2,), "sessions": (2,)}, "2 sessions of 2 threads need 4 cores"),
        ({"rounds": 4}, "--rounds is 4, but the interval of a ratio needs at least 5"),
        ({"seconds": 0.0}, "--seconds is 0.0"),
        ({"seconds": math.nan}, "--seconds is nan"),
        ({"bundles": ()}, "no bundle is given"),
        ({"bundles": (REFERENCE, REFERENCE / "." / ".." / "1")}, "are the same bundle"),
        ({"against": REFERENCE / "none.onnx"}, "none.onnx is not a file"),
    ],
)
def test_bad_requests_are_refused(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], words: str) -> None:
    monkeypatch.setattr(planning, "available_cores", lambda: 2)
    with pytest.raises(UsageError) as caught:
        benchmark(request(**changes))
    assert words in caught.value.message
    assert caught.value.remedy


def test_a_folder_that_is_not_a_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not a bundle"):
        benchmark(request(bundles=(tmp_path,)))


# Whole runs with fake processes.


class FakeWorker:
    """A process that measures at once: 1 ms per call and image, with the changes of ``plan``."""

    plan: Mapping[str, Any] = {}

    def __init__(self, name: str, request: Mapping[str, Any]) -> None:
        version = Bundle.open(REFERENCE).manifest.verification["runtimes"].get(name, {}).get("version", "1")
        batches = [str(batch) for batch in request["batches"]]
        self.request, self.calls = request, 0
        self.loaded = {
            "import": 0.1, "load": 0.2, "description": {"version": self.plan.get("version", version)},
            "first": dict.fromkeys(batches, 0.3), "memory": dict.fromkeys(batches, 10**8),
        }  # fmt: skip
        if name in self.plan.get("refuse", ()):
            raise RuntimeUnavailable("it is broken here", remedy="Repair it")

    def __enter__(self) -> FakeWorker:
        return self

    def __exit__(self, *_: object) -> None: ...

    def measure(self, batch: int, _seconds: float) -> tuple[dict[str, float], list[float]]:
        self.calls += 1
        if self.calls > self.plan.get("interrupt", 99):
            raise KeyboardInterrupt
        busy = 0.01 + self.plan.get("others", 0.0) * 2
        golden = self.plan.get("golden", {}).get(self.request["runtime"], 0.0)
        facts = {"elapsed": 0.01, "cpu": 0.01, "busy": busy, "total": 2.0, "golden": golden}
        return facts, [1e-3 * batch / self.request["threads"]] * 10


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., BenchmarkReport]:
    """Runs a benchmark with fake processes and a fake verification, which is the recorded one."""
    recorded = Bundle.open(REFERENCE).manifest.verification
    monkeypatch.setattr(planning, "available_cores", lambda: 2)
    monkeypatch.setattr(module, "available_memory", lambda: 10**10)
    monkeypatch.setattr(module, "cpu_name", lambda: recorded["environment"]["cpu"])
    monkeypatch.setattr(module, "Worker", FakeWorker)
    monkeypatch.setattr(FakeWorker, "plan", {})

    def run(plan: Mapping[str, Any] | None = None, **changes: Any) -> BenchmarkReport:
        monkeypatch.setattr(FakeWorker, "plan", plan or {})
        return benchmark(request(**{"runtimes": ("onnxruntime-cpu",), "rounds": 5, **changes}))

    return run


Fake = Callable[..., BenchmarkReport]


def test_the_verdict_at_export_counts_for_this_file_engine_and_processor_only(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    verified: list[Any] = []
    recorded = VerificationReport.from_json(Bundle.open(REFERENCE).manifest.verification)

    def verify(*_: object, runtimes: list[str], **__: object) -> VerificationReport:
        verified.append(runtimes)
        return recorded

    monkeypatch.setattr(module, "verify", verify)
    assert {item.verdict.source for item in fake().results} == {"at export"}
    assert verified == []
    assert {item.verdict.source for item in fake({"version": "0.1"}).results} == {"now"}
    assert verified == [["onnxruntime-cpu"]]
    monkeypatch.setattr(module, "cpu_name", lambda: "another processor")
    assert {item.verdict.source for item in fake().results} == {"now"}


def test_an_interrupt_keeps_the_rounds_so_far(fake: Fake) -> None:
    report = fake({"interrupt": 5}, batches=(1,), threads=(1,), sessions=(1,), rounds=9)
    assert report.interrupted
    assert [len(item.rounds) for item in report.results] == [5]
    with pytest.raises(KeyboardInterrupt):
        fake({"interrupt": 0})


def test_the_order_changes_from_round_to_round_and_repeats_with_the_seed(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    orders: list[list[Any]] = []
    real = FakeWorker.measure

    def noted(self: FakeWorker, batch: int, seconds: float) -> Any:
        orders[-1].append((self.request["threads"], self.request["sessions"], batch))
        return real(self, batch, seconds)

    monkeypatch.setattr(FakeWorker, "measure", noted)
    for _ in range(2):
        orders.append([])
        assert not fake().interrupted
    assert orders[0] == orders[1]
    rounds = [orders[0][at : at + 6] for at in range(0, 30, 6)]
    assert rounds[0] == rounds[1][::-1]
    assert rounds[2] == rounds[3][::-1]
    assert rounds[0] != rounds[2]
    assert len({frozenset(part) for part in rounds}) == 1, "every variant is measured once in each round"


def test_too_little_memory_is_refused_before_the_process_starts(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "available_memory", lambda: 5 * 10**7)
    with pytest.raises(UsageError, match=r"needs about 10\d MB of memory, but 50 MB are free"):
        fake()


def test_files_that_can_not_be_loaded_are_listed_and_if_none_can_it_is_an_error(fake: Fake) -> None:
    report = fake({"refuse": ("torch-cpu",)}, runtimes=("torch-cpu", "onnxruntime-cpu"))
    assert report.left == {"A torch-cpu": "it is broken here"}
    assert {item.variant.runtime for item in report.results} == {"onnxruntime-cpu"}
    with pytest.raises(RuntimeUnavailable, match="no runtime could load its file: it is broken here"):
        fake({"refuse": ("onnxruntime-cpu",)})
    with pytest.raises(UsageError, match="can't be run: it is broken here"):
        fake({"refuse": (BARE,)}, against=REFERENCE / "model.onnx")


def test_tuned_json_has_the_recommendations_and_is_not_written_on_a_busy_machine(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "1"
    shutil.copytree(REFERENCE, folder)
    report = fake({"others": 0.5}, bundles=(folder,))
    with pytest.raises(RuntimeUnavailable, match="other processes used 50%"):
        save_tunings(report)
    assert not (folder / TUNED).exists()
    report = fake(bundles=(folder,), against=REFERENCE / "model.onnx")
    assert save_tunings(report) == [folder / TUNED]
    tuning = read_tuning(folder)
    assert isinstance(tuning, Tuning)
    assert set(tuning.choices) == {"latency", "throughput", "cpu"}
    best = tuning.choices["latency"]
    assert (best.runtime, best.batch, best.threads, best.sessions) == ("onnxruntime-cpu", 1, 2, 1)
    assert best.p50_ms == pytest.approx(0.5)
    Bundle.open(folder).check()


def test_a_wrong_answer_while_measuring_disqualifies(fake: Fake) -> None:
    report = fake({"golden": {"torchscript-cpu": 1e-3}}, runtimes=("torchscript-cpu", "onnxruntime-cpu"))
    words = {(item.variant.runtime, item.word) for item in report.results}
    assert words == {("torchscript-cpu", "WRONG"), ("onnxruntime-cpu", "PASS")}
    assert {item.best.variant.runtime for item in report.recommended} == {"onnxruntime-cpu"}


# The self-check.


class WorkInProcess:
    """Known work in this process, measured by a real or a fake clock."""

    def __init__(self, work: Callable[[Any], Any], clock: Callable[[], float]) -> None:
        self.work, self.clock = work, clock

    def measure(self, _batch: int, seconds: float) -> tuple[dict[str, float], list[float]]:
        timed_calls(self.work, INPUTS, seconds * 0.1, clock=self.clock)
        times, _ = timed_calls(self.work, INPUTS, seconds, clock=self.clock)
        return {"elapsed": sum(times), "cpu": sum(times), "golden": 0.0}, times


def measured_ratio(
    subject: Subject, works: list[Callable[[Any], Any]], clock: Callable[[], float], seed: int, *, rounds: int,
    seconds: float,
) -> Quantile:  # fmt: skip
    """The ratio of the second piece of work to the first, by the rounds of the benchmark."""
    variants = [Variant(subject, name, 1, 1, 1) for name in ("onnxruntime-cpu", "openvino-cpu")]
    workers = {item.process: WorkInProcess(work, clock) for item, work in zip(variants, works, strict=True)}
    measured, _, whole = module._rounds(variants, workers, rounds, seconds / rounds, seed, silent)
    assert whole
    return results_of([(item, Loaded(0.1, 0.1, 0.1, 0), part, PASS) for item, part in measured.items()])[1].ratio


def noisy(seed: int, factor: float) -> tuple[FakeClock, list[Callable[[Any], Any]]]:
    """A clock on a disturbed machine, and two pieces of work, of which the second takes ``factor`` times as long.

    The machine drifts by tens of percent over the rounds, each call has 10 % of noise, every 20th call is interrupted.
    """
    rng, clock = np.random.default_rng(seed), FakeClock()
    phase = rng.uniform(0, 6)

    def seconds(base: float) -> float:
        drift = 1 + 0.2 * math.sin(phase + clock.now / 3)
        spike = rng.exponential(20 * base) if rng.random() < 0.05 else 0.0
        return float(base * drift * rng.lognormal(0, 0.1) + spike)

    return clock, [clock.work(lambda: seconds(1e-3)), clock.work(lambda: seconds(1e-3 * factor))]


@pytest.mark.parametrize("rounds", [LEAST_ROUNDS, ROUNDS])
def test_a_variant_slowed_by_10_percent_is_found_and_two_equal_ones_show_no_difference(
    subject: Subject, rounds: int
) -> None:
    slow, same = [], []
    for seed in range(100):
        for factor, found in ((1.1, slow), (1.0, same)):
            clock, works = noisy(seed, factor)
            found.append(measured_ratio(subject, works, clock, seed, rounds=rounds, seconds=1.0))
    assert sum(abs(item.value - 1.1) <= 0.03 and not item.holds_one for item in slow) >= 90
    assert sum(item.holds_one for item in same) >= 90


@pytest.mark.slow
def test_ten_percent_of_real_work_are_found(subject: Subject) -> None:
    """Real work of a known amount: a loop of 5000 steps, and one of 5500, in CPU time, which other processes leave alone."""

    def looped(steps: int) -> Callable[[Any], Any]:
        def run(feeds: Any) -> Any:
            for _ in range(steps):
                pass
            return feeds

        return run

    slow, same = (
        [
            measured_ratio(subject, [looped(5000), looped(steps)], time.thread_time, seed, rounds=ROUNDS, seconds=2.0)
            for seed in range(10)
        ]
        for steps in (5500, 5000)
    )
    assert sum(abs(item.value - 1.1) <= 0.03 and not item.holds_one for item in slow) >= 9
    assert sum(item.holds_one for item in same) >= 9
