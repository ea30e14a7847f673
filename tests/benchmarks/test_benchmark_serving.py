"""The comparison of servers: loads, ratios, verdicts, its page, and a short run of it."""

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.wire_samples import H2LOAD, H2LOAD_LOG, WRK

from benchmarks.serving import load as serving_load
from benchmarks.serving import speed as serving_speed
from benchmarks.serving.__main__ import TARGETS, infer_share, outcomes, serving_page
from benchmarks.serving.alone import Alone
from benchmarks.serving.load import Load, parse_h2load, parse_wrk, wrk_script
from benchmarks.serving.process import Running, free_ports
from benchmarks.serving.servers import WAYS
from benchmarks.serving.speed import Sample, ServerMemory, ServingPlan, ServingSpeeds, measure
from benchmarks.serving.wires import WIRES, read_logits
from benchmarks.soak.server import running
from bnexport.errors import BundleError, MissingDependency, ProofError, RuntimeUnavailable
from bnexport.serving.grpc.inference import classes

ROOT = Path(__file__).parents[2]
BUNDLE = ROOT / "models" / "bn_lenet" / "1"
#: The script as a terminal starts it: what runs in a shell's background has SIGINT ignored.
AS_FROM_A_TERMINAL = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("benchmarks.serving", run_name="__main__", alter_sys=True)
"""


def test_the_output_of_wrk_is_read_exactly():
    assert parse_wrk(WRK) == Load(30419, pytest.approx(1.099801), 238, 692, {})
    broken = WRK.replace('"status": 0', '"status": 3').replace('"timeout": 0', '"timeout": 1')
    assert parse_wrk(broken).errors == {"status": 3, "timeout": 1}
    assert parse_wrk(WRK).per_second == pytest.approx(27658.6, abs=0.1)


def test_the_output_of_h2load_is_read_exactly():
    load = parse_h2load(H2LOAD, H2LOAD_LOG)
    assert (load.requests, load.seconds, load.errors) == (5, 1.0, {})
    assert (load.p50_us, load.p99_us) == (1400, pytest.approx(np.percentile([3457, 3517, 1400, 1390, 279], 99)))
    wrong = parse_h2load(H2LOAD.replace("0 errored, 0 timeout", "2 errored, 1 timeout"), H2LOAD_LOG + "1\t503\t9\n")
    assert wrong.errors == {"errored": 2, "timeout": 1, "status": 1}
    assert wrong.requests == 5
    assert parse_h2load(H2LOAD.replace("finished in 1.00s", "finished in 987.65ms"), H2LOAD_LOG).seconds == 0.98765


@pytest.mark.parametrize(
    "text", ["", "unable to connect to 127.0.0.1:1 Connection refused\n", WRK.replace("30419", "0")]
)
def test_no_result_is_an_error(text):
    with pytest.raises(RuntimeUnavailable, match="wrk gave no result"):
        parse_wrk(text)
    with pytest.raises(RuntimeUnavailable, match="h2load gave no result"):
        parse_h2load(text, "")


def test_headers_are_quoted_for_lua():
    text = wrk_script({"content-type": 'a"b\\c'})
    assert 'wrk.headers["content-type"] = "a\\"b\\\\c"' in text
    assert '"requests": %d' in text


@pytest.mark.parametrize("name", [name for name, wire in WIRES.items() if wire.logits and not wire.grpc])
def test_requests_carry_the_image(name):
    image = np.random.default_rng(0).random((1, 1, 28, 28), np.float32)
    request = WIRES[name].request(image)
    if name == "oip-binary":
        start = int(request.headers["inference-header-content-length"])
        assert np.array_equal(np.frombuffer(request.body, np.float32, offset=start), image.ravel())
    else:
        assert request.headers["content-type"] == "application/json"
        assert request.body.count(b",") >= 783


def test_a_grpc_message_is_a_model_infer_request():
    image = np.random.default_rng(0).random((1, 1, 28, 28), np.float32)
    body = WIRES["oip-grpc"].request(image).body
    assert body[:5] == b"\0" + (len(body) - 5).to_bytes(4, "big")
    found = classes()["ModelInferRequest"].FromString(body[5:])
    assert (found.model_name, found.inputs[0].name, found.inputs[0].datatype) == ("bn_lenet", "input", "FP32")
    assert list(found.inputs[0].shape) == [1, 1, 28, 28]
    assert list(found.raw_input_contents) == [image.tobytes()]


def test_a_grpc_answer_is_read_and_a_broken_one_is_a_fault():
    raw = np.arange(10, dtype=np.float32)
    body = b"\x32" + bytes([raw.nbytes]) + raw.tobytes()  # field 6, raw_output_contents
    assert np.array_equal(read_logits(WIRES["oip-grpc"], {}, body), raw)
    for broken in (b"", body[:-1], b"\xff"):
        with pytest.raises(ProofError, match="can't be read"):
            read_logits(WIRES["oip-grpc"], {}, broken)


def sample(cpu_us, infer_us=None, *, p50=100, p99=200, requests=1000, **errors):
    return Sample(Load(requests, 1.0, p50, p99, errors), cpu_us, infer_us)


def made_up(**changes):
    """Figures of two rounds that meet every target; ``changes`` puts other samples in for one way at 8 clients."""
    samples = {
        "binary": {1: [sample(90, 20), sample(80, 20)], 8: [sample(60, 20), sample(60, 15)]},
        "json": {1: [sample(200, 20)] * 2, 8: [sample(150, 20, p50=100, p99=299)] * 2},
        "echo": {1: [sample(50), sample(50)], 8: [sample(40), sample(30)]},
        "fastapi": {1: [sample(600), sample(480)], 8: [sample(360), sample(540)]},
    }
    for name, rows in changes.items():
        samples[name][8] = rows
    memory = ServerMemory((0, 500_000, 1_000_100), (100 * 2**20, 109 * 2**20, 104 * 2**20), 110 * 2**20)
    alone = [Alone({1: 25.0, 8: 15.0}, 50.0, 70.0), Alone({1: 18.0, 8: 14.0}, 40.0, 90.0)]
    return ServingSpeeds(samples, alone, {"binary": (3298, 185)}, {"grpc": "no option"}, memory)


def verdicts(speeds):
    return [outcome.met for outcome in outcomes(speeds)]


def test_ratios_are_of_one_round_and_all_targets_can_be_met():
    assert verdicts(made_up()) == [True] * len(TARGETS)
    faster, tail, overhead, memory = outcomes(made_up())
    # of round 1: 600 / 90 and 360 / 60; of round 2: 480 / 80 and 540 / 60
    assert faster.figures == ("6.33 (6.00 to 6.67) at 1 client", "7.50 (6.00 to 9.00) at 8 clients")
    assert tail.figures == (
        "2.00 (2.00 to 2.00) for bnexport, binary tensors",
        "2.99 (2.99 to 2.99) for bnexport, JSON",
    )
    # (90 - 20) / 50 and (80 - 18) / 50: the counter has 20, one image alone takes 18
    assert overhead.figures == ("1.32 (1.24 to 1.40) at 1 client", "1.25 (1.00 to 1.50) at 8 clients")
    assert memory.figures == ("+4.0% over 1,000,100 requests (100.0 to 104.0 MiB)",)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"binary": [sample(61, 20), sample(91, 15)]}, [False, True, False, True]),
        ({"fastapi": [sample(350), sample(350)]}, [False, True, True, True]),
        ({"json": [sample(150, p50=100, p99=300)] * 2}, [True, False, True, True]),
        ({"echo": [sample(20), sample(30)]}, [True, True, False, True]),
        ({"binary": [sample(60, 20, status=1), sample(60, 15)]}, [False, False, False, True]),
        ({"echo": [sample(40, read=2), sample(30)]}, [True, True, False, True]),
    ],
    ids=["slow", "fast peer", "long tail", "fast echo", "errors", "echo with errors"],
)
def test_a_missed_target_is_reported(changes, expected):
    assert verdicts(made_up(**changes)) == expected
    page = serving_page(made_up(**changes), "a machine")
    assert page.count("**missed**") == expected.count(False)
    assert ("had errors" in page) == any(row.load.errors for rows in changes.values() for row in rows)


def test_the_count_of_clients_at_which_a_target_is_missed_is_reported():
    faster, _, overhead, _ = outcomes(made_up(binary=[sample(100, 20), sample(100, 20)]))
    # of both rounds: 360 / 100 and 540 / 100; the echo 360 / 40 and 540 / 30
    assert faster.figures[1] == "4.50 (3.60 to 5.40) at 8 clients (missed; the echo has 13.50)"
    assert faster.figures[0].endswith("at 1 client")
    # (100 - 20) / 40 and (100 - 18) / 30
    assert overhead.figures[1] == "2.37 (2.00 to 2.73) at 8 clients (missed)"


def test_memory_that_grows_or_was_not_watched_for_long_is_not_flat():
    speeds = made_up()
    grown = dataclasses.replace(speeds.memory, resident=(100, 101, 106))
    assert verdicts(dataclasses.replace(speeds, memory=grown))[-1] is False
    short = dataclasses.replace(speeds.memory, requests=(0, 10, 20))
    assert verdicts(dataclasses.replace(speeds, memory=short))[-1] is None
    assert verdicts(dataclasses.replace(speeds, memory=None))[-1] is None


def test_the_counters_wall_time_does_not_excuse_a_miss():
    assert infer_share(sample(100, 70.0), 25.0) == 25.0
    assert infer_share(sample(100, 15.0), 25.0) == 15.0
    assert infer_share(sample(100), 25.0) == 25.0


def test_the_page_holds_figures_sizes_and_what_is_missing():
    page = " ".join(serving_page(made_up(), "a machine").split())
    assert "| bnexport, binary tensors | 8 | 1,000 to 1,000 | 60 | 100 | 200 | 2.0 | 7.50 |" in page
    assert "bnexport, gRPC: not measured, no option." in page
    assert "bnexport, binary tensors 3,298 and 185" in page
    assert "Rounds: 2; each load took 1.0 to 1.0 s and 1,000 to 1,000 requests. a machine." in page
    assert "| 1,000,100 | 104.0 |" in page
    # 25 and 18 in a loop, 50 and 40 after pauses of 70 and 90
    assert "After a pause of 80 us ONNX Runtime alone takes 45.0 us (40.0 to 50.0) for one image, 2.1 times" in page
    without = made_up()
    del without.samples["fastapi"]
    assert "**not measured**" in serving_page(without, "a machine")


def bench(answer):
    """A bench, and a server in place of a process that answers ``answer(request)``."""

    class Stub:
        post = staticmethod(answer)

    made = serving_speed._Bench(ServingPlan(BUNDLE, Path("nowhere")), lambda _: None)
    return made, Stub()


@pytest.mark.parametrize(("change", "ok"), [(0.0, True), (0.01, False), (float("nan"), False)])
def test_a_wrong_answer_stops_the_benchmark(change, ok):
    made, server = bench(lambda _: (200, {}, body))
    logits = made.logits.copy()
    logits[3] += change
    body = ('{"logits": [' + ", ".join(map(str, logits.tolist())) + "]}").replace("nan", "NaN").encode()
    request = WIRES["rows-json"].request(made.image)
    if ok:
        assert made._check("fastapi", server, request)
        assert made.sizes["fastapi"] == (len(request.body), len(body))
    else:
        with pytest.raises(ProofError, match="onnxruntime alone"):
            made._check("fastapi", server, request)


def test_an_answer_that_is_none():
    made, server = bench(lambda _: (503, {}, b"not ready"))
    request = WIRES["oip-binary"].request(made.image)
    assert not made._check("binary", server, request)
    for body, headers in ((b"{}", {}), (b"abc", {"inference-header-content-length": "0"})):
        server.post = lambda _, body=body, headers=headers: (200, headers, body)
        with pytest.raises(ProofError, match="can't be read"):
            made._check("binary", server, request)
    made.sizes["binary"] = (1, 185)
    server.post = lambda _: (200, {}, bytes(184))
    with pytest.raises(ProofError, match="answered 184 bytes"):
        made._check("echo", server, request)


def test_a_server_that_can_not_be_had_is_named_and_the_needed_ones_are_not_left_out(monkeypatch):
    made, _ = bench(None)

    def broken(*_):
        raise RuntimeUnavailable("pip has no index", remedy="Get one")

    monkeypatch.setattr("benchmarks.serving.servers.make_venv", broken)
    assert list(made.prepare(["binary", "echo", "fastapi"])) == ["binary", "echo"]
    assert made.failed == {"fastapi": "pip has no index"}
    with pytest.raises(RuntimeUnavailable, match="no index"):
        made._give_up("echo", RuntimeUnavailable("no index", remedy="Get one"))


def test_a_missing_load_tool_and_another_model_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(serving_load.shutil, "which", lambda _: None)
    with pytest.raises(MissingDependency, match="needs wrk") as caught:
        measure([], ServingPlan(BUNDLE, tmp_path))
    assert caught.value.remedy == "Install it: apt-get install wrk"
    with pytest.raises(BundleError):
        measure([], ServingPlan(tmp_path, tmp_path))
    monkeypatch.setattr(serving_load.shutil, "which", lambda name: None if name == "h2load" else name)
    monkeypatch.setattr("benchmarks.serving.servers.make_venv", lambda *_: pytest.fail("it was begun"))
    with pytest.raises(MissingDependency, match="needs h2load"):
        measure(["grpc", "fastapi"], ServingPlan(BUNDLE, tmp_path))


@pytest.mark.slow
@pytest.mark.needs("wrk")
def test_a_short_run(tmp_path):
    reported = []
    plan = ServingPlan(BUNDLE, tmp_path, rounds=1, seconds=1, memory_requests=1000, warm_requests=100, clients=(8,))
    speeds = measure(["json", "grpc", "processes"], plan, on_line=reported.append)
    assert set(speeds.samples) == {"binary", "echo", "json", "grpc", "processes"}
    assert speeds.failed == {}
    for name, columns in speeds.samples.items():
        (found,) = columns[8]
        assert found.load.requests > 0
        assert not found.load.errors
        assert found.load.p50_us <= found.load.p99_us
        assert found.cpu_us > 0
        assert (found.infer_us is not None) == WAYS[name].counted
        assert any(f"{WAYS[name].words}, 8 clients" in line for line in reported)
    (alone,) = speeds.alone
    assert 0 < alone.batches[8] < alone.batches[1]
    assert alone.rested > alone.batches[8]
    assert alone.pause > 20.0
    assert speeds.memory.requests[0] == 0
    assert speeds.memory.requests[-1] >= 1000
    assert speeds.memory.peak >= max(speeds.memory.resident) > 2**20
    page = serving_page(speeds, "a machine")
    assert all(f"| {WAYS[name].words} | 8 |" in page for name in speeds.samples)


@pytest.mark.slow
@pytest.mark.needs("wrk")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_nothing(tmp_path, number):
    words = ["binary", "--out", str(tmp_path / "page.md"), "--seconds", "1", "--memory-requests", "0"]
    with subprocess.Popen(
        [sys.executable, "-c", AS_FROM_A_TERMINAL, *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    ) as child:  # fmt: skip
        try:
            assert "1 client:" in child.stderr.readline()
            family = [pid for pid, _ in Running(child, free_ports(), tmp_path)._rows()]
            assert len(family) > 1
            child.send_signal(number)
            _, printed = child.communicate(timeout=240)
        finally:
            child.kill()
    assert child.returncode == 130
    assert [line for line in printed.splitlines() if not line.startswith("round ")] == [
        "serving: interrupted, so there is no result"
    ]
    assert list(tmp_path.iterdir()) == []
    assert not [pid for pid in family if running(pid)]


def test_the_committed_page_holds_every_server():
    page = (ROOT / "docs" / "results" / "serving_speed.md").read_text(encoding="utf-8")
    text = " ".join(page.split())
    for way in WAYS.values():
        assert f"| {way.words} | 8 |" in page or f"{way.words}: not measured" in text
    assert sum(page.count(f"**{word}**") for word in ("met", "missed", "not measured")) == len(TARGETS)


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["tomcat"], 2, "unknown server tomcat"),
        (["--rounds", "0"], 2, "rounds and seconds start at 1"),
        (["--bundle", "nowhere", "echo"], 2, "nowhere does not exist"),
        (["echo"], 3, "needs wrk, which is not installed here. Install it: apt-get install wrk"),
    ],
)
def test_the_script_refuses_in_one_sentence(words, code, sentence, tmp_path):
    child = subprocess.run(
        [sys.executable, "-m", "benchmarks.serving", "--out", str(tmp_path / "page.md"), *words],
        capture_output=True, text=True, timeout=120, check=False, cwd=ROOT,
        env={"PATH": "", "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)},
    )  # fmt: skip
    assert child.returncode == code
    assert sentence in child.stderr
    assert "Traceback" not in child.stderr
    assert not (tmp_path / "page.md").exists()
