"""Numbers → SVG inside a page: its colors are the page's variables, its text is text, nothing in it is styled inline.

The drawings hold no text of users: names of runs are in the page's own legends, and in the description, which is
escaped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

from markupsafe import Markup

if TYPE_CHECKING:
    from collections.abc import Sequence

NUM_COLORS = 6
MAX_POINTS = 400
"""A longer series is drawn as the means of this many neighboring stretches, with a band from lowest to highest."""

_WIDTH, _HEIGHT = 324.0, 194.0
_FONT = 11.5  # at 320 pixels, the narrowest phone, 9 pixels remain
_CHARACTER = 6.6  # a digit is about this wide; the page's font is not known here
_LINE = 15.0  # height of a line of text
_INK, _GRID, _STRONG = "var(--ink-soft)", "var(--line)", "var(--ink)"
_DASHES = ("", "6 3", "6 2 1.5 2", "1.5 2.5")
_MARGIN = 0.04  # of the axis on either side of the data


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Points of one color; form `points` marks each of them, `rule` is a dashed line for comparison."""

    x: Sequence[float]
    y: Sequence[float]
    color: int = 0
    form: str = "line"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A horizontal bar in parts of (length, color), with a label behind it, and an interval around its end."""

    name: str
    parts: tuple[tuple[float, int], ...]
    label: str
    interval: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Axis:
    """Values from `low` to `high` on the drawing from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return the place of a value, to a tenth of a unit, which is finer than a screen."""
        low, high, value = (
            (math.log(v) for v in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        )
        return round(self.start + (value - low) / (high - low) * (self.end - self.start), 1)


def draw_lines(
    alt: str, series: Sequence[Series], *, x_label: str, y_label: str, log: bool = False, from_zero: bool = False
) -> Markup:
    """Draw curves over a common axis.

    Args:
        alt: Description, for people who do not see the chart.
        series: The curves.
        x_label: Name and unit.
        y_label: Name and unit.
        log: Whether y is logarithmic; all values must be above zero.
        from_zero: Whether y starts at zero; the axis of a rate that starts elsewhere exaggerates.
    """
    xs, ys = [x for curve in series for x in curve.x], [y for curve in series for y in curve.y]
    if log:
        low, high = min(ys) / (max(ys) / min(ys)) ** _MARGIN, max(ys) * (max(ys) / min(ys)) ** _MARGIN
    elif from_zero:
        low, high = 0.0, 1.08 * max(ys) or 1.0
    else:
        low, high = _widened(min(ys), max(ys))
    x_range = _widened(min(xs), max(xs))
    svg, x, y = _frame(alt, x_range, (low, high), x_label=x_label, y_label=y_label, log=log, last=max(xs))
    for curve in series:
        _draw_curve(svg, curve, x, y)
    return _markup(svg)


def draw_histogram(alt: str, edges: Sequence[float], counts: Sequence[int], *, x_label: str, y_label: str) -> Markup:
    """Draw bars from edge to edge; there is one more edge than counts."""
    svg, x, y = _frame(
        alt, _widened(edges[0], edges[-1]), (0.0, 1.08 * max(counts) or 1.0), x_label=x_label, y_label=y_label
    )
    group = ET.SubElement(svg, "g", {"class": "series-0"})
    for (left, right), count in zip(pairwise(edges), counts, strict=True):
        if count:
            _rectangle(group, (x(left), x(left + 0.92 * (right - left))), (y(count), y(0)), 0)
    return _markup(svg)


def draw_bars(alt: str, bars: Sequence[Bar], *, x_label: str, ticks: Sequence[float] | None = None) -> Markup:
    """Draw horizontal bars, the first on top; `ticks` for an axis with natural ends, such as 0 to 100."""
    bar_height, gap = 22.0, 14.0
    bottom = len(bars) * (bar_height + gap) + gap / 2
    svg = _svg(alt, bottom + 2.5 * _LINE)
    ends = [sum(length for length, _ in bar.parts) for bar in bars]
    left = 8 + _CHARACTER * max(len(bar.name) for bar in bars)
    longest = max(0.0, *ends, *(bar.interval[1] for bar in bars if bar.interval is not None)) or 1.0
    right = _WIDTH - 10 - _CHARACTER * max(len(bar.label) for bar in bars)
    x = _Axis(low=0.0, high=max(longest, ticks[-1]) if ticks else longest, start=left, end=right)
    _draw_x_axis(svg, x, bottom, x_label, ticks)
    for number, (bar, end) in enumerate(zip(bars, ends, strict=True)):
        top = gap / 2 + number * (bar_height + gap)
        middle, done = top + bar_height / 2, 0.0
        _text(svg, bar.name, left - 6, middle, anchor="end")
        for length, color in bar.parts:
            _rectangle(svg, (x(done), x(done + length)), (top, top + bar_height), color)
            done += length
        if bar.interval is not None:
            first, last = (x(value) for value in bar.interval)
            path = f"M{first} {middle} L{last} {middle} M{first} {middle - 5} L{first} {middle + 5}"
            path += f" M{last} {middle - 5} L{last} {middle + 5}"
            ET.SubElement(svg, "path", {"d": path, "stroke": _STRONG, "stroke-width": "2", "fill": "none"})
        _text(svg, bar.label, max(x(end), *(x(value) for value in bar.interval or (end,))) + 6, middle)
    return _markup(svg)


def describe_series(name: str, values: Sequence[float]) -> str:
    """Describe a curve in words: where it starts and ends, and its extremes."""
    if not values:
        return f"{name}: no values."
    return (
        f"{name}: {len(values)} values, first {values[0]:.4g}, last {values[-1]:.4g}, "
        f"lowest {min(values):.4g}, highest {max(values):.4g}."
    )


def _frame(
    alt: str,
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    *,
    x_label: str,
    y_label: str,
    log: bool = False,
    last: float = math.inf,
) -> tuple[ET.Element, _Axis, _Axis]:
    """Draw both axes and the grid, with a label at the x-value `last`; return the drawing and the axes."""
    top, bottom = 1.7 * _LINE if y_label else 0.7 * _LINE, _HEIGHT - 2.5 * _LINE
    y = _Axis(low=y_range[0], high=y_range[1], start=bottom, end=top, log=log)
    y_ticks = _log_ticks(*y_range) if log else _ticks(*y_range, most=6)
    left = 6 + _CHARACTER * max(len(_number(tick)) for tick in y_ticks)
    x = _Axis(low=x_range[0], high=x_range[1], start=left, end=_WIDTH - 10)
    svg = _svg(alt, _HEIGHT)
    if y_label:
        _text(svg, y_label, left, 0.6 * _LINE)
    for tick in y_ticks:
        ET.SubElement(svg, "path", {"d": f"M{left:.1f} {y(tick)} L{x.end} {y(tick)}", "stroke": _GRID})
        _text(svg, _number(tick), left - 5, y(tick), anchor="end")
    _draw_x_axis(svg, x, bottom, x_label, _with_last(_x_ticks(x), last, x))
    return svg, x, y


def _draw_x_axis(svg: ET.Element, x: _Axis, bottom: float, label: str, ticks: Sequence[float] | None = None) -> None:
    ET.SubElement(svg, "path", {"d": f"M{x.start:.1f} {bottom} L{x.end} {bottom}", "stroke": _GRID})
    for tick in ticks or _x_ticks(x):
        _text(svg, _number(tick), x(tick), bottom + 0.7 * _LINE, anchor="middle")
    _text(svg, label, (x.start + x.end) / 2, bottom + 1.8 * _LINE, anchor="middle")


def _draw_curve(svg: ET.Element, curve: Series, x: _Axis, y: _Axis) -> None:
    color = f"var(--series-{curve.color % NUM_COLORS})"
    group = ET.SubElement(svg, "g", {"class": "rule" if curve.form == "rule" else f"series-{curve.color}"})
    points = list(zip(curve.x, curve.y, strict=True))
    if curve.form == "line" and len(points) > MAX_POINTS:
        bounds = [len(points) * number // MAX_POINTS for number in range(MAX_POINTS + 1)]
        parts = [points[start:stop] for start, stop in pairwise(bounds)]
        points = [(sum(px for px, _ in part) / len(part), sum(py for _, py in part) / len(part)) for part in parts]
        band = [(px, min(py for _, py in part)) for (px, _), part in zip(points, parts, strict=True)]
        band += reversed([(px, max(py for _, py in part)) for (px, _), part in zip(points, parts, strict=True)])
        outline = {"d": _path(band, x, y), "fill": color, "fill-opacity": "0.18"}
        ET.SubElement(svg, "path", outline)
    stroke = {"line": (color, "1.8", _DASHES[curve.color // NUM_COLORS % len(_DASHES)])}
    stroke |= {"points": (color, "1.8", "1.8 3.6"), "rule": (_INK, "1.2", "5 4")}
    ink, width, dashes = stroke[curve.form]
    attributes = {"d": _path(points, x, y), "stroke": ink, "stroke-width": width, "fill": "none"}
    ET.SubElement(group, "path", attributes | ({"stroke-dasharray": dashes} if dashes else {}))
    if curve.form == "points" or (curve.form == "line" and len(points) == 1):
        for px, py in points:
            ET.SubElement(group, "circle", {"cx": str(x(px)), "cy": str(y(py)), "r": "3", "fill": color})


def _path(points: Sequence[tuple[float, float]], x: _Axis, y: _Axis) -> str:
    return "M" + " L".join(f"{x(px)} {y(py)}" for px, py in points)


def _rectangle(parent: ET.Element, xs: tuple[float, float], ys: tuple[float, float], color: int) -> None:
    path = f"M{xs[0]} {ys[0]} L{xs[1]} {ys[0]} L{xs[1]} {ys[1]} L{xs[0]} {ys[1]} Z"
    ET.SubElement(parent, "path", {"d": path, "fill": f"var(--series-{color % NUM_COLORS})"})


def _text(parent: ET.Element, text: str, x: float, y: float, anchor: str = "start") -> None:
    place = {"x": f"{x:.1f}", "y": f"{y:.1f}", "dominant-baseline": "central", "text-anchor": anchor}
    ET.SubElement(parent, "text", {**place, "font-size": str(_FONT), "fill": _INK}).text = text


def _svg(alt: str, height: float) -> ET.Element:
    return ET.Element("svg", {"viewBox": f"0 0 {_WIDTH:g} {height:g}", "role": "img", "aria-label": alt})


def _markup(svg: ET.Element) -> Markup:
    return Markup(ET.tostring(svg, encoding="unicode", short_empty_elements=False))  # noqa: S704 - escaped by ElementTree


# ---- ticks


def _widened(low: float, high: float) -> tuple[float, float]:
    """Return the ends of an axis for values from low to high, with a margin; equal values get some room too."""
    margin = _MARGIN * (high - low) or 0.05 * abs(high) or 0.5
    return low - margin, high + margin


def _ticks(low: float, high: float, most: int, *, whole: bool = False) -> list[float]:
    """Return at most so many round numbers, in equal steps of 1, 2 or 5 times a power of ten."""
    power = math.floor(math.log10((high - low) / most))
    power = max(power, 0) if whole else power
    steps = (digit * 10.0**exponent for exponent in (power, power + 1, power + 2) for digit in (1, 2, 5))
    for step in steps:
        first, last = math.ceil(low / step), math.floor(high / step)
        if last - first < most and not (whole and step < 1):
            return [number * step for number in range(first, last + 1)]
    raise AssertionError("a step of 100 times the range divided by the number of ticks is large enough")


def _x_ticks(x: _Axis) -> list[float]:
    """Return whole numbers whose labels do not touch; fractions if no whole number is in the range."""
    for most in (6, 5, 4, 3):
        ticks = _ticks(x.low, x.high, most, whole=True)
        if sum(len(_number(tick)) + 2 for tick in ticks) * _CHARACTER < x.end - x.start:
            break
    return ticks or _ticks(x.low, x.high, 3)


def _with_last(ticks: list[float], last: float, x: _Axis) -> list[float]:
    """Return the ticks with the last whole value, a run's last step, in place of those whose labels would touch it."""
    if not math.isfinite(last) or last != math.floor(last):
        return ticks

    def room(tick: float) -> float:
        return _CHARACTER * (len(_number(tick)) + len(_number(last)) + 2) / 2

    return [*(tick for tick in ticks if x(last) - x(tick) >= room(tick)), last]


def _log_ticks(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 times powers of ten; over many decades the powers alone, and not all of them."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [
        digit * 10.0**exponent for exponent in exponents for digit in (1, 2, 5) if low <= digit * 10.0**exponent <= high
    ]
    if len(ticks) > 8:
        ticks = [10.0**exponent for exponent in exponents if low <= 10.0**exponent <= high]
    return ticks[:: math.ceil(len(ticks) / 8)]


def _number(value: float) -> str:
    if abs(value) >= 1e6:
        return f"{value / 1e6:g} M"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
