"""Numbers → SVG that stands inside a page: its colours are the page's, its text is text, nothing in it is styled inline.

The drawings hold no text of users: names of runs stand in the page's own legends.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

import numpy as np
from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NUM_COLOURS = 6
MOST_POINTS = 400
"""A longer series is drawn as the means of so many neighbouring stretches, and the band from least to most."""

_WIDTH, _HEIGHT = 4.5, 2.7  # inches of 72 units
_INK, _GRID, _STRONG = "#010101", "#020202", "#040404"
_SERIES = tuple(f"#03030{number}" for number in range(NUM_COLOURS))
_VARIABLES = {_INK: "var(--ink-soft)", _GRID: "var(--line)", _STRONG: "var(--ink)"} | {
    colour: f"var(--series-{number})" for number, colour in enumerate(_SERIES)
}
_DASHES = ("-", "--", "-.", ":")
_STYLE = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 11.5,
    "text.color": _INK,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": _GRID,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "ytick.left": False,
    "ytick.minor.left": False,
    "xtick.minor.bottom": False,
    "lines.linewidth": 1.8,
    "text.parse_math": False,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Points of one colour; `points` marks each of them, `rule` is a dashed line for comparison."""

    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    form: str = "line"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A horizontal bar in parts of (length, colour), with what is written behind it, and an interval on its end."""

    name: str
    parts: tuple[tuple[float, int], ...]
    label: str
    interval: tuple[float, float] | None = None


def draw_lines(
    name: str,
    alt: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    log: bool = False,
    from_zero: bool = False,
) -> Markup:
    """Curves over a common axis.

    Args:
        name: Distinguishes the chart from others of the page.
        alt: What the chart shows, for those who do not see it.
        series: What is drawn.
        x_label: Name and unit.
        y_label: Name and unit.
        log: Whether y is logarithmic; then all values must be above zero.
        from_zero: Whether y starts at zero: a rate's axis that starts elsewhere exaggerates.
    """
    with _drawing(name, alt) as drawing:
        for curve in series:
            _curve(drawing.axes, curve)
        if log:
            drawing.axes.set_yscale("log")
        elif from_zero:
            drawing.axes.set_ylim(0, 1.08 * max(max(curve.y) for curve in series) or 1)
        _finish(drawing.axes, x_label, y_label, log=log)
    return drawing.markup


def draw_histogram(
    name: str, alt: str, edges: Sequence[float], counts: Sequence[int], *, x_label: str, y_label: str
) -> Markup:
    """Bars from edge to edge; one edge more than counts."""
    with _drawing(name, alt) as drawing:
        drawing.axes.bar(
            edges[:-1], counts, width=np.diff(edges) * 0.92, align="edge", color=_SERIES[0], gid="series-0"
        )
        _finish(drawing.axes, x_label, y_label)
    return drawing.markup


def draw_bars(
    name: str, alt: str, bars: Sequence[Bar], *, x_label: str, ticks: Sequence[float] | None = None
) -> Markup:
    """Horizontal bars, the first on top; `ticks` where the axis has natural ends."""
    with _drawing(name, alt, height=0.85 + 0.5 * len(bars)) as drawing:
        axes = drawing.axes
        for place, bar in enumerate(bars):
            left = 0.0
            for length, colour in bar.parts:
                axes.barh(place, length, left=left, height=0.6, color=_SERIES[colour % NUM_COLOURS])
                left += length
            if bar.interval:
                axes.plot(bar.interval, (place, place), color=_STRONG, marker="|", markersize=10, linewidth=2)
            end = max(left, *(bar.interval or (left,)))
            axes.annotate(bar.label, (end, place), (6, 0), textcoords="offset points", va="center")
        axes.set_yticks(range(len(bars)), [bar.name for bar in bars])
        axes.invert_yaxis()
        axes.grid(visible=False)
        longest = max(sum(length for length, _ in bar.parts) for bar in bars) or 1
        axes.set_xlim(0, 1.3 * (ticks[-1] if ticks else longest))
        _finish(axes, x_label, "")
        if ticks:
            axes.set_xticks(ticks)
    return drawing.markup


class _Drawing:
    def __init__(self, axes: Axes) -> None:
        self.axes = axes
        self.markup = Markup()


@contextmanager
def _drawing(name: str, alt: str, height: float = _HEIGHT) -> Iterator[_Drawing]:
    """One pair of axes, in our style whatever the user's own settings of matplotlib."""
    import matplotlib.style  # half a second, which only who draws should wait for
    from matplotlib.figure import Figure

    with matplotlib.style.context(["default", {**_STYLE, "svg.hashsalt": name}]):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        drawing = _Drawing(figure.subplots())
        yield drawing
        stream = io.StringIO()
        figure.savefig(
            stream,
            format="svg",
            transparent=True,
            metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")),
        )
    drawing.markup = _inline(stream.getvalue(), alt)


