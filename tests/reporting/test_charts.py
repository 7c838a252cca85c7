from __future__ import annotations

import itertools
import re
from xml.etree import ElementTree as ET

import pytest

from loratune.reporting.charts import MAX_POINTS, Bar, Series, draw_bars, draw_histogram, draw_lines


def drawn() -> dict[str, str]:
    """One chart of each kind."""
    line = Series(x=[1, 2, 3], y=[3.0, 1.0, 2.0])
    return {
        "lines": draw_lines("a", [line], x_label="step", y_label="loss"),
        "log": draw_lines("a", [Series(x=[1, 2], y=[1e-3, 1e3])], x_label="step", y_label="loss", log=True),
        "one point": draw_lines("a", [Series(x=[1], y=[0.0])], x_label="step", y_label="", from_zero=True),
        "histogram": draw_histogram("a", [1, 3, 5], [2, 7], x_label="tokens", y_label="rows"),
        "bars": draw_bars("a", [Bar(name="x", parts=((0.0, 0), (2.0, 1)), label="2", interval=(1, 3))], x_label="s"),
    }


def test_a_chart_can_stand_in_a_page_that_forbids_inline_styles_and_requests() -> None:
    charts = drawn()
    ids: list[str] = []
    for svg in charts.values():
        root = ET.fromstring(svg)  # noqa: S314 - drawn just now
        assert (root.tag, root.attrib["role"], root.attrib["aria-label"]) == ("svg", "img", "a")
        for element in root.iter():
            assert element.tag not in ("style", "script", "image", "a")
            assert not {"style", "onload"} & set(element.attrib)
            assert "http" not in " ".join(element.attrib.values())
        own = [element.attrib["id"] for element in root.iter() if "id" in element.attrib]
        assert set(re.findall(r"#(\w+)", svg)) == set(own), "every reference is to something of the chart"
        ids += own
    assert len(ids) == len(set(ids)), "two charts of one page must not share a name"


@pytest.mark.parametrize("color", ["#0", "#1f77b4", "black"])
def test_every_color_is_the_page_s(color: str) -> None:
    for svg in drawn().values():
        assert color not in re.sub(r'(href|clip-path|id)="[^"]*"', "", svg)


def test_a_long_curve_is_drawn_as_means_with_a_band_that_holds_every_value() -> None:
    values = [float(number % 2) for number in range(10 * MAX_POINTS)]
    svg = draw_lines("a", [Series(x=range(len(values)), y=values)], x_label="step", y_label="")
    root = ET.fromstring(svg)  # noqa: S314 - drawn just now
    (line,) = root.findall(".//g[@class='series-0']/path")
    heights = [float(part) for part in re.findall(r"[-\d.]+", line.attrib["d"])][1::2]
    assert max(heights) - min(heights) < 1, "the mean of ones and zeros is a flat line"
    (band,) = [element for element in root.iter() if element.attrib.get("fill-opacity") == "0.18"]
    (outline,) = root.findall(f".//path[@id='{band.attrib['href'][1:]}']") if band.tag == "use" else [band]
    edges = [float(part) for part in re.findall(r"[-\d.]+", outline.attrib["d"])][1::2]
    assert max(edges) - min(edges) > 80
    assert len(svg) < 60_000


@pytest.mark.parametrize(("first", "last"), [(1.4771, 1.5052), (-4.0, -3.9872), (0.3, 0.9)])
def test_values_that_are_close_have_ticks_too(first: float, last: float) -> None:
    """As the logarithms of a sweep's values are."""
    svg = draw_lines("a", [Series(x=[first, last], y=[1.0, 2.0])], x_label="log10", y_label="")
    texts = [t.text or "" for t in ET.fromstring(svg).iter("text") if t.attrib.get("text-anchor") == "middle"]  # noqa: S314
    ticks = [float(text.replace("\N{MINUS SIGN}", "-")) for text in texts if text != "log10"]
    assert ticks
    margin = 0.1 * (last - first)
    assert all(first - margin <= tick <= last + margin for tick in ticks)


@pytest.mark.parametrize(("first", "last"), [(1, 75), (1, 76), (1, 7), (0, 129_500), (3, 3)])
def test_the_last_step_has_a_label_and_no_labels_touch(first: int, last: int) -> None:
    svg = draw_lines("a", [Series(x=[first, last], y=[1.0, 2.0])], x_label="step", y_label="")
    root = ET.fromstring(svg)  # noqa: S314 - drawn just now
    labels = [
        (float(t.attrib["x"]), t.text or "") for t in root.iter("text") if t.attrib.get("text-anchor") == "middle"
    ]
    ticks = [(place, text) for place, text in labels if text != "step"]
    assert f"{last:,}" in [text for _, text in ticks]
    for (left, one), (right, other) in itertools.pairwise(sorted(ticks)):
        assert right - left > 6 * (len(one) + len(other)) / 2, "six units are the width of a digit"
