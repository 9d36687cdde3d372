"""Charts as inline SVG: lines with intervals, and bars for shares.

Everything that is drawn has a name for screen readers, takes its text colour from the page, and is narrow enough (360
units) to be read on a telephone without shrinking. The script of the page reads `data-x` and `data-y`, the limits of
the axes, to name the points below the pointer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

from coconut.report.text import format_axis, visible

WIDTH, HEIGHT = 360, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 24, 36
_BAR_WIDTH = 150
_LINE = 14
_NAMES = 72
"""Height of names that stand aslant below an axis."""


@dataclass(frozen=True)
class Point:
    """A value with its interval, if it has one."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    """One line of a chart."""

    label: str
    colour: str
    points: Sequence[Point]
    dashes: str = ""
    """As in `stroke-dasharray`."""


@dataclass(frozen=True)
class Chart:
    """Lines over a common axis; what lies outside of positive numbers is left out on a logarithmic axis."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    is_log: bool = False
    limits: tuple[float, float] | None = None
    """Of the vertical axis; None for those of the points."""
    x_ticks: Sequence[float] | None = None
    x_names: Sequence[str] = ()
    """In place of the numbers of `x_ticks`."""
    shown: list[Series] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        for one in self.series:
            points = [p for p in one.points if math.isfinite(p.y) and (p.y > 0 or not self.is_log)]
            if points:
                self.shown.append(Series(one.label, one.colour, points, one.dashes))

    def to_svg(self, *, style: str = "") -> Markup:
        """Draw the chart; with a style sheet it stands by itself as a file, with title and legend."""
        points = [point for one in self.shown for point in one.points]
        x = Axis.over([p.x for p in points], _LEFT, WIDTH - _RIGHT, is_wide=self.x_ticks is not None)
        values = [v for p in points for v in (p.y, p.low, p.high) if v is not None]
        bottom = _NAMES if self.x_names else _BOTTOM
        y = Axis.over(self.limits or values, HEIGHT - bottom, _TOP, is_log=self.is_log)
        parts = [_grid(x, y, self.x_ticks, self.x_names), *(_line(one, x, y) for one in self.shown)]
        parts.append(_text(WIDTH - _RIGHT, HEIGHT - 4, self.x_label, "end"))
        parts.append(_text(2, _TOP - 12, self.y_label, "start"))
        top, bottom = 0, HEIGHT
        if style:
            top, bottom = -_LINE, HEIGHT + _LINE * len(self.shown) + 4
            parts.append(_text(2, top + 11, self.title, "start"))
            parts += [_legend_line(one, HEIGHT + _LINE * place) for place, one in enumerate(self.shown, 1)]
        return Markup(
            '<svg xmlns="http://www.w3.org/2000/svg" class="chart" viewBox="0 {} {} {}" role="img" aria-label="{}"'
            ' tabindex="0" data-x="{} {} {} {}" data-y="{} {} {} {} {}">{}{}</svg>'
        ).format(
            *(top, WIDTH, bottom - top, visible(f"{self.title}: {self.describe()}"), x.low, x.high, x.start, x.end),
            *(y.low, y.high, y.start, y.end, "log" if self.is_log else "linear"),
            Markup("<style>{}</style>").format(Markup(style)) if style else "",
            Markup("\n").join(parts),
        )

    def describe(self) -> str:
        """Say in words where every line ends."""
        ends = [f"{one.label} ends at {format_axis(one.points[-1].y)}" for one in self.shown]
        return f"{self.y_label} over {self.x_label}. {'; '.join(ends)}."


