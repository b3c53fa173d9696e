# SPDX-License-Identifier: Apache-2.0
"""Small charts as inline SVG. Colours and fonts come from the page's style sheet; every text is escaped here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 360, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 12, 36

Points = Sequence[tuple[float, float]]


@dataclass
class Chart:
    """A chart of `x` and `y` ranges; the methods add marks, `svg` gives the element.

    Attributes:
      title: what a screen reader says of it.
      x, y: (lowest, highest) values shown.
      x_label, y_label: of the axes.
      log_x, log_y: logarithmic axes; values must be positive.
    """

    title: str
    x: tuple[float, float]
    y: tuple[float, float]
    x_label: str = ""
    y_label: str = ""
    log_x: bool = False
    log_y: bool = False
    _marks: list[str] = field(default_factory=list)

    def line(self, points: Points, style: str) -> Chart:
        """A line through `points`; `style` is a class of the style sheet."""
        path = " ".join(f"{self._x(x):.1f},{self._y(y):.1f}" for x, y in points)
        self._marks.append(f'<polyline class="{style}" points="{path}"/>')
        return self

    def area(self, points: Points, style: str) -> Chart:
        """`line`, filled down to the axis."""
        first, last = self._x(points[0][0]), self._x(points[-1][0])
        bottom = HEIGHT - _BOTTOM
        path = " ".join(f"L{self._x(x):.1f} {self._y(y):.1f}" for x, y in points)
        self._marks.append(f'<path class="{style}" d="M{first:.1f} {bottom} {path} L{last:.1f} {bottom}Z"/>')
        return self

    def dots(self, points: Iterable[tuple[float, float, str]], style: str, radius: float = 3) -> Chart:
        """Points with a text each that shows when pointed at."""
        for x, y, text in points:
            place = f'cx="{self._x(x):.1f}" cy="{self._y(y):.1f}"'
            self._marks.append(f'<circle class="{style}" {place} r="{radius}"><title>{escape(text)}</title></circle>')
        return self

    def bars(self, values: Iterable[tuple[float, float, str]], style: str, width: float) -> Chart:
        """Bars of (middle, height, text), `width` wide in units of x."""
        half = max(0.5, (self._x(self.x[0] + width) - self._x(self.x[0])) / 2 - 0.75)
        for x, y, text in values:
            top, bottom = self._y(y), HEIGHT - _BOTTOM
            box = f'x="{self._x(x) - half:.1f}" y="{top:.1f}" width="{2 * half:.1f}" height="{bottom - top:.1f}"'
            self._marks.append(f'<rect class="{style}" {box}><title>{escape(text)}</title></rect>')
        return self

    def rule(self, text: str, style: str, *, x: float | None = None, y: float | None = None) -> Chart:
        """A line across the chart at `x` or at `y`, with its name."""
        if y is not None:
            at = self._y(y)
            self._marks.append(
                f'<line class="{style}" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
            )
            self._text(WIDTH - _RIGHT - 2, at - 4, text, "end", "note")
        elif x is not None:
            at = self._x(x)
            self._marks.append(
                f'<line class="{style}" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"/>'
            )
            right = at > WIDTH / 2
            self._text(at + (-4 if right else 4), HEIGHT - _BOTTOM - 6, text, "end" if right else "start", "note")
        return self

    def note(self, x: float, y: float, text: str, style: str, anchor: str = "end", lift: float = 8) -> Chart:
        """A text above a point."""
        self._text(self._x(x), self._y(y) - lift, text, anchor, style)
        return self

    def svg(self) -> str:
        axes: list[str] = []
        marks, self._marks = self._marks, axes
        for value in _ticks(*self.y, self.log_y):
            at = self._y(value)
            axes.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
            self._text(_LEFT - 6, at + 4, number(value), "end", "tick")
        for value in _ticks(*self.x, self.log_x):
            self._text(self._x(value), HEIGHT - _BOTTOM + 16, number(value), "middle", "tick")
        self._text((_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 4, self.x_label, "middle", "axis")
        if self.y_label:
            middle = (_TOP + HEIGHT - _BOTTOM) / 2
            turned = f'<text class="axis" text-anchor="middle" transform="translate(10 {middle:.0f}) rotate(-90)">'
            axes.append(f"{turned}{escape(self.y_label)}</text>")
        self._marks = marks
        head = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img"><title>{escape(self.title)}</title>'
        return head + "".join(axes) + "".join(marks) + "</svg>"

    def _text(self, x: float, y: float, text: str, anchor: str, style: str) -> None:
        place = f'class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
        self._marks.append(f"<text {place}>{escape(text)}</text>")

    def _x(self, value: float) -> float:
        return _LEFT + _share(value, *self.x, self.log_x) * (WIDTH - _LEFT - _RIGHT)

    def _y(self, value: float) -> float:
        return HEIGHT - _BOTTOM - _share(value, *self.y, self.log_y) * (HEIGHT - _TOP - _BOTTOM)


def number(value: float) -> str:
    """A number for people: 1,024, 0.85, 3.2 M."""
    for limit, unit in ((1e9, " G"), (1e6, " M")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}"
    if abs(value) >= 10_000:
        return f"{value / 1000:.3g} k"
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def _share(value: float, low: float, high: float, log: bool) -> float:
    if log:
        value, low, high = math.log(value), math.log(low), math.log(high)
    share = (value - low) / (high - low) if high > low else 0.5
    return min(1.0, max(0.0, share))


def _ticks(low: float, high: float, log: bool) -> list[float]:
    """Four to eight round values inside the range."""
    if high <= low:
        return [low]
    if log:
        powers = [2**power for power in range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)]
        return [float(power) for power in powers[:: max(1, math.ceil(len(powers) / 9))]]
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= max(factor for factor in (1, 2, 5) if (high - low) / (step * factor) >= 3.5 or factor == 1)
    first = math.ceil(low / step - 1e-9)
    return [first * step + index * step for index in range(int((high - first * step) / step + 1e-9) + 1)]
