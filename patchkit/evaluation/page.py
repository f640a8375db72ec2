"""The page of a comparison: one file, opened from anywhere, that loads nothing from anywhere."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any

from patchkit.evaluation import gallery, plots, sweeps, table
from patchkit.evaluation.columns import columns
from patchkit.evaluation.request import Request
from patchkit.evaluation.store import Store
from patchkit.evaluation.table import colour

# Even if something foreign got into the page, it could load and send nothing.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_HOW = """Intervals are for 95 %: Wilson's for shares, Student's for means. Every sample has noise of its own. They
are for these prompts and new seeds; with one seed a prompt also for new prompts of this kind. Figures <em>against
dense</em> are paired, prompt by prompt and seed by seed; green and red mark those whose interval (for shares after
Agresti and Min) leaves out &ldquo;no difference&rdquo;. The best of each row is marked, which need not be more than
chance. Difference pictures show the mean difference to dense over time, four times as strong. PSNR, SSIM and
differences are of 8-bit pictures. Seconds are of whole calls, after a warm-up that does not count."""


def make(
    request: Request, store: Store, rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any], notes: Sequence[str]
) -> str:
    """The whole page as text."""
    names = list(summary["variants"])
    shown = gallery.make(rows, names, store)
    title = f"{', '.join(names)} on {summary['model']}"
    body = [
        _header(title, request, summary),
        "<h2>Figures</h2>",
        table.html(summary, request.world),
        _explanations(summary, request, notes),
        _plots(summary, request),
        "<h2>Results</h2>",
        _controls(request, names, rows, shown),
        f"<main>{shown.html}</main>",
        '<p id="none" class="soft hidden">Nothing is left by this choice.</p>',
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_asset('page.css')}</style></head><body>{''.join(body)}"
        f"<script>{_asset('page.js')}</script></body></html>\n"
    )


def _asset(name: str) -> str:
    return (resources.files("patchkit.evaluation") / name).read_text(encoding="utf-8")


def _header(title: str, request: Request, summary: Mapping[str, Any]) -> str:
    count, seeds = summary["prompts"], summary["seeds"]
    many = f"{count} prompt{'s' if count > 1 else ''} x {seeds} seed{'s' if seeds > 1 else ''}"
    inputs = ", ".join(f"{name} {_short(value)}" for name, value in summary["inputs"].items())
    versions = ", ".join(f"{name} {v}" for name, v in summary["versions"].items() if v)
    lines = [
        f"{many}, {len(summary['variants'])} variants, {escape(summary['pipeline'])} in {escape(summary['dtype'])}"
        f" on {escape(summary['device'])}; {escape(inputs)}",
        f"{escape(summary['date'])}; {escape(versions)}",
    ]
    recipes = "".join(_recipe(n, name, v) for n, (name, v) in enumerate(summary["variants"].items()) if v["recipes"])
    return (
        f"<header><h1>{escape(title)}</h1><p>{lines[0]}</p><p class='soft'>{lines[1]}</p>"
        f"<details><summary>recipes with all their options</summary>{recipes}</details></header>"
    )


def _recipe(number: int, name: str, variant: Mapping[str, Any]) -> str:
    options = json.dumps(variant["recipes"], indent=1, ensure_ascii=False, default=str)
    return f'<p class="chip {colour(number)}">{escape(name)}</p><pre>{escape(options)}</pre>'


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _explanations(summary: Mapping[str, Any], request: Request, notes: Sequence[str]) -> str:
    titles = {c.key: c.title for c in columns(request.world)}
    parts = [f"<p class='soft'>{_HOW}</p>"]
    if summary["memory_means"]:
        parts.append(f"<p class='soft'>Peak memory: {escape(summary['memory_means'])}.</p>")
    if any(c["group"] == "edit" for c in summary["columns"]):
        parts.append(f"<p class='soft'>Outside the mask: {escape(outside_meaning(request))}.</p>")
    missing = "".join(f"<li>{escape(titles[k])}: {escape(why)}</li>" for k, why in summary["missing"].items())
    notes_ = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return (
        f"<details><summary>how to read this</summary>{''.join(parts)}</details>"
        + (f"<details><summary>not measured</summary><ul class='soft'>{missing}</ul></details>" if missing else "")
        + (f"<details open><summary>notes</summary><ul class='soft'>{notes_}</ul></details>" if notes_ else "")
    )


def outside_meaning(request: Request) -> str:
    """What lies outside, and what it is compared with, in words."""
    masks = "the given masks" if any(c.mask for c in request.cases) else "the objects that the detectors see in both"
    reference = "the source of the edit" if any(c.source for c in request.cases) else "the unpatched result"
    return f"outside {masks}, against {reference}"


def _plots(summary: Mapping[str, Any], request: Request) -> str:
    seconds = {name: figure for name, _, figure in table.estimates(summary, "seconds")}
    found: list[tuple[str, str]] = []
    for key, title in (("right", "all right"), ("psnr", "PSNR to dense, dB"), ("ssim", "SSIM to dense")):
        points = [(name, n, seconds[name], figure) for name, n, figure in table.estimates(summary, key)]
        if points and not (key == "ssim" and any(k == "psnr" for k, _ in found)):
            found.append(
                (
                    key,
                    _plot(f"{title}, against seconds", plots.scatter(points, "seconds", title, percent=key == "right")),
                )
            )
    found += _curves(summary)
    groups = [
        (c.title, [(name, n, figure) for name, n, figure in table.estimates(summary, c.key)])
        for c in table.shown(summary, request.world)
        if c.group == "prompt" and c.average == "share"
    ]
    drawn = [text for _, text in found]
    if groups:
        drawn.insert(0, _plot("right, by attribute", plots.bars(groups, "right, by attribute")))
    return f'<h2>Plots</h2><div class="plots">{"".join(drawn)}</div>' if drawn else ""


def _curves(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Where the variants differ in one number: the figures over it, and the unpatched model's across."""
    found = sweeps.sweep(summary["variants"])
    if found is None:
        return []
    option, values = found
    drawn = []
    for key, title in (("right", "all right"), ("psnr", "PSNR to dense, dB")):
        known = table.estimates(summary, key)
        points = [(name, n, values[name], figure) for name, n, figure in known if name in values]
        across = next(((name, n, figure) for name, n, figure in known if name not in values), None)
        if len(points) >= sweeps.LEAST:
            svg = plots.curve(points, across, option, title, percent=key == "right")
            drawn.append((key, _plot(f"{title}, over {option}", svg)))
    return drawn


def _plot(title: str, svg: str) -> str:
    return f'<div class="plot"><h3>{escape(title)}</h3>{svg}</div>'


def _controls(request: Request, names: Sequence[str], rows: Sequence[Mapping[str, Any]], shown: gallery.Gallery) -> str:
    buttons = "".join(
        f'<button class="chip {colour(n)}" data-variant="{n}" aria-pressed="true">{escape(name)}</button>'
        for n, name in enumerate(names)
    )
    if any(row["verdict"] for row in rows):
        buttons += '<button id="wrong" aria-pressed="false">only where something is wrong</button>'
    if len(request.cases) > 1:
        options = "".join(f'<option value="{c.number}">{escape(c.prompt[:90])}</option>' for c in request.cases)
        buttons += f'<select id="prompt" aria-label="prompt"><option value="">all prompts</option>{options}</select>'
    few = ""
    if shown.shown < shown.total:
        few = (
            f"<p class='soft'>{shown.shown} of {shown.total} samples are shown, to keep the page small: the first seed "
            "of each prompt, then those where something is wrong. All are in the folder <code>frames</code>.</p>"
        )
    return f'<div class="controls">{buttons}</div>{few}'