@dataclass(frozen=True)
class Axis:
    """A range of numbers and the pixels that it takes."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    @classmethod
    def over(
        cls, values: Sequence[float], start: float, end: float, *, is_log: bool = False, is_wide: bool = False
    ) -> "Axis":
        """Choose an axis over the values; `is_wide` leaves half a unit at both ends, for counts."""
        low, high = (min(values), max(values)) if values else (0.0, 1.0)
        if is_wide:
            low, high = low - 0.5, high + 0.5
        if low == high:
            low, high = (low / 2, high * 2) if is_log else (low - 0.5, high + 0.5)
        return cls(low, high, start, end, is_log)

    def place(self, value: float) -> float:
        """Return where a value stands, in pixels."""
        low, high, at = self.low, self.high, value
        if self.is_log:
            low, high, at = math.log(low), math.log(high), math.log(value)
        share = min(1.02, max(-0.02, (at - low) / (high - low)))
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self) -> list[float]:
        """Return some round numbers on the axis.

        >>> Axis(0.0, 1.0, 0, 100).ticks()
        [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
        >>> Axis(0.003, 2.0, 0, 100, is_log=True).ticks()
        [0.01, 0.1, 1.0]
        """
        if self.is_log:
            powers = range(math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9) + 1)
            found = [10.0**power for power in powers][:: max(1, len(powers) // 5)]
            if len(found) > 1:
                return found
        raw = (self.high - self.low) / 5
        unit = 10.0 ** math.floor(math.log10(raw))
        step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(number * step, 12) for number in range(first, last + 1)]


def share_bar(value: float | None, low: float | None, high: float | None, *, colour: str = "var(--accent)") -> Markup:
    """Draw a share from 0 to 1 as a bar with its interval; nothing where there is no number."""
    if value is None:
        return Markup("")
    axis = Axis(0.0, 1.0, 1, _BAR_WIDTH - 1)
    end = axis.place(value)
    whisker = Markup("")
    if low is not None and high is not None:
        whisker = Markup('<path class="whisker" d="M{} 7H{}M{} 3V11M{} 3V11"/>').format(
            axis.place(low), axis.place(high), axis.place(low), axis.place(high)
        )
    return Markup(
        '<svg class="bar" viewBox="0 0 {} 14" aria-hidden="true">'
        '<rect class="track" x="1" y="4" width="{}" height="6"/>'
        '<rect x="1" y="4" width="{}" height="6" fill="{}"/>{}</svg>'
    ).format(_BAR_WIDTH, _BAR_WIDTH - 2, max(0.5, round(end - 1, 1)), colour, whisker)


def _grid(x: Axis, y: Axis, x_ticks: Sequence[float] | None, x_names: Sequence[str]) -> Markup:
    parts = []
    for value in y.ticks():
        at = y.place(value)
        parts.append(Markup('<path class="grid" d="M{} {}H{}"/>').format(x.start, at, x.end))
        parts.append(_text(x.start - 4, at + 3.5, format_axis(value), "end"))
    ticks = x.ticks() if x_ticks is None else x_ticks
    for value in [] if x_names else ticks:
        parts.append(_text(x.place(value), y.start + 14, format_axis(value), "middle"))
    for value, name in zip(ticks, x_names, strict=False):
        turn = Markup('<g transform="rotate(-40 {} {})">').format(x.place(value), y.start + 12)
        parts.append(turn + _text(x.place(value), y.start + 12, name[:14], "end") + Markup("</g>"))
    return Markup("").join(parts)


def _line(one: Series, x: Axis, y: Axis) -> Markup:
    places = " ".join(f"{x.place(p.x):g},{y.place(p.y):g}" for p in one.points)
    whiskers = "".join(
        f"M{x.place(p.x):g} {y.place(p.low):g}V{y.place(p.high):g}"
        for p in one.points
        if p.low is not None and p.high is not None
    )
    dots = Markup("").join(
        Markup('<circle cx="{}" cy="{}" r="2.2" fill="{}"/>').format(x.place(p.x), y.place(p.y), one.colour)
        for p in (one.points if len(one.points) <= 12 else [])
    )
    path = Markup('<path class="whisker" style="stroke:{}" d="{}"/>').format(one.colour, whiskers) if whiskers else ""
    return Markup(
        '<g class="series" data-label="{}"><polyline fill="none" stroke="{}" stroke-width="1.4"{} points="{}"/>{}{}</g>'
    ).format(
        visible(one.label),
        one.colour,
        _dashes(one),
        places,
        path,
        dots,
    )


def _legend_line(one: Series, y: float) -> Markup:
    line = Markup('<path d="M2 {}H26" stroke="{}" stroke-width="1.4"{}/>').format(y - 3, one.colour, _dashes(one))
    return line + _text(32, y, one.label, "start")


def _dashes(one: Series) -> Markup:
    return Markup(' stroke-dasharray="{}"').format(one.dashes) if one.dashes else Markup("")


def _text(x: float, y: float, text: str, anchor: str) -> Markup:
    return Markup('<text x="{}" y="{}" text-anchor="{}">{}</text>').format(x, y, anchor, escape(visible(text)))
