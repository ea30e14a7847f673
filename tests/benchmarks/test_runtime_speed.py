"""The comparison of runtimes: engines in their processes, the table, the targets, and the page."""

from pathlib import Path

import pytest

from benchmarks import runtime_speed
from benchmarks.clock import Spread
from benchmarks.runtime_speed import LENET, REFERENCE, Row, Side, Target, Tuned, cells_of, inputs, main, measured
from bnexport.errors import RuntimeUnavailable
from bnexport.tuned import Choice, read_tuning

CHOICE = Choice("onnxruntime-cpu", 4, 1, 2, 1.0, 1.0, 1.0)


def test_calls_are_counted_and_inputs_change() -> None:
    seen: list[float] = []
    found = measured(lambda x: seen.append(float(x.sum())), inputs({"shape": [3, 2], "dtype": "float32"}), 0.01)
    assert len(set(seen)) == 8
    assert found["rate"] > 0
    assert found["p50"] >= 0


@pytest.mark.parametrize("engine", ["ONNX Runtime", "TorchScript", "onnxruntime-cpu"])
def test_an_engine_runs_in_its_processes(engine: str) -> None:
    with Side(engine, REFERENCE, threads=1, sessions=2 if engine == "onnxruntime-cpu" else 1) as side:
        sample = side.measure((2, 1, 28, 28), 0.02)
    assert sample.rate > 0
    assert sample.p50 > 0


def test_a_file_that_an_engine_can_not_open_is_reported(tmp_path: Path) -> None:
    with pytest.raises(RuntimeUnavailable, match="ONNX Runtime: "):
        Side("ONNX Runtime", tmp_path)


def test_ratios_are_those_of_each_round() -> None:
    rows = [Row("a", [1.0, 2.0], [10.0, 20.0]), Row("b", [2.0, 2.0], [5.0, 40.0])]
    assert cells_of(rows)[1] == [
        "b",
        "2.000 (2.000 to 2.000)",
        "1.50 (1.00 to 2.00)",
        "22 (5 to 40)",
        "1.25 (0.50 to 2.00)",
    ]


@pytest.mark.parametrize(
    ("ratios", "at_least", "met"),
    [([1.3, 1.1, 1.25], True, True), ([1.1], True, False), ([1.1], False, True), ([1.3], False, False)],
)
def test_the_median_ratio_judges_a_target(ratios: list[float], at_least: bool, met: bool) -> None:
    target = Target("what", "compared", Spread.of(ratios), 1.2, at_least)
    assert target.met == met
    assert target.cells()[-1] == ("met" if met else "missed")


@pytest.mark.slow
def test_the_command_measures_and_writes_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every measurement is real and short; the choice of ``bnexport benchmark`` and OpenVINO's tool are replaced."""
    bundles: list[Path] = []

    def tuned(given: tuple[Path, Path]) -> tuple[dict[str, Tuned], Tuned]:
        bundles.extend(given)
        assert read_tuning(given[0]) is read_tuning(given[1]) is None
        return {"throughput": Tuned(given[1], CHOICE), "latency": Tuned(given[0], CHOICE)}, Tuned(given[0], CHOICE)

    monkeypatch.setattr(runtime_speed, "tuned", tuned)
    monkeypatch.setattr(runtime_speed, "benchmark_app", lambda *_: 100.0)
    monkeypatch.setattr(runtime_speed, "PEER_BATCHES", (4,))
    monkeypatch.setattr(runtime_speed, "PEERS", ("ONNX Runtime",))
    monkeypatch.setattr(runtime_speed, "MEASURED", {"TorchScript": 1, "ONNX Runtime": 3})
    monkeypatch.setattr(runtime_speed, "exported", lambda *_: ({"float32": REFERENCE}, {"int8": "no labels"}))
    words = [LENET, "--rounds", "2", "--seconds", "0.02", "--images", "640", "--out", str(tmp_path / "page.md")]
    monkeypatch.setattr("sys.argv", ["runtime_speed", *words])
    assert main() in (0, 1)
    page = (tmp_path / "page.md").read_text()
    assert page.count("| float32, TorchScript |") == page.count("| float32, ONNX Runtime |") == 1
    assert "- Not measured: int8: no labels" in page
    assert (
        "| throughput, tuned over the best peer's default | onnxruntime-cpu, 2 sessions x 1 thread, batch 4, packed pools: "
        in page
    )
    assert "benchmark_app -hint throughput, batch 4: 100" in page
    assert "bare loop of 2 sessions x 1 thread, batch 4" in page
    assert "| throughput, tuned, of the plain file, over the best peer's default | " in page
    assert [bundle.parent.name for bundle in bundles] == ["plain", "packed"]