def _curve(axes: Axes, curve: Series) -> None:
    colour = _SERIES[curve.colour % NUM_COLOURS]
    x, y = np.asarray(curve.x, dtype=float), np.asarray(curve.y, dtype=float)
    if curve.form == "rule":
        axes.plot(x, y, color=_INK, linewidth=1.2, linestyle=(0, (4, 3)), gid="rule")
        return
    if curve.form == "points":
        axes.plot(x, y, color=colour, linestyle=(0, (1, 2)), marker="o", markersize=6, gid=f"series-{curve.colour}")
        return
    dashes = _DASHES[curve.colour // NUM_COLOURS % len(_DASHES)]
    if len(x) > MOST_POINTS:
        parts = np.array_split(np.arange(len(x)), MOST_POINTS)
        low, high = (np.array([of(y[part]) for part in parts]) for of in (np.min, np.max))
        x, y = (np.array([values[part].mean() for part in parts]) for values in (x, y))
        axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
    axes.plot(x, y, color=colour, linestyle=dashes, marker="o" if len(x) == 1 else None, gid=f"series-{curve.colour}")


def _finish(axes: Axes, x_label: str, y_label: str, *, log: bool = False) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    axes.set_xlabel(x_label)
    axes.set_title(y_label, loc="left", fontsize=11.5, color=_INK)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(_tick))
    if log:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
        axes.yaxis.set_minor_formatter(NullFormatter())
    if log or y_label:
        axes.yaxis.set_major_formatter(FuncFormatter(_tick))


def _tick(value: float, position: int | None = None) -> str:  # noqa: ARG001 - matplotlib's signature
    if abs(value) >= 1e6:
        return f"{value / 1e6:g} M"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


# ---- from matplotlib's SVG to the page's

_SVG = "{http://www.w3.org/2000/svg}"
_HREF = "{http://www.w3.org/1999/xlink}href"
_PAGE_DECIDES = {"font-family", "font"}


def _inline(text: str, alt: str) -> Markup:
    """Without namespaces, inline styles and names, which would clash or which the page's policy forbids."""
    root = ET.fromstring(text)  # noqa: S314 - matplotlib wrote it just now
    for parent in root.iter():
        for child in [child for child in parent if child.tag == f"{_SVG}style"]:
            parent.remove(child)
    referenced = set(re.findall(r"#(\w+)", " ".join(v for e in root.iter() for v in e.attrib.values())))
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        element.attrib = dict(_attributes(element.attrib, referenced))
    for size in ("width", "height", "version"):
        root.attrib.pop(size, None)
    root.attrib |= {"role": "img", "aria-label": alt}
    return Markup(ET.tostring(root, encoding="unicode", short_empty_elements=False))  # noqa: S704 - no user's text


def _attributes(attributes: dict[str, str], referenced: set[str]) -> Iterator[tuple[str, str]]:
    for name, value in attributes.items():
        if name == "style":
            for declaration in filter(str.strip, value.split(";")):
                key, _, setting = (part.strip() for part in declaration.partition(":"))
                if key not in _PAGE_DECIDES:
                    yield key, _VARIABLES.get(setting, setting)
        elif name == "id":
            if value in referenced:
                yield "id", value
            elif value.startswith("series-") or value == "rule":
                yield "class", value
        elif name == _HREF:
            yield "href", value
        elif name == "d":
            yield "d", _shorter(value)
        else:
            yield name, value


def _shorter(path: str) -> str:
    """A path with a tenth of a unit, which is finer than a screen."""
    return " ".join(re.sub(r"\d+\.\d+", lambda number: f"{float(number[0]):.1f}", path).split())


def describe(name: str, values: Sequence[Any]) -> str:
    """A curve in words: where it starts and ends, and its extremes."""
    if not values:
        return f"{name}: no values."
    return (
        f"{name}: {len(values)} values, first {values[0]:.4g}, last {values[-1]:.4g}, "
        f"least {min(values):.4g}, most {max(values):.4g}."
    )
