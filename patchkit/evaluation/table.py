"""The figures as a table: on the page with bars, intervals and what is best; in Markdown for texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from patchkit.evaluation.columns import Column, columns
from patchkit.evaluation.request import DENSE
from patchkit.zoo.worlds import World

COLOURS = 8  # classes v0 to v7 of the page's style
GROUPS = {
    "prompt": "as the prompt asks",
    "dense": "like the unpatched result",
    "edit": "outside the objects or mask",
    "time": "in time",
    "cost": "cost",
    "recipe": "recipe",
}
Summary = Mapping[str, Any]


def colour(number: int) -> str:
    """The class of the n-th variant; the unpatched model, which comes first, is gray."""
    return f"v{number if number < COLOURS else 1 + (number - 1) % (COLOURS - 1)}"


def shown(summary: Summary, world: World | None) -> list[Column]:
    """The columns that some variant has a figure for, in order, those of a group together."""
    used = {c["key"] for c in summary["columns"]}
    known = [c for c in columns(world) if c.key in used]
    return [c for group in GROUPS for c in known if c.group == group]


def spread(column: Column, figure: Mapping[str, Any]) -> str:
    """An interval as people read it."""
    if figure["low"] is None or figure["low"] == figure["high"]:
        return ""
    scale, digits = (100, 0) if column.average == "share" else (1, column.digits)
    unit = " %" if column.average == "share" else ""
    return f"{scale * figure['low']:.{digits}f} to {scale * figure['high']:.{digits}f}{unit}"


def against(column: Column, figure: Mapping[str, Any]) -> tuple[str, str]:
    """The figure against dense in words, and ``up``, ``down`` or nothing: better, worse, or within chance."""
    found = figure.get("against_dense")
    if not found:
        return "", ""
    value, low, high = found["value"], found["low"], found["high"]
    neutral = 1.0 if column.average == "ratio" else 0.0
    if value == neutral and (column.average == "share" or low == high):
        return "as dense", ""
    if column.average == "ratio":
        text = f"x {value:.2f} against dense"
    elif column.average == "share":
        text = f"{100 * value:+.0f} points against dense"
    else:
        text = f"{value:+.{column.digits}f} against dense"
    if low is None or high is None or not column.better or low <= neutral <= high:
        return text, ""
    return text, "up" if (low > neutral) == (column.better == "more") else "down"


def html(summary: Summary, world: World | None) -> str:
    """One row a figure, one column a variant: so it fits a phone."""
    variants = summary["variants"]
    head = "".join(
        f'<th scope="col"><span class="chip {colour(n)}">{escape(name)}</span></th>' for n, name in enumerate(variants)
    )
    rows, group = [], ""
    best = {c["key"]: c["best"] for c in summary["columns"]}
    for column in shown(summary, world):
        if column.group != group:
            group = column.group
            rows.append(f'<tr class="part"><th colspan="{len(variants) + 1}">{GROUPS[group]}</th></tr>')
        arrow = {"more": " ↑", "less": " ↓"}.get(column.better, "")
        cells = [_cell(column, summary, name, colour(n), name in best[column.key]) for n, name in enumerate(variants)]
        rows.append(
            f'<tr><th scope="row">{escape(column.title)}{arrow}<small>{escape(column.meaning)}</small></th>'
            + "".join(cells)
            + "</tr>"
        )
    return (
        f'<div class="scroll"><table><thead><tr><th></th>{head}</tr></thead><tbody>'
        + "".join(rows)
        + "</tbody></table></div>"
    )


def _cell(column: Column, summary: Summary, name: str, style: str, best: bool) -> str:
    figure = summary["variants"][name]["figures"].get(column.key)
    if figure is None:
        why = "reference" if name == DENSE and column.group in ("dense", "edit") else "–"
        return f'<td class="{style}"><span class="soft">{why}</span></td>'
    top = 1.0 if column.average == "share" else _largest(column, summary)
    text, direction = against(column, figure)
    more = f'<small class="{direction}">{escape(text)}</small>' if text else ""
    interval = spread(column, figure)
    few = "" if figure["n"] == summary["variants"][name]["samples"] else f" (n = {figure['n']})"
    return (
        f'<td class="{style}{" best" if best else ""}"><span class="num">{escape(column.text(figure["value"]))}</span>'
        f'<div class="bar"><i style="width:{_percent(figure["value"], top)}"></i>{_whisker(figure, top)}</div>'
        + (f"<small>{escape(interval + few)}</small>" if interval or few else "")
        + f"{more}</td>"
    )


def _largest(column: Column, summary: Summary) -> float:
    """The end of all intervals."""
    figures = (v["figures"].get(column.key) for v in summary["variants"].values())
    return max((max(f["value"], f["high"] or 0.0) for f in figures if f is not None), default=0.0)


def _percent(value: float, top: float) -> str:
    return f"{100 * min(1.0, max(0.0, value / top)) if top > 0 else 0.0:.1f}%"


def _whisker(figure: Mapping[str, Any], top: float) -> str:
    """The interval, over the bar."""
    if figure["low"] is None or top <= 0:
        return ""
    start = max(0.0, figure["low"])
    return f'<b style="left:{_percent(start, top)};width:{_percent(figure["high"] - start, top)}"></b>'


def markdown(summary: Summary, world: World | None) -> str:
    """One row a variant; the best of each column in bold."""
    used = shown(summary, world)
    best = {c["key"]: c["best"] for c in summary["columns"]}
    lines = [["", *(c.title for c in used)]]
    for name, variant in summary["variants"].items():
        cells = []
        for column in used:
            figure = variant["figures"].get(column.key)
            text = "" if figure is None else column.text(figure["value"])
            interval = "" if figure is None else spread(column, figure)
            text = f"**{text}**" if name in best[column.key] else text
            cells.append(f"{text} ({interval})" if interval else text)
        lines.append([name.replace("|", "\\|"), *cells])
    rule = ["---", *("--:" for _ in used)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (lines[0], rule, *lines[1:])) + "\n"


def brief(summary: Summary, world: World | None) -> tuple[list[str], list[list[str]]]:
    """Head and rows for a terminal: the main figures, each with its interval below."""
    wanted = ("right", "psnr", "ssim", "outside_psnr", "smoothness", "flicker", "seconds", "evaluations")
    used = [c for c in shown(summary, world) if c.key in wanted]
    rows = []
    for name, variant in summary["variants"].items():
        cells = [name]
        for column in used:
            figure = variant["figures"].get(column.key)
            cells.append("" if figure is None else f"{column.text(figure['value'])}\n{spread(column, figure)}".rstrip())
        found = variant["figures"].get("seconds", {}).get("against_dense")
        cells.append("" if not found else f"{1 / found['value']:.2f}" + _inverse(found))
        rows.append(cells)
    return ["", *(c.title for c in used), "speed-up"], rows


def _inverse(found: Mapping[str, Any]) -> str:
    return "" if found["low"] is None else f"\n{1 / found['high']:.2f} to {1 / found['low']:.2f}"


def estimates(summary: Summary, key: str) -> Sequence[tuple[str, int, Mapping[str, Any]]]:
    """(variant, number of its colour, figure) of those that have a figure."""
    return [
        (name, int(colour(n)[1:]), v["figures"][key])
        for n, (name, v) in enumerate(summary["variants"].items())
        if key in v["figures"]
    ]
