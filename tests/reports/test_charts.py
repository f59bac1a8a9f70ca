"""Charts say the numbers they were given, in places that can be computed by hand."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

from spin_lightning.reports.charts import MOST_POINTS, interval_chart, line_chart, log_ticks, round_ticks, thin

SVG = "{http://www.w3.org/2000/svg}"


def read(chart: str) -> ElementTree.Element:
    return ElementTree.fromstring(chart)


def texts(chart: str) -> list[str]:
    return [element.text or "" for element in read(chart).iter(f"{SVG}text")]


def curves(chart: str) -> list[list[tuple[float, float]]]:
    """The places of the points of each curve, in pixels."""
    found = []
    for path in read(chart).iter(f"{SVG}path"):
        if path.get("stroke-linejoin") and re.fullmatch(r"M[\d. -]+", path.get("d", "")):
            numbers = [float(number) for number in path.get("d", "")[1:].split()]
            found.append(list(zip(numbers[::2], numbers[1::2], strict=True)))
    return found


def of_x(chart: str, label: str) -> float:
    """Where a label of the x axis stands, in pixels."""
    (element,) = (e for e in read(chart).iter(f"{SVG}text") if e.text == label and e.get("text-anchor") == "middle")
    return float(element.get("x", ""))


def test_points_stand_where_the_axes_say():
    chart = line_chart({"SPIN": [(0, 0.0), (50, 1.0), (100, 0.25)]}, "Loss", "updates", "nats")
    (curve,) = curves(chart)
    low, high = of_x(chart, "0"), of_x(chart, "100")
    assert [x for x, _ in curve] == pytest.approx([low, (low + high) / 2, high], abs=0.1)
    bottom, top = curve[0][1], curve[1][1]  # the ticks are from 0.0 to 1.0, so these are the ends of the y axis
    assert curve[2][1] == pytest.approx(bottom + (top - bottom) / 4, abs=0.1)
    assert top < bottom  # y grows downwards on paper
    assert {"0.0", "0.2", "1.0", "0", "20", "100", "updates", "nats", "Loss"} <= set(texts(chart))


def test_a_logarithmic_axis_places_powers_of_ten_equally_far():
    chart = line_chart({"lr": [(0, 1e-4), (1, 1e-2), (2, 1.0), (3, 0.0), (4, -1.0)]}, "lr", "x", "y", log_y=True)
    (curve,) = curves(chart)
    assert [x for x, _ in curve] == sorted(x for x, _ in curve) and len(curve) == 3
    first, second, third = (y for _, y in curve)
    assert first - second == pytest.approx(second - third, abs=0.2)
    assert "lr: 3 points, 2 not shown, from 0.0001 to 1" in chart


def test_numbers_that_are_not_finite_are_gaps():
    points = [(0, 1.0), (1, 2.0), (2, math.nan), (3, 3.0), (4, math.inf), (5, 2.0), (6, 1.0), (math.nan, 1.0)]
    chart = line_chart({"a": points}, "t", "x", "y")
    assert [len(curve) for curve in curves(chart)] == [2, 2]
    assert len(list(read(chart).iter(f"{SVG}circle"))) == 5  # the lone third one too
    assert "a: 5 points, 3 not shown, from 1 to 1, 1 to 3" in chart


@pytest.mark.parametrize("points", [[], [(0, math.nan)], [(0, -math.inf)], [(1e308, -1e308), (0, 1e308)]])
def test_without_numbers_a_chart_says_so(points):
    assert "no numbers" in texts(line_chart({"a": points}, "t", "x", "y"))
    assert "no numbers" in texts(interval_chart([("a", math.nan, 0, 1)] if points else [], "t", "x"))


@pytest.mark.parametrize("value", [0.0, 7.0, -3.0, 1e-12, 1e200])
def test_a_single_value_has_axes_around_it(value):
    chart = line_chart({"a": [(3, value)]}, "t", "x", "y")
    (circle,) = read(chart).iter(f"{SVG}circle")
    assert 0 < float(circle.get("cy", "")) < 290 and 0 < float(circle.get("cx", "")) < 480
    assert "nan" not in chart and "inf" not in chart


def test_a_long_series_is_thinned_and_keeps_its_peaks_and_gaps():
    points = [(x, 0.5) for x in range(100_000)]
    points[70_001], points[40_000], points[10] = (70_001, 9.0), (40_000, -9.0), (10, math.nan)
    kept = thin(points)
    assert len(kept) <= 1.5 * MOST_POINTS
    assert {points[70_001], points[40_000], points[0], points[-1]} <= set(kept) and points[10] in kept
    chart = line_chart({"a": points}, "t", "x", "y")
    assert len(chart) < 12_000 and "a: 99999 points, 1 not shown, from 0.5 to 0.5, -9 to 9" in chart


def test_a_band_has_the_colour_of_its_series_and_both_its_ends():
    band = [(0, 0.0, 1.0), (1, math.nan, 1.0), (2, 0.0, 1.0), (3, 0.25, 0.75)]
    chart = line_chart({"a": [(0, 0.5)], "b": [(0, 0.5), (3, 0.5)]}, "t", "x", "y", {"b": band})
    filled = [p for p in read(chart).iter(f"{SVG}path") if p.get("fill-opacity")]
    assert [p.get("fill") for p in filled] == ["var(--chart-2)"] * 2
    numbers = [float(number) for number in filled[1].get("d", "")[1:-1].split()]
    y = numbers[1::2]  # high, high, low, low: of (2, 0, 1) and (3, .25, .75)
    assert y[1] - y[0] == pytest.approx((y[3] - y[0]) / 4, abs=0.2) and y[3] - y[2] == pytest.approx(
        y[1] - y[0], abs=0.2
    )


def test_series_are_told_apart_by_more_than_colour():
    chart = line_chart({name: [(0, 1.0), (1, 2.0)] for name in "abcde"}, "t", "x", "y")
    dashes = [p.get("stroke-dasharray") for p in read(chart).iter(f"{SVG}path") if p.get("stroke-linejoin")]
    assert len(set(dashes[:5])) == 5 and dashes[:5] == dashes[5:]  # in the legend as in the plot
    assert set("abcde") < set(texts(chart))
    assert "prefers-color-scheme:dark" in chart


def test_guides_and_marks_are_drawn_inside_the_axes():
    chart = line_chart(
        {"a": [(0, 0.1), (10, 0.2)]},
        "t",
        "x",
        "y",
        guides={"ln 2": math.log(2)},
        marks=[(5, "iteration 1"), (99, "no")],
    )
    assert {"ln 2", "iteration 1", "0.8"} <= set(texts(chart)) and "no" not in texts(chart)


def test_text_of_others_is_shown_and_not_obeyed():
    hostile = "</title><script>alert(1)</script>\x1b[2J\u202eabc\x00&\ud800"
    for chart in (
        line_chart(
            {hostile: [(0, 1.0)], "b": []}, hostile, hostile, hostile, marks=[(0, hostile)], guides={hostile: 1.0}
        ),
        interval_chart([(hostile, 1.0, 0.0, 2.0)], hostile, hostile),
    ):
        read(chart.encode().decode())  # is XML, and UTF-8
        assert "<script" not in chart and "\u202e" not in chart and "\x1b" not in chart
        assert "&lt;script&gt;" in chart and "\\u202e" in chart


def test_names_too_long_for_their_place_are_cut_and_kept_as_a_hint():
    name = "an arm of a study " * 6
    chart = interval_chart([(name, 1.0, 0.5, 1.5)], "t", "x")
    assert any(text.endswith("…") for text in texts(chart)) and f"<title>{name.strip()}</title>" in chart


def test_an_interval_that_includes_zero_has_a_hollow_dot():
    rows = [("apart", 0.5, 0.25, 0.75), ("close", 0.25, -0.25, 0.75), ("open", 0.5, -math.inf, math.nan)]
    chart = interval_chart(rows, "t", "nats")
    circles = list(read(chart).iter(f"{SVG}circle"))
    assert [circle.get("fill") for circle in circles] == ["var(--chart-1)", "var(--chart-paper)", "var(--chart-paper)"]
    apart, close, _ = (float(circle.get("cx", "")) for circle in circles)
    zero, half = of_x(chart, "0.0"), of_x(chart, "0.4")
    assert apart - zero == pytest.approx(0.5 / 0.4 * (half - zero), abs=0.2) and close < apart
    assert "apart: 0.5 (0.25 to 0.75, leaves out 0); close: 0.25 (-0.25 to 0.75, includes 0)" in chart
    assert "includes" not in interval_chart(rows, "t", "nats", zero_line=None)


def test_ticks_are_round_and_reach_around_the_numbers():
    for low, high in ((0.013, 0.0131), (-5.0, 1e6), (3.0, 3.0000001), (-1e-7, 2e-7), (0.0, 0.0)):
        ticks = round_ticks(low, high)
        assert ticks[0] <= low <= high <= ticks[-1] and 3 <= len(ticks) <= 8, (low, high, ticks)
    for low, high in ((1e-9, 5.0), (0.5, 0.6), (2.0, 2.0), (1.0, 1000.0)):
        ticks = log_ticks(low, high)
        assert ticks[0] <= low <= high <= ticks[-1] and 2 <= len(ticks) <= 11, (low, high, ticks)


def test_the_same_numbers_give_the_same_bytes():
    assert line_chart({"a": [(0, 1 / 3)]}, "t", "x", "y") == line_chart({"a": [(0, 1 / 3)]}, "t", "x", "y")
