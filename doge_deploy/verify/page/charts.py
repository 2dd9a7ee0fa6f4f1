"""Pictures of a case as inline SVG, without script; colours are classes of the page's style."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from markupsafe import Markup

from doge_deploy.verify.positions import FIRST_BIN, Positions, Sample

WIDTH, HEIGHT = 360, 170
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 10, 28
"""Margins around the plotted area, in the picture's own units."""

_SVG = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>')
_LINE = Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>')
_TEXT = Markup('<text class="{}" x="{:.1f}" y="{:.1f}">{}</text>')
_DOT = Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="{}"><title>{}</title></circle>')
_BARE_DOT = Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="{}"/>')
_BAR = Markup('<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"><title>{}</title></rect>')


def error_by_position(positions: Positions, allowed: float) -> Markup:
    """The largest error of a logit at each position, beside what is allowed; a logarithmic scale.

    Positions with another likeliest token are rings; infinite errors stand at the top.
    """
    finite = [error for error in positions.error if 0 < error < math.inf]
    scale = _Decades([*finite, allowed])
    count = len(positions.error)
    parts = [scale.axis()]
    for number, error in enumerate(positions.error):
        same = positions.expected[number] == positions.found[number]
        name = "bad" if error > allowed else "mark"
        words = f"position {positions.index[number]}, call {positions.call[number]}: {error:.1e}"
        parts.append(
            _DOT.format(
                name if same else f"{name} ring", _along(number, count), scale.place(error), 2 if same else 4, words
            )
        )
    if allowed > 0:
        place = scale.place(allowed)
        parts.append(_LINE.format("limit", LEFT, place, WIDTH - RIGHT, place))
        parts.append(_TEXT.format("note", LEFT + 4, place - 3 if place > TOP + 12 else place + 11, "allowed"))
    parts += [_TEXT.format("tick", LEFT, HEIGHT - 14, 1), _TEXT.format("tick end", WIDTH - RIGHT, HEIGHT - 14, count)]
    parts.append(_TEXT.format("tick middle", (LEFT + WIDTH) / 2, HEIGHT - 2, "position that has logits"))
    return _picture("largest error of a logit at each position", parts)


def histogram(sample: Sample, allowed: float) -> Markup:
    """How many logits differ by how much, in half decades."""
    used = [number for number, count in enumerate(sample.histogram) if count]
    edges = [FIRST_BIN + number / 2 for number in used]
    limit = math.log10(allowed) if allowed > 0 else None
    low = min([*edges, *([limit] if limit is not None else [])], default=FIRST_BIN)
    high = max([edge + 0.5 for edge in edges] + ([limit] if limit is not None else []), default=low + 1)
    low, high = math.floor(low), max(math.ceil(high), math.floor(low) + 1)
    most = max(sample.histogram, default=0) or 1
    span = (WIDTH - LEFT - RIGHT) / (high - low)
    parts = [
        _TEXT.format("tick end", LEFT - 4, TOP + 8, _count(most)),
        _TEXT.format("tick end", LEFT - 4, HEIGHT - BOTTOM, 0),
    ]
    for number, edge in zip(used, edges, strict=True):
        share = sample.histogram[number] / most * (HEIGHT - TOP - BOTTOM)
        name = "bad" if limit is not None and edge >= limit else "mark"
        words = f"{sample.histogram[number]} from {10**edge:.1e} to {10 ** (edge + 0.5):.1e}"
        left = LEFT + (edge - low) * span
        parts.append(_BAR.format(name, left, HEIGHT - BOTTOM - share, max(span / 2 - 1, 0.5), share, words))
    parts.append(_LINE.format("axis", LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM))
    step = max(1, math.ceil((high - low) / 6))
    for decade in range(low, high + 1, step):
        anchor = "tick end" if decade == high else "tick middle"
        parts.append(_TEXT.format(anchor, LEFT + (decade - low) * span, HEIGHT - 14, f"1e{decade}"))
    if limit is not None:
        place = LEFT + (limit - low) * span
        parts.append(_LINE.format("limit", place, TOP, place, HEIGHT - BOTTOM))
        end = place > WIDTH - 70
        parts.append(_TEXT.format("note end" if end else "note", place + (-4 if end else 4), TOP + 9, "allowed"))
    words = f"|error| of {sample.compared:,} logits; {sample.equal:,} are equal"
    parts.append(_TEXT.format("tick middle", (LEFT + WIDTH) / 2, HEIGHT - 2, words))
    return _picture("histogram of the errors of logits", parts)


def scatter(sample: Sample) -> Markup:
    """Logits of the bundle over those of the reference; equal ones lie on the diagonal."""
    numbers = [*sample.expected, *sample.found] or [0.0, 1.0]
    low, high = min(numbers), max(numbers)
    if not low < high:
        low, high = low - 1, high + 1

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - low) / (high - low) * (WIDTH - LEFT - RIGHT)
        return across, HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [_LINE.format("axis", *place(low, low), *place(high, high))]
    far = 0.02 * (high - low)
    for x, y in dict.fromkeys(zip(sample.expected, sample.found, strict=True)):
        parts.append(_BARE_DOT.format("bad" if abs(x - y) > far else "mark", *place(x, y), 1.6))
    for value, name in ((low, "tick"), (high, "tick end")):
        parts.append(_TEXT.format(name, place(value, low)[0], HEIGHT - 14, f"{value:.3g}"))
    parts.append(_TEXT.format("tick end", LEFT - 4, TOP + 8, f"{high:.3g}"))
    parts.append(_TEXT.format("tick end", LEFT - 4, HEIGHT - BOTTOM, f"{low:.3g}"))
    parts.append(
        _TEXT.format("tick middle", (LEFT + WIDTH) / 2, HEIGHT - 2, "logit of the reference; upright: of the bundle")
    )
    return _picture("logits of the bundle over those of the reference", parts)


class _Decades:
    """A logarithmic scale from the bottom of a picture to its top."""

    def __init__(self, numbers: Sequence[float]) -> None:
        decades = [math.log10(number) for number in numbers if 0 < number < math.inf] or [0.0]
        self.low = math.floor(min(decades))
        self.high = max(math.ceil(max(decades)), self.low + 1)

    def place(self, number: float) -> float:
        if number == math.inf:
            return float(TOP)
        decade = math.log10(number) if number > 0 else self.low
        share = (min(max(decade, self.low), self.high) - self.low) / (self.high - self.low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def axis(self) -> Markup:
        step = max(1, math.ceil((self.high - self.low) / 5))
        lines = []
        for decade in range(self.low, self.high + 1, step):
            place = self.place(10.0**decade)
            lines.append(_LINE.format("grid", LEFT, place, WIDTH - RIGHT, place))
            lines.append(_TEXT.format("tick end", LEFT - 4, place + 3, f"1e{decade}"))
        return Markup().join(lines)


def _along(number: int, count: int) -> float:
    """Where the position `number` of `count` stands."""
    return LEFT + (WIDTH - LEFT - RIGHT) * ((number + 0.5) / count)


def _count(number: int) -> str:
    return f"{number / 1e6:.3g}M" if number >= 1e6 else f"{number / 1e3:.3g}k" if number >= 1e4 else str(number)


def _picture(title: str, parts: Iterable[Markup]) -> Markup:
    return _SVG.format(WIDTH, HEIGHT, title, Markup().join(parts))
