import re
from xml.etree import ElementTree

import numpy as np
import pytest
from support.reports import HOSTILE, full_report, large_report, layers, samples

from bnexport.reporting.charts import (
    LEAST,
    MOST,
    SHOWN_LAYERS,
    ChartAxis,
    SpeedCurve,
    axis_of,
    drift,
    drifts,
    histogram,
    maps,
    margins,
    speeds,
    strips,
)
from bnexport.reporting.summary import runs
from bnexport.verification.verdict import LayerDrift, VerificationReport

ODD = [np.array([]), np.zeros(3), np.array([np.nan, np.inf, 1e-6]), np.full(4, 1e300), np.array([1e-320])]


def paths(chart: str, kind: str) -> list[str]:
    root = ElementTree.fromstring(str(chart))
    return [item.get("d") or "" for item in root.iter("path") if item.get("class") == kind]


@pytest.mark.parametrize(
    ("parts", "axis"),
    [
        ([np.array([3e-7, 2e-3])], ChartAxis(-7, -2)),
        ([1e-5], ChartAxis(-5, -4)),
        ([np.array([1e-5, 1e-3]), None], ChartAxis(-5, -3)),
        ([np.zeros(3)], ChartAxis(-10, -9)),
        ([np.array([np.nan]), np.array([])], ChartAxis(-9, 0)),
        ([1e300], ChartAxis(3, 4)),
    ],
)
def test_an_axis_holds_every_number_in_whole_decades(parts: list, axis: ChartAxis) -> None:
    assert axis_of(parts) == axis


def test_places_on_an_axis() -> None:
    axis = ChartAxis(-8, -4)
    assert axis.at(np.array([1e-8, 1e-6, 1e-4])).tolist() == pytest.approx([0.0, 0.5, 1.0])
    assert axis.at(np.array([0.0, 1e9])).tolist() == [0.0, 1.0]
    assert axis.ticks(3) == [(0.0, "1e-08"), (0.5, "1e-06"), (1.0, "0.0001")]
    assert len(ChartAxis(-10, 3).ticks(5)) <= 5


def test_one_bad_sample_of_thousands_is_seen() -> None:
    axis = ChartAxis(-8, -2)
    errors = np.append(np.full(9999, 1e-7), 5e-3)
    (area,) = paths(histogram(errors, [], 1e-5, axis), "area")
    heights = [24 - float(height) for height in re.findall(r"V([\d.]+)H", area)]
    drawn = [height for height in heights if height > 0]
    assert len(drawn) == 2
    assert min(drawn) > 1.5, "of 24"


def test_dots_and_bound_stand_where_their_numbers_are() -> None:
    chart = histogram(np.array([]), [1e-7, 1e-5], 1e-6, ChartAxis(-8, -4))
    assert paths(chart, "dot") == ["M250 12v.01", "M750 12v.01"]
    assert paths(chart, "bound") == ["M500 0V24"]
    assert paths(chart, "area") == []
    assert paths(histogram(np.array([]), [], None, ChartAxis(-8, -4)), "bound") == []


def test_a_map_shows_every_cell_that_holds_a_sample() -> None:
    across, up = ChartAxis(-4, 0), ChartAxis(-8, -4)
    chart = margins(np.array([2e-8, 2e-6, np.nan]), np.array([2e-3, 2e-3, 2e-1]), 1e-5, across, up)
    cells = "".join(d for level in range(1, 5) for d in paths(chart, f"level{level}"))
    assert cells.count("M") == 2
    (bound,) = paths(chart, "bound")
    assert bound == "M46 37.5h256"  # a quarter from the top of 150


def test_the_corner_is_where_the_error_is_half_of_the_margin() -> None:
    (corner,) = paths(margins(np.array([]), np.array([]), None, ChartAxis(-4, 0), ChartAxis(-4, 0)), "risk")
    x, y, x2, y2 = map(float, re.findall(r"-?[\d.]+", corner)[:4])
    share = np.log10(2) / 4
    assert (x, x2) == (46, 302)
    assert y == pytest.approx(150 * (1 + share), abs=0.1)
    assert y2 == pytest.approx(150 * share, abs=0.1)


