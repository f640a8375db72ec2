"""Plots as SVG text. Colours are classes ``v0``, ``v1`` ... of the page's style, so that they fit light and dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import Any

WIDTH = 420  # in pixels of the drawing, which is about a phone's width: text stays readable there
_LEFT, _RIGHT, _TOP, _BOTTOM = 42, 14, 12, 40
_ROW, _GAP, _NAME = 17, 12, 110
_HEIGHT = 260

Place = Callable[[float], float]
Estimate = Mapping[str, Any]  # value, low, high


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers inside [low, high], about ``count`` of them."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def scatter(
    points: Sequence[tuple[str, int, Estimate, Estimate]], x_title: str, y_title: str, percent: bool = False
) -> str:
    """Points with intervals both ways.

    Args:
        points: (name, number of its colour, x, y).
        x_title: under the axis.
        y_title: what stands over the plot.
        percent: whether y are shares.
    """
    xs, ys = _range([p[2] for p in points], from_zero=True), _range([p[3] for p in points], shares=percent)
    place_x, place_y, parts = _axes(xs, ys, percent)
    labels = _apart([place_y(p[3]["value"]) for p in points])
    for (name, number, x, y), label in zip(points, labels, strict=True):
        px, py = place_x(x["value"]), place_y(y["value"])
        title = escape(f"{name}: {_numbers(x)} {x_title}; {_numbers(y)} {y_title}")
        parts.append(f'<g class="v{number}"><title>{title}</title>')
        if x["low"] is not None:
            parts.append(_line(place_x(max(xs[0], x["low"])), py, place_x(min(xs[1], x["high"])), py, "whisker"))
        if y["low"] is not None:
            parts.append(_line(px, place_y(max(ys[0], y["low"])), px, place_y(min(ys[1], y["high"])), "whisker"))
        parts.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="5"/>')
        right = px < WIDTH * 0.6
        parts.append(_text(px + (9 if right else -9), label - 5, name, "start" if right else "end", "name") + "</g>")
    parts.append(_text((_LEFT + WIDTH) / 2, _HEIGHT - 6, x_title, "middle"))
    return _svg(_HEIGHT, parts, f"{y_title} against {x_title}")


def curve(
    points: Sequence[tuple[str, int, float, Estimate]],
    reference: tuple[str, int, Estimate] | None,
    x_title: str,
    y_title: str,
    percent: bool = False,
) -> str:
    """A figure over a number, with intervals, joined by a line.

    Args:
        points: (name, number of its colour, x, y).
        reference: (name, number of its colour, y) of what has no such number, drawn across; None = there is none.
        x_title: under the axis.
        y_title: what stands over the plot.
        percent: whether y are shares.
    """
    points = sorted(points, key=lambda p: p[2])
    known = [p[3] for p in points] + ([reference[2]] if reference else [])
    xs = _range([{"value": p[2], "low": None, "high": None} for p in points])
    ys = _range(known, shares=percent)
    place_x, place_y, parts = _axes(xs, ys, percent)
    if reference:
        name, number, y = reference
        py = place_y(y["value"])
        parts.append(f'<g class="v{number}"><title>{escape(f"{name}: {_numbers(y)} {y_title}")}</title>')
        parts.append(
            _line(_LEFT, py, WIDTH - _RIGHT, py, "whisker") + _text(WIDTH - _RIGHT, py - 5, name, "end", "name")
        )
        parts.append("</g>")
    places = [(place_x(x), place_y(y["value"])) for _, _, x, y in points]
    parts += [_line(*start, *end, "joint") for start, end in pairwise(places)]
    for (name, number, _, y), (px, py) in zip(points, places, strict=True):
        parts.append(f'<g class="v{number}"><title>{escape(f"{name}: {_numbers(y)} {y_title}")}</title>')
        if y["low"] is not None:
            parts.append(_line(px, place_y(max(ys[0], y["low"])), px, place_y(min(ys[1], y["high"])), "whisker"))
        parts.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="5"/></g>')
    parts.append(_text((_LEFT + WIDTH) / 2, _HEIGHT - 6, x_title, "middle"))
    return _svg(_HEIGHT, parts, f"{y_title} over {x_title}")


def _axes(xs: tuple[float, float], ys: tuple[float, float], percent: bool) -> tuple[Place, Place, list[str]]:
    """Where values of x and y lie, and the grid with its numbers."""

    def place_x(v: float) -> float:
        return _LEFT + (v - xs[0]) / (xs[1] - xs[0]) * (WIDTH - _LEFT - _RIGHT)

    def place_y(v: float) -> float:
        return _HEIGHT - _BOTTOM - (v - ys[0]) / (ys[1] - ys[0]) * (_HEIGHT - _BOTTOM - _TOP)

    parts = []
    for tick in ticks(*xs):
        parts.append(_line(place_x(tick), _TOP, place_x(tick), _HEIGHT - _BOTTOM, "grid"))
        parts.append(_text(place_x(tick), _HEIGHT - _BOTTOM + 15, f"{tick:g}", "middle"))
    for tick in ticks(*ys):
        parts.append(_line(_LEFT, place_y(tick), WIDTH - _RIGHT, place_y(tick), "grid"))
        parts.append(_text(_LEFT - 6, place_y(tick) + 4, f"{100 * tick:g}%" if percent else f"{tick:g}", "end"))
    return place_x, place_y, parts


def bars(groups: Sequence[tuple[str, Sequence[tuple[str, int, Estimate]]]], title: str) -> str:
    """Shares as bars from 0 to 100 %: for each group one bar a variant, with its interval."""
    parts, y = [], 4.0
    start, end = float(_NAME), WIDTH - 44.0
    place = lambda share: start + share * (end - start)  # noqa: E731
    for group, entries in groups:
        parts.append(_text(0, y + 12, group, "start", "group"))
        y += _ROW
        for name, number, share in entries:
            middle = y + _ROW / 2 - 1
            parts.append(f'<g class="v{number}"><title>{escape(f"{name}, {group}: {_numbers(share, 100)} %")}</title>')
            parts.append(_text(_NAME - 6, y + 12, name, "end"))
            parts.append(f'<rect class="track" x="{start}" y="{y + 2:.1f}" width="{end - start:.1f}" height="11"/>')
            width = max(0.0, share["value"]) * (end - start)
            parts.append(f'<rect x="{start}" y="{y + 2:.1f}" width="{width:.1f}" height="11"/>')
            if share["low"] is not None:
                parts.append(_line(place(share["low"]), middle, place(share["high"]), middle, "whisker over"))
            parts.append(_text(WIDTH, y + 12, f"{100 * share['value']:.0f} %", "end") + "</g>")
            y += _ROW
        y += _GAP
    return _svg(max(1.0, y), parts, title)


def _range(estimates: Sequence[Estimate], *, from_zero: bool = False, shares: bool = False) -> tuple[float, float]:
    """The axis that holds all values and intervals, with some room."""
    if shares:
        return -0.03, 1.03
    values = [v for e in estimates for v in (e["value"], e["low"], e["high"]) if v is not None]
    low, high = min(values), max(values)
    room = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    return (min(0.0, low) if from_zero else low - room), high + room


def _apart(places: Sequence[float], least: float = 13) -> list[float]:
    """Places of labels, moved down where they would lie on each other."""
    out = list(places)
    last = -math.inf
    for i in sorted(range(len(out)), key=lambda i: out[i]):
        out[i] = last = max(out[i], last + least)
    return out


def _numbers(estimate: Estimate, scale: float = 1) -> str:
    low, high = estimate["low"], estimate["high"]
    spread = "" if low is None or high is None else f" ({scale * low:.4g} to {scale * high:.4g})"
    return f"{scale * estimate['value']:.4g}{spread}"


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    mark = f' class="{kind}"' if kind else ""
    return f'<text{mark} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(height: float, parts: Sequence[str], title: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title, quote=True)}">'
        + "".join(parts)
        + "</svg>"
    )
