"""Line charts as SVG text."""

import html
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 340, 215  # about the pixels of a chart on a phone, so that its text is as large as the style says
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 8, 38  # margins around the plot
TICKS = 5
UNITS = ((1e9, "G"), (1e6, "M"), (1e3, "k"))
SMOOTH_FROM = 60  # points; fewer are drawn as they are
LOG_FROM = 3.0  # a chart whose values span this factor can also be seen on a log scale

Point = tuple[float, float | None]  # y None: was not finite


@dataclass(frozen=True)
class Line:
    """One curve: `points` by ascending x; `colour` numbers the run; an evaluation has a mark at each point.

    smooth: a mean to draw over them, if there is one.
    """

    label: str
    colour: int
    points: Sequence[Point]
    smooth: Sequence[Point] = ()
    marked: bool = False

    def values(self) -> list[float]:
        return [y for _, y in self.points if y is not None]

    def last(self) -> str:
        """Returns the last finite value as text; empty without one."""
        return short(self.values()[-1]) if self.values() else ""


@dataclass(frozen=True)
class Axis:
    """Values low..high along the pixels begin..end."""

    low: float
    high: float
    begin: float
    end: float
    log: bool = False

    @staticmethod
    def over(values: Sequence[float], begin: float, end: float, log: bool = False, room: float = 0.0) -> "Axis":
        """Returns an axis that holds the values and leaves the share `room` free at both ends."""
        low, high = min(values), max(values)
        if low == high == 0:  # mostly shares and counts, which are never negative
            high = 1.0
        elif low == high:  # one value: any width will do
            low, high = (low / 2, high * 2) if log else (low - abs(low) / 2, high + abs(high) / 2)
        if log:
            factor = (high / low) ** room
            return Axis(low / factor, high * factor, begin, end, log)
        return Axis(low - room * (high - low), high + room * (high - low), begin, end)

    def pixel(self, value: float) -> float:
        low, high, value = (math.log(x) if self.log else x for x in (self.low, self.high, value))
        return self.begin + (value - low) / (high - low) * (self.end - self.begin)

    def ticks(self) -> list[tuple[float, str]]:
        """Returns round values inside the axis, and their labels."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            many = math.log10(self.high / self.low) > 2
            values = [factor * 10.0**decade for decade in decades for factor in ((1,) if many else (1, 2, 5))]
            inside = [(value, short(value)) for value in values if self.low <= value <= self.high]
            if len(inside) > 1:
                return inside[:: math.ceil(len(inside) / (TICKS + 2))]
        step = _round_step((self.high - self.low) / TICKS)
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        return [(i * step, short(i * step, step)) for i in range(first, last + 1)]


def _round_step(minimum: float) -> float:
    """Returns the smallest 1, 2 or 5 times a power of ten that is at least `minimum`."""
    power = 10.0 ** math.floor(math.log10(minimum))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= minimum * (1 - 1e-9))


def short(value: float, step: float | None = None) -> str:
    """Returns a number as text, with k, M or G: digits that distinguish values `step` apart, or four significant."""
    size = abs(value)
    factor, unit = next((u for u in UNITS if size >= u[0]), (1.0, ""))
    if size >= 1e4:
        value, step, size = value / factor, step and step / factor, size / factor
    else:
        unit = ""
    if step is None or 0 < size < 1e-3:
        return f"{value:.4g}{unit}"
    return f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}{unit}"


def thinned(points: Sequence[Point], limit: int) -> list[Point]:
    """Returns about `limit` points: of each stretch the lowest, the highest and a gap, so that no peak is lost."""
    if len(points) <= limit:
        return list(points)
    length = math.ceil(2 * len(points) / limit)
    kept = {0, len(points) - 1}
    for start in range(0, len(points), length):
        stretch = range(start, min(start + length, len(points)))
        by_value = sorted((i for i in stretch if points[i][1] is not None), key=lambda i: points[i][1])
        gaps = [i for i in stretch if points[i][1] is None]
        kept.update(by_value[:1], by_value[-1:], gaps[:1])
    return [points[i] for i in sorted(kept)]


def smoothed(points: Sequence[Point]) -> list[Point]:
    """Returns the exponential mean over the points so far, with a half-life of a fiftieth of them; none of a few."""
    if len(points) < SMOOTH_FROM:
        return []
    decay, mean, weight, means = 0.5 ** (50 / len(points)), 0.0, 0.0, []
    for x, y in points:
        if y is not None:
            mean, weight = decay * mean + (1 - decay) * y, decay * weight + 1 - decay
        means.append((x, mean / weight if y is not None else None))
    return means


def can_be_log(lines: Sequence[Line]) -> bool:
    values = [value for line in lines for value in line.values()]
    return min(values) > 0 and max(values) / min(values) >= LOG_FROM


def draw(lines: Sequence[Line], x_label: str, marks: Sequence[tuple[float, int, str]] = (), log: bool = False) -> str:
    """Returns an SVG of the lines, at least one of which has a value.

    Args:
        marks: (x, colour, what happened there), drawn as upright lines.
        log: of the y axis.
    """
    x_axis = Axis.over([0.0, *(x for line in lines for x, _ in line.points)], LEFT, WIDTH - RIGHT)
    y_axis = Axis.over([y for line in lines for y in line.values()], HEIGHT - BOTTOM, TOP, log, room=0.04)
    parts = [*_frame(x_axis, y_axis, x_label)]
    parts += [_mark(x_axis, *mark) for mark in marks if x_axis.low <= mark[0] <= x_axis.high]
    parts += [_curve(line, x_axis, y_axis) for line in lines]
    kind = "log" if log else "linear"
    return (
        f'<svg class="{kind}" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" data-x="{x_axis.low:g} {x_axis.high:g}">'
        f'{"".join(parts)}<path class="cursor" d=""/></svg>'
    )


def _frame(x_axis: Axis, y_axis: Axis, x_label: str) -> Iterator[str]:
    left, right, top, bottom = LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM
    for value, label in y_axis.ticks():
        y = y_axis.pixel(value)
        yield f'<path class="grid" d="M{left} {y:.1f}H{right}"/>'
        yield f'<text class="y" x="{left - 6}" y="{y + 4:.1f}">{label}</text>'
    for value, label in x_axis.ticks():
        x = x_axis.pixel(value)
        yield f'<path class="tick" d="M{x:.1f} {bottom}v4"/>'
        yield f'<text class="x" x="{x:.1f}" y="{bottom + 16}">{label}</text>'
    yield f'<path class="axis" d="M{left} {top}V{bottom}H{right}"/>'
    yield f'<text class="x name" x="{(left + right) / 2}" y="{HEIGHT - 5}">{html.escape(x_label)}</text>'


def _mark(x_axis: Axis, x: float, colour: int, what: str) -> str:
    return (
        f'<path class="mark c{colour}" d="M{x_axis.pixel(x):.1f} {TOP}V{HEIGHT - BOTTOM}">'
        f"<title>{html.escape(what)}</title></path>"
    )


def _curve(line: Line, x_axis: Axis, y_axis: Axis) -> str:
    kind = "evaluation" if line.marked else "training"
    parts = [_path("raw" if line.smooth else "curve", line.points, x_axis, y_axis)]
    if line.smooth:
        parts.append(_path("curve", line.smooth, x_axis, y_axis))
    if line.marked or len(line.points) == 1:  # a short run has one training point
        pixels = [(x_axis.pixel(x), y_axis.pixel(y)) for x, y in line.points if y is not None]
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in pixels]
    return f'<g class="{kind} c{line.colour}">{"".join(parts)}</g>'


def _path(kind: str, points: Sequence[Point], x_axis: Axis, y_axis: Axis) -> str:
    """Returns the path that joins the points, with a gap where there is no value."""
    path = ""
    for finite, stretch in itertools.groupby(points, key=lambda point: point[1] is not None):
        if finite:
            pixels = [f"{x_axis.pixel(x):.1f} {y_axis.pixel(y):.1f}" for x, y in stretch]
            path += "M" + "L".join(pixels) + ("h0" if len(pixels) == 1 else "")  # a lone point shows as a dot
    return f'<path class="{kind}" d="{path}"/>'