def test_the_corner_is_in_the_picture_of_errors_far_below_the_margins() -> None:
    """Errors of 1e-8 with margins of 0.1 left the corner above the picture, whose text names it."""
    report = full_report(passed=True)
    known = {"torch-cpu": (np.full(50, 1e-8), np.geomspace(0.01, 1.0, 50))}
    ((_, chart),) = maps(runs(report), known)
    (corner,) = paths(chart, "risk")
    _, y, _, _ = map(float, re.findall(r"-?[\d.]+", corner)[:4])
    assert 0 < y < 75, "its lower end is inside the picture, whose height is 150"


def test_layers_that_left_have_a_cross() -> None:
    assert len(paths(drift(layers(8, 5)), "left")) == 3
    assert len(paths(drift(layers(8, 5)), "dot")) == 5
    assert paths(drift(layers(300)), "dot") == [], "a line alone is clearer than 300 dots"
    infinite = (LayerDrift("a", "Conv", 1.7976931348623157e308, 1e-4, True), LayerDrift("b", "Gemm", 0.0, 0.0, False))
    (line,) = paths(drift(infinite), "line")
    assert all(0 <= float(y) <= 120 for y in re.findall(r" ([\d.]+)", line))


@pytest.mark.parametrize("odd", ODD, ids=["none", "exact", "not finite", "huge", "denormal"])
def test_charts_of_odd_numbers_stay_inside(odd: np.ndarray) -> None:
    with np.errstate(all="raise"):
        axis = axis_of([odd])
        for chart in (histogram(odd, list(odd), 1e-5, axis), margins(odd, odd, float("nan"), axis, axis)):
            ElementTree.fromstring(str(chart))
            assert "nan" not in chart
            assert "inf" not in chart
            assert max(map(float, re.findall(r"\d+(?:\.\d+)?", "".join(paths(chart, "area")))), default=0) <= 1000
    assert LEAST < MOST


def test_every_measured_run_has_its_strip() -> None:
    report = full_report()
    found = strips(runs(report), report.samples)
    assert found is not None
    assert [name for name, _, _ in found.lines] == [
        "torch-cpu", "onnxruntime-cuda", "onnxruntime-cuda, tf32", "torchscript-cpu",
    ]  # fmt: skip
    _, chart, error = found.lines[2]
    assert error == "0.00076"
    assert len(paths(chart, "area")) == 1
    assert paths(found.lines[3][1], "area") == [], "no samples of it are known"
    assert strips((), {}) is None


def test_maps_are_drawn_of_known_runs_alone() -> None:
    report = full_report()
    known = {
        **report.samples,
        "another run": report.samples["torch-cpu"],
        "torchscript-cpu": (np.zeros(0), np.zeros(0)),
    }
    assert [name for name, _ in maps(runs(report), known)] == [
        "torch-cpu",
        "onnxruntime-cuda",
        "onnxruntime-cuda, tf32",
    ]
    assert maps(runs(report), {}) == []


def test_layers_that_left_come_first_and_all_of_them_are_listed() -> None:
    found = drifts(large_report())
    assert found[0].first == "conv280"
    assert [item.first for item in found[1:]] == [""] * 23
    assert len(found[0].shown) == SHOWN_LAYERS + 20
    assert drifts(VerificationReport(())) == []


def test_charts_hold_no_name() -> None:
    report = full_report()
    drawn = "".join(str(item.chart) for item in drifts(report))
    drawn += "".join(str(chart) for _, chart in maps(runs(report), samples([run.name for run in runs(report)])))
    assert HOSTILE not in drawn
    assert "script" not in drawn


def test_the_picture_holds_its_curves_and_escapes_names() -> None:
    curves = [SpeedCurve("A <b> & co", 0, 1, ((0.05, 2e4), (7.0, 1e5))), SpeedCurve("x" * 100, 1, 0, ((1.0, 300.0),))]
    root = ElementTree.fromstring(str(speeds(curves)))
    texts = [item.text for item in root.iter() if item.tag.endswith("text")]
    assert "A <b> & co" in texts
    assert max(map(len, filter(None, texts))) <= 60
    assert {"0.01", "10", "100", "100k"} <= set(texts)
    lines = [item.get("d", "") for item in root.iter() if item.get("class") == "c0 d1"]
    assert len(lines) == 2, "the curve and its line in the legend"
    assert "prefers-color-scheme:dark" in str(speeds([]))
